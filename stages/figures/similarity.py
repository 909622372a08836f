"""How alike the old task's edges are in base and tuned model, between floor and ceiling."""

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.figures.style import INK, SOFT, empty, label, legend_below, look, plt, styled

_PANELS = (("cosine", "Cosine"), ("spearman", "Rank correlation"))


def draw(frame: pd.DataFrame, floor: Mapping[str, float | None]) -> Figure:
    """Left: cosine, which the strong edges decide; right: rank correlation, where all edges weigh alike.

    Args:
        frame: model, seed, kind, value, ceiling, null.
        floor: kind -> similarity of two bases.
    """
    with styled():
        frame = frame.dropna(subset=["value"])
        models = list(dict.fromkeys(frame["model"]))
        height = max(4.4, 1.6 + 0.45 * len(models)) if models else 1.5
        figure, panels = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
        if frame.empty:
            for axes, text in zip(panels, ("No circuit was identifiable: nothing to compare.", ""), strict=True):
                empty(axes, text)
            return figure
        size = 7 if frame["seed"].nunique() < 5 else 5
        for axes, (kind, title) in zip(panels, _PANELS, strict=True):
            part = frame[frame["kind"] == kind].copy()
            part["name"] = [label(str(model)) for model in part["model"]]
            names = [label(model) for model in models]
            for column, colour in (("ceiling", INK), ("null", SOFT)):
                sns.stripplot(
                    part, x=column, y="name", order=names, ax=axes, jitter=False, color=colour, marker="|", size=13,
                    linewidth=1.4,
                )  # fmt: skip
            colours = {label(model): look(model).colour for model in models}
            sns.swarmplot(  # not at random, so that the same numbers give the same picture
                part, x="value", y="name", order=names, hue="name", palette=colours, ax=axes, size=size, legend=False,
                edgecolor="white", linewidth=0.5, zorder=5,
            )  # fmt: skip
            if (value := floor.get(kind)) is not None:
                axes.axvline(value, color=SOFT, linestyle=":", linewidth=1, zorder=1)  # its name is in the legend
            axes.set_xlim(min(-0.05, float(part["null"].min()) - 0.05), 1.03)
            axes.set_xlabel("Similarity of base and tuned model")
            axes.set_ylabel("")
            axes.set_title(title)
            axes.grid(axis="x")
        panels[1].set_yticklabels([])
        marks = (("o", SOFT, "a seed"), ("|", INK, "its ceiling"), ("|", SOFT, "heads renamed within layers (mean)"))
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=9, label=text)
            for marker, colour, text in marks
        ]
        handles.append(Line2D([], [], color=SOFT, linestyle=":", label="floor: two bases"))
        legend_below(figure, handles)
        return figure
