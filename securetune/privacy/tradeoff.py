"""What the whole privacy curve of a run says, beyond one pair (epsilon, delta)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from securetune.privacy.loss_distribution import (
    MEANINGLESS_EPSILON,
    Phase,
    check_delta,
    check_phases,
    closed_form_bound,
    compose,
    interval_for,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = ["gdp_mu", "max_true_positive_rate", "max_true_positive_rate_of_run"]

_GRID_POINTS = 500  # costs 0.1 % of mu over a grid ten times as fine


def max_true_positive_rate(epsilon: float, delta: float, false_positive_rate: float = 0.01) -> float:
    """Bound what any attack can tell about one record's membership from an (epsilon, delta) run.

    The hypothesis-testing region of Kairouz, Oh and Viswanath 2015, https://arxiv.org/abs/1311.0776, section
    2.

    Args:
        epsilon: >= 0.
        delta: In [0, 1].
        false_positive_rate: Fraction of non-members the attack calls members, in [0, 1].

    Returns:
        The highest fraction of members that such an attack can find.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}.")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta must be in [0, 1], got {delta}.")
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"false_positive_rate must be in [0, 1], got {false_positive_rate}.")
    few_alarms = math.exp(min(epsilon, 700.0)) * false_positive_rate + delta
    few_misses = 1 - math.exp(-epsilon) * (1 - delta - false_positive_rate)
    return max(0.0, min(1.0, few_alarms, few_misses))


def max_true_positive_rate_of_run(phases: Sequence[Phase], false_positive_rate: float = 0.01) -> float:
    """Bound a membership attack by all pairs (epsilon, delta) that a run satisfies, not by one of them.

    Args:
        phases: The run, at least one step.
        false_positive_rate: Fraction of non-members the attack calls members, in [0, 1].

    Returns:
        A bound at most as high as :func:`max_true_positive_rate` at any one pair, up to the grid of pairs.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_phases(phases)
    taken = tuple(phase for phase in phases if phase.steps > 0)
    if not taken:
        return max_true_positive_rate(0.0, 0.0, false_positive_rate)
    if closed_form_bound(taken, 0.01) > MEANINGLESS_EPSILON:
        return 1.0
    pld = compose(taken, interval_for(sum(phase.steps for phase in taken)))
    largest = min(pld.get_epsilon_for_delta(1e-12), 50.0)  # beyond, no pair bounds anything
    epsilons = [largest * i / 1000 for i in range(1001)]
    deltas: Any = pld.get_delta_for_epsilon(epsilons)
    return min(
        max_true_positive_rate(epsilon, min(max(float(delta), 0.0), 1.0), false_positive_rate)
        for epsilon, delta in zip(epsilons, deltas, strict=True)
    )


def gdp_mu(phases: Sequence[Phase], smallest_delta: float) -> float:
    """Bound a run by one Gaussian: the ``mu`` of Gaussian differential privacy, read off the PLD.

    A run is ``mu``-GDP when telling it from a neighbour's run is no easier than telling ``N(0, 1)`` from
    ``N(mu, 1)`` (Dong, Roth and Su 2022, https://arxiv.org/abs/1905.02383, definition 2.5). The central limit
    theorem's value (their section 5.2) is an approximation that can lie below the truth, and is not used.

    Guarantees:
        For every delta from ``smallest_delta`` to 1, epsilon of the PLD is at most that of the Gaussian.
        Below it nothing is said: far out in the tail sampling helps no more, and only the ``mu`` of the same
        run without sampling holds at every delta; the answer is never above that one.

    Args:
        phases: The run.
        smallest_delta: Where the comparison ends, in (0, 1): the run's own delta, or less.

    Returns:
        ``mu`` >= 0, rounded up.

    Raises:
        ValueError: If an argument is out of range.
        PrivacyError: If the phases' samplings speak of different neighbours.
    """
    import numpy as np

    check_delta(smallest_delta)
    check_phases(phases)
    taken = tuple(phase for phase in phases if phase.steps > 0)
    unsampled = math.sqrt(
        sum(phase.steps * (_largest_change(phase) / phase.noise_multiplier) ** 2 for phase in taken)
    )
    if not taken or closed_form_bound(taken, smallest_delta) > MEANINGLESS_EPSILON:
        return unsampled
    pld = compose(taken, interval_for(sum(phase.steps for phase in taken)))
    epsilons = np.linspace(0.0, pld.get_epsilon_for_delta(smallest_delta), _GRID_POINTS)
    # Both curves fall, so a Gaussian that at each point reaches the run's delta of the point before lies
    # above the run everywhere between them.
    deltas = np.asarray(pld.get_delta_for_epsilon(epsilons.tolist()))[:-1]
    low, high = 0.0, unsampled
    while high - low > 1e-9 * high:
        mu = (low + high) / 2
        low, high = (low, mu) if (_gaussian_deltas(epsilons[1:], mu) >= deltas).all() else (mu, high)
    return high


def _largest_change(phase: Phase) -> float:
    """Most that one record can move a step's sum, in units of ``C``, when the sample is known."""
    return 2.0 if phase.sampling.kind == "fixed size" else 1.0


def _gaussian_deltas(epsilons: "np.ndarray", mu: float) -> "np.ndarray":
    """Compute delta of ``mu``-GDP (Balle and Wang 2018, https://arxiv.org/abs/1805.06530, theorem 8)."""
    import numpy as np
    from scipy.special import log_ndtr

    return np.exp(log_ndtr(mu / 2 - epsilons / mu)) - np.exp(epsilons + log_ndtr(-mu / 2 - epsilons / mu))
