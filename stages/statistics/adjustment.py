"""What a distance between outputs explains. It describes; neither part is among the hypotheses.

The method's effect: does the method still matter where the distance moved is taken into account? A linear model of the
primary measure on method and distance, with the seed as block and one value of each method a seed; the coefficient of
the method is its partial effect, and p is of its t test. The distance is itself an outcome of the method, so this says
what goes together, not what would happen if the distance were held. A family may differ from the other by what one of
its arms is taught, not by its method: the first family is also compared with each arm of the second alone.

Prediction: which distance predicts how much of the old task is lost? One line for each predictor, with the seed as
block. A check more than a finding where one predictor is on old-task prompts: it is nearly the loss in other units.
Asked is whether the loss goes more closely with the first predictor than with the second: the correlations over
the arms of each seed, whose differences go through the exact sign-flip test. (Errors in left-out seeds would not do:
seeds share what they are predicted from, and the test would reject too often, .068 for .05 in simulations.)

Blocks are taken out by taking all values as deviations from the mean of their seed, which gives the same coefficients
as one dummy variable for each seed. How well a model predicts is measured on seeds that it was not fitted on: R2 is 1 -
(squared errors) / (squared deviations), over all left-out seeds, each with its arms as deviations from its own mean. It
asks whether arms of a new seed are told apart; 0 is guessing that all are alike, and it is negative where a model does
worse than that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from stages.statistics.cells import Cells
from stages.statistics.paired import sign_flip_p, t_interval
from stages.statistics.wording import count

Columns = Float[np.ndarray, "rows columns"]
METHOD = "method"


@dataclass(frozen=True)
class Adjustment:
    """What is asked, fixed before the results.

    Attributes:
        outcome: the primary measure.
        distance: measure that the method's effect is adjusted for.
        families: two names with their arms; the effect is the first family minus the second.
        contrasts: (arm, reference) pairs, which are adjusted, too.
        forgetting: measure whose loss is predicted: the base's value minus the arm's.
        predictors: measures that may predict it; the first is tested against the second, if there are two.
        confidence: coverage of intervals.
    """

    outcome: str
    distance: str
    families: Mapping[str, Sequence[str]]
    contrasts: Sequence[tuple[str, str]]
    forgetting: str
    predictors: Sequence[str]
    confidence: float


def adjust(cells: Cells, asked: Adjustment, left_out: Mapping[str, float | None]) -> dict[str, Any]:
    """Entry `adjustment` of statistics.json.

    Args:
        cells: all records.
        asked: what is asked.
        left_out: seeds that no contrast counts, because of their base.
    """
    measures = tuple(dict.fromkeys((asked.outcome, asked.distance, asked.forgetting, *asked.predictors)))
    rows = [
        {"arm": arm, "seed": seed} | {measure: cells.value(measure, arm, seed) for measure in measures}
        for arm in cells.arms
        for seed in cells.seeds
        if seed not in left_out and cells.reached(arm, seed)
    ]
    frame = pd.DataFrame(rows, columns=["arm", "seed", *measures]).astype(dict.fromkeys(measures, "float64"))
    (first, arms), (second, others) = asked.families.items()
    sides = [(f"{first} − {second}", tuple(arms), tuple(others))]
    sides += [(f"{arm} − {reference}", (arm,), (reference,)) for arm, reference in asked.contrasts]
    effects = [_effect(frame, asked, *side) for side in sides]
    families = {name: [arm for arm in cells.arms if arm in listed] for name, listed in asked.families.items()}
    references = families[second] if len(families[second]) > 1 else ()  # of a single arm, the family says it already
    return {
        "outcome": asked.outcome,
        "distance": asked.distance,
        "forgetting": asked.forgetting,
        "families": families,
        "effects": effects,
        "by_reference": [
            _effect(frame, asked, f"{first} − {reference}", tuple(arms), (reference,)) for reference in references
        ],
        "predictors": [_predictor(frame, asked, predictor) for predictor in asked.predictors],
        "prediction": _prediction(frame, asked),
    }


def _effect(
    frame: pd.DataFrame, asked: Adjustment, name: str, arms: Sequence[str], references: Sequence[str]
) -> dict[str, Any]:
    """Effect of the method on the outcome, raw and adjusted for the distance.

    The unit is the seed, as everywhere: the arms of a family are averaged at each seed that has an arm of both sides.
    """
    counts = frame["arm"].isin([*arms, *references]) & frame[[asked.outcome, asked.distance]].notna().all(axis=1)
    part = pd.DataFrame(frame[counts]).assign(**{METHOD: lambda rows: rows["arm"].isin(arms).astype(float)})
    sides = part.groupby(["seed", METHOD])[[asked.outcome, asked.distance]].mean()
    part = pd.DataFrame(sides).reset_index()
    part = pd.DataFrame(part[part["seed"].duplicated(keep=False)])
    entry: dict[str, Any] = {"name": name, "arms": list(arms), "references": list(references)}
    fits = {
        key: fit(part, asked.outcome, predictors, METHOD, asked.confidence)
        for key, predictors in (("raw", [METHOD]), ("adjusted", [METHOD, asked.distance]))
    }
    alone = fit(part, asked.outcome, [asked.distance], asked.distance, asked.confidence)
    return (
        entry
        | {"n": len(set(part["seed"]))}
        | {
            f"{key}_{what}": found[what]
            for key, found in fits.items()
            for what in ("effect", "ci", "p", "why_not", "r2")
        }
        | {"distance_r2": alone["r2"]}
    )


def _predictor(frame: pd.DataFrame, asked: Adjustment, predictor: str) -> dict[str, Any]:
    """Slope of the loss on one predictor, and how well it predicts left-out seeds."""
    part = _losses(frame, asked, [predictor])
    found = fit(part, "loss", [predictor], predictor, asked.confidence)
    return {"measure": predictor, "n": len(part), "seeds": len(set(part["seed"]))} | found


def _prediction(frame: pd.DataFrame, asked: Adjustment) -> dict[str, Any]:
    """Does the loss go more closely with the first predictor than with the second, over the models of a seed?

    Returns:
        the measures, the means over the seeds of their correlations with the loss, the mean of the differences, its t
        interval, the differences by seed and p; None where it cannot be estimated. Only models that have all three
        numbers count, and only seeds with three of them.
    """
    compared = list(asked.predictors[:2])
    found: dict[str, list[float]] = {}
    if len(compared) == 2:
        for seed, part in _losses(frame, asked, compared).groupby("seed", sort=False):
            found[str(seed)] = [_correlation(part[name].to_numpy(), part["loss"].to_numpy()) for name in compared]
    found = {seed: pair for seed, pair in found.items() if np.isfinite(pair).all()}
    values = {seed: first - second for seed, (first, second) in found.items()}
    differences = list(values.values())
    interval = t_interval(differences, asked.confidence)
    return {
        "measures": compared,
        "correlations": [float(mean) for mean in np.mean(list(found.values()), axis=0)] if found else None,
        "n": len(values),
        "difference": float(np.mean(differences)) if differences else None,
        "ci": None if interval is None else list(interval),
        "values": values,
        "p": sign_flip_p(differences),
    }


def _correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Pearson's; NaN for fewer than three points, which lie on a line, and without spread."""
    if len(x) < 3 or min(np.ptp(x), np.ptp(y)) < 1e-12:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def _losses(frame: pd.DataFrame, asked: Adjustment, predictors: Sequence[str]) -> pd.DataFrame:
    """arm, seed, loss and the predictors, of the models that have all of them. The loss is short of the base's own
    value, which the block takes up."""
    return frame[["arm", "seed", *predictors]].assign(loss=-frame[asked.forgetting]).dropna()


def fit(
    part: pd.DataFrame, outcome: str, predictors: Sequence[str], of_interest: str, confidence: float
) -> dict[str, Any]:
    """A linear model with the seed as block: coefficient of one predictor, its t interval and p, R2 on left-out seeds.

    What cannot be estimated is None, and `why_not` says why.

    Args:
        part: one row for each model, with its seed.
        outcome, predictors: columns.
        of_interest: the predictor whose coefficient is asked for.
        confidence: coverage of the interval.
    """
    x, y, seeds = _deviations(part, predictors), _deviations(part, [outcome])[:, 0], part["seed"].to_numpy()
    why_not = _why_not(x, y, len(set(seeds)))
    if why_not:
        return {"effect": None, "ci": None, "p": None, "r2": None, "why_not": why_not}
    from statsmodels.regression.linear_model import OLS

    model = OLS(y, x)
    model.df_resid = len(y) - x.shape[1] - len(set(seeds))  # one mean of each seed was fitted, too
    index, ci, effect, p = list(predictors).index(of_interest), None, None, None
    if model.df_resid > 0:
        result = model.fit()
        effect = float(result.params[index])
        ci = [float(bound) for bound in result.conf_int(1 - confidence)[index]]
        p = float(result.pvalues[index])
    else:
        why_not = f"{len(set(seeds))} seeds leave no degree of freedom"
    return {"effect": effect, "ci": ci, "p": p, "r2": left_out_r2(x, y, seeds), "why_not": why_not}


def _deviations(part: pd.DataFrame, columns: Sequence[str]) -> Columns:
    """Values minus the mean of their seed. In numpy: it is asked for thousands of times, and a groupby takes longer."""
    values = part[list(columns)].to_numpy("float64")
    seed, rows = np.unique(part["seed"], return_inverse=True, return_counts=True)[1:]
    sums = np.stack([np.bincount(seed, column) for column in values.T], axis=1)
    return values - (sums / rows[:, None])[seed]


def _why_not(x: Columns, y: Float[np.ndarray, " rows"], seeds: int) -> str | None:
    """Why no model can be fitted, or None. Values that differ by rounding alone have no spread."""
    if seeds < 2:
        return f"{count(seeds, 'seed')}, at least 2 are needed"
    if np.abs(y).max() < 1e-12:
        return "the outcome has no spread inside the seeds"
    return _undetermined(x)


def _undetermined(x: Columns) -> str | None:
    """Why the coefficients of these predictors are not determined, or None."""
    sizes = np.abs(x).max(axis=0)
    if (sizes < 1e-12).any():
        return "a predictor has no spread inside the seeds"
    if np.linalg.matrix_rank(x / sizes, tol=1e-9) < x.shape[1]:
        return "the predictors go together entirely"
    return None


def left_out_r2(x: Columns, y: Float[np.ndarray, " rows"], seeds: np.ndarray) -> float | None:
    """R2 of predictions for seeds that were not fitted; None where the others alone allow no fit.

    Args:
        x, y: deviations from the mean of their seed.
        seeds: the seed of each row.
    """
    errors = np.empty_like(y)
    for seed in np.unique(seeds):
        out = seeds == seed
        if _undetermined(x[~out]):
            return None
        coefficients = np.linalg.lstsq(x[~out], y[~out], rcond=None)[0]
        errors[out] = y[out] - x[out] @ coefficients
    return float(1 - (errors**2).sum() / (y**2).sum())
