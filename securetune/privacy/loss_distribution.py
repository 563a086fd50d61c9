"""Privacy loss distributions (PLD) of Poisson-sampled Gaussian steps, by the ``dp-accounting`` package.

The discretisation rounds towards more loss ("connect the dots", Doroshenko et al. 2022,
https://arxiv.org/abs/2207.04380), so each epsilon is an upper bound, whatever the grid. The package is
imported on first use.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dp_accounting import DpEvent
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = ["Phase", "check_delta", "check_phase", "check_sample_rate", "check_steps", "compose", "step_event"]

MIN_NOISE_MULTIPLIER = 0.1  # below it the sum is all but published; the grid would also grow without bound
MAX_STEPS = 1_000_000
COARSE_INTERVAL = 1e-3  # width of a privacy-loss bucket
FINE_INTERVAL = 1e-4
MEANINGLESS_EPSILON = 1000.0  # a looser bound is reported above it: the exact number would fill the memory
_COARSE_STEPS = 200  # up to here the coarse grid costs less than 1e-3 of epsilon


class Phase(NamedTuple):
    """A stretch of steps of one mechanism; a run whose settings changed is a list of phases."""

    noise_multiplier: float
    sample_rate: float
    steps: int


def step_event(noise_multiplier: float, sample_rate: float) -> "DpEvent":
    """Describe one step to ``dp-accounting``: Gaussian noise on a Poisson sample.

    Args:
        noise_multiplier: Noise standard deviation over the clipping threshold, > 0.
        sample_rate: Probability in (0, 1] of each record.

    Returns:
        The event; compose it once per step.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    return PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))


def interval_for(steps: int) -> float:
    """Choose the grid: rounding adds up over the steps.

    Args:
        steps: Number of steps of the run.

    Returns:
        The width of a privacy-loss bucket.
    """
    return COARSE_INTERVAL if steps <= _COARSE_STEPS else FINE_INTERVAL


@lru_cache(maxsize=512)
def epsilon_at(phases: tuple[Phase, ...], delta: float, interval: float) -> float:
    """Compute epsilon of checked phases on a given grid.

    Args:
        phases: Each of at least one step; no phase costs nothing.
        delta: In (0, 1).
        interval: Width of a privacy-loss bucket.

    Returns:
        An upper bound on epsilon.
    """
    if not phases:
        return 0.0
    bound = closed_form_bound(phases, delta)
    if bound > MEANINGLESS_EPSILON:
        return bound
    return float(compose(phases, interval).get_epsilon_for_delta(delta))


def closed_form_bound(phases: tuple[Phase, ...], delta: float) -> float:
    """Bound epsilon roughly, without a grid, to know beforehand how large a grid would become.

    Order 2 of the sampled Gaussian's Renyi divergence has a closed form (Mironov, Talwar and Zhang 2019,
    https://arxiv.org/abs/1908.10530, section 3.3); it gives this epsilon (Mironov 2017,
    https://arxiv.org/abs/1702.07476, proposition 3).

    Args:
        phases: Checked phases.
        delta: In (0, 1).

    Returns:
        An upper bound on epsilon.
    """
    return -math.log(delta) + sum(
        phase.steps * math.log1p(phase.sample_rate**2 * math.expm1(phase.noise_multiplier**-2))
        for phase in phases
    )


def compose(phases: tuple[Phase, ...], interval: float) -> "PrivacyLossDistribution":
    """Build the distribution of a whole run.

    Args:
        phases: At least one, each checked and of at least one step.
        interval: Width of a privacy-loss bucket.

    Returns:
        The distribution, for both directions of adding or removing one record.
    """
    total: PrivacyLossDistribution | None = None
    for phase in phases:
        if phase.sample_rate == 1:  # Gaussians add up exactly
            part = _one_step(phase.noise_multiplier / math.sqrt(phase.steps), 1.0, interval)
        else:
            part = _one_step(phase.noise_multiplier, phase.sample_rate, interval).self_compose(phase.steps)
        total = part if total is None else total.compose(part)
    assert total is not None
    return total


@lru_cache(maxsize=4)
def _one_step(noise_multiplier: float, sample_rate: float, interval: float) -> "PrivacyLossDistribution":
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sample_rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def check_delta(delta: float) -> None:
    """Refuse a delta outside (0, 1)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta}.")


def check_sample_rate(sample_rate: float) -> None:
    """Refuse a sample rate outside (0, 1]."""
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}.")


def check_steps(steps: int, *, at_least: int) -> None:
    """Refuse a number of steps outside ``at_least`` .. ``MAX_STEPS``."""
    if not at_least <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be from {at_least} to {MAX_STEPS}, got {steps}.")


def check_phase(phase: Phase) -> None:
    """Refuse a phase that the accountant cannot count."""
    if not MIN_NOISE_MULTIPLIER <= phase.noise_multiplier < math.inf:
        raise ValueError(
            f"noise_multiplier must be a finite number >= {MIN_NOISE_MULTIPLIER}, "
            f"got {phase.noise_multiplier}."
        )
    check_sample_rate(phase.sample_rate)
    check_steps(phase.steps, at_least=0)
