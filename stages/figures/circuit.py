"""The circuit drawn: positions across in reading order, layers up, heads as dots, arrows for the hops.

The base's panel says what the circuit is (colour = group, reds = groups that work against the answer, size =
path-patching score); the arms' panels show the same heads coloured by how much tuning changed their weights.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch

from stages.figures.style import FAINT, INK, SOFT, empty, label, plt, styled

GROUP_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F3C8D",
    "#6B8E23",
    "#A0522D",
    "#444444",
)
AGAINST_COLOURS = ("#B2182B", "#67001F", "#F4707A", "#7A3B3B")  # of groups that work against the answer
LOGITS = "logits"
Point = tuple[float, float]


def draw(
    heads: pd.DataFrame,
    paths: pd.DataFrame,
    changes: pd.DataFrame,
    positions: list[str],
    n_layers: int,
    n_heads: int,
    notes: dict[str, str],
) -> Figure:
    """Base above, arms below.

    Args:
        heads: group, position, layer, head, score, sign: the base's circuit.
        paths: group, receiver (a group or "logits"), component.
        changes: arm, layer, head, change.
        positions: columns, in reading order.
        n_layers: of the model.
        n_heads: of a layer.
        notes: model -> a line below its panel's title.
    """
    with styled():
        if heads.empty:
            figure, axes = plt.subplots(figsize=(11, 2), layout="constrained")
            empty(axes, "No circuit was identifiable in this base: nothing to draw.")
            return figure
        arms = list(dict.fromkeys(changes["arm"]))
        columns = min(3, max(1, len(arms)))
        rows = -(-len(arms) // columns)
        figure = plt.figure(figsize=(11, 5.4 + 3.1 * rows), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=(5.2, 3.1 * max(rows, 1)), squeeze=False)[:, 0]
        axes = upper.subplots()
        places = _places(heads, positions, n_heads)
        axes.set_title(f"{label('base')}: {notes.get('base', '')}")
        if arms:
            panels = lower.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
            relevant = changes.merge(heads[["layer", "head"]].drop_duplicates())
            scale = Normalize(0, float(relevant["change"].max()) or 1.0)
            for place, panel in enumerate(panels.flat):
                if place >= len(arms):
                    panel.set_axis_off()
                    continue
                arm = arms[place]
                _arm(panel, heads, changes[changes["arm"] == arm], places, positions, n_layers, scale)
                panel.set_title(f"{label(arm)}", fontsize=10, pad=16)
                if place % columns == 0:
                    panel.set_ylabel("Layer", fontsize=8)
                panel.text(0, 1.02, notes.get(arm, ""), transform=panel.transAxes, fontsize=8, color=SOFT)
            shown = min(rows, 2)  # as long as two rows at most, however many there are
            bar = lower.colorbar(
                ScalarMappable(scale, _MAP),
                ax=panels,
                location="right",
                shrink=0.9 * shown / rows,
                pad=0.01,
                aspect=15 * shown,
                anchor=(0.0, 1.0 if rows > shown else 0.5),
            )
            bar.set_label("Weight change / norm of the head")
            bar.outline.set_visible(False)  # type: ignore[operator]
        _base(axes, heads, paths, places, positions, n_layers)
        return figure


_MAP = plt.get_cmap("cividis_r")


def _places(heads: pd.DataFrame, positions: list[str], n_heads: int) -> dict[tuple[str, int, int], Point]:
    """Where each node is drawn: its position's column, its head number across the column, its layer up."""
    return {
        (position, layer, head): (
            positions.index(position) + 0.76 * ((head + 0.5) / n_heads - 0.5),
            float(layer),
        )
        for position, layer, head in heads[["position", "layer", "head"]].itertuples(index=False)
    }


def _frame(axes: Axes, positions: list[str], n_layers: int, top: float) -> None:
    for column in range(len(positions)):
        axes.axvspan(column - 0.44, column + 0.44, color="#F6F6F6", zorder=0, linewidth=0)
    axes.set_xlim(-0.5, len(positions) - 0.5)
    axes.set_ylim(-0.6, n_layers - 1 + top)
    axes.set_yticks(range(n_layers))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)


def _base(
    axes: Axes,
    heads: pd.DataFrame,
    paths: pd.DataFrame,
    places: dict[tuple[str, int, int], Point],
    positions: list[str],
    n_layers: int,
) -> None:
    _frame(axes, positions, n_layers, 1.7)
    axes.set_xticks(range(len(positions)), [position.replace("_", "\n", 1) for position in positions])
    axes.set_ylabel("Layer")
    groups = list(dict.fromkeys(heads["group"]))
    colours: dict[str, str] = {}
    for sign, palette in ((1, GROUP_COLOURS), (-1, AGAINST_COLOURS)):
        of_sign = [group for group in groups if heads.loc[heads["group"] == group, "sign"].iloc[0] == sign]
        colours |= {group: palette[index % len(palette)] for index, group in enumerate(of_sign)}
    strongest = float(heads["score"].abs().max()) or 1.0
    centres: dict[str, Point] = {LOGITS: (float(len(positions) - 1), n_layers + 0.1)}
    times_drawn: dict[Point, int] = {}
    for group in groups:
        members = heads[heads["group"] == group]
        points = [places[key] for key in members[["position", "layer", "head"]].itertuples(index=False, name=None)]
        strength = members["score"].abs().to_numpy() / strongest
        x, y = np.average(np.array(points), axis=0, weights=strength + 1e-9)
        centres[group] = (float(x), float(y))
        for point, size in zip(points, 40 + 260 * strength, strict=True):
            rings = times_drawn.get(point, 0)  # a head of several groups gets a ring for each further one
            times_drawn[point] = rings + 1
            axes.plot([x, point[0]], [y, point[1]], color=colours[group], linewidth=1, alpha=0.35, zorder=2)
            axes.scatter(
                *point,
                s=(size**0.5 + 7 * rings) ** 2,
                facecolor="none" if rings else colours[group],
                edgecolor=colours[group] if rings else "white",
                linewidth=2 if rings else 0.8,
                zorder=4,
            )
    axes.text(*centres[LOGITS], "logits", ha="center", va="center", fontsize=10, color=INK, zorder=6)
    handles = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="none",
            color=colours[group],
            markersize=8,
            label=f"{group} ({count})",
        )
        for group, count in heads.groupby("group", sort=False).size().items()
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), title="group (heads)", title_fontsize=9)
    _arrows(axes, paths, centres, colours)


def _arrows(axes: Axes, paths: pd.DataFrame, centres: dict[str, Point], colours: dict[str, str]) -> None:
    """One arrow for each pair of sender and receiver, labelled with the receiver's inputs that it feeds."""
    fed: dict[tuple[str, str], list[str]] = {}
    for group, receiver, component in paths.itertuples(index=False):
        fed.setdefault((group, receiver), []).extend([] if pd.isna(component) else [str(component)])
    axes.figure.get_figure(root=True).draw_without_rendering()  # fixes the layout, so that points on the page are known
    to_page = axes.transData
    drawn: list[tuple[Point, str]] = []
    for (group, receiver), components in fed.items():
        if group not in centres or receiver not in centres:
            continue
        start, end = np.array(centres[group]), np.array(centres[receiver])
        beside = sum(to == receiver and abs(place[0] - start[0]) < 0.5 for place, to in drawn)
        drawn.append((centres[group], receiver))
        bend = 0.0 if receiver == LOGITS else (-0.35 if abs(start[0] - end[0]) < 0.5 else 0.12)
        bend += 0.08 * beside * (-1 if bend < 0 else 1)  # arrows that would lie on one another fan out
        axes.add_patch(
            FancyArrowPatch(
                tuple(start),
                tuple(end),
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-|>",
                mutation_scale=15,
                shrinkA=4,
                shrinkB=8,
                color=colours[group],
                linewidth=2,
                alpha=0.85,
                zorder=5,
            )
        )
        if components:
            (x0, y0), (x1, y1) = to_page.transform(start), to_page.transform(end)
            # the middle of the curve that matplotlib calls arc3
            middle = ((x0 + x1 + bend * (y1 - y0)) / 2, (y0 + y1 - bend * (x1 - x0)) / 2)
            x, y = to_page.inverted().transform(middle)
            axes.text(
                x,
                y,
                ", ".join(sorted(set(components))),
                ha="center",
                va="center",
                fontsize=9,
                color=colours[group],
                fontweight="bold",
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
                zorder=6,
            )


def _arm(
    axes: Axes,
    heads: pd.DataFrame,
    changes: pd.DataFrame,
    places: dict[tuple[str, int, int], Point],
    positions: list[str],
    n_layers: int,
    scale: Normalize,
) -> None:
    _frame(axes, positions, n_layers, 0.6)
    change = {
        (layer, head): value for layer, head, value in changes[["layer", "head", "change"]].itertuples(index=False)
    }
    nodes: dict[tuple[str, int, int], float] = {}  # a head of several groups has its largest score
    for position, layer, head, score in heads[["position", "layer", "head", "score"]].itertuples(
        index=False, name=None
    ):
        nodes[position, layer, head] = max(abs(score), nodes.get((position, layer, head), 0.0))
    strongest = max(nodes.values()) or 1.0
    for (position, layer, head), score in nodes.items():
        x, y = places[position, layer, head]
        value = change.get((layer, head))
        axes.scatter(
            x,
            y,
            s=20 + 110 * score / strongest,
            color="white" if value is None else _MAP(scale(value)),
            edgecolor=SOFT,
            linewidth=0.5,
            zorder=4,
        )
    axes.set_xticks(
        range(len(positions)),
        [position.replace("_", "\n") for position in positions],
    )
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", labelsize=8)
