"""The benchmark's record as a Markdown table."""

from typing import Any


def table(record: dict[str, Any]) -> str:
    """One line a hop, and the sum of each model; then what was measured once for each model."""
    machine = record["machine"]
    lines = [
        "| model | hop | naive, s | ours, s | times faster | token-layers, naive / ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model in record["models"]:
        for row in [*model["hops"], model["total"]]:
            total = row is model["total"]
            cells = [
                f"{model['model']}, {model['examples']} examples" if row is model["hops"][0] else "",
                row["hop"],
                _seconds(row["naive"]["seconds"]),
                _seconds(row["ours"]["seconds"]),
                f"{row['times_faster']['median']:.3g}",
                f"{row['token_layer_ratio']:.3g}",
            ]
            lines.append("| " + " | ".join(f"**{cell}**" if total and cell else cell for cell in cells) + " |")
    lines += ["", "| model | first three hops | peak memory, ours (limit) / naive | largest difference in float64 |"]
    lines.append("| --- | --- | --- | --- |")
    for model in record["models"]:
        memory, check = model["memory"], model["max_difference_float64"]
        peaks = f"{memory['ours_mib']:.0f} ({memory['budget_mib']:.0f}) / {memory['naive_mib']:.0f} MiB"
        lines.append(
            f"| {model['model']} | {model['first_three_hops']['times_faster']['median']:.3g} times faster "
            f"| {peaks if 'ours_mib' in memory else 'not measured'} "
            f"| {check['difference']:.1e} (effects up to {check['largest_effect']:.2g}; {check['layers']} layers, "
            f"{check['senders']} senders) |"
        )
    sampled = [model for model in record["models"] if model["senders_timed_naive"] < model["senders"]]
    note = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}, "
        f"{record['models'][0]['dtype']}; medians of "
        f"{', '.join(str(model['repetitions']) for model in record['models'])} repetitions, both sides in turn "
        "(ranges: `reports/benchmarks.json`). Random weights but for SmolLM2; naive runs the senders of all layers."
    )
    for model in sampled:
        note += (
            f" On {model['model']} it was timed with {model['senders_timed_naive']} of {model['senders']} senders, "
            "some in every layer, and scaled: each costs it the same passes."
        )
    if record.get("real") is not None:
        lines += ["", *_real(record["real"])]
    return "\n".join([*lines, "", note])


def _real(real: dict[str, Any]) -> list[str]:
    """The table of the part on a real model, and a line on its memory."""
    hop, search, memory = real["hop"], real["search"], real["memory"]
    lines = [
        f"| {real['model']}, {real['pairs']} IOI pairs, {real['tokens']} tokens | naive, s | ours, s | times faster |",
        "| --- | --- | --- | --- |",
        f"| clean and corrupt runs | {real['runs']['naive']:.3g} | {real['runs']['ours']:.3g} | |",
        f"| all {hop['heads']} heads -> logits | {hop['naive']:.3g} | {hop['ours']:.3g} | {hop['times_faster']:.3g} |",
        f"| search ({search['nodes']} nodes), the sets that ours patches | {search['naive']:.3g} "
        f"| {search['seconds']:.3g} | {search['times_faster']:.3g} |",
        f"| the same with every head of every hop patched | {search['naive_every_head']:.3g} "
        f"| {search['seconds']:.3g} | {search['naive_every_head'] / search['seconds']:.3g} |",
        "",
    ]
    note = (
        f"Ours under a limit of {real['limit_mib']:.0f} MiB. "
        f"Naive was timed with {hop['naive_senders_timed']} senders and scaled, the search's "
        f"{search['sets_to_logits']} sets of senders by one pass and {search['sets_to_inputs']} by two each, and "
        f"{search['estimated_heads']} more where every head is patched that ours estimates; largest "
        f"difference in float32 {hop['largest_difference']:.1e} (effects up to {hop['largest_effect']:.2g})."
    )
    if "peak_mib" in memory:
        note += (
            f" Search, and the circuit and {memory['random_circuits']} random ones in place, on {memory['pairs']} "
            f"pairs under a limit of {memory['limit_mib']:.0f} MiB: peak of the process {memory['peak_mib']:.0f} MiB, "
            f"{memory['growth_mib']:.0f} beyond the loaded model; {memory['search_seconds']:.3g} + "
            f"{memory['evaluation_seconds']:.3g} s."
        )
    return [*lines, note]


def _seconds(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.3g}"
