"""Statistics of a few paired differences: intervals, an exact test, equivalence, and what n pairs can show at
all.

With three to ten pairs asymptotics are no help, so the methods are chosen for small n:
- interval: Student's t on the differences, exact for normal differences at any n >= 2. The percentile
  bootstrap is reported beside it; with 3 pairs it draws from 10 distinct resamples and covers far less than
  it says;
- test: the exact sign-flip test, which assumes only that under the null each difference is as likely to have
  the opposite sign. Its smallest p is 2 / 2**n, whatever the data;
- equivalence: two one-sided t tests (TOST) against a margin, because "not significant" does not mean "equal".
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from stages.pipeline.stage import Invalid

Values = Sequence[float] | Float[np.ndarray, " n"]


def t_interval(values: Values, confidence: float) -> tuple[float, float] | None:
    """Student's t interval for the mean; None below two values.

    Args:
        values: one number per pair (or seed).
        confidence: coverage, for example 0.95.
    """
    if len(values) < 2:
        return None
    mean, error = _mean_and_error(values)
    half = float(special.stdtrit(len(values) - 1, (1 + confidence) / 2)) * error
    return mean - half, mean + half


def _mean_and_error(values: Values) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))


def bootstrap_interval(values: Values, confidence: float, resamples: int, seed: int) -> tuple[float, float] | None:
    """Percentile bootstrap interval for the mean; None below two values."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng([seed, len(values)]).integers(len(values), size=(resamples, len(values)))
    means = np.asarray(values, dtype=np.float64)[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


MOST_PAIRS = 40  # of the sign-flip test: 2**20 sums of each half


def sign_flip_p(differences: Values) -> float | None:
    """Two-sided p of the exact sign-flip test of mean zero, over all 2**n patterns; None without any.

    Every pattern's sum is a sum over one half of the differences plus one over the other half. Only the 2**(n/2) sums
    of each half are made, and the pairs that are at least as far out as the data are counted by bisection.

    Sums that differ by rounding alone are ties, as in `scipy.stats.permutation_test`. Its tolerance is a share of the
    observed mean; here it is the same share of the sum of sizes, which rounding errors grow with, so that differences
    that cancel are recognised, too.

    Raises:
        Invalid: there are more than 40 differences.
    """
    x = np.asarray(differences, dtype=np.float64)
    if len(x) == 0:
        return None
    if len(x) > MOST_PAIRS:
        raise Invalid(
            f"the exact sign-flip test of {len(x)} pairs goes through 2**{len(x)} patterns: at most {MOST_PAIRS} pairs"
        )
    least = abs(float(x.sum())) - 100 * np.finfo(np.float64).eps * float(np.abs(x).sum())
    first, second = np.sort(_signed_sums(x[: len(x) // 2])), _signed_sums(x[len(x) // 2 :])
    one_tail = int((len(first) - np.searchsorted(first, least - second)).sum())
    return min(1.0, 2 * one_tail / 2 ** len(x))  # the other tail is its mirror image


def _signed_sums(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " patterns"]:
    """The sums of x under all 2**n patterns of signs."""
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def smallest_sign_flip_p(n: int) -> float | None:
    """The smallest two-sided p that n pairs can give; None for n = 0."""
    return 2 / 2**n if n else None


def equivalence_p(differences: Values, margin: float) -> float | None:
    """p of TOST: small when the mean difference lies inside (-margin, margin); None below two differences."""
    if len(differences) < 2:
        return None
    x = np.asarray(differences, dtype=np.float64)
    if np.ptp(x) == 0:  # no spread: the t statistics are infinite or undefined
        return 0.0 if abs(x[0]) < margin else 1.0
    (mean, error), df = _mean_and_error(x), len(x) - 1
    return float(max(special.stdtr(df, -(mean + margin) / error), special.stdtr(df, (mean - margin) / error)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm-adjusted p values of one family.

    The family is what was planned, so a contrast that could not be tested (None) still counts: as p = 1.
    """
    p = np.asarray([1.0 if p is None else p for p in p_values], dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [None if p is None else float(q) for p, q in zip(p_values, adjusted, strict=True)]


def t_test_power(effect: float, n: int, level: float, two_sided: bool) -> float:
    """Power of a t test of n normal differences, whose mean is `effect` standard deviations.

    The mean over the distribution of the observed spread, which is a chi distribution, by Gauss-Legendre quadrature
    over its quantiles. The noncentral t distribution, as `statsmodels.stats.power.TTestPower` has it, would be the same
    and is its oracle in the tests, but is not a number in places where pairs are few.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    spread = np.sqrt(2 * special.gammaincinv((n - 1) / 2, (nodes + 1) / 2) / (n - 1))
    least = special.stdtrit(n - 1, 1 - level / (2 if two_sided else 1)) * spread
    shift = effect * math.sqrt(n)
    rejected = special.ndtr(shift - least) + (special.ndtr(-shift - least) if two_sided else 0.0)
    return float(weights @ rejected / 2)


@cache
def _effect_size(n: int, level: float, power: float, two_sided: bool) -> float:
    """Smallest true mean, in standard deviations, that a t test of n differences detects with a power."""
    found = optimize.root_scalar(lambda size: t_test_power(size, n, level, two_sided) - power, bracket=(0.0, 1e4))
    return float(found.root)


def detectable_difference(n: int, sd: float, alpha: float, power: float) -> float | None:
    """The smallest true difference that a paired two-sided t test of n pairs detects with a power; None below two.

    Args:
        n: number of pairs.
        sd: standard deviation of the differences, taken for the true one.
        alpha: level of the test, not corrected.
        power: share of experiments that detect it.
    """
    return None if n < 2 else sd * _effect_size(n, alpha, power, True)


def provable_margin(n: int, sd: float, alpha: float, power: float) -> float | None:
    """The smallest margin within which TOST of n pairs shows two equal arms to be equal, with a power; None below two.

    Each of its two tests may fail in half of the share that may fail in all. Both can fail together, so the power is
    above what is asked for: 0.88 for 0.8 at 2 pairs, 0.8 from some 8 pairs on. Arguments as for
    `detectable_difference`.
    """
    return None if n < 2 else sd * _effect_size(n, alpha, (1 + power) / 2, False)


def pairs_needed(alpha: float, family: int) -> int:
    """Fewest pairs with which the smallest Holm-adjusted sign-flip p of a family is at most alpha."""
    return math.ceil(math.log2(2 * family / alpha) - 1e-12)


def power_note(n: int, alpha: float, family: int) -> str:
    """One sentence on what n pairs can and cannot show."""
    if n == 0:
        return "There is no pair to compare, so nothing can be tested."
    can = "can reach" if n >= pairs_needed(alpha, 1) else "cannot, however large its effect, reach"
    note = (
        f"With {n} {'pair' if n == 1 else 'pairs'} the smallest two-sided p of the exact sign-flip test is "
        f"{smallest_sign_flip_p(n):.4f}, so a single contrast {can} p < {alpha:g}; that takes "
        f"{pairs_needed(alpha, 1)} pairs"
    )
    if family > 1:
        need = pairs_needed(alpha, family)
        smallest = smallest_sign_flip_p(need)
        note += f", and {need} pairs (smallest p {smallest:.4f}) in a family of {family} under Holm"
    return note + "."


def resolution_note(n: int, sd: float, alpha: float, power: float, name: str) -> str:
    """One sentence on which size of difference n pairs with the spread of a contrast resolve; empty below two pairs."""
    detectable, margin = detectable_difference(n, sd, alpha, power), provable_margin(n, sd, alpha, power)
    if detectable is None or margin is None:
        return ""
    return (
        f"At the spread of {name} (standard deviation {sd:.3f} of the differences), a paired t test of {n} pairs "
        f"detects a true difference of {detectable:.3f} with {100 * power:g} % power, and TOST shows equal arms "
        f"to be equal within ±{margin:.3f}."
    )
