"""What each arm's training took: equal in gradient steps by design, not in answers or tokens."""

from typing import Any

import numpy as np
import pandas as pd

COUNTS = {"steps": "gradient_steps", "answers": "completions"}


def table_of_budgets(curves: pd.DataFrame, prompt_tokens: int) -> list[dict[str, Any]]:
    """The budget of every arm that trains, of a whole run and up to the picked checkpoints.

    Args:
        curves: of all arms (`frames.training_curves`): arm, gradient_steps, completions, picked.
        prompt_tokens: of a prompt; every answer is one token.

    Returns:
        for each arm, gradient steps, answers that were learned from (the rollouts of RL arms) and tokens, each answer
        counted with a prompt of its own: of a whole run, and the means over the picked checkpoints of all seeds.
    """
    found = []
    for arm, rows in curves.groupby("arm", sort=False):
        counts = {name: np.asarray(rows[column], dtype=np.int64) for name, column in COUNTS.items()}
        picked = np.asarray(rows["picked"], dtype=bool)
        if counts["steps"].max() == 0:
            continue
        entry: dict[str, Any] = {"arm": arm}
        for name, values in counts.items():
            entry[name] = int(values.max())
            entry[f"{name}_to_level"] = float(values[picked].mean()) if picked.any() else None
        to_level = entry["answers_to_level"]
        entry["tokens"] = entry["answers"] * (prompt_tokens + 1)
        entry["tokens_to_level"] = None if to_level is None else to_level * (prompt_tokens + 1)
        found.append(entry)
    return found
