"""How far a tuned model moved from its base: its answers on old and new prompts, and its weights."""

from pathlib import Path

from stages.pipeline.files import write_json
from stages.pipeline.stage import Cell, run


def main(cell: Cell) -> None:
    import torch

    from stages.learning.probes import last_logits
    from stages.measures.divergence import divergences
    from stages.measures.weights import per_head, per_matrix, whole
    from stages.pipeline.checkpoints import load_model
    from stages.pipeline.processes import in_processes
    from stages.tasks.examples import read_examples, read_prompts

    torch.set_num_threads(1)
    arm, seed = cell.item["arm"], cell.item["seed"]
    base, tuned = load_model(f"models/base/{seed}"), load_model(f"models/{arm}/{seed}")
    old = read_examples(Path("data/old/evaluation.parquet")).input_ids[: cell.params("drift.n_examples")]
    new_file = Path("data/new") / cell.params("new_task") / "evaluation.parquet"
    new = read_prompts(new_file).input_ids[: cell.params("drift.n_examples")]

    passes = [(model, prompts) for prompts in (old, new) for model in (base, tuned)]
    of_old_base, of_old_tuned, of_new_base, of_new_tuned = in_processes(
        lambda part: last_logits(*part), passes, cell.params("drift.processes")
    )
    norm, relative = whole(base, tuned)
    matrices, matrices_relative = per_matrix(base, tuned)
    heads = per_head(base, tuned, base.config.num_attention_heads, base.config.num_key_value_heads)
    record = {
        "arm": arm,
        "seed": int(seed),
        "old": divergences(of_old_base, of_old_tuned),
        "new": divergences(of_new_base, of_new_tuned),
        "weight_norm": norm,
        "weight_norm_relative": relative,
        "per_matrix": matrices,
        "per_matrix_relative": matrices_relative,
        "per_head": [list(row[:3]) for row in heads],
        "per_head_relative": [[*row[:2], row[3]] for row in heads],
    }
    write_json(f"reports/cells/drift/{arm}/{seed}.json", record)


if __name__ == "__main__":
    run("drift", ("arm", "seed"), main)
