"""Confidence intervals and error rates: every number in the evidence gets its uncertainty here.

All intervals are two-sided. Methods were chosen for small samples and proportions near 0 and 1, where the
normal approximation is too narrow.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from securetune.evidence import Interval

LEVEL = 0.95
_MIN_FALSE_POSITIVES = 10  # below, the interval of the false-positive rate is wider than the rate itself


class Estimate(NamedTuple):
    """A value and its confidence interval."""

    value: float
    interval: Interval


class OperatingPoint(NamedTuple):
    """A detector at one threshold.

    Attributes:
        threshold: Scores above it count as positive.
        true_positive_rate: Share of the positives above the threshold, with its interval at this threshold.
        false_positive_rate: Share of the negatives above the threshold, with its interval.
    """

    threshold: float
    true_positive_rate: Estimate
    false_positive_rate: Estimate


class RocCurve(NamedTuple):
    """A ROC curve from (0, 0) to (1, 1), both rates rising.

    Attributes:
        false_positive_rates: Shares of negatives above each threshold.
        true_positive_rates: Shares of positives above the same threshold.
    """

    false_positive_rates: list[float]
    true_positive_rates: list[float]


def clopper_pearson(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """Compute the exact interval of a proportion.

    Clopper and Pearson 1934, https://doi.org/10.1093/biomet/26.4.404.

    Guarantees:
        Covers the true proportion with probability at least ``level``, whatever it is.

    Args:
        successes: Number of successes, in [0, n].
        n: Number of independent trials >= 1.
        level: Confidence level, in (0, 1).

    Returns:
        The interval, within [0, 1].

    Raises:
        ValueError: If ``successes`` or ``n`` is outside its range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes must be in [0, n] with n >= 1, got successes={successes}, n={n}.")
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(stats.beta.ppf(1 - tail, successes + 1, n - successes))
    return Interval(low=low, high=high, level=level)


def proportion(outcomes: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Estimate a proportion with its Clopper-Pearson interval.

    Args:
        outcomes: ``[n]``, bool, n >= 1: one independent outcome per text.
        level: Confidence level, in (0, 1).

    Returns:
        The share of true outcomes and its interval.
    """
    values = np.asarray(outcomes, dtype=bool)
    return Estimate(float(values.mean()), clopper_pearson(int(values.sum()), values.size, level=level))


def paired_difference(first: ArrayLike, second: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Estimate the difference of two proportions measured on the same texts.

    The asymptotic score interval of Tango 1998 (Statistics in Medicine 17, 891-908), which keeps its
    level for small samples and extreme proportions (Fagerland et al. 2014). Pairing removes the texts' own
    difficulty: only texts on which the two models differ count.

    Guarantees:
        Swapping the arguments mirrors the result. The interval excludes zero exactly if McNemar's test
        (without continuity correction) rejects equality at ``1 - level``.

    Args:
        first: ``[n]``, bool, n >= 1: the first model is right on each text.
        second: ``[n]``, bool: the second model, same texts in the same order.
        level: Confidence level, in (0, 1).

    Returns:
        Proportion of ``first`` minus proportion of ``second``, and its interval within [-1, 1].

    Raises:
        ValueError: If the lengths differ or are zero.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(
            f"both models need one outcome per text, the same n >= 1, got {a.shape} and {b.shape}."
        )
    gains, losses, n = int((a & ~b).sum()), int((b & ~a).sum()), a.size
    critical = float(stats.norm.ppf((1 + level) / 2))

    def score(difference: float) -> float:
        # share of losses that is most likely if the true difference were this one
        linear = (2 * n - gains + losses) * difference - gains - losses
        constant = -losses * difference * (1 - difference)
        loss_share = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * loss_share + difference * (1 - difference))
        distance = gains - losses - n * difference
        if variance > 0:
            return distance / math.sqrt(variance)
        return math.copysign(math.inf, distance) if distance else 0.0

    def solve(target: float, low: float, high: float) -> float:
        return optimize.brentq(lambda d: score(d) - target, low, high)  # pyright: ignore[reportReturnType]

    value = (gains - losses) / n
    edge = 1 - 1e-12
    low = -1.0 if score(-edge) <= critical else solve(critical, -edge, value)
    high = 1.0 if score(edge) >= -critical else solve(-critical, value, edge)
    return Estimate(value, Interval(low=min(low, value), high=max(high, value), level=level))


def ratio(numerators: ArrayLike, denominators: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Estimate a ratio of sums, such as nats per token, over independent texts.

    The texts are the independent units, not their tokens, so the interval is that of the linearised ratio
    (Cochran 1977, section 6.3) with a t quantile.

    Args:
        numerators: ``[n]``, finite, n >= 2: one sum per text, such as the loss of all its tokens in nats.
        denominators: ``[n]``, >= 0 and not all zero: one weight per text, such as its number of tokens.
        level: Confidence level, in (0, 1).

    Returns:
        The ratio of the sums and its interval.

    Raises:
        ValueError: If the lengths differ or are below two, or the weights sum to zero.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.shape != bottom.shape or top.size < 2:
        raise ValueError(f"a ratio needs two arrays of one length >= 2, got {top.shape} and {bottom.shape}.")
    if not (bottom.sum() > 0 and np.isfinite(top).all()):
        raise ValueError("a ratio needs finite numerators and a positive sum of denominators.")
    n = top.size
    value = top.sum() / bottom.sum()
    error = math.sqrt(n / (n - 1) * np.square(top - value * bottom).sum()) / bottom.sum()
    half_width = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    return Estimate(float(value), Interval(low=value - half_width, high=value + half_width, level=level))


def auc(positives: ArrayLike, negatives: ArrayLike, *, level: float = LEVEL) -> Estimate:
    """Estimate the area under the ROC curve with DeLong's interval.

    DeLong et al. 1988, https://doi.org/10.2307/2531595, with the rank formulas of Sun and Xu 2014. Ties
    count half. Where the scores separate perfectly DeLong's variance is zero; the interval then is the
    one-sided exact bound that the smaller group alone allows.

    Args:
        positives: ``[m]``, finite, m >= 2: scores of the positives (members); higher means more likely
            positive.
        negatives: ``[n]``, finite, n >= 2: scores of the negatives.
        level: Confidence level, in (0, 1).

    Returns:
        The area and its interval within [0, 1].

    Raises:
        ValueError: If there are fewer than two scores on a side, or one is not finite.
    """
    x, y = _scores(positives, negatives)
    m, n = x.size, y.size
    ranks = stats.rankdata(np.concatenate([x, y]))
    above = (ranks[:m] - stats.rankdata(x)) / n  # share of the negatives below each positive
    below = 1 - (ranks[m:] - stats.rankdata(y)) / m  # share of the positives above each negative
    value = float(above.mean())
    if value in (0.0, 1.0):
        gap = 1 - ((1 - level) / 2) ** (1 / min(m, n))
        return Estimate(value, Interval(low=max(0.0, value - gap), high=min(1.0, value + gap), level=level))
    error = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    half_width = float(stats.norm.ppf((1 + level) / 2)) * error
    return Estimate(
        value, Interval(low=max(0.0, value - half_width), high=min(1.0, value + half_width), level=level)
    )


def min_negatives(false_positive_rate: float) -> int:
    """Return how many negatives a rate needs before it can be measured: ten expected false positives."""
    return math.ceil(_MIN_FALSE_POSITIVES / false_positive_rate - 1e-9)


def tpr_at_fpr(
    positives: ArrayLike, negatives: ArrayLike, *, false_positive_rate: float, level: float = LEVEL
) -> OperatingPoint:
    """Measure the true-positive rate at the lowest threshold that keeps the false-positive rate.

    Guarantees:
        The measured false-positive rate is at most ``false_positive_rate``, and no lower threshold keeps
        that.

    Args:
        positives: ``[m]``, finite, m >= 2: scores of the positives; higher means more likely positive.
        negatives: ``[n]``, finite: scores of the negatives, n >= ``min_negatives(false_positive_rate)``.
        false_positive_rate: The rate to keep, in (0, 1).
        level: Confidence level of the Clopper-Pearson intervals of both rates, in (0, 1). They hold for the
            threshold as a given number.

    Returns:
        The operating point.

    Raises:
        ValueError: If the rate is outside its range, or too few negatives measure it.
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"false_positive_rate must be in (0, 1), got {false_positive_rate}.")
    x, y = _scores(positives, negatives)
    needed = min_negatives(false_positive_rate)
    if y.size < needed:
        raise ValueError(
            f"a false-positive rate of {false_positive_rate:g} needs at least {needed} negatives, "
            f"got {y.size}. Use more held-out texts or a higher rate."
        )
    allowed = math.floor(false_positive_rate * y.size + 1e-9)
    threshold = float(np.sort(y)[::-1][allowed])  # at most `allowed` negatives lie strictly above it
    return OperatingPoint(
        threshold, proportion(x > threshold, level=level), proportion(y > threshold, level=level)
    )


def roc_curve(positives: ArrayLike, negatives: ArrayLike, *, max_points: int | None = None) -> RocCurve:
    """Compute the ROC curve; tied scores make one step.

    Args:
        positives: ``[m]``, finite, m >= 2: scores of the positives; higher means more likely positive.
        negatives: ``[n]``, finite, n >= 2: scores of the negatives.
        max_points: Thin the curve to about this many points for a plot; None keeps every step.

    Returns:
        The curve.
    """
    x, y = _scores(positives, negatives)
    thresholds = np.unique(np.concatenate([x, y]))[::-1]
    true_rates = np.concatenate([[0.0], 1 - np.searchsorted(np.sort(x), thresholds, side="left") / x.size])
    false_rates = np.concatenate([[0.0], 1 - np.searchsorted(np.sort(y), thresholds, side="left") / y.size])
    if max_points is not None and true_rates.size > max_points:
        # half of the points evenly in rank, half at low false-positive rates, where the curve is read
        even = np.linspace(0, true_rates.size - 1, max_points // 2)
        low = np.geomspace(1, true_rates.size, max_points - even.size) - 1
        kept = np.unique(np.concatenate([even, low]).round().astype(int))
        true_rates, false_rates = true_rates[kept], false_rates[kept]
    return RocCurve(false_rates.tolist(), true_rates.tolist())


def _scores(positives: ArrayLike, negatives: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    for name, scores in (("positives", x), ("negatives", y)):
        if scores.ndim != 1 or scores.size < 2:
            raise ValueError(f"{name} must hold at least two scores, got shape {scores.shape}.")
        if not np.isfinite(scores).all():
            raise ValueError(f"{name} hold {int((~np.isfinite(scores)).sum())} scores that are not finite.")
    return x, y
