"""Stage `drift`: how far a tuned model moved from its base, and how much of the old circuit's edges it still has.

    python -m stages drift <arm> <seed>

reads  models/base/<seed>, models/<arm>/<seed>, reports/cells/discover/base/<seed>, data/old, data/new/<new task>
writes reports/cells/drift/<arm>/<seed>.json
         old, new      divergences of the answers; of answers of several tokens along the canonical one
         weight_norm*, per_matrix*, per_head*
         cka           of the residual stream at the last token of old prompts
         relearning    steps on a few old examples until the old task is back, and the scores before and after them
         retraced      the hops of the base measured again in the tuned model: its scores on the discovery split, the
                       effect of all heads of each hop, similarity, overlap and edges; these are null, with a reason,
                       where the circuit of base or tuned model is not identifiable
       reports/cells/drift/<arm>/<seed>.npz
         for every scored hop of the base "<hop>.half0" and "<hop>.half1": scores in the tuned model of the even and of
         the odd examples, [layers, heads]
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.pipeline.files import read_json, write_json, write_npz
from stages.pipeline.resources import Resources, resources
from stages.pipeline.stage import Cell, run

if TYPE_CHECKING:
    import numpy as np

    from stages.circuits.walker import Walker


def main(cell: Cell) -> None:
    import torch

    from stages.circuits.walker import Walker
    from stages.learning.probes import canonical_logits, last_logits
    from stages.measures.alignment import last_streams, layer_cka
    from stages.measures.divergence import divergences
    from stages.measures.weights import per_head, per_matrix, whole
    from stages.pipeline.checkpoints import load_for_analysis, load_model
    from stages.pipeline.processes import in_processes
    from stages.tasks.examples import read_examples, read_prompts

    torch.set_num_threads(1)
    arm, seed, settings, available = cell.item["arm"], cell.item["seed"], cell.params("drift"), resources()
    folders = f"models/base/{seed}", f"models/{arm}/{seed}"
    base, tuned = (load_model(folder, device=available.device) for folder in folders)  # in float32
    old = read_examples(Path("data/old/evaluation.parquet")).input_ids[: settings.n_examples]
    new_file = Path("data/new") / cell.params("new_task") / "evaluation.parquet"
    new = read_prompts(new_file).select(slice(0, settings.n_examples))

    if available.dtype == "float32":
        walkers = Walker(base), Walker(tuned)
    else:
        walkers = tuple(Walker(load_for_analysis(folder, available)) for folder in folders)
    work = [
        *(partial(last_logits, model, old) for model in (base, tuned)),
        *(partial(canonical_logits, model, new) for model in (base, tuned)),
        *(partial(last_streams, walker, old) for walker in walkers),
        partial(_relearn, base, tuned, settings.relearning),
    ]
    of_old_base, of_old_tuned, of_new_base, of_new_tuned, base_streams, tuned_streams, relearning = in_processes(
        lambda part: part(), work, available.processes
    )
    retraced, arrays = _retraced(walkers[1], settings, seed, available)
    norm, relative = whole(base, tuned)
    matrices, matrices_relative = per_matrix(base, tuned)
    heads = per_head(base, tuned)
    stated = available.stated()
    record = {
        "arm": arm,
        "seed": int(seed),
        **({"settings": stated} if stated else {}),
        "old": divergences(of_old_base, of_old_tuned),
        "new": divergences(of_new_base, of_new_tuned, len(new)),
        "weight_norm": norm,
        "weight_norm_relative": relative,
        "per_matrix": matrices,
        "per_matrix_relative": matrices_relative,
        "per_head": [list(row[:3]) for row in heads],
        "per_head_relative": [[*row[:2], row[3]] for row in heads],
        "cka": layer_cka(base_streams, tuned_streams),
        "relearning": relearning,
        "retraced": retraced,
    }
    write_json(f"reports/cells/drift/{arm}/{seed}.json", record)
    write_npz(f"reports/cells/drift/{arm}/{seed}.npz", **arrays)


def _relearn(base: Any, tuned: Any, settings: Any) -> dict[str, Any]:
    from stages.measures.relearning import relearn, whole_scores
    from stages.tasks.examples import read_examples

    examples = read_examples("data/old/relearning.parquet").select(slice(0, settings.examples))
    probe = read_examples("data/old/selection.parquet").select(slice(0, settings.probe_examples))
    found = relearn(
        tuned,
        examples,
        probe,
        settings.share * whole_scores(base, probe)["accuracy"],
        settings.most_steps,
        settings.learning_rate,
        settings.betas,
        settings.weight_decay,
    )
    return {
        "target": found.target,
        "accuracies": found.accuracies,
        "steps": found.steps,
        "regained": found.steps is not None,
        "most_steps": settings.most_steps,
        "before": found.before,
        "after": found.after,
    }


def _retraced(
    walker: "Walker", settings: Any, seed: str, available: Resources
) -> "tuple[dict[str, Any], dict[str, np.ndarray]]":
    """The entry of the record and the scores; the settings of the base's discovery hold for the tuned model, too."""
    import numpy as np

    from stages.circuits.scores import Metric
    from stages.circuits.spread import patcher_of
    from stages.measures.edge_scores import EdgeScores
    from stages.measures.edges import edge_changes
    from stages.measures.overlap import overlaps
    from stages.measures.relearning import whole_scores
    from stages.measures.retracing import retrace
    from stages.measures.scores import ENDINGS
    from stages.measures.similarity import similarity
    from stages.tasks.examples import read_examples

    folder = Path("reports/cells/discover/base", seed)
    discovered = read_json(folder / "record.json")
    found = discovered["settings"]
    with np.load(folder / "scores.npz") as arrays:
        base = EdgeScores.of(discovered["hops"], dict(arrays))
    nothing = {"joint": None, "similarity": None, "overlap": None, "edges": None}
    if base is None:
        reason = "no circuit is identifiable in the base"
        return dict.fromkeys(ENDINGS) | {"identifiable": False, "reason": reason} | nothing, {}
    examples = read_examples("data/old/discovery.parquet").select(slice(0, found["examples"]))
    metric = Metric(found["score"])
    whole: dict[str, Any] = dict(whole_scores(walker.model, examples))
    if whole["accuracy"] < found["identifiable_accuracy"]:
        reason = f"old-task accuracy {whole['accuracy']:.3f} is below {found['identifiable_accuracy']:g}"
        return whole | {"identifiable": False, "reason": reason} | nothing, {}
    patcher = patcher_of(walker, examples, metric, available.share_mib, available.processes)
    scores, joint = retrace(patcher, metric, discovered["hops"], base.hops)
    tuned = EdgeScores.of(discovered["hops"], scores)
    assert tuned is not None  # the same hops are scored
    before = {hop["name"]: hop["joint"] for hop in discovered["hops"]}
    return whole | {
        "identifiable": True,
        "reason": None,
        "joint": {hop: {"base": before[hop], "tuned": value} for hop, value in joint.items()},
        "similarity": similarity(base, tuned, settings.permutations, [settings.seed, int(seed)]),
        "overlap": overlaps(base, tuned, discovered["size"]),
        "edges": edge_changes(base, tuned, settings.strong_edge),
    }, scores


if __name__ == "__main__":
    run("drift", ("arm", "seed"), main)
