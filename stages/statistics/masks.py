"""Do the same heads of a group carry a value before and after tuning? Masks of base and tuned model at one size.

For every group and desideratum that the base's group carries (a mask of k of its n heads, 0 < k < n, moves at least
half of the answers), the k strongest heads of the tuned model's mask are compared with those of the base:

- share: of the base's k heads, how many are among the tuned model's;
- chance: what k random heads of the group have, k / n;
- ceiling: the share between two masks of the base itself, trained on different pairs.
"""

from typing import Any

import numpy as np

from stages.statistics.cells import BASE, Cells

LEAST_CARRIED = 0.5  # accuracy of the base's own mask from which on it is compared


def table_of_masks(cells: Cells) -> list[dict[str, Any]]:
    """Means over all masks of all seeds at which an arm reached the level; `masks` is their number."""
    found = []
    for arm in cells.arms:
        rows = [row for seed in cells.seeds if cells.reached(arm, seed) for row in _of_seed(cells, arm, seed)]
        means = np.mean(rows, axis=0).tolist() if rows else [None] * 3
        found.append({"arm": arm, "masks": len(rows)} | dict(zip(("share", "chance", "ceiling"), means, strict=True)))
    return found


def _of_seed(cells: Cells, arm: str, seed: str) -> list[tuple[float, float, float]]:
    base, tuned = cells.record("dcm", BASE, seed), cells.record("dcm", arm, seed)
    rows = []
    for group, scores in (base.get("groups") or {}).items():
        for name, score in scores.items():
            k, n = len(score["selected"]), score["size"]
            if not 0 < k < n or score["accuracy"] < LEAST_CARRIED:
                continue
            orders = (score["order"], tuned["groups"][group][name]["order"], base["again"][group][name])
            heads, theirs, again = ({tuple(head) for head in order[:k]} for order in orders)
            rows.append((len(heads & theirs) / k, k / n, len(heads & again) / k))
    return rows
