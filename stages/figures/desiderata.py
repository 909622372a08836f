"""What the groups of the circuit carry, in the base and after tuning (desiderata-based component masking)."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from stages.figures.bars import bar_handles, group_labels, grouped_bars
from stages.figures.style import empty, legend_below, model_handles, plt, styled


def draw(
    frame: pd.DataFrame, groups: list[str], counts: dict[str, int], n_seeds: int, titles: Mapping[str, str]
) -> Figure:
    """One panel for each desideratum.

    Args:
        frame: model, seed, group, desideratum, accuracy, floor, random.
        groups: groups to show, in order.
        counts: group -> number of bases that have it.
        n_seeds: number of bases.
        titles: desideratum -> its words, in the order of the panels; others come after them.
    """
    with styled():
        if frame.empty:
            figure, axes = plt.subplots(figsize=(11, 1.5), layout="constrained")
            empty(axes, "Nothing to show: no circuit was identifiable in a base.")
            return figure
        found = list(dict.fromkeys(frame["desideratum"]))
        names = [name for name in titles if name in found]
        names += [name for name in found if name not in titles]
        figure, panels = plt.subplots(
            len(names),
            1,
            figsize=(11, 1.2 + 2.5 * len(names)),
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        models = list(dict.fromkeys(frame["model"]))
        for axes, name in zip(panels[:, 0], names, strict=True):
            part = frame[frame["desideratum"] == name]
            grouped_bars(axes, part, groups, models, "floor")
            axes.set_title(titles.get(name, name))
            axes.set_ylabel("Share of answers moved")
        panels[-1, 0].set_xticks(range(len(groups)), group_labels(groups, counts, n_seeds))
        handles = model_handles(models, "s") + bar_handles(
            "floor: nothing swapped", bool(frame["random"].notna().any())
        )
        legend_below(figure, handles)
        return figure
