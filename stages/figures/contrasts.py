"""The answer: what each arm keeps, and the paired differences with their intervals."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.figures.style import INK, SOFT, empty, label, look, plt, styled


def draw(
    levels: pd.DataFrame,
    contrasts: pd.DataFrame,
    axis_label: str,
    ceiling: float | None,
    floor: float | None,
    margin: float,
    confidence: float,
) -> Figure:
    """Two panels: each arm's level with its seeds; arm minus reference for each contrast.

    Args:
        levels: model, seed, compared, value.
        contrasts: name, arm, reference, n, difference, low, high, p, values (list of per-seed differences).
        axis_label: what is measured.
        ceiling: what an undamaged model would have.
        floor: what random circuits have.
        margin: differences within it count as none.
        confidence: coverage of the intervals.
    """
    with styled():
        rows = max(levels["model"].nunique(), len(contrasts))
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 1.6 + 0.5 * rows), width_ratios=(1, 1.25), layout="constrained"
        )
        _levels(left, levels, axis_label, ceiling, floor)
        if contrasts["difference"].notna().any():
            _contrasts(right, contrasts, margin, confidence)
        else:
            empty(right, "No pair of arms can be compared;\nthe report says what was left out and why.")
        return figure


def _levels(axes: Axes, levels: pd.DataFrame, axis_label: str, ceiling: float | None, floor: float | None) -> None:
    arms = list(dict.fromkeys(levels["model"]))
    for row, arm in enumerate(arms):
        part = levels[levels["model"] == arm].dropna(subset=["value"])
        style = look(arm)
        counted = part[part["compared"]]
        jitter = np.linspace(-0.16, 0.16, len(part)) if len(part) > 1 else np.zeros(len(part))
        for shift, entry in zip(jitter, part.to_dict("records"), strict=True):
            axes.plot(
                entry["value"],
                row + shift,
                style.marker,
                color=style.colour,
                markerfacecolor=style.colour if entry["compared"] else "white",
                markersize=6,
                alpha=0.75,
                zorder=3,
            )
        if len(counted):
            mean = counted["value"].mean()
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color=style.colour, linewidth=3, zorder=2)
        elif part.empty:
            axes.annotate(
                "not identifiable", (0.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=SOFT
            )
    axes.set_yticks(range(len(arms)), [label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.75)
    axes.set_xlabel(axis_label)
    axes.set_title("What each arm keeps")
    axes.grid(axis="x")
    low, high = axes.get_xlim()
    for value, text, style in ((ceiling, "base", "--"), (floor, "random circuits", ":")):
        if value is not None:
            axes.set_xlim(min(low, value - 0.03), max(high, value + 0.05))
            low, high = axes.get_xlim()
            axes.axvline(value, color=SOFT, linestyle=style, linewidth=1, zorder=1)
            axes.annotate(
                text,
                (value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-3 if value is ceiling else 3, -2),
                textcoords="offset points",
                ha="right" if value is ceiling else "left",
                va="top",
                fontsize=8,
                color=SOFT,
            )
    if not levels["compared"].all():
        handle = Line2D(
            [],
            [],
            marker="o",
            linestyle="none",
            markerfacecolor="white",
            color=SOFT,
            label="left out of the contrasts",
        )
        axes.legend(handles=[handle], loc="lower left", fontsize=8)


def _contrasts(axes: Axes, contrasts: pd.DataFrame, margin: float, confidence: float) -> None:
    axes.axvspan(-margin, margin, color="#F2F2F2", zorder=0)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    notes = []
    for row, entry in enumerate(contrasts.to_dict("records")):
        colour = look(entry["arm"]).colour
        notes.append(f"n = {entry['n']}")
        if pd.isna(entry["difference"]):
            continue
        if pd.notna(entry["low"]):
            axes.plot([entry["low"], entry["high"]], [row, row], color=colour, linewidth=2, zorder=2)
        axes.plot(entry["difference"], row, "s", color=colour, markersize=8, markeredgecolor="white", zorder=4)
        values = np.asarray(entry["values"])
        axes.plot(values, np.full(len(values), row + 0.26), "o", color=colour, markersize=4, alpha=0.7, zorder=3)
        notes[-1] += f"\np = {entry['p']:.3f}"
    axes.set_yticks(
        range(len(contrasts)),
        [f"{e['name']}  {label(e['arm'])}\nminus {label(e['reference'])}" for e in contrasts.to_dict("records")],
    )
    axes.set_ylim(len(contrasts) - 0.4, -0.75)
    axes.set_xlabel(f"Difference, {100 * confidence:g} % interval; small dots are seeds")
    axes.set_title("Paired differences")
    axes.grid(axis="x")
    # An interval from two or three pairs can be far wider than the data; it may leave the panel, the data may
    # not.
    points = np.concatenate([np.asarray(values) for values in contrasts["values"] if len(values)])
    reach = max(2.5 * float(np.abs(points).max()), 3 * margin)
    widest = float(np.nanmax(np.abs(contrasts[["low", "high"]].to_numpy(dtype=float)), initial=0.0))
    limit = min(reach, 1.1 * max(widest, float(np.abs(points).max())) + margin / 2)
    limit = max(limit, 1.4 * margin)
    axes.set_xlim(-limit, limit)
    for row, entry in enumerate(contrasts.to_dict("records")):
        for bound, marker in ((entry["low"], "<"), (entry["high"], ">")):
            if pd.notna(bound) and abs(bound) > limit:
                axes.plot(
                    np.sign(bound) * limit,
                    row,
                    marker,
                    color=look(entry["arm"]).colour,
                    clip_on=False,
                    markersize=7,
                )
    twin = axes.twinx()
    twin.set_ylim(axes.get_ylim())
    twin.set_yticks(range(len(contrasts)), notes, fontsize=8, color=SOFT)
    twin.tick_params(length=0)
    twin.spines[:].set_visible(False)
    axes.annotate("reference\nkeeps more", (0.01, 1), xycoords="axes fraction", va="top", fontsize=8, color=SOFT)
    axes.annotate("arm\nkeeps more", (0.99, 1), xycoords="axes fraction", va="top", ha="right", fontsize=8, color=SOFT)
