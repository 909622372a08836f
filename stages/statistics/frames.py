"""Tidy tables for the figures: one row per mark, made from the records."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.pipeline.stage import Invalid
from stages.statistics.cells import BASE, Cells

WHOLE = "circuit"  # stands for all groups together among the groups of a transplant


def seed_values(cells: Cells, measures: tuple[str, ...], left_out: Collection[str]) -> pd.DataFrame:
    """model, seed, compared, and one column for each measure; empty where undefined.

    Args:
        cells: all records.
        measures: columns.
        left_out: seeds that no contrast counts, because of their base.
    """
    rows = [
        {"model": model, "seed": seed, "compared": _counts(cells, model, seed) and seed not in left_out}
        | {measure: cells.value(measure, model, seed) for measure in measures}
        for model in cells.models
        for seed in cells.seeds
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(measures, "float64"))


def training_curves(root: Path, cells: Cells, learning_rates: Sequence[float]) -> pd.DataFrame:
    """The curves of all arms at these learning rates; `picked` marks the checkpoint that stage `match` took.

    Raises:
        Invalid: a curve is missing.
    """
    parts = []
    for arm in cells.arms:
        for seed in cells.seeds:
            files = [root / "finetune" / arm / seed / f"{rate}.csv" for rate in learning_rates]
            # those of an arm without gradient steps, which has no rate, are the same
            frame = pd.concat(map(_csv, files)).drop_duplicates(ignore_index=True)
            record = cells.record("match", arm, seed)
            frame["arm"], frame["seed"] = arm, seed
            frame["picked"] = False
            if record.get("step") is not None:
                same_rate = np.isclose(frame["learning_rate"], record["learning_rate"], rtol=1e-6)
                frame["picked"] = same_rate & (frame["step"] == record["step"]) & cells.reached(arm, seed)
            parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def base_curves(root: Path, cells: Cells) -> pd.DataFrame:
    """The training curves of the bases, with their seed.

    Raises:
        Invalid: a curve is missing.
    """
    parts = []
    for seed in cells.seeds:
        frame = _csv(root / "pretrain" / seed / "curve.csv")
        frame["seed"] = seed
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def matched_points(cells: Cells) -> pd.DataFrame:
    """arm, seed, reached, learning_rate and the accuracies of the matched model on the selection split."""
    rows = [
        {"arm": arm, "seed": seed}
        | {
            key: cells.record("match", arm, seed).get(key)
            for key in (
                "reached",
                "learning_rate",
                "new_accuracy_selection",
                "old_accuracy_selection",
                "weight_norm",
            )
        }
        for arm in cells.arms
        for seed in cells.seeds
    ]
    return pd.DataFrame(rows)


def transplants(cells: Cells) -> pd.DataFrame:
    """Accuracy of a model with another's head outputs, by direction, group, arm and seed.

    `receiver` is the accuracy of the receiving model alone, `donor` that of the giving one, `random` that
    with as many random heads transplanted.
    """
    rows = []
    for arm in cells.arms:
        for seed in cells.seeds:
            record = cells.record("cmap", arm, seed)
            for direction in ("tuned_to_base", "base_to_tuned"):
                control = ((record.get("random") or {}).get(direction)) or {}
                alone = (record["base_accuracy"], record["tuned_accuracy"])
                receiver, donor = alone if direction == "tuned_to_base" else alone[::-1]
                for group, scores in (record.get(direction) or {}).items():
                    rows.append(
                        {
                            "direction": direction,
                            "group": group,
                            "model": arm,
                            "seed": seed,
                            "reached": cells.reached(arm, seed),
                            "accuracy": scores["accuracy"],
                            "receiver": receiver,
                            "donor": donor,
                            "random": (control.get(group) or {}).get("accuracy"),
                        }
                    )
    columns = ["direction", "group", "model", "seed", "reached", "accuracy", "receiver", "donor", "random"]
    return pd.DataFrame(rows, columns=columns).astype({"random": "float64"})


def desiderata(cells: Cells) -> pd.DataFrame:
    """What each group carries in each model: accuracy with its selected heads swapped, or none (`floor`)."""
    rows = []
    for model in cells.models:
        for seed in cells.seeds:
            for group, found in (cells.record("dcm", model, seed).get("groups") or {}).items():
                for name, scores in found.items():
                    rows.append(
                        {
                            "model": model,
                            "seed": seed,
                            "reached": model == BASE or cells.reached(model, seed),
                            "group": group,
                            "desideratum": name,
                            "accuracy": scores["accuracy"],
                            "floor": scores["floor"],
                            "random": scores.get("random_accuracy"),
                        }
                    )
    columns = ["model", "seed", "reached", "group", "desideratum", "accuracy", "floor", "random"]
    return pd.DataFrame(rows, columns=columns).astype({"random": "float64"})


def circuits_and_nulls(cells: Cells) -> pd.DataFrame:
    """Old-task accuracy by model, seed and kind: "whole model", "base circuit", "own circuit", or "random" (many rows a
    cell). Not faithfulness, which says nothing where the whole model answers next to nothing."""
    rows = []
    for model in cells.models:
        for seed in cells.seeds:
            record = cells.record("evaluate", model, seed)
            reached = model == BASE or cells.reached(model, seed)
            whole = record.get("old_accuracy")
            values = [("whole model", whole), ("base circuit", (record.get("circuit") or {}).get("accuracy"))]
            if model != BASE:
                values.append(("own circuit", (record.get("own_circuit") or {}).get("accuracy")))
            shares = (record.get("random") or {}).get("faithfulness") or []  # undefined where the model answers nothing
            values += [("random", share * whole) for share in shares if share is not None]
            rows += [
                {"model": model, "seed": seed, "reached": reached, "kind": kind, "accuracy": value}
                for kind, value in values
            ]
    columns = ["model", "seed", "reached", "kind", "accuracy"]
    return pd.DataFrame(rows, columns=columns).astype({"accuracy": "float64"})


def size_curves(cells: Cells) -> pd.DataFrame:
    """Share of the model's score that the k strongest nodes of the base keep, by accuracy and by logit difference:
    model, seed, reached, size, share, share_ld; one row for each size, and none where there is no circuit."""
    rows = []
    for model in cells.models:
        for seed in cells.seeds:
            curve = _inspection(cells, model, seed, "size_curve")
            shares = [curve.get(key) or [None] * len(curve.get("sizes") or ()) for key in ("share", "share_ld")]
            rows += [
                {"model": model, "seed": seed, "reached": _counts(cells, model, seed), "size": size}
                | {"share": share, "share_ld": share_ld}
                for size, share, share_ld in zip(curve.get("sizes") or (), *shares, strict=True)
            ]
    columns = ["model", "seed", "reached", "size", "share", "share_ld"]
    return pd.DataFrame(rows, columns=columns).astype({"share": "float64", "share_ld": "float64"})


def knockout_curves(cells: Cells) -> pd.DataFrame:
    """Accuracy by central layer when `query` cannot see `key`: model, seed, reached, query, key, layer, accuracy, and
    `everywhere`, the accuracy when it cannot in any layer."""
    rows = []
    for model in cells.models:
        for seed in cells.seeds:
            for path, found in (_inspection(cells, model, seed, "knockout").get("paths") or {}).items():
                query, key = path.split(">")
                rows += [
                    {"model": model, "seed": seed, "reached": _counts(cells, model, seed), "query": query, "key": key}
                    | {"layer": layer, "accuracy": accuracy, "everywhere": found["everywhere"]}
                    for layer, accuracy in enumerate(found["accuracy"])
                ]
    columns = ["model", "seed", "reached", "query", "key", "layer", "accuracy", "everywhere"]
    return pd.DataFrame(rows, columns=columns).astype({"accuracy": "float64", "everywhere": "float64"})


def _inspection(cells: Cells, model: str, seed: str, part: str) -> dict[str, Any]:
    return (cells.record("evaluate", model, seed).get("inspection") or {}).get(part) or {}


def _counts(cells: Cells, model: str, seed: str) -> bool:
    return model == BASE or cells.reached(model, seed)


def circuit_heads(cells: Cells, seed: str) -> pd.DataFrame:
    """The heads of the base's circuit, one row per group membership: group, position, layer, head, score, sign."""
    rows = [
        {"layer": layer, "head": head, "score": score}
        | {"group": group["name"], "position": group["position"], "sign": group.get("sign", 1)}
        for group in _groups(cells, seed)
        for (layer, head), score in zip(group["heads"], group["scores"] or [1.0] * len(group["heads"]), strict=True)
    ]
    return pd.DataFrame(rows, columns=["group", "position", "layer", "head", "score", "sign"])


def circuit_paths(cells: Cells, seed: str) -> pd.DataFrame:
    """The hops of the base's circuit: group, receiver (a group, or "logits"), component."""
    rows = [{key: group[of] for key, of in _PATH} for group in _groups(cells, seed)]
    return pd.DataFrame(rows, columns=[key for key, _ in _PATH])


_PATH = (("group", "name"), ("receiver", "receiver"), ("component", "component"))


def head_changes(cells: Cells, seed: str) -> pd.DataFrame:
    """Weight change of every head of every arm, relative where recorded: arm, layer, head, change."""
    rows = []
    for arm in cells.arms:
        record = cells.record("drift", arm, seed)
        for layer, head, change in record.get("per_head_relative") or record["per_head"]:
            rows.append({"arm": arm, "layer": int(layer), "head": int(head), "change": change})
    return pd.DataFrame(rows, columns=["arm", "layer", "head", "change"])


def group_order(cells: Cells) -> dict[str, int]:
    """Group names -> number of bases that have the group; most frequent first, then as discovered."""
    count: dict[str, int] = {}
    for seed in cells.seeds:
        for group in _groups(cells, seed):
            count[group["name"]] = count.get(group["name"], 0) + 1
    return dict(sorted(count.items(), key=lambda item: -item[1]))


def _groups(cells: Cells, seed: str) -> list[dict[str, Any]]:
    circuit = cells.record("circuit", BASE, seed)
    return circuit["groups"] if circuit["identifiable"] else []


def _csv(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise Invalid(f"{path} is missing: seeds and arms in params.yaml ask for it; run dvc repro")
    return pd.read_csv(path, dtype={"seed": str})
