"""Cross-model activation patching: whose head outputs do the old task's work in whose model?"""

import pandas as pd
from matplotlib.figure import Figure

from stages.figures.bars import bar_handles, group_labels, grouped_bars
from stages.figures.style import empty, legend_below, model_handles, plt, reference_line, styled

_DIRECTIONS = (
    ("tuned_to_base", "Tuned head outputs in the base: is the tuned head still good for the old task?"),
    ("base_to_tuned", "Base head outputs in the tuned model: does that bring the old task back?"),
)


def draw(
    frame: pd.DataFrame, groups: list[str], counts: dict[str, int], n_seeds: int, base_old: float | None
) -> Figure:
    """Two panels, one for each direction.

    Args:
        frame: direction, group, model, seed, accuracy, receiver, random.
        groups: groups to show, in order.
        counts: group -> number of bases that have it.
        n_seeds: number of bases.
        base_old: old-task accuracy of the base, the ceiling.
    """
    with styled():
        if frame.empty:
            figure, axes = plt.subplots(figsize=(11, 1.5), layout="constrained")
            empty(
                axes,
                "Nothing to show: no identifiable circuit, or no arm reached the matching level.",
            )
            return figure
        figure, panels = plt.subplots(2, 1, figsize=(11, 7.6), sharex=True, sharey=True, layout="constrained")
        models = list(dict.fromkeys(frame["model"]))
        for axes, (direction, title) in zip(panels, _DIRECTIONS, strict=True):
            part = frame[frame["direction"] == direction]
            grouped_bars(axes, part, groups, models, "receiver")
            axes.set_title(title)
            axes.set_ylabel("Old-task accuracy")
            if base_old is not None:
                reference_line(axes, base_old, "base")
        panels[1].set_xticks(range(len(groups)), group_labels(groups, counts, n_seeds))
        handles = model_handles(models, "s") + bar_handles("receiving model alone", bool(frame["random"].notna().any()))
        legend_below(figure, handles)
        return figure
