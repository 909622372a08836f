"""Is the circuit more than chance? What it does alone, beside the whole model and random circuits of the same shape."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.figures.style import SOFT, empty, label, legend_below, look, plt, styled

_INCHES = 11.0  # width of the figure
_REACH = 0.22  # of the seeds to both sides of a column's middle, in columns


def draw(frame: pd.DataFrame) -> Figure:
    """One column for each model.

    Args:
        frame: model, seed, reached, kind ("whole model", "base circuit", "own circuit", "random"), accuracy.
    """
    with styled():
        frame = frame.dropna(subset=["accuracy"])
        nothing = set(frame["kind"]) <= {"whole model"}
        figure, axes = plt.subplots(figsize=(_INCHES, 1.5 if nothing else 4.4), layout="constrained")
        if nothing:
            empty(axes, "No circuit was identifiable in the base: nothing to compare with chance.")
            return figure
        models = list(dict.fromkeys(frame["model"]))
        seeds = list(dict.fromkeys(frame["seed"]))
        places = np.linspace(-_REACH, _REACH, len(seeds)) if len(seeds) > 1 else [0.0]
        width = 0.9 * 72 * _INCHES / len(models)  # of a column, in points
        size = min(8.0, max(4.0, 1.2 * 2 * _REACH * width / len(seeds)))
        for column, model in enumerate(models):
            style = look(model)
            for seed, shift in zip(seeds, places, strict=True):
                part = frame[(frame["model"] == model) & (frame["seed"] == seed)]
                x = column + shift
                chance = part[part["kind"] == "random"]["accuracy"]
                axes.plot([x] * len(chance), chance, "_", color=SOFT, markersize=size - 1, alpha=0.6, zorder=2)
                whole = part[part["kind"] == "whole model"]["accuracy"]
                axes.plot([x] * len(whole), whole, "_", color="black", markersize=size + 5, markeredgewidth=2, zorder=3)
                for kind, filled in (("own circuit", False), ("base circuit", True)):
                    value = part[part["kind"] == kind]["accuracy"]
                    axes.plot(
                        [x] * len(value),
                        value,
                        "o",
                        color=style.colour,
                        markerfacecolor=style.colour if filled else "white",
                        markersize=size if filled else size - 1.5,
                        markeredgewidth=1.3,
                        zorder=4 if filled else 5,
                    )
        axes.set_ylim(-0.03, 1.05)
        names = [textwrap.fill(label(model), max(9, int(width / 7)), break_long_words=False) for model in models]
        axes.set_xticks(range(len(models)), names)
        axes.set_xlim(-0.5, len(models) - 0.5)
        axes.set_ylabel("Old-task accuracy")
        axes.grid(axis="y")
        axes.tick_params(axis="x", length=0)
        handles = [
            Line2D(
                [],
                [],
                marker="o",
                linestyle="none",
                color=SOFT,
                markersize=8,
                label="the base's circuit in this model",
            ),
            Line2D(
                [],
                [],
                marker="o",
                linestyle="none",
                color=SOFT,
                markerfacecolor="white",
                label="the model's own circuit",
            ),
            Line2D(
                [],
                [],
                marker="_",
                linestyle="none",
                color=SOFT,
                markersize=9,
                label="random circuit, same shape",
            ),
            Line2D(
                [],
                [],
                marker="_",
                linestyle="none",
                color="black",
                markersize=12,
                markeredgewidth=2,
                label="the whole model",
            ),
        ]
        legend_below(figure, handles)
        return figure
