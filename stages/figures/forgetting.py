"""Is the loss a matter of distance? Old-task accuracy against the distance moved, in outputs and weights."""

import pandas as pd
from matplotlib.figure import Figure

from stages.figures.style import legend_below, look, mean_and_seeds, model_handles, plt, reference_line, styled, zoomed

_DISTANCES = (
    ("kl_new", "KL(base || tuned) on new-task prompts, nats"),
    ("weight_norm", "Norm of the weight change"),
)


def draw(curves: pd.DataFrame, base_old: float | None, rate: float) -> Figure:
    """Two panels at one learning rate: arms at the same distance are compared by looking straight up.

    Args:
        curves: arm, seed, learning_rate, step, old_accuracy, kl_new, weight_norm, picked.
        base_old: old-task accuracy of the base.
        rate: the learning rate that the arms were matched at; arms without training are drawn too.
    """
    with styled():
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
        shown = curves[(curves["learning_rate"].sub(rate).abs() < 1e-6 * rate) | curves["learning_rate"].eq(0)]
        arms = list(dict.fromkeys(shown["arm"]))
        for axes, (column, title) in zip(panels, _DISTANCES, strict=True):
            for arm, runs in shown.groupby("arm", sort=False):
                style = look(str(arm))
                mean_and_seeds(axes, runs, column, "old_accuracy", style.colour)
                picked = runs[runs["picked"]]
                axes.plot(
                    picked[column],
                    picked["old_accuracy"],
                    style.marker,
                    color=style.colour,
                    linestyle="none",
                    markersize=7,
                    markeredgecolor="white",
                    zorder=5,
                )
            axes.set_ylim(*zoomed([float(value) for value in shown["old_accuracy"]], [base_old]))
            axes.grid()
            trained = shown[shown["learning_rate"] > 0]
            furthest = float((trained if len(trained) else shown)[column].max())
            axes.set_xlim(-0.02 * furthest, 1.05 * furthest)  # a random direction may be followed much further
            axes.set_xlabel(title)
            if base_old is not None:
                reference_line(axes, base_old, "base")
        panels[0].set_ylabel("Old-task accuracy")
        panels[0].set_title("Moved in outputs")
        panels[1].set_title("Moved in weights")
        legend_below(figure, model_handles(arms))
        return figure
