"""How many nodes of the circuit are enough: faithfulness against size, the strongest nodes first."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from stages.figures.style import SOFT, empty, legend_below, look, mean_and_seeds, plt, reference_line, styled

_MOST = 2.0  # end of the axis: the share says how much less the whole model does, and grows without bounds


def draw(frame: pd.DataFrame, circuit_sizes: Sequence[float]) -> Figure:
    """Left: by accuracy; right: by logit difference.

    Args:
        frame: model, seed, size, share, share_ld.
        circuit_sizes: number of nodes of each base's circuit.
    """
    with styled():
        frame = frame.dropna(subset=["share", "share_ld"], how="all")
        figure, both = plt.subplots(1, 2, figsize=(11, 4.6 if len(frame) else 1.5), layout="constrained")
        if frame.empty:
            for axes, text in zip(both, ("No circuit was identifiable in the base: no size curve.", ""), strict=True):
                empty(axes, text)
            return figure
        models = list(dict.fromkeys(frame["model"]))
        for axes, column, title in zip(both, ("share", "share_ld"), ("Accuracy", "Logit difference"), strict=True):
            for model in reversed(models):  # the base on top
                runs = frame[frame["model"] == model].assign(step=frame["size"])
                mean_and_seeds(axes, runs.dropna(subset=[column]), "size", column, look(model).colour)
            axes.set_xscale("symlog", linthresh=4, linscale=0.6)
            largest = int(frame["size"].max())
            axes.set_xticks([tick for tick in (0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if tick <= largest])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlim(0, largest)
            axes.set_xlabel("Nodes in place, strongest first (log)")
            axes.grid(axis="y")
            lowest, highest = float(frame[column].min()), float(frame[column].max())
            axes.set_ylim(max(-1.0, min(-0.03, lowest - 0.03)), min(_MOST, max(1.1, highest + 0.06)))
            axes.set_title(title)
            reference_line(axes, 1.0, "the whole model", side="left")
            for size in sorted(set(circuit_sizes)):
                axes.axvline(size, color=SOFT, linestyle=":", linewidth=1.2, zorder=1)
        both[0].set_ylabel("Share of the model's own score\n(no node = 0)")
        handles = [Line2D([], [], color=look(name).colour, linewidth=3, label=look(name).label) for name in models]
        handles.append(Line2D([], [], color=SOFT, linestyle=":", label="size of a base's circuit"))
        legend_below(figure, handles)
        return figure
