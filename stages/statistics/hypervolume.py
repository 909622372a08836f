"""One number for a whole trade-off: how much of the old task an arm keeps at every level of the new one it gets to.

The Pareto front of an arm and seed is over all its checkpoints at all learning rates of the grid. Its hypervolume is
the area of the points (new, old) that some checkpoint reaches in both accuracies, above the reference point (new-task
accuracy of the base, 0), as a share of the area that a model with 1 and 1 would have. So it needs no matching, and a
run that keeps its old skill and learns nothing has none. It takes the best of many noisy checkpoints, so it describes,
and is not tested.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from stages.statistics.contrasts import Plan
from stages.statistics.matchings import summary


def hypervolume(points: Float[np.ndarray, "n 2"], reference: tuple[float, float]) -> float:
    """Area that is dominated by points of which both coordinates are better when larger.

    Args:
        points: any number of them, dominated ones included.
        reference: the corner that the area is counted from; a point below it in either coordinate adds nothing.
    """
    area, highest = 0.0, reference[1]
    right_to_left = points[np.lexsort((-points[:, 1], -points[:, 0]))]
    edges = np.maximum(np.append(right_to_left[:, 0], reference[0]), reference[0])
    for (_, y), x, following in zip(right_to_left, edges[:-1], edges[1:], strict=True):
        highest = max(highest, float(y))
        area += (highest - reference[1]) * float(x - following)
    return area


def share_kept(curves: pd.DataFrame) -> float | None:
    """Hypervolume of one arm at one seed, as a share; None where the base leaves nothing to learn.

    Args:
        curves: learning_rate, step, new_accuracy, old_accuracy; step 0 is the base.
    """
    base = float(curves.loc[curves["step"] == 0, "new_accuracy"].mean())
    points = curves[["new_accuracy", "old_accuracy"]].to_numpy(dtype=np.float64)
    return hypervolume(points, (base, 0.0)) / (1 - base) if base < 1 else None


def compare_hypervolumes(curves: pd.DataFrame, plan: Plan, seeds: Sequence[str]) -> dict[str, Any]:
    """Shares by arm and their planned differences, over the seeds that count.

    Args:
        curves: of all arms: arm, seed and the columns of `share_kept`.
        plan: the contrasts.
        seeds: those whose base counts.
    """
    groups: Any = curves.groupby(["arm", "seed"], sort=False)
    found = {(str(arm), str(seed)): share_kept(run) for (arm, seed), run in groups}
    values = {key: share for key, share in found.items() if share is not None}
    arms = list(dict.fromkeys(arm for arm, _ in found))
    of_arm = {arm: {seed: values[arm, seed] for seed in seeds if (arm, seed) in values} for arm in arms}
    return {
        "reference": "(new-task accuracy of the base, 0)",
        "arms": {arm: summary(of_arm[arm], plan.confidence) for arm in arms},
        "contrasts": [
            {"name": name, "arm": arm, "reference": reference}
            | summary(
                {seed: v - of_arm[reference][seed] for seed, v in of_arm[arm].items() if seed in of_arm[reference]},
                plan.confidence,
            )
            for name, arm, reference in plan.named
        ],
    }
