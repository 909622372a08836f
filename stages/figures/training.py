"""How base and arms learned."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from stages.figures.style import SOFT, legend_below, look, mean_and_seeds, plt, reference_line, share_axis, styled


def draw(base: pd.DataFrame, arms: pd.DataFrame, level: float | None, shortcut: float | None) -> Figure:
    """First row: the base, then the arms' new task per learning rate; second row: the old task below them.

    Args:
        base: seed, step, accuracy (old task), and where recorded induction (strings said twice).
        arms: arm, seed, learning_rate, step, new_accuracy, old_accuracy.
        level: the matching level.
        shortcut: best new-task accuracy without the skill.
    """
    with styled():
        trained = arms[arms["learning_rate"] > 0]
        rates = sorted(trained["learning_rate"].unique())
        figure = plt.figure(figsize=(3.75 * (1 + len(rates)), 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 1 + len(rates))
        _base(figure.add_subplot(grid[:, 0]), base)
        for column, rate in enumerate(rates, start=1):
            for row, (task, title) in enumerate(
                (("new_accuracy", "New-task accuracy"), ("old_accuracy", "Old-task accuracy"))
            ):
                axes = figure.add_subplot(grid[row, column])
                for arm, runs in trained[trained["learning_rate"] == rate].groupby("arm", sort=False):
                    mean_and_seeds(axes, runs, "step", task, look(str(arm)).colour)
                axes.set_xscale("symlog", linthresh=1)
                ticks = [0, 1, 10, 100, 1000, 10000]
                axes.set_xticks([tick for tick in ticks if tick <= trained["step"].max()])
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_locator(NullLocator())
                share_axis(axes)
                if column == 1:
                    axes.set_ylabel(title)
                else:
                    axes.tick_params(labelleft=False)
                if row == 0:
                    axes.set_title(f"Arms, learning rate {rate:g}")
                    if level is not None:
                        reference_line(axes, level, "matching level", side="left")
                    if shortcut is not None:
                        reference_line(axes, shortcut, "best shortcut", style=":", side="left")
                else:
                    axes.set_xlabel("Gradient step (log)")
        names = list(dict.fromkeys(trained["arm"]))
        handles = [Line2D([], [], color=look(name).colour, linewidth=3, label=look(name).label) for name in names]
        legend_below(figure, handles)
        return figure


def _base(axes: Axes, base: pd.DataFrame) -> None:
    curves = (("accuracy", "old task", "black", "-"), ("induction", "strings said twice", SOFT, ":"))
    for column, name, colour, dash in curves:
        if column not in base:
            continue
        for number, (_, run) in enumerate(base.groupby("seed", sort=False)):
            run = run.dropna(subset=[column]).sort_values("step")
            axes.plot(run["step"], run[column], dash, color=colour, linewidth=1.3, label=None if number else name)
    share_axis(axes)
    axes.set_title("Base")
    axes.set_xlabel("Training step")
    axes.set_ylabel("Accuracy, one line per seed")
    axes.legend(loc="lower right")
