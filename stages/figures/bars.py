"""Grouped bars with seeds, a floor and a control; shared by the figures of transplants and of desiderata."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from stages.figures.style import INK, SOFT, look, share_axis

WIDTH = 0.82  # of all bars of a group


def grouped_bars(axes: Axes, frame: pd.DataFrame, groups: Sequence[str], models: Sequence[str], floor: str) -> None:
    """Bars of mean `accuracy` by group and model, dots for seeds, a tick at the mean of column `floor`,
    diamonds at `random`.

    Args:
        axes: to draw on.
        frame: group, model, seed, accuracy, random, and the column `floor`.
        groups: in order; a group without rows for a model leaves a gap.
        models: in order.
        floor: column of what the model does without the intervention.
    """
    step = WIDTH / len(models)
    for index, model in enumerate(models):
        style = look(model)
        for place, group in enumerate(groups):
            part = frame[(frame["model"] == model) & (frame["group"] == group)]
            if part.empty:
                continue
            x = place - WIDTH / 2 + (index + 0.5) * step
            axes.bar(x, part["accuracy"].mean(), 0.88 * step, color=style.colour, alpha=0.55, linewidth=0, zorder=2)
            spread = np.linspace(-0.22, 0.22, len(part)) * step if len(part) > 1 else np.zeros(1)
            axes.plot(x + spread, part["accuracy"], "o", color=style.colour, markersize=2.6, zorder=4)
            axes.plot(
                [x - 0.46 * step, x + 0.46 * step],
                [part[floor].mean()] * 2,
                color=INK,
                linewidth=1.6,
                zorder=5,
            )
            if part["random"].notna().any():
                axes.plot(
                    x,
                    part["random"].mean(),
                    "D",
                    color="white",
                    markeredgecolor=INK,
                    markersize=3.6,
                    zorder=6,
                )
    for place in range(1, len(groups)):
        axes.axvline(place - 0.5, color="#E8E8E8", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.tick_params(axis="x", length=0)
    share_axis(axes)


def bar_handles(floor: str, random: bool) -> list[Line2D]:
    """Legend entries of what is not a model."""
    handles = [
        Line2D([], [], color=INK, linewidth=1.6, label=floor),
        Line2D([], [], color=SOFT, marker="o", linestyle="none", markersize=3, label="one seed"),
    ]
    if random:
        handles.append(
            Line2D(
                [],
                [],
                color="white",
                marker="D",
                markeredgecolor=INK,
                linestyle="none",
                markersize=4,
                label="random heads",
            )
        )
    return handles


def group_labels(groups: Sequence[str], counts: dict[str, int], n_seeds: int) -> list[str]:
    """Names of groups for an axis, wrapped, with the number of bases that have them where that is not all."""
    labels = []
    for group in groups:
        text = group.replace(">", "\n→ ")
        if group in counts and counts[group] < n_seeds:
            text += f"\n({counts[group]} of {n_seeds} bases)"
        labels.append(text)
    return labels
