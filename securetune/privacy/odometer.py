"""A privacy budget that is charged step by step and stops a run before the target is passed."""

from collections.abc import Sequence

from securetune.errors import PrivacyError
from securetune.privacy.accounting import epsilon_of_phases
from securetune.privacy.loss_distribution import COARSE_STEPS, MAX_STEPS, Phase, check_delta, check_phases

__all__ = ["BudgetOdometer"]

_STEPS_AHEAD = 128  # so far a check looks ahead, so that charging step by step rarely computes an epsilon


class BudgetOdometer:
    """Compose phases as they happen, and refuse the one that would pass the target.

    Charge first, release the noise afterwards. The odometer lives in memory: a ledger on disk is what counts
    a run's steps across a crash. A resumed run gives the ledger's phase as ``spent``, and so does a run that
    goes on with other noise.

    Guarantees:
        Epsilon of everything charged never passes ``target_epsilon``, whatever the order of the charges. A
        refused charge changes nothing. Composing by PLD holds for phases that were fixed beforehand or follow
        from public facts such as the step number: noise or rates chosen by looking at what private steps
        released (the model included) are not covered.

    Args:
        target_epsilon: Largest epsilon allowed, > 0.
        delta: Probability allowed for the guarantee to fail, in (0, 1).
        reportable_epsilon: Whether sampler and noise have secret keys; with a fixed test key the odometer
            stops just the same but reports no epsilon.
        spent: Phases charged before, such as ``read_ledger(path).phase`` of a run that is continued.

    Raises:
        ValueError: If an argument is out of range.
        PrivacyError: If what was spent before has passed the target.
    """

    def __init__(
        self,
        target_epsilon: float,
        delta: float,
        *,
        reportable_epsilon: bool,
        spent: Sequence[Phase] = (),
    ) -> None:
        if not target_epsilon > 0:
            raise ValueError(f"target_epsilon must be > 0, got {target_epsilon}.")
        check_delta(delta)
        self.target_epsilon = target_epsilon
        self.delta = delta
        self._reportable_epsilon = reportable_epsilon
        self._phases: tuple[Phase, ...] = ()
        self._room: dict[Phase, int] = {}  # steps of a mechanism that are known to fit
        for phase in spent:
            self._phases = _merged(self._phases, phase)
        cost = epsilon_of_phases(self._phases, delta)
        if cost > target_epsilon:
            raise PrivacyError(
                f"what was spent before costs epsilon {cost:.4g} at delta={delta:g}, above the target of "
                f"{target_epsilon:g}: nothing more can be charged. Stop here, or plan with a higher target "
                "and report that one."
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Everything charged; steps of one mechanism are one phase."""
        return self._phases

    def epsilon(self) -> float | None:
        """Compute what was charged so far.

        Returns:
            An upper bound on epsilon at ``delta``, at most ``target_epsilon``; ``None`` where a fixed test
            key forbids to report one.
        """
        return epsilon_of_phases(self._phases, self.delta) if self._reportable_epsilon else None

    def remaining_steps(self, phase: Phase) -> int:
        """Count how many more steps of a mechanism fit into what is left.

        Args:
            phase: The mechanism; its own number of steps does not matter.

        Returns:
            The number of steps, up to what the accountant counts at all (``MAX_STEPS``).

        Raises:
            ValueError: If the phase has a value out of its range.
            PrivacyError: If its sampling speaks of other neighbours than that of the phases before.
        """
        check_phases([*self._phases, phase])
        return self._fitting(phase, MAX_STEPS)

    def can_afford(self, phase: Phase) -> bool:
        """Say whether a phase fits into what is left.

        Args:
            phase: Steps not yet taken.

        Returns:
            Whether :meth:`charge` would accept it.

        Raises:
            ValueError: If the phase has a value out of its range.
            PrivacyError: If its sampling speaks of other neighbours than that of the phases before.
        """
        check_phases([*self._phases, phase])
        mechanism = phase._replace(steps=0)
        if phase.steps > self._room.get(mechanism, 0):
            self._room[mechanism] = self._fitting(phase, max(phase.steps, _STEPS_AHEAD))
        return phase.steps <= self._room.get(mechanism, 0)

    def charge(self, phase: Phase) -> None:
        """Count a phase whose noise is about to be released.

        Args:
            phase: Steps not yet taken, such as ``sampler.phase(noise_multiplier, 1)``.

        Raises:
            ValueError: If the phase has a value out of its range.
            PrivacyError: If it would pass the target, or cannot be composed with the phases before; nothing
                is counted then, and the noise must not be released.
        """
        mechanism = phase._replace(steps=0)
        if not self.can_afford(phase):
            raise PrivacyError(
                f"{phase.steps} more steps with noise_multiplier={phase.noise_multiplier:g} at "
                f"sample_rate={phase.sample_rate:g} would pass the target of epsilon "
                f"{self.target_epsilon:g} at delta={self.delta:g}; {self._room[mechanism]} of them fit. End "
                "the run here, or use more noise for the rest."
            )
        self._phases = _merged(self._phases, phase)
        self._room = {mechanism: self._room.get(mechanism, 0) - phase.steps}

    def _fitting(self, phase: Phase, limit: int) -> int:
        """Find the most steps of a mechanism, up to ``limit``, that fit into what is left."""
        taken = sum(charged.steps for charged in self._phases)

        def fits(steps: int) -> bool:
            phases = _merged(self._phases, phase._replace(steps=steps))
            return epsilon_of_phases(phases, self.delta) <= self.target_epsilon

        steps = 0
        # Epsilon rises with the steps on one grid of the accountant's, which is finer for long runs.
        for end in (min(COARSE_STEPS - taken, limit), min(MAX_STEPS - taken, limit)):
            stride = 1
            while steps + stride <= end and fits(steps + stride):
                steps += stride
                stride *= 2
            while stride := stride // 2:
                if steps + stride <= end and fits(steps + stride):
                    steps += stride
            if steps < end:
                break
        return steps


def _merged(phases: tuple[Phase, ...], added: Phase) -> tuple[Phase, ...]:
    """Add steps to the phase of the same mechanism, since composition does not depend on the order."""
    for index, phase in enumerate(phases):
        if phase._replace(steps=added.steps) == added:
            joined = phase._replace(steps=phase.steps + added.steps)
            return (*phases[:index], joined, *phases[index + 1 :])
    return (*phases, added)
