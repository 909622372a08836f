"""Do base and tuned model have the same strongest nodes? Overlap against size, between chance, floor and ceiling."""

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.figures.style import INK, SOFT, empty, label, legend_below, look, plt, share_axis, styled

MOST_COLUMNS = 4
_LINES = (("ceiling", INK, "--"), ("chance", SOFT, "-."))


def draw(frame: pd.DataFrame, sizes: Sequence[int], floor: Sequence[float | None]) -> Figure:
    """One panel for each arm; lines are means over seeds, bands the range.

    Args:
        frame: model, seed, size, share, ceiling, chance.
        sizes: of the floor.
        floor: overlap of two bases at these sizes.
    """
    with styled():
        models = list(dict.fromkeys(frame["model"]))
        if not models:
            figure, axes = plt.subplots(figsize=(11, 1.5), layout="constrained")
            empty(axes, "No circuit was identifiable: nothing to compare.")
            return figure
        rows = -(-len(models) // MOST_COLUMNS)
        columns = -(-len(models) // rows)
        figure, panels = plt.subplots(
            rows, columns, figsize=(11, 0.8 + 2.6 * rows), layout="constrained", sharex=True, sharey=True, squeeze=False
        )
        for axes, model in zip(panels.flat, models, strict=False):
            part = frame[frame["model"] == model]
            for column, colour, style in _LINES:
                sns.lineplot(
                    part, x="size", y=column, ax=axes, color=colour, linestyle=style, errorbar=None, linewidth=1
                )
            sns.lineplot(
                part, x="size", y="share", ax=axes, color=look(model).colour, linewidth=2, errorbar=("pi", 100)
            )  # fmt: skip
            axes.plot(
                sizes, [float("nan") if v is None else v for v in floor], color=SOFT, linestyle=":", linewidth=1.4
            )
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.set_title(label(model))
            axes.set_xlabel("Strongest nodes (log)")
            axes.set_ylabel("")
            share_axis(axes)
        for axes in panels.flat[len(models) :]:
            axes.set_axis_off()
        figure.supylabel("Share of the base's that is kept", fontsize=10)
        handles = [
            Line2D([], [], color=SOFT, linewidth=3, label="base and tuned (band: range over seeds)"),
            Line2D([], [], color=INK, linestyle="--", label="ceiling: halves of a model"),
            Line2D([], [], color=SOFT, linestyle=":", label="floor: two bases"),
            Line2D([], [], color=SOFT, linestyle="-.", label="chance, as many of each layer"),
        ]
        legend_below(figure, handles)
        return figure
