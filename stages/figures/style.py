"""One look for all figures: fonts, colours, the name and mark of every arm.

Colours tell families apart for colour-blind readers too (Okabe and Ito's palette): SFT is warm, RL is blue,
controls are purple and grey; within a family, lightness and marker differ. An arm that is not listed gets the
next spare look.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


@dataclass(frozen=True)
class Look:
    """How a model appears.

    Attributes:
        label: its name in figures and tables.
        colour: hexadecimal RGB.
        marker: of matplotlib.
        about: what an arm learns from, in one line.
    """

    label: str
    colour: str
    marker: str
    about: str = "–"


LOOKS = {
    "base": Look("Base", "#000000", "*"),
    "sft_gold": Look("SFT (gold)", "#D55E00", "o", "the one canonical answer of each prompt"),
    "sft_far": Look("SFT (far)", "#8C2D04", "X", "the right answer that the base finds least likely"),
    "sft_oracle": Look("SFT (oracle)", "#F0B04A", "p", "the base's whole distribution over the right answers"),
    "self_sft": Look("SFT (own samples)", "#E69F00", "s", "the base's own right answers, drawn once"),
    "sft_accepted": Look("SFT (accepted)", "#C44601", "*", "the right ones of the answers that Dr. GRPO samples"),
    "iterative_sft": Look("SFT (resampled)", "#A6761D", "h", "the model's own right answers, drawn anew as it learns"),
    "reinforce": Look("REINFORCE", "#56B4E9", "^", "rewards of its own samples as they are, without a baseline"),
    "rloo": Look("RLOO", "#4C72D0", ">", "rewards minus the mean reward of the other samples of a prompt"),
    "dr_grpo": Look("Dr. GRPO", "#0072B2", "D", "rewards minus the mean reward of a prompt's samples"),
    "dr_grpo_kl": Look(
        "Dr. GRPO + KL", "#003F6B", "v", "rewards as Dr. GRPO has, with a penalty on the KL to the base"
    ),
    "grpo": Look("GRPO", "#2A4DA0", "8", "rewards as Dr. GRPO has, divided by their standard deviation at a prompt"),
    "dpo": Look("DPO", "#117733", "<", "the canonical answer preferred to a wrong one of the base"),
    "sft_replay": Look("SFT + replay", "#CC79A7", "P", "gold answers, and some old-task prompts in every step"),
    "noise": Look("Random direction", "#8A8A8A", "d", "nothing: moved in weights along a random direction"),
    "random_reward": Look("Random reward", "#B9B9B9", "<", "rewards that know nothing of the answers"),
    "joint": Look("Joint training", "#5B3A5E", "H", "gold answers, and as many old-task prompts"),
}
_SPARE = (("#009E73", "8"), ("#6B8E23", "o"), ("#44AA99", "s"), ("#882255", "D"))

INK, SOFT, FAINT = "#222222", "#666666", "#DDDDDD"

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "report",
    "figure.dpi": 100,
}


def look(name: str) -> Look:
    """The look of a model by its name; the same on every run."""
    if name in LOOKS:
        return LOOKS[name]
    colour, marker = _SPARE[sum(name.encode()) % len(_SPARE)]
    return Look(name, colour, marker)


def label(name: str) -> str:
    """A model's name for people."""
    return look(name).label


@contextmanager
def styled() -> Iterator[None]:
    """Draw inside this context, so that no global setting changes."""
    with plt.rc_context(_RC), _overlaps_allowed():
        yield


@contextmanager
def _overlaps_allowed() -> Iterator[None]:
    """Of many seeds that are alike, some may overlap at the edge of their row; seaborn warns of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*points cannot be placed")
        yield


def png(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG; the same figure gives the same bytes. Closes it."""
    buffer = io.BytesIO()
    with _overlaps_allowed():
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)
    return buffer.getvalue()


def model_handles(names: Sequence[str], marker: str | None = None) -> list[Line2D]:
    """Legend entries of models: their own markers, or one `marker` for all where only colours differ."""
    return [
        Line2D(
            [],
            [],
            color=look(name).colour,
            marker=marker or look(name).marker,
            linestyle="none",
            markersize=10 if look(name).marker == "*" and marker is None else 8,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label=look(name).label,
        )
        for name in names
    ]


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One legend for all panels, below them, in as few rows as fit the width of the figure."""
    for rows in range(1, len(handles) + 1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows))
        if legend.get_window_extent().width < 0.95 * figure.bbox.width:  # letters are wider at few pixels
            return
        if rows < len(handles):
            legend.remove()


def reference_line(
    axes: Axes, value: float, text: str, horizontal: bool = True, style: str = "--", side: str = "right"
) -> None:
    """A thin line for a ceiling, a floor or a level, with its name at one side of it."""
    if horizontal:
        axes.axhline(value, color=SOFT, linestyle=style, linewidth=1, zorder=1)
        axes.annotate(
            text,
            (1 if side == "right" else 0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2 if side == "right" else 2, 3),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8,
            color=SOFT,
            zorder=5,
        )
    else:
        axes.axvline(value, color=SOFT, linestyle=style, linewidth=1, zorder=1)
        axes.annotate(
            text,
            (value, 0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            rotation=90,
            fontsize=8,
            color=SOFT,
            zorder=5,
        )


def share_axis(axes: Axes, which: str = "y", top: float = 1.0) -> None:
    """An axis for a share: from zero, with a little air, ticks at fifths."""
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    limits = (-0.03, max(1.03, top * 1.03))
    if which == "y":
        axes.set_ylim(*limits)
        axes.set_yticks(ticks)
    else:
        axes.set_xlim(*limits)
        axes.set_xticks(ticks)
    axes.grid(axis="y" if which == "y" else "x")


def mean_and_seeds(axes: Axes, runs: pd.DataFrame, x: str, y: str, colour: str) -> None:
    """A thin line for every seed and, where all seeds have the same steps, a thick one for their mean."""
    columns = list(dict.fromkeys(("step", x, y)))
    by_seed = [run[columns].sort_values("step") for _, run in runs.groupby("seed", sort=False)]
    for run in by_seed:
        axes.plot(run[x], run[y], color=colour, linewidth=0.7, alpha=0.35, zorder=2)
    if len({tuple(run["step"].tolist()) for run in by_seed}) == 1:
        mean: Any = pd.concat(by_seed).groupby("step", as_index=False).mean()
        axes.plot(mean[x], mean[y], color=colour, linewidth=2, alpha=0.95, zorder=3)


def zoomed(values: Sequence[float], always: Sequence[float | None] = (), step: float = 0.1) -> tuple[float, float]:
    """Axis limits for marks that need no zero: all finite values, out to whole steps, with a little air."""
    finite = [v for v in (*values, *always) if v is not None and math.isfinite(v)] or [0.0, 1.0]
    low, high = math.floor(min(finite) / step + 1e-9) * step, math.ceil(max(finite) / step - 1e-9) * step
    return low - 0.2 * step, max(high, low + step) + 0.3 * step


def only_text(text: str) -> Figure:
    """A low figure that says why there is nothing to draw."""
    figure = plt.figure(figsize=(11, 1.5), layout="constrained")
    empty(figure.add_subplot(), text)
    return figure


def empty(axes: Axes, text: str) -> None:
    """Say in place of a figure why there is nothing to draw."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=SOFT, transform=axes.transAxes, wrap=True)
