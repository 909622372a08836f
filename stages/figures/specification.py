"""Does the answer hang on a choice? Every hypothesis under each other choice, sorted, with the choices below."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.figures.style import INK, SOFT, label, look, only_text, plt, styled
from stages.measures.scores import ENDINGS

_BY = {"new_accuracy": "accuracy", "kl_new": "KL", "weight_norm": "norm", "gradient_steps": "steps"}
_MEASURES = {f"retention{ending}": score.replace("_", " ") for score, ending in ENDINGS.items()}
_MEASURES["old_accuracy"] = "whole model's accuracy"
_AROUND = {
    "own_means": "own means",
    "base_means": "base's means",
    "resampled": "resampled",
    "base_resampled": "base's resampled",
    None: "nothing ablated",
}


def draw(found: Sequence[Mapping[str, Any]], margin: float) -> Figure:
    """A column for each hypothesis: above the differences with their intervals, below which choices give them.

    Args:
        found: entry `specification` of statistics.json.
        margin: differences within it count as none.
    """
    with styled():
        shown = [entry for entry in found if entry["choices"]]
        if not shown:
            return only_text("No hypothesis has a pair of arms at any matching: nothing to show.")
        rows = _rows([choice for entry in shown for choice in entry["choices"]])
        figure = plt.figure(figsize=(11, 3.4 + 0.165 * len(rows)), layout="constrained")
        panels = figure.subplots(
            2, len(shown), squeeze=False, sharex="col", sharey="row", height_ratios=(3.0, 0.165 * len(rows))
        )
        for column, entry in enumerate(shown):
            _differences(panels[0, column], entry, margin)
            _choices(panels[1, column], entry["choices"], rows)
        panels[0, 0].set_ylabel("Difference")
        panels[1, 0].set_yticks(range(len(rows)), [text for _, _, text in rows], fontsize=7.5)
        return figure


def _rows(choices: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any, str]]:
    """Kind of choice, its value and its words, in reading order."""
    rates = sorted({choice["rate"] for choice in choices}, key=float)
    matchings = {choice["matching"]: f"{_BY[choice['by']]} {choice['at']:g}" for choice in choices}
    order = {by: place for place, by in enumerate(_BY)}
    places = {choice["matching"]: (order[choice["by"]], choice["at"]) for choice in choices}
    measures = [name for name in _MEASURES if any(choice["measure"] == name for choice in choices)]
    around = [kind for kind in _AROUND if any(choice["ablation"] == kind for choice in choices)]
    return [
        *(("rate", rate, f"rate {rate}") for rate in rates),
        *(("matching", name, matchings[name]) for name in sorted(matchings, key=lambda name: places[name])),
        *(("measure", name, _MEASURES[name]) for name in measures),
        *(("ablation", kind, _AROUND[kind]) for kind in around),
    ]


def _differences(axes: Axes, entry: Mapping[str, Any], margin: float) -> None:
    axes.axhspan(-margin, margin, color="#F2F2F2", zorder=0)
    axes.axhline(0, color=INK, linewidth=1, zorder=1)
    colour = look(entry["arm"]).colour
    values = [choice["difference"] for choice in entry["choices"]]
    for place, choice in enumerate(entry["choices"]):
        if choice["ci"] is None:
            continue
        apart = choice["ci"][0] > 0 or choice["ci"][1] < 0
        axes.plot([place, place], choice["ci"], color=colour if apart else SOFT, linewidth=0.7, alpha=0.45, zorder=2)
    axes.plot(range(len(values)), values, ".", color=INK, markersize=2.5, zorder=3)
    for place, choice in enumerate(entry["choices"]):
        if choice["planned"]:
            axes.plot(place, choice["difference"], "D", color=colour, markersize=8, markeredgecolor="white", zorder=5)
            axes.axvline(place, color=colour, linewidth=1, alpha=0.5, zorder=1)
    limit = 1.25 * max(float(np.abs(values).max()), margin)
    axes.set_ylim(-limit, limit)
    axes.set_title(f"{entry['name']}: {label(entry['arm'])} minus {label(entry['reference'])}")
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.grid(axis="y")


def _choices(axes: Axes, choices: Sequence[Mapping[str, Any]], rows: Sequence[tuple[str, Any, str]]) -> None:
    kinds = list(dict.fromkeys(kind for kind, _, _ in rows))
    for number, (kind, value, _) in enumerate(rows):
        if kinds.index(kind) % 2 == 0:
            axes.axhspan(number - 0.5, number + 0.5, color="#F7F7F7", zorder=0)
        at = [place for place, choice in enumerate(choices) if choice[kind] == value]
        axes.plot(at, np.full(len(at), number), "|", color=INK, markersize=4, markeredgewidth=0.6, zorder=2)
    for place, choice in enumerate(choices):
        if choice["planned"]:
            axes.axvline(place, color=SOFT, linewidth=1, zorder=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-1, len(choices))
    axes.tick_params(length=0, labelbottom=False)
    axes.set_xlabel(f"{len(choices)} choices, by their difference")
