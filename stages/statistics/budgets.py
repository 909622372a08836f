"""What each arm's training took: equal in gradient steps by design, not in answers or tokens."""

from typing import Any

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
        if rows["gradient_steps"].max() == 0:
            continue
        entry: dict[str, Any] = {"arm": arm}
        picked = rows[rows["picked"]]
        for name, column in COUNTS.items():
            entry[name] = int(rows[column].max())
            entry[f"{name}_to_level"] = float(picked[column].mean()) if len(picked) else None
        to_level = entry["answers_to_level"]
        entry["tokens"] = entry["answers"] * (prompt_tokens + 1)
        entry["tokens_to_level"] = None if to_level is None else to_level * (prompt_tokens + 1)
        found.append(entry)
    return found
