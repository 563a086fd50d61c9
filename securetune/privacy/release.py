"""Publish held-out counts (such as "correct answers") with differential privacy and honest intervals.

Guarantee, and why it holds:
    Let every released count be a number of held-out records with some property, each property a function of
    one record and the trained model. Adding or removing one held-out record changes each of the ``k`` counts
    by at most 1; so it does when a fixed number of records is evaluated, chosen by a keyed hash of each
    record: then one record takes another's place. Two-sided geometric noise ``P(z) ~ exp(-|z| epsilon / k)``
    on each count makes the ``k`` counts together ``epsilon``-differentially private (Ghosh, Roughgarden and
    Sundararajan 2009, https://arxiv.org/abs/0811.2841; the L1 sensitivity of the ``k`` counts is ``k``).

    A record's side, training or held-out, depends on a keyed hash of that record alone. Adding a record
    therefore changes one side only: either the training, which costs the run's ``(epsilon, delta)``, and the
    counts only through the released model; or the counts, which cost ``epsilon`` of this release, given the
    same model. Releasing both costs each record the larger of the two, not the sum (parallel composition,
    McSherry 2009, https://doi.org/10.1145/1559845.1559850).

    So the model behind a count must be the released one, or one that saw no private record, such as the base
    model. Counts of a model trained on the private records without privacy can not be released: one training
    record may change all of them.

    The totals must be public constants (a recipe's number of evaluated texts), never the size of the held-out
    part, which is private. The noise is drawn from the operating system's randomness with integer arithmetic
    alone, so its distribution is exact; the time it takes is not hidden. Each call draws anew and costs
    ``epsilon`` again.
"""

import math
import secrets
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

__all__ = ["ReleasedFraction", "noisy_count_interval", "release_counts", "two_sided_geometric"]

_FRACTION_TOLERANCE = 1e-9
RandBelow = Callable[[int], int]


class ReleasedFraction(NamedTuple):
    """A noised fraction of a public number of records, safe to publish.

    Attributes:
        value: The noised fraction, brought into [0, 1].
        low: Lower end of an interval that covers the population's fraction with probability at least
            ``level``.
        high: Upper end.
        level: Joint coverage over the sampling of records and the noise, two-sided, for this one fraction.
        total: Number of records, a public constant.
        noise_scale: Scale of the noise on the count, in records: ``k / epsilon``.
    """

    value: float
    low: float
    high: float
    level: float
    total: int
    noise_scale: float


def release_counts(
    counts: Mapping[str, int], totals: Mapping[str, int], epsilon: float, *, level: float = 0.95
) -> dict[str, ReleasedFraction]:
    """Add two-sided geometric noise to held-out counts and turn them into fractions with intervals.

    Charge ``epsilon`` to the ledger first (:meth:`securetune.privacy.ledger.Ledger.charge_release`).

    Guarantees:
        All fractions together are ``epsilon``-differentially private for one held-out record, under the
        conditions of the module's text. Each interval covers the fraction in the population that the records
        come from with probability at least ``level``, over the sampling and the noise jointly.

    Args:
        counts: Number of held-out records with each property, by name; every name spends an equal part of
            ``epsilon``.
        totals: Number of records evaluated for each name, >= 1: public constants.
        epsilon: Privacy cost of the whole release, > 0.
        level: Coverage of each interval, in (0, 1).

    Returns:
        One released fraction for each name.

    Raises:
        ValueError: If the names differ, nothing is to release, or a number is out of range.
    """
    if not counts or set(counts) != set(totals):
        raise ValueError(
            "counts and totals must have the same names, at least one; "
            f"got {sorted(counts)} and {sorted(totals)}."
        )
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a finite number > 0, got {epsilon}.")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}.")
    for name, count in counts.items():
        if totals[name] < 1 or not 0 <= count <= totals[name]:
            raise ValueError(f"counts[{name!r}] must be from 0 to its total, got {count} of {totals[name]}.")
    epsilon_each = Fraction(epsilon) / len(counts)
    released: dict[str, ReleasedFraction] = {}
    for name, count in counts.items():
        noisy = int(count) + two_sided_geometric(epsilon_each)
        low, high = noisy_count_interval(noisy, totals[name], float(epsilon_each), level=level)
        value = min(max(noisy / totals[name], 0.0), 1.0)
        released[name] = ReleasedFraction(value, low, high, level, totals[name], float(1 / epsilon_each))
    return released


def two_sided_geometric(epsilon: Fraction, *, rand_below: RandBelow = secrets.randbelow) -> int:
    """Draw an integer ``z`` with probability proportional to ``exp(-|z| epsilon)``, exactly.

    Algorithm 2 of Canonne, Kamath and Steinke 2020, https://arxiv.org/abs/2004.00010.

    Args:
        epsilon: > 0.
        rand_below: Draws a uniform integer from 0 to its argument minus 1; a test may pass its own.

    Returns:
        The integer.

    Raises:
        ValueError: If ``epsilon`` is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}.")
    numerator, denominator = epsilon.denominator, epsilon.numerator  # the scale 1 / epsilon as a fraction
    while True:
        remainder = rand_below(numerator)
        if not _bernoulli_exp(remainder, numerator, rand_below):
            continue
        quotient = 0
        while _bernoulli_exp(1, 1, rand_below):
            quotient += 1
        magnitude = (remainder + numerator * quotient) // denominator
        is_negative = rand_below(2) == 1
        if is_negative and magnitude == 0:  # zero must not count twice
            continue
        return -magnitude if is_negative else magnitude


def noisy_count_interval(
    noisy: int, total: int, epsilon: float, *, level: float = 0.95
) -> tuple[float, float]:
    """Find the fractions that a noisy count does not contradict: Clopper and Pearson, with noise.

    The observed number is ``Binomial(total, p) + Z`` with ``P(Z = z) ~ exp(-|z| epsilon)``. Each end of the
    interval is the ``p`` at which a number as extreme as the observed one has probability ``(1 - level) /
    2``.

    Guarantees:
        Whatever ``p``, the interval covers it with probability at least ``level``, over sampling and noise
        jointly. Without noise (``epsilon`` large) it is the Clopper-Pearson interval. It uses ``noisy``
        alone, so it costs no privacy.

    Args:
        noisy: The released count; may lie outside 0 .. ``total``.
        total: Number of records, >= 1.
        epsilon: Parameter of the noise on this count, > 0.
        level: Coverage, in (0, 1).

    Returns:
        The lower and the upper end, in [0, 1].
    """
    from scipy.optimize import root_scalar
    from scipy.stats import binom

    counts = np.arange(total + 1)
    at_least = _noise_at_least(noisy - counts, epsilon)  # P(c + Z >= noisy) for each count c
    at_most = _noise_at_least(counts - noisy, epsilon)
    tail = (1 - level) / 2

    def crossing(tails: np.ndarray) -> float:
        def excess(fraction: float) -> float:
            return float(binom.pmf(counts, total, fraction) @ tails) - tail

        return float(root_scalar(excess, bracket=(0.0, 1.0), method="brentq", xtol=_FRACTION_TOLERANCE).root)

    # P(c + Z >= noisy) rises with the fraction, from the noise alone at 0; the other tail falls.
    low = 0.0 if at_least[0] >= tail else 1.0
    if at_least[0] < tail < at_least[-1]:
        low = crossing(at_least)
    high = 1.0 if at_most[-1] >= tail else 0.0
    if at_most[-1] < tail < at_most[0]:
        high = crossing(at_most)
    return max(0.0, low - 2 * _FRACTION_TOLERANCE), min(1.0, high + 2 * _FRACTION_TOLERANCE)


def _noise_at_least(thresholds: np.ndarray, epsilon: float) -> np.ndarray:
    """P(Z >= threshold) of two-sided geometric noise, for each threshold."""
    ratio = math.exp(-epsilon)
    upper_tail = np.exp(-epsilon * np.abs(np.where(thresholds > 0, thresholds, 1 - thresholds))) / (1 + ratio)
    return np.where(thresholds > 0, upper_tail, 1 - upper_tail)


def _bernoulli_exp(numerator: int, denominator: int, rand_below: RandBelow) -> bool:
    """Return true with probability ``exp(-numerator / denominator)``, a fraction in [0, 1] (Algorithm 1)."""
    k = 1
    while rand_below(denominator * k) < numerator:  # Bernoulli(fraction / k)
        k += 1
    return k % 2 == 1
