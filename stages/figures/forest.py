"""The hypotheses base by base: every seed's difference, and their mean with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.figures.style import INK, SOFT, label, look, only_text, plt, styled


def draw(hypotheses: Sequence[Mapping[str, Any]], axis_label: str, margin: float, confidence: float) -> Figure:
    """A column for each hypothesis, a line for each seed, sorted by the first one; below them the mean.

    Args:
        hypotheses: entries of `contrasts` of statistics.json, of the primary measure.
        axis_label: what is measured.
        margin: differences within it count as none.
        confidence: coverage of the intervals.
    """
    with styled():
        shown = [entry for entry in hypotheses if entry["n"]]
        if not shown:
            return only_text("No pair of arms can be compared: nothing to show.")
        first = shown[0]["values"]
        others = dict.fromkeys(seed for entry in shown[1:] for seed in entry["values"] if seed not in first)
        seeds = [*sorted(first, key=lambda seed: -first[seed]), *others]
        figure = plt.figure(figsize=(11, 1.6 + 0.19 * len(seeds)), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, entry in zip(panels, shown, strict=True):
            _panel(axes, entry, seeds, axis_label, margin)
        panels[0].set_yticks(
            [*range(len(seeds)), len(seeds) + 0.6],
            [*(f"seed {seed}" for seed in seeds), f"mean, {100 * confidence:g} %"],
            fontsize=8,
        )
        panels[0].set_ylim(len(seeds) + 1.3, -0.8)
        return figure


def _panel(axes: Axes, entry: Mapping[str, Any], seeds: Sequence[str], axis_label: str, margin: float) -> None:
    colour, values = look(entry["arm"]).colour, entry["values"]
    axes.axvspan(-margin, margin, color="#F2F2F2", zorder=0)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    for row, seed in enumerate(seeds):
        if seed in values:
            axes.plot([0, values[seed]], [row, row], color=colour, linewidth=1, alpha=0.35, zorder=2)
            axes.plot(values[seed], row, "o", color=colour, markersize=4, zorder=3)
        else:
            axes.annotate("left out", (0, row), fontsize=7, color=SOFT, va="center", ha="center", zorder=3)
    at = len(seeds) + 0.6
    if entry["ci"] is not None:
        axes.plot(entry["ci"], [at, at], color=colour, linewidth=3, zorder=2)
    axes.plot(entry["difference"], at, "D", color=colour, markersize=8, markeredgecolor="white", zorder=4)
    limit = 1.1 * max(float(np.abs(list(values.values())).max()), margin, *(abs(bound) for bound in entry["ci"] or ()))
    axes.set_xlim(-limit, limit)
    axes.set_title(f"{entry['name']}: {label(entry['arm'])} minus {label(entry['reference'])}, n = {entry['n']}")
    axes.set_xlabel(axis_label)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
