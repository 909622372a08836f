"""New task against old: the path of every run, and where the compared models are."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.figures.style import (
    SOFT,
    empty,
    legend_below,
    look,
    mean_and_seeds,
    model_handles,
    plt,
    reference_line,
    styled,
    zoomed,
)


def draw(
    curves: pd.DataFrame,
    matched: pd.DataFrame,
    endpoints: pd.DataFrame,
    level: float | None,
    shortcut: float | None,
    base_old: float | None,
    circuit_label: str,
) -> Figure:
    """One panel per learning rate, and one with the matched models' circuits.

    Args:
        curves: arm, seed, learning_rate, step, new_accuracy, old_accuracy, picked.
        matched: arm, seed, reached, new_accuracy, old_accuracy, learning_rate of models without a training
            path.
        endpoints: model, seed, compared, new_accuracy, kept (evaluation split).
        level: the matching level.
        shortcut: best new-task accuracy without the skill.
        base_old: old-task accuracy of the base.
        circuit_label: what `kept` is.
    """
    with styled():
        trained = curves[curves["learning_rate"] > 0]
        rates = sorted(trained["learning_rate"].unique())
        arms = list(dict.fromkeys(curves["arm"]))
        figure, panels = plt.subplots(
            1, len(rates) + 1, figsize=(3.75 * (len(rates) + 1), 4.6), squeeze=False, layout="constrained"
        )
        figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]
        across = zoomed([*trained["new_accuracy"], *matched["new_accuracy"], *endpoints["new_accuracy"]], [shortcut])
        up = zoomed([*trained["old_accuracy"], *matched["old_accuracy"]], [base_old])
        for axes, rate in zip(panels[0], rates, strict=False):
            for arm, runs in trained[trained["learning_rate"] == rate].groupby("arm", sort=False):
                style = look(str(arm))
                mean_and_seeds(axes, runs, "new_accuracy", "old_accuracy", style.colour)
                picked = runs[runs["picked"]]
                axes.plot(
                    picked["new_accuracy"],
                    picked["old_accuracy"],
                    style.marker,
                    color=style.colour,
                    linestyle="none",
                    markersize=7,
                    markeredgecolor="white",
                    zorder=5,
                )
            start = trained[(trained["learning_rate"] == rate) & (trained["step"] == 0)]
            for _, origin in start.groupby("seed", sort=False):
                axes.plot(
                    origin["new_accuracy"].mean(),
                    origin["old_accuracy"].mean(),
                    "*",
                    color="black",
                    markersize=11,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    zorder=6,
                )
            untrained = matched[matched["learning_rate"].eq(rate)]
            for entry in untrained.to_dict("records"):
                style = look(entry["arm"])
                axes.plot(
                    entry["new_accuracy"],
                    entry["old_accuracy"],
                    style.marker,
                    color=style.colour,
                    markersize=8,
                    zorder=4,
                )
            axes.set_title(f"Learning rate {rate:g}")
            axes.set_ylabel("Old-task accuracy")
            _frame(axes, across, up, level, shortcut)
            if base_old is not None:
                reference_line(axes, base_old, "base")
        last = panels[0][-1]
        points = endpoints.dropna(subset=["kept", "new_accuracy"])
        if len(points):
            for entry in points.to_dict("records"):
                style = look(entry["model"])
                last.plot(
                    entry["new_accuracy"],
                    entry["kept"],
                    style.marker,
                    color=style.colour,
                    markerfacecolor=style.colour if entry["compared"] else "white",
                    markersize=(11 if entry["model"] == "base" else 8) if entry["compared"] else 6,
                    markeredgecolor="white" if entry["compared"] else style.colour,
                    zorder=4,
                )
            last.set_title("Circuit kept, matched models")
            last.set_ylabel(circuit_label)
            _frame(last, across, zoomed(list(points["kept"])), level, shortcut, named=not rates)
        else:
            empty(last, "No circuit was identifiable\nin the base: nothing to show.")
        handles = model_handles(["base", *arms])
        if not endpoints["compared"].all():
            handles.append(
                Line2D(
                    [],
                    [],
                    marker="o",
                    linestyle="none",
                    color=SOFT,
                    markerfacecolor="white",
                    label="left out of the contrasts",
                )
            )
        legend_below(figure, handles)
        return figure


def _frame(
    axes: Axes,
    across: tuple[float, float],
    up: tuple[float, float],
    level: float | None,
    shortcut: float | None,
    named: bool = True,
) -> None:
    axes.set_xlim(*across)
    axes.set_ylim(*up)
    axes.grid()
    axes.set_xlabel("New-task accuracy")
    if level is not None:
        reference_line(axes, level, "matching level" if named else "", horizontal=False)
    if shortcut is not None:
        reference_line(axes, shortcut, "best shortcut" if named else "", horizontal=False, style=":")
