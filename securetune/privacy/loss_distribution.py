"""Privacy loss distributions (PLD) of Gaussian steps on sampled records, by the ``dp-accounting`` package.

Three ways to sample, each with the neighbouring relation that its accounting holds for (:class:`Sampling`).
Truncated and fixed-size sampling take a record in another one's place, so a record's presence moves the sum
by up to ``2 C``; their distribution is the mixture of Ganesh 2025, https://arxiv.org/abs/2508.15089, as
``dp-accounting`` builds it.

The discretisation rounds towards more loss ("connect the dots", Doroshenko et al. 2022,
https://arxiv.org/abs/2207.04380), so each epsilon is an upper bound, whatever the grid. The package is
imported on first use.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from securetune.errors import PrivacyError

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = [
    "FIXED_ORDER",
    "POISSON",
    "Phase",
    "Sampling",
    "SamplingKind",
    "check_delta",
    "check_phase",
    "check_phases",
    "check_sample_rate",
    "check_sampling",
    "check_steps",
    "compose",
    "rdp_event",
    "step_event",
]

MIN_NOISE_MULTIPLIER = 0.1  # below it the sum is all but published; the grid would also grow without bound
MAX_STEPS = 1_000_000
COARSE_INTERVAL = 1e-3  # width of a privacy-loss bucket
FINE_INTERVAL = 1e-4
MEANINGLESS_EPSILON = 1000.0  # a looser bound is reported above it: the exact number would fill the memory
COARSE_STEPS = 200  # up to here the coarse grid costs less than 1e-3 of epsilon


SamplingKind = Literal["Poisson", "truncated Poisson", "fixed size", "fixed order"]
_HIDES_THE_NUMBER: tuple[SamplingKind, ...] = ("Poisson", "fixed order")  # their number of records is private


class Sampling(NamedTuple):
    """How the records of a step are chosen, beside their rate: what the accountant must know.

    Attributes:
        kind: "Poisson": each record independently. "truncated Poisson": the same, and of a sample larger than
            ``max_batch_size`` a uniformly random part of that size. "fixed size": a uniformly random set of
            ``max_batch_size`` records. "fixed order": batches in an order that nothing is gained from;
            a whole run is one mechanism, so the rate is 1.
        num_records: Number of records, a public constant that epsilon depends on; ``None`` for Poisson
            sampling and fixed order, where it is private.
        max_batch_size: Most records in one step; ``None`` for those two, which have no such limit.
    """

    kind: SamplingKind = "Poisson"
    num_records: int | None = None
    max_batch_size: int | None = None

    @property
    def neighbouring_relation(self) -> str:
        """How two data sets differ that the accounting makes hard to tell apart.

        Poisson sampling hides whether a record was there at all. The two others need a public number of
        records: truncated sampling hides whether a record was an empty one (without gradient), which keeps
        its place in the count; fixed-size sampling hides which record it was.
        """
        relations: dict[SamplingKind, str] = {
            "Poisson": "add or remove one",
            "truncated Poisson": "zero out one",
            "fixed size": "replace one",
            "fixed order": "add or remove one",
        }
        return relations[self.kind]


POISSON = Sampling()
FIXED_ORDER = Sampling("fixed order")


class Phase(NamedTuple):
    """A stretch of steps of one mechanism; a run whose settings changed is a list of phases."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    sampling: Sampling = POISSON


def step_event(noise_multiplier: float, sample_rate: float, sampling: Sampling = POISSON) -> "DpEvent":
    """Describe one step to ``dp-accounting``: Gaussian noise on the sum over a sample.

    Compose it once per step, in a ``PLDAccountant`` of the sampling's neighbouring relation (add or remove
    one: ``ADD_OR_REMOVE_ONE``; zero out one: ``REPLACE_SPECIAL``; replace one: ``REPLACE_ONE``). A sample of
    fixed size is one of rate 1 that is truncated.

    Args:
        noise_multiplier: Noise standard deviation over the clipping threshold, > 0.
        sample_rate: Probability in (0, 1] of each record, before truncation.
        sampling: How the records are chosen.

    Returns:
        The event.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent

    if sampling.kind == "fixed order":
        return GaussianDpEvent(noise_multiplier)
    if sampling.kind == "Poisson":
        return PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))
    num_records, max_batch_size = _public_sizes(sampling)
    rate = 1.0 if sampling.kind == "fixed size" else sample_rate
    return TruncatedSubsampledGaussianDpEvent(num_records, rate, max_batch_size, noise_multiplier)


def rdp_event(noise_multiplier: float, sample_rate: float, sampling: Sampling = POISSON) -> "DpEvent | None":
    """Describe one step to the Renyi accountant of ``dp-accounting``, which knows fewer ways to sample.

    Args:
        noise_multiplier: Noise standard deviation over the clipping threshold, > 0.
        sample_rate: Probability in (0, 1] of each record, before truncation.
        sampling: How the records are chosen.

    Returns:
        The event, in terms of the largest change of the sum, which is ``2 C`` where one record is replaced by
        another; ``None`` for truncated sampling, which that accountant cannot count.
    """
    from dp_accounting import GaussianDpEvent, SampledWithoutReplacementDpEvent

    if sampling.kind == "truncated Poisson":
        return None
    if sampling.kind in _HIDES_THE_NUMBER:
        return step_event(noise_multiplier, sample_rate, sampling)
    return SampledWithoutReplacementDpEvent(*_public_sizes(sampling), GaussianDpEvent(noise_multiplier / 2))


def accountant_relation(sampling: Sampling) -> "NeighboringRelation":
    """Name a sampling's neighbouring relation as ``dp-accounting`` does.

    Args:
        sampling: How the records are chosen.

    Returns:
        The relation to make an accountant with.
    """
    from dp_accounting import NeighboringRelation

    relations = {
        "Poisson": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "truncated Poisson": NeighboringRelation.REPLACE_SPECIAL,
        "fixed size": NeighboringRelation.REPLACE_ONE,
        "fixed order": NeighboringRelation.ADD_OR_REMOVE_ONE,
    }
    return relations[sampling.kind]


def interval_for(steps: int) -> float:
    """Choose the grid: rounding adds up over the steps.

    Args:
        steps: Number of steps of the run.

    Returns:
        The width of a privacy-loss bucket.
    """
    return COARSE_INTERVAL if steps <= COARSE_STEPS else FINE_INTERVAL


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

    Order 2 of the Renyi divergence has a closed form for a Poisson sample (Mironov, Talwar and Zhang 2019,
    https://arxiv.org/abs/1908.10530, section 3.3), and a bound for sampling without replacement (Wang, Balle
    and Kasiviswanathan 2019, https://arxiv.org/abs/1808.00087, theorem 9), here for replacing one of two
    vectors of norm ``C`` by another; each gives this epsilon (Mironov 2017, https://arxiv.org/abs/1702.07476,
    proposition 3).

    Args:
        phases: Checked phases.
        delta: In (0, 1).

    Returns:
        An upper bound on epsilon.
    """
    return -math.log(delta) + sum(phase.steps * _order_two_divergence(phase) for phase in phases)


def _order_two_divergence(phase: Phase) -> float:
    replaced_loss = 4 * phase.noise_multiplier**-2  # order 2 of a Gaussian that moves by 2 C
    replaced = min(4 * math.expm1(replaced_loss), 2 * math.exp(replaced_loss))
    if phase.sampling.kind == "fixed size":
        return math.log1p(phase.sample_rate**2 * replaced)
    kept = phase.sample_rate**2 * math.expm1(phase.noise_multiplier**-2)
    if phase.sampling.kind == "truncated Poisson":
        # whether the others alone fill the batch does not depend on the record; then its rate is lower
        from scipy.stats import binom

        num_records, max_batch_size = _public_sizes(phase.sampling)
        full = float(binom.sf(max_batch_size - 1, num_records - 1, phase.sample_rate))
        kept = (1 - full) * kept + full * phase.sample_rate**2 * replaced
    return math.log1p(kept)


def compose(phases: tuple[Phase, ...], interval: float) -> "PrivacyLossDistribution":
    """Build the distribution of a whole run.

    Args:
        phases: At least one, each checked and of at least one step, under relations that can be composed.
        interval: Width of a privacy-loss bucket.

    Returns:
        The distribution, for both directions of the neighbouring relation.
    """
    total: PrivacyLossDistribution | None = None
    for phase in phases:
        if phase.sample_rate == 1 and phase.sampling.kind in _HIDES_THE_NUMBER:  # Gaussians add up exactly
            noise_multiplier = phase.noise_multiplier / math.sqrt(phase.steps)
            part = _one_step(noise_multiplier, 1.0, phase.sampling, interval)
        else:
            part = _one_step(phase.noise_multiplier, phase.sample_rate, phase.sampling, interval)
            part = part.self_compose(phase.steps)
        total = part if total is None else total.compose(part)
    assert total is not None
    return total


@lru_cache(maxsize=4)
def _one_step(
    noise_multiplier: float, sample_rate: float, sampling: Sampling, interval: float
) -> "PrivacyLossDistribution":
    from dp_accounting.pld import privacy_loss_distribution

    relation = accountant_relation(sampling)
    if sampling.kind in _HIDES_THE_NUMBER:
        return privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier,
            value_discretization_interval=interval,
            sampling_prob=sample_rate,
            neighboring_relation=relation,
        )
    num_records, max_batch_size = _public_sizes(sampling)
    return privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        num_records,
        1.0 if sampling.kind == "fixed size" else sample_rate,
        max_batch_size,
        noise_multiplier,
        value_discretization_interval=interval,
        neighboring_relation=relation,
    )


def _public_sizes(sampling: Sampling) -> tuple[int, int]:
    assert sampling.num_records is not None
    assert sampling.max_batch_size is not None
    return sampling.num_records, sampling.max_batch_size


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
    if not (at_least <= steps <= MAX_STEPS and steps == int(steps) and not isinstance(steps, float)):
        raise ValueError(f"steps must be a whole number from {at_least} to {MAX_STEPS}, got {steps}.")


def check_phase(phase: Phase) -> None:
    """Refuse a phase that the accountant cannot count."""
    if not MIN_NOISE_MULTIPLIER <= phase.noise_multiplier < math.inf:
        raise ValueError(
            f"noise_multiplier must be a finite number >= {MIN_NOISE_MULTIPLIER}, "
            f"got {phase.noise_multiplier}."
        )
    check_sampling(phase.sampling, phase.sample_rate)
    check_steps(phase.steps, at_least=0)


def check_sampling(sampling: Sampling, sample_rate: float) -> None:
    """Refuse a sampling that lacks its public constants, or contradicts its rate."""
    check_sample_rate(sample_rate)
    kind, num_records, max_batch_size = sampling
    if kind in _HIDES_THE_NUMBER:
        if kind == "fixed order" and sample_rate != 1:
            raise ValueError(
                "batches in fixed order are not amplified by sampling: sample_rate must be 1, got "
                f"{sample_rate}."
            )
        if (num_records, max_batch_size) != (None, None):
            raise ValueError(
                f"{kind} sampling has neither num_records (private under it) nor max_batch_size, got "
                f"{num_records} and {max_batch_size}. Leave them out, or use truncated Poisson sampling."
            )
        return
    if num_records is None or max_batch_size is None or not 1 <= max_batch_size <= num_records:
        raise ValueError(
            f"{kind} sampling needs public constants 1 <= max_batch_size <= num_records, got "
            f"{max_batch_size} and {num_records}."
        )
    if kind == "fixed size" and sample_rate != max_batch_size / num_records:
        raise ValueError(
            f"fixed size sampling takes each record with probability max_batch_size / num_records = "
            f"{max_batch_size / num_records}, got sample_rate={sample_rate}."
        )


def check_phases(phases: Iterable[Phase]) -> None:
    """Refuse phases that the accountant cannot count, or whose guarantees speak of different neighbours.

    Args:
        phases: The run.

    Raises:
        ValueError: If a phase has a value out of its range.
        PrivacyError: If fixed-size phases are mixed with others. Poisson phases hold for zeroing a record out
            as well, with the same numbers, so they can be composed with truncated ones.
    """
    kinds: set[SamplingKind] = set()
    for phase in phases:
        check_phase(phase)
        kinds.add(phase.sampling.kind)
    if "fixed size" in kinds and len(kinds) > 1:
        raise PrivacyError(
            f"one epsilon cannot hold for phases of {', '.join(sorted(kinds))} sampling: fixed-size sampling "
            "hides which record was there (replace one), the others whether it was there. Use one kind of "
            "sampling for the whole run."
        )
