"""Does the answer hang on where the arms are compared? What they keep at every matching."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.figures.style import (
    INK,
    SOFT,
    empty,
    legend_below,
    look,
    model_handles,
    plt,
    reference_line,
    styled,
    zoomed,
)

_MATCHED_BY = {
    "new_accuracy": ("Equal skill", "New-task accuracy reached"),
    "kl_new": ("Equal KL", "KL reached, nats"),
    "weight_norm": ("Equal weight norm", "Norm reached"),
    "gradient_steps": ("Equal budget", "Gradient steps"),
}


def draw(frame: pd.DataFrame, primary: float | None, base_old: float | None, counted: bool) -> Figure:
    """A column for each kind of matching; above what the base's circuit still does, below the old task as a whole.

    Args:
        frame: by, at, selected, arm, seed, retention, old_accuracy.
        primary: the level of new-task accuracy that the contrasts are at.
        base_old: old-task accuracy of the base.
        counted: whether the base's circuit works at any seed, so that there is something to keep.
    """
    with styled():
        kinds = [kind for kind in _MATCHED_BY if kind in set(frame["by"])]
        places = [int(frame[frame["by"] == kind]["at"].nunique()) for kind in kinds]
        figure = plt.figure(figsize=(11, 6.6 if counted else 1.5), layout="constrained")
        if not counted or frame["old_accuracy"].isna().all():
            empty(figure.add_subplot(), "No arm reached a matching with a circuit to look at: nothing to show.")
            return figure
        panels = figure.subplots(2, len(kinds), squeeze=False, width_ratios=[1 + n for n in places], sharex="col")
        rows = (("retention", "Circuit retention", 1.0), ("old_accuracy", "Old-task accuracy", base_old))
        for axes_row, (measure, title, of_base) in zip(panels, rows, strict=True):
            limits = zoomed(list(frame[measure]), [of_base])
            for axes, kind in zip(axes_row, kinds, strict=True):
                _panel(axes, frame[frame["by"] == kind], measure)
                axes.set_ylim(*limits)
                axes.grid(axis="y")
                axes.set_xlabel("")
                axes.set_ylabel(title if kind == kinds[0] else "")
                axes.tick_params(labelleft=kind == kinds[0])
                if of_base is not None:
                    reference_line(axes, of_base, "base")
        for axes, kind in zip(panels[0], kinds, strict=True):
            axes.set_title(_MATCHED_BY[kind][0])
        for axes, kind in zip(panels[1], kinds, strict=True):
            _ticks(axes, frame[frame["by"] == kind], primary if kind == "new_accuracy" else None)
            axes.set_xlabel(_MATCHED_BY[kind][1])
        legend_below(figure, model_handles(list(dict.fromkeys(frame["arm"]))))
        return figure


def _panel(axes: Axes, frame: pd.DataFrame, measure: str) -> None:
    """Means as large marks, seeds as small ones, side by side at each value."""
    arms, order = list(dict.fromkeys(frame["arm"])), sorted(frame["at"].unique())
    palette = {arm: look(arm).colour for arm in arms}
    shared = {"data": frame, "x": "at", "y": measure, "hue": "arm", "order": order, "hue_order": arms}
    sns.stripplot(**shared, palette=palette, dodge=True, jitter=False, size=3.5, alpha=0.55, legend=False, ax=axes)
    sns.pointplot(
        **shared,
        palette=palette,
        dodge=0.8 - 0.8 / len(arms),  # where stripplot has them
        errorbar=None,
        linestyles="none",
        markers=[look(arm).marker for arm in arms],
        markersize=7.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        legend=False,
        ax=axes,
    )
    for place in range(1, len(order)):
        axes.axvline(place - 0.5, color="#E8E8E8", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.tick_params(axis="x", length=0)


def _ticks(axes: Axes, frame: pd.DataFrame, primary: float | None) -> None:
    """The values; bold where the contrasts are, grey with a star where too few runs get there."""
    values = frame.drop_duplicates("at").sort_values("at")
    selected = dict(zip(values["at"], values["selected"], strict=True))
    axes.set_xticks(range(len(selected)), [f"{at:g}{'*' if few else ''}" for at, few in selected.items()])
    for tick, (at, few) in zip(axes.get_xticklabels(), selected.items(), strict=True):
        tick.set_color(SOFT if few else INK)
        tick.set_fontweight("bold" if at == primary else "normal")
