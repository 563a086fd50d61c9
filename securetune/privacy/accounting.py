"""How much privacy a run costs: noise calibration and epsilon by privacy loss distributions (PLD).

Every number here is for one mechanism: at each step a secret random sample of the records, a sum of
per-record vectors of L2 norm at most ``C``, and Gaussian noise of standard deviation ``noise_multiplier * C``
on that sum. The sample is a Poisson sample (each record taken independently with probability
``sample_rate``; two data sets are neighbours when one is the other plus one record: add or remove one) unless
the phase says otherwise (:class:`securetune.privacy.loss_distribution.Sampling`). Where the unit is a user,
read "user" for "record". The accountant is the ``dp-accounting`` package; it is imported on first use.

The PLD discretisation rounds towards more loss ("connect the dots", Doroshenko et al. 2022,
https://arxiv.org/abs/2207.04380), so each epsilon is an upper bound, whatever the grid.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import NamedTuple

from securetune.errors import PrivacyError
from securetune.privacy.loss_distribution import (
    COARSE_INTERVAL,
    FINE_INTERVAL,
    MEANINGLESS_EPSILON,
    MIN_NOISE_MULTIPLIER,
    POISSON,
    Phase,
    Sampling,
    SamplingKind,
    accountant_relation,
    check_delta,
    check_phase,
    check_phases,
    check_sampling,
    check_steps,
    epsilon_at,
    interval_for,
    rdp_event,
    step_event,
)
from securetune.privacy.tradeoff import gdp_mu, max_true_positive_rate, max_true_positive_rate_of_run

__all__ = [
    "EpsilonCurve",
    "Phase",
    "PrivacyPlan",
    "PrivacySpec",
    "Sampling",
    "accountant_name",
    "calibrate_noise_multiplier",
    "epsilon_curve",
    "epsilon_of_phases",
    "epsilon_spent",
    "gdp_mu",
    "max_true_positive_rate",
    "max_true_positive_rate_of_run",
    "plan_privacy",
    "rdp_epsilon",
    "step_event",
    "unit_statement",
]

NEIGHBOURING_RELATION = POISSON.neighbouring_relation
UNIT_STATEMENT = "one record; a person with several records is not covered"
MAX_NOISE_MULTIPLIER = 10_000.0
_CALIBRATION_TOLERANCE = 1e-5  # relative, on the noise multiplier
_GRID_COST = 0.05  # most that the PLD's grid adds to epsilon, where noise is large and steps are many: 0.036


@dataclass(frozen=True, kw_only=True)
class PrivacySpec:
    """What the user asks of a private run: public constants only, nothing measured on the private data.

    Attributes:
        target_epsilon: Largest epsilon the run may cost, > 0.
        delta: Probability allowed for the guarantee to fail, in (0, 1) and at most one over the number of
            records.
        sample_rate: Probability ``q`` in (0, 1] of each record at each step.
        steps: Planned number of steps, from 1 to ``MAX_STEPS``.
        max_grad_norm: Clipping threshold ``C`` > 0, in units of the gradient's L2 norm.
        expected_batch_size: Public divisor of the noised sum, in records, >= 1.
        sampler: How the records of a step are chosen.
        num_records: Number of records where epsilon depends on it, which makes it public; ``None`` for
            Poisson sampling.
        max_batch_size: Most records in one step; ``None`` for Poisson sampling.

    Raises:
        ValueError: If a value is out of its range.
    """

    target_epsilon: float
    delta: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    expected_batch_size: int
    sampler: SamplingKind = "Poisson"
    num_records: int | None = None
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        _check_target_epsilon(self.target_epsilon)
        check_delta(self.delta)
        check_sampling(self.sampling, self.sample_rate)
        check_steps(self.steps, at_least=1)
        if not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm must be a finite number > 0, got {self.max_grad_norm}.")
        if not (self.expected_batch_size >= 1 and isinstance(self.expected_batch_size, int)):
            raise ValueError(
                f"expected_batch_size must be a whole number >= 1, got {self.expected_batch_size}."
            )

    @property
    def sampling(self) -> Sampling:
        """How the records of a step are chosen, as the accountant takes it."""
        return Sampling(self.sampler, self.num_records, self.max_batch_size)


class EpsilonCurve(NamedTuple):
    """Epsilon after so many steps, at a few steps of a run.

    Attributes:
        steps: Increasing; the last one is the whole run.
        epsilons: Epsilon after each of ``steps``, at the curve's delta.
    """

    steps: tuple[int, ...]
    epsilons: tuple[float, ...]

    def at(self, step: int) -> float:
        """Bound epsilon after ``step`` steps: exact at a point of the curve, else the next point's value.

        Args:
            step: Steps taken, from 0 to the end of the curve.

        Returns:
            An upper bound on epsilon, 0 for no step.

        Raises:
            ValueError: If ``step`` is outside the curve.
        """
        if step == 0:
            return 0.0
        if not 0 < step <= self.steps[-1]:
            raise ValueError(f"step must be from 0 to {self.steps[-1]}, the end of the curve, got {step}.")
        return next(epsilon for end, epsilon in zip(self.steps, self.epsilons, strict=True) if end >= step)


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What a run will cost, known before it starts.

    Attributes:
        spec: What was asked for.
        noise_multiplier: Standard deviation of the noise on the sum, in units of ``spec.max_grad_norm``.
        epsilon: PLD epsilon of all planned steps at ``spec.delta``, at most ``spec.target_epsilon``.
        rdp_epsilon: The same by Renyi accounting, a looser bound from other mathematics (cross-check);
            ``None`` for truncated Poisson sampling, which the Renyi accountant cannot count.
        gdp_mu: The whole run is at most as telling as one Gaussian of sensitivity ``mu`` and standard
            deviation 1, at every delta from ``spec.delta`` up: an upper bound from the PLD.
        max_tpr_at_1pct_fpr: Highest true-positive rate, at 1 % false positives, of any membership attack on
            one record that ``(epsilon, delta)`` allows.
        max_tpr_at_1pct_fpr_pld: The same from the whole PLD: tighter.
        curve: Epsilon over the steps.
        accountant: Name and version of what computed ``epsilon``.
    """

    spec: PrivacySpec
    noise_multiplier: float
    epsilon: float
    rdp_epsilon: float | None
    gdp_mu: float
    max_tpr_at_1pct_fpr: float
    max_tpr_at_1pct_fpr_pld: float
    curve: EpsilonCurve
    accountant: str

    @property
    def phase(self) -> Phase:
        """The whole planned run, as the accountant takes it."""
        return Phase(self.noise_multiplier, self.spec.sample_rate, self.spec.steps, self.spec.sampling)


def unit_statement(unit: str, *, max_records_per_unit: int | None = None) -> str:
    """Say in words whom epsilon protects, for plans and reports.

    Args:
        unit: "record" or "user".
        max_records_per_unit: Most records of a user in one step.

    Returns:
        The statement.

    Raises:
        ValueError: If there is no such unit.
    """
    records = " with all records"
    if max_records_per_unit is not None:
        records = f", with up to {max_records_per_unit} records in a step, of all"
    statements = {
        "record": UNIT_STATEMENT,
        "user": f"one user{records} under that user's id; a person with several ids is not covered",
    }
    if unit not in statements:
        raise ValueError(f"unit must be one of {', '.join(statements)}, got {unit!r}.")
    return statements[unit]


def accountant_name() -> str:
    """Name the accountant and its version, for plans, ledgers and reports.

    Returns:
        For example ``"dp-accounting 0.6.0, PLD"``.
    """
    return f"dp-accounting {version('dp-accounting')}, PLD"


def plan_privacy(spec: PrivacySpec) -> PrivacyPlan:
    """Calibrate the noise for ``spec`` and work out everything a plan prints about privacy.

    Args:
        spec: What the user asks for.

    Returns:
        The plan; ``plan.epsilon <= spec.target_epsilon``.

    Raises:
        PrivacyError: If no allowed noise reaches the target, or the two accountants contradict each other.
    """
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=spec.target_epsilon,
        delta=spec.delta,
        sample_rate=spec.sample_rate,
        steps=spec.steps,
        sampling=spec.sampling,
    )
    phase = Phase(noise_multiplier, spec.sample_rate, spec.steps, spec.sampling)
    epsilon = epsilon_of_phases([phase], spec.delta)
    cross_check = None if spec.sampler == "truncated Poisson" else rdp_epsilon([phase], spec.delta)
    if cross_check is not None and cross_check < epsilon * (1 - 1e-3) - _GRID_COST:
        raise PrivacyError(
            f"the accountants contradict each other: PLD epsilon {epsilon:.6g} is above RDP epsilon "
            f"{cross_check:.6g}, at noise_multiplier={noise_multiplier:.6g}, "
            f"sample_rate={spec.sample_rate:.6g}, steps={spec.steps}, delta={spec.delta:.3g}. PLD must be "
            "the tighter one. Claim no epsilon for this plan; please report these values as a bug."
        )
    return PrivacyPlan(
        spec=spec,
        noise_multiplier=noise_multiplier,
        epsilon=epsilon,
        rdp_epsilon=cross_check,
        gdp_mu=gdp_mu([phase], spec.delta),
        max_tpr_at_1pct_fpr=max_true_positive_rate(epsilon, spec.delta, 0.01),
        max_tpr_at_1pct_fpr_pld=max_true_positive_rate_of_run([phase], 0.01),
        curve=epsilon_curve(phase, spec.delta),
        accountant=accountant_name(),
    )


def calibrate_noise_multiplier(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, sampling: Sampling = POISSON
) -> float:
    """Find the least noise that keeps ``steps`` steps within ``(target_epsilon, delta)``.

    Guarantees:
        ``epsilon_spent`` at the returned value is at most ``target_epsilon``, never above it. It is within
        1e-3 of the target (relative) for targets up to 100.

    Args:
        target_epsilon: Largest epsilon allowed, > 0.
        delta: In (0, 1).
        sample_rate: Probability in (0, 1] of each record at each step.
        steps: Number of steps, from 1 to ``MAX_STEPS``.
        sampling: How the records of a step are chosen.

    Returns:
        The noise multiplier: standard deviation of the noise on the sum, over the clipping threshold.

    Raises:
        ValueError: If an argument is out of range.
        PrivacyError: If the answer would lie outside ``MIN_NOISE_MULTIPLIER`` .. ``MAX_NOISE_MULTIPLIER``.
    """
    _check_target_epsilon(target_epsilon)
    check_delta(delta)
    check_sampling(sampling, sample_rate)
    check_steps(steps, at_least=1)
    asked = f"target_epsilon={target_epsilon:g}, delta={delta:g}, sample_rate={sample_rate:g}, steps={steps}"

    def gap(noise_multiplier: float, interval: float) -> float:
        phase = Phase(noise_multiplier, sample_rate, steps, sampling)
        return epsilon_at((phase,), delta, interval) - target_epsilon

    if sample_rate < 1 and -math.expm1(steps * math.log1p(-sample_rate)) <= delta:
        raise PrivacyError(
            f"delta is too large: at {asked} a record is used at all with probability at most delta, so "
            "the formula would allow to publish it outright. Lower delta (at most one over the number of "
            "records)."
        )
    no_privacy = PrivacyError(
        f"privacy.target_epsilon asks for next to no privacy: {asked} needs no noise multiplier above "
        f"{MIN_NOISE_MULTIPLIER:g}, or allows an epsilon above {MEANINGLESS_EPSILON:g}; single records show "
        "through then. Lower target_epsilon, or set privacy.enabled to false and claim no epsilon."
    )
    if target_epsilon > MEANINGLESS_EPSILON:
        raise no_privacy
    # Downwards from the largest noise, since epsilon's cost in memory grows as the noise falls.
    if gap(MAX_NOISE_MULTIPLIER, FINE_INTERVAL) > 0:
        reached = gap(MAX_NOISE_MULTIPLIER, FINE_INTERVAL) + target_epsilon
        raise PrivacyError(
            f"privacy.target_epsilon cannot be reached: {asked} needs a noise multiplier above "
            f"{MAX_NOISE_MULTIPLIER:g} (there epsilon is still {reached:.3g}). Raise target_epsilon or "
            "delta, or lower steps or sample_rate."
        )
    upper, lower = MAX_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER / 2
    while gap(lower, COARSE_INTERVAL) <= 0:
        if lower <= MIN_NOISE_MULTIPLIER:
            raise no_privacy
        upper, lower = lower, max(lower / 2, MIN_NOISE_MULTIPLIER)
    interval = interval_for(steps)
    if interval != COARSE_INTERVAL and gap(upper, COARSE_INTERVAL) <= 0:
        # The coarse answer costs little and lies just above the fine one.
        coarse = _root(lambda sigma: gap(sigma, COARSE_INTERVAL), lower, upper)
        upper, lower = coarse, max(coarse * 0.998, lower)
        while gap(lower, interval) <= 0 and lower > MIN_NOISE_MULTIPLIER:
            upper, lower = lower, max(lower * 0.97, MIN_NOISE_MULTIPLIER)
    noise_multiplier = _root(lambda sigma: gap(sigma, interval), lower, upper)
    while gap(noise_multiplier, interval) > 0:
        noise_multiplier *= 1 + _CALIBRATION_TOLERANCE
    return noise_multiplier


def epsilon_spent(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Compute epsilon of ``steps`` equal steps.

    Args:
        noise_multiplier: Noise standard deviation over the clipping threshold, > 0.
        sample_rate: Probability in (0, 1] of each record at each step.
        steps: Number of steps, from 0 to ``MAX_STEPS``.
        delta: In (0, 1).

    Returns:
        An upper bound on epsilon at ``delta``; 0 for no step.

    Raises:
        ValueError: If an argument is out of range.
    """
    return epsilon_of_phases([Phase(noise_multiplier, sample_rate, steps)], delta)


def epsilon_of_phases(phases: Sequence[Phase], delta: float) -> float:
    """Compute epsilon of a run whose noise or sample rate changed on the way, all phases on the same records.

    Args:
        phases: Any order, since composition does not depend on it; phases of no steps are allowed.
        delta: In (0, 1), for the whole run.

    Returns:
        An upper bound on epsilon at ``delta``.

    Raises:
        ValueError: If an argument is out of range.
        PrivacyError: If the phases' samplings speak of different neighbours.
    """
    check_delta(delta)
    check_phases(phases)
    taken = tuple(phase for phase in phases if phase.steps > 0)
    return epsilon_at(taken, delta, interval_for(sum(phase.steps for phase in taken)))


def rdp_epsilon(phases: Sequence[Phase], delta: float) -> float:
    """Compute epsilon by Renyi differential privacy, the cross-check of the PLD value.

    The sampled Gaussian mechanism of Mironov, Talwar and Zhang 2019, https://arxiv.org/abs/1908.10530; for
    samples of fixed size Wang, Balle and Kasiviswanathan 2019, https://arxiv.org/abs/1808.00087, theorem 27.

    Args:
        phases: As for :func:`epsilon_of_phases`.
        delta: In (0, 1), for the whole run.

    Returns:
        An upper bound on epsilon at ``delta``, above the PLD's up to the grid of the latter.

    Raises:
        ValueError: If an argument is out of range, or a phase samples in a way that the accountant cannot
            count (truncated Poisson).
        PrivacyError: If the phases' samplings speak of different neighbours.
    """
    from dp_accounting.rdp import RdpAccountant

    check_delta(delta)
    check_phases(phases)
    relation = accountant_relation(phases[0].sampling if phases else POISSON)
    accountant = RdpAccountant(neighboring_relation=relation)
    # Some orders do not converge and are left out with a warning each: the bound stays valid, the noise helps
    # nobody.
    with _quiet_absl():
        for phase in phases:
            event = rdp_event(phase.noise_multiplier, phase.sample_rate, phase.sampling)
            if event is None:
                raise ValueError(f"the Renyi accountant cannot count {phase.sampling.kind} sampling.")
            if phase.steps > 0:
                accountant.compose(event, phase.steps)
        return float(accountant.get_epsilon(delta))


def epsilon_curve(phase: Phase, delta: float, *, num_points: int = 20) -> EpsilonCurve:
    """Compute epsilon along a run at a few steps, for plots and progress bars.

    The one-step distribution is built once, so a curve costs little more than its last point.

    Args:
        phase: The whole run.
        delta: In (0, 1).
        num_points: At most so many points, evenly spread, >= 1; the last step is always one of them.

    Returns:
        The curve, not decreasing; its last point equals :func:`epsilon_of_phases` of ``phase``.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_delta(delta)
    check_phase(phase)
    check_steps(phase.steps, at_least=1)
    if num_points < 1:
        raise ValueError(f"num_points must be >= 1, got {num_points}.")
    points = min(num_points, phase.steps)
    steps = tuple(math.ceil(phase.steps * (i + 1) / points) for i in range(points))
    interval = interval_for(phase.steps)
    epsilons: list[float] = []
    for count in steps:
        epsilon = epsilon_at((phase._replace(steps=count),), delta, interval)
        epsilons.append(max([epsilon, *epsilons[-1:]]))
    return EpsilonCurve(steps, tuple(epsilons))


def _root(gap: Callable[[float], float], lower: float, upper: float) -> float:
    """Find where ``gap`` crosses zero, falling; without a crossing, the end that is nearest to one."""
    from scipy.optimize import root_scalar

    if gap(upper) >= 0:
        return upper
    if gap(lower) <= 0:
        return lower
    found = root_scalar(gap, bracket=(lower, upper), method="brentq", rtol=_CALIBRATION_TOLERANCE)
    return float(found.root)


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_target_epsilon(target_epsilon: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon must be a finite number > 0, got {target_epsilon}.")
