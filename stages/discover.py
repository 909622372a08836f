"""Stage `discover`: find the circuit of the old task in one model by exact path patching.

    python -m stages discover <model> <seed>

reads  models/<model>/<seed>, data/old/discovery.parquet, data/old_task.json; of a base pruning.parquet, means.parquet
writes reports/cells/discover/<model>/<seed>/
         circuit.json   groups of heads; empty and not identifiable where the model is below `identifiable_accuracy`. Of
                        a base without the heads that it does without, which are beside them; of a tuned model, whose
                        heads judge nothing, as they were found
         scores.npz     for every scored hop "<hop>.score" and "<hop>.noise", and of the even and the odd examples alone
                        "<hop>.half0" and "<hop>.half1", [layers, heads]
         record.json    accuracy, settings, and every hop that was tried: its effect, what its heads feed (receiver,
                        component, and the receiving heads), the effects of the sets of heads that decide whether it
                        counts (`gate`), what its heads leave out (`selection`), which sign they have and what they read
                        (the semantic position they attend to most); the same of the heads with the other sign
                        (`against`); in bfloat16, how far the first hop ranks the heads as in float32 (`precision`); of
                        a base what its circuit does without (`idle`)
With `discover.tuned` false no circuit is searched for in tuned models, which is what takes longest where they are
large: an empty one is written.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Circuit
from stages.circuits.given_hops import HopSpec, given_hops
from stages.circuits.patcher import Patcher, Progress
from stages.circuits.precision import first_hop, rank_agreement
from stages.circuits.reading import Attention, mean_attention
from stages.circuits.rule import Rule
from stages.circuits.scores import Metric, Scores, measure_of
from stages.circuits.search import Found, Hop, search
from stages.circuits.spread import aligned, patcher_of
from stages.circuits.walker import Walker
from stages.measures.idle import without_idle
from stages.measures.prepared import Prepared
from stages.measures.prompts import in_tail_order, placed
from stages.pipeline.checkpoints import load_for_analysis
from stages.pipeline.files import read_json, replacing_directory, write_json, write_npz
from stages.pipeline.resources import Resources, resources
from stages.pipeline.stage import Cell, Invalid, run
from stages.tasks.examples import Examples, read_examples

AGREEING = 16  # examples whose first hop is asked in float32, too


def main(cell: Cell) -> None:
    settings, available = cell.params("discover"), resources()
    model, seed = cell.item["model"], cell.item["seed"]
    folder = Path("reports/cells/discover", model, seed)
    if model != "base" and not settings.tuned:
        _leave_out(cell, folder)
        return
    torch.set_num_threads(1)
    examples = read_examples("data/old/discovery.parquet")
    if settings.examples > len(examples):
        raise Invalid(f"discover.examples = {settings.examples}: data/old/discovery.parquet holds {len(examples)}")
    examples = examples.select(slice(0, settings.examples))

    metric = Metric(settings.score)
    few = examples.select(slice(0, AGREEING))
    rounded = available.dtype == "bfloat16"
    exact = _first_hop(_walker(cell, replace(available, dtype="float32")), few, metric, available) if rounded else None
    walker = _walker(cell, available)
    precision = None
    if exact is not None:
        precision = rank_agreement(
            exact, _first_hop(walker, few, metric, available), len(few), settings.minimum_head_effect
        )

    patcher = patcher_of(walker, examples, metric, available.share_mib, available.processes, _SenderBar)
    accuracy = float(patcher.correct.float().mean())
    if accuracy < settings.identifiable_accuracy:
        circuit, hops = Circuit((), walker.n_layers, walker.n_heads, identifiable=False), []
        attention = None
    else:
        attention = mean_attention(
            walker, examples.input_ids, examples.positions, available.share_mib, available.processes
        )
        task = read_json("data/old_task.json")
        circuit, hops = _find(patcher, metric, settings, examples.readout, task, f"discover {model}/{seed}")
    idle = None
    if model == "base" and circuit.groups:
        circuit, idle = _without_idle(cell, walker, circuit, available)

    with replacing_directory(folder) as folder:
        write_json(folder / "circuit.json", circuit.to_json())
        write_npz(folder / "scores.npz", **_arrays(hops))
        write_json(
            folder / "record.json",
            {
                "model": model,
                "seed": int(seed),
                "accuracy": accuracy,
                "clean": float(patcher.clean.mean()),
                "corrupt": float(patcher.corrupt.mean()),
                "identifiable": circuit.identifiable,
                "size": len(circuit.nodes),
                "idle": idle,
                "sizes": {group.name: len(group.heads) for group in circuit.groups},
                "nodes_per_position": _nodes_per_position(circuit),
                "hops": [_record(hop, attention) for hop in hops],
                **({} if precision is None else {"precision": precision}),
                "settings": settings.model_dump(mode="json") | available.stated(),
            },
        )


def _leave_out(cell: Cell, folder: Path) -> None:
    """What is written of a tuned model in which no circuit is searched for: none, of a model of that size."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(f"models/base/{cell.item['seed']}")
    with replacing_directory(folder) as folder:
        write_json(folder / "circuit.json", Circuit((), config.num_hidden_layers, config.num_attention_heads).to_json())
        write_npz(folder / "scores.npz")
        record = {"model": cell.item["model"], "seed": int(cell.item["seed"]), "searched": False, "hops": []}
        write_json(folder / "record.json", record)


def _walker(cell: Cell, available: Resources) -> Walker:
    return Walker(load_for_analysis(f"models/{cell.item['model']}/{cell.item['seed']}", available))


def _first_hop(walker: Walker, examples: Examples, metric: Metric, available: Resources) -> Scores:
    measure = measure_of(metric, examples.answer, examples.others)
    return first_hop(walker, aligned(examples), measure, metric, examples.readout, available.share_mib)


def _without_idle(cell: Cell, walker: Walker, circuit: Circuit, available: Resources) -> tuple[Circuit, dict[str, Any]]:
    """The circuit without the heads that the base does without (`measures.idle`), and entry `idle` of the record."""
    declared = replace(cell, stage="discover_base")
    score, clauses, tolerance = (declared.params(f"evaluate.{name}") for name in ("score", "clauses", "idle_tolerance"))
    prompts = read_examples("data/old/means.parquet").input_ids
    means = mean_outputs(walker, prompts, available.share_mib, available.processes)
    examples = in_tail_order(read_examples("data/old/pruning.parquet"), {node.position for node in circuit.nodes})
    model = Prepared(walker, means, placed(examples, examples.places(clauses)), available.share_mib)
    left = without_idle(
        lambda circuits: [entry[score] for entry in model.in_place(circuits).means()], circuit, tolerance
    )
    whole, without = model.in_place([frozenset(circuit.nodes), frozenset(left.circuit.nodes)]).means()
    stay = {group.name for group in left.circuit.groups}
    kept = frozenset(left.circuit.nodes)
    return left.circuit, {
        "score": score,
        "tolerance": tolerance,
        "examples": len(examples),
        "found": whole | {"size": len(circuit.nodes)},
        "left": without | {"size": len(kept)},
        "groups": {name: {"without": value, "idle": name not in stay} for name, value in left.groups.items()},
        "heads": [
            {"head": [node.layer, node.head], "position": node.position, "without": value, "idle": node not in kept}
            for node, value in sorted(left.heads.items())
        ],
    }


def _find(
    patcher: Patcher, metric: Metric, settings: Any, readout: str, task: Mapping[str, Any], title: str
) -> tuple[Circuit, list[Hop]]:
    """Run the chosen hops under a progress bar that names the last one and its strongest head.

    Args:
        readout: position at which the answer is read.
        task: data/old_task.json.
    """
    rule = Rule(
        settings.minimum_effect,
        settings.minimum_head_effect,
        settings.noise_z,
        settings.coverage,
        settings.merge_overlap,
        settings.max_depth,
        settings.screen,
        settings.most_senders,
    )
    with tqdm(desc=title, unit="hop", mininterval=0.5) as bar:

        def report(hop: Hop) -> None:
            strongest = "nothing above the noise"
            if hop.found and hop.scores is not None:
                parts = []
                for part in hop.found:
                    layer, head = part.heads[0]
                    value = float(hop.scores.score[layer, head])
                    what = "heads" if part.sign > 0 else "heads against the answer"
                    parts.append(f"{len(part.heads)} {what}, strongest {layer}.{head} ({value:.2f})")
                strongest = "; ".join(parts)
            bar.set_postfix_str(f"{hop.name}: {strongest}", refresh=False)
            bar.update()

        if settings.hops == "auto":
            return search(patcher, metric, rule, report, readout, task["root"], task["display"])
        top = settings.paper_top
        receivers, heads = (None, None) if top is None else (top.receivers, top.heads)
        specs = [HopSpec(*hop) for hop in task["paper_hops"]]
        return given_hops(patcher, metric, rule, specs, receivers, heads, report)


class _SenderBar:
    """A bar below the one of the hops, for questions that take more than a second: senders done, and the strongest of
    them so far."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=progress.total, desc="  senders", unit="set", leave=False, delay=1.0, mininterval=0.5, position=1
            )
        self._bar.set_postfix_str(f"strongest {progress.strongest[:40]}: {progress.effect:+.3f}", refresh=False)
        self._bar.update(int(progress.done) - self._bar.n)
        if progress.done >= progress.total:
            self._bar.close()
            self._bar = None


def _arrays(hops: list[Hop]) -> dict[str, np.ndarray]:
    arrays = {}
    for hop in hops:
        if hop.scores is not None:
            arrays[f"{hop.name}.score"] = hop.scores.score.numpy()
            arrays[f"{hop.name}.noise"] = hop.scores.noise.numpy()
        if hop.halves is not None:
            arrays |= {f"{hop.name}.half{number}": half.numpy() for number, half in enumerate(hop.halves)}
    return arrays


def _nodes_per_position(circuit: Circuit) -> dict[str, int]:
    positions = [node.position for node in circuit.nodes]
    return {position: positions.count(position) for position in sorted(set(positions))}


def _record(hop: Hop, attention: Attention | None) -> dict[str, Any]:
    selection = hop.selection
    return {
        "name": hop.name,
        "position": hop.position,
        "receiver": hop.receiver,
        "component": None if hop.component is None else str(hop.component),
        "feeds": [list(head) for head in hop.feeds],
        "joint": float(hop.joint.score),
        "joint_noise": float(hop.joint.noise),
        "gate": None if hop.gate is None else {"score": hop.gate.score.tolist(), "noise": hop.gate.noise.tolist()},
        "split_half": hop.split_half,
        "selection": None
        if selection is None
        else {
            "tolerance": selection.tolerance,
            "left": list(selection.left),
            "missing": list(selection.missing),
            "shortfall": selection.shortfall,
        },
        "sign": hop.sign,
        **_senders(hop, hop.of(hop.sign), attention),
        "against": None if hop.of(-hop.sign) is None else _senders(hop, hop.of(-hop.sign), attention),
    }


def _senders(hop: Hop, found: Found | None, attention: Attention | None) -> dict[str, Any]:
    reads = None
    if found is not None and attention is not None:
        position, share = attention.most_read(hop.position, found.heads)
        reads = {"position": position, "share": share}
    selected, group = (0, None) if found is None else (len(found.heads), found.group)
    return {"selected": selected, "group": group, "reads": reads}


if __name__ == "__main__":
    run("discover", ("model", "seed"), main)
