"""Which layers carry the answer: accuracy when one position cannot see another, by layer."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stages.figures.style import SOFT, empty, legend_below, look, mean_and_seeds, plt, share_axis, styled

MOST_COLUMNS = 4
OTHER_CLAUSE = "another_clause"  # the control of tasks with clauses, no position of its own


def draw(frame: pd.DataFrame, window: int, positions: Mapping[str, str]) -> Figure:
    """One panel for each path.

    Args:
        frame: model, seed, query, key, layer, accuracy, everywhere.
        window: layers that are knocked out together.
        positions: of the task in reading order, each with what it is called.
    """
    words = {**positions, OTHER_CLAUSE: OTHER_CLAUSE.replace("_", " ")}
    with styled():
        paths = _paths(frame, list(positions))
        if not paths:
            figure, axes = plt.subplots(figsize=(11, 1.5), layout="constrained")
            empty(axes, "No attention was knocked out.")
            return figure
        rows = -(-len(paths) // MOST_COLUMNS)
        columns = -(-len(paths) // rows)
        figure, panels = plt.subplots(
            rows, columns, figsize=(11, 0.7 + 2.5 * rows), layout="constrained", sharey=True, squeeze=False
        )
        for panel, (query, key) in zip(panels.flat, paths, strict=False):
            part = frame[(frame["query"] == query) & (frame["key"] == key)]
            _panel(panel, part)
            seeds, of = part["seed"].nunique(), frame["seed"].nunique()
            fewer = f" ({seeds} of {of} bases)" if seeds < of else ""
            panel.set_title(f"{words[query]} ↛ {words[key]}{fewer}", fontsize=9)
        for panel in panels.flat[len(paths) :]:
            panel.set_axis_off()
        for row in panels:
            row[0].set_ylabel("Accuracy")
        for index, panel in enumerate(panels.flat):
            if index < len(paths) <= index + columns:
                panel.set_xlabel("Layer" if window == 1 else f"Centre of {window} layers")
        names = list(dict.fromkeys(frame["model"]))
        handles = [Line2D([], [], color=look(name).colour, linewidth=3, label=look(name).label) for name in names]
        square = Line2D([], [], color=SOFT, marker="s", linestyle="none", markersize=5, label="not in any layer")
        legend_below(figure, [*handles, square])
        return figure


def _panel(axes: Axes, part: pd.DataFrame) -> None:
    models = list(dict.fromkeys(part["model"]))
    layers = int(part["layer"].max()) + 1
    for index, model in reversed(list(enumerate(models))):  # the base on top
        runs = part[part["model"] == model].assign(step=part["layer"])
        mean_and_seeds(axes, runs, "layer", "accuracy", look(model).colour)
        place = layers + 0.1 + 0.9 * (index + 0.5) / len(models)
        everywhere = runs.groupby("seed")["everywhere"].first().mean()
        axes.plot(place, everywhere, "s", color=look(model).colour, markersize=4, zorder=4)
    axes.axvline(layers - 0.2, color="#E8E8E8", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.3, layers + 1.1)
    step = max(1, layers // 8)
    axes.set_xticks([*range(0, layers, step), layers + 0.55], [*map(str, range(0, layers, step)), "all"])
    share_axis(axes)


def _paths(frame: pd.DataFrame, positions: list[str]) -> list[tuple[str, str]]:
    """Paths from the last token first, and the control at the end."""
    paths = dict.fromkeys(zip(frame["query"], frame["key"], strict=True))
    query = [*reversed(positions)]
    key = [*positions, OTHER_CLAUSE]
    return sorted(paths, key=lambda path: (path[1] == OTHER_CLAUSE, query.index(path[0]), key.index(path[1])))
