"""How often, and how far apart, one unit takes part in the steps of a run.

The cost of noise that is correlated over the steps depends on this pattern, so it is fixed before the run: by
:class:`EpochOrderSampler`, which keeps it by construction, or by :class:`ParticipationTracker`, which refuses
a loader's batches that break it. A unit is what the guarantee hides: one record, or all records of one user.

Nothing here is amplified by sampling: the guarantee holds against someone who knows every batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from securetune.errors import PrivacyError
from securetune.privacy.loss_distribution import FIXED_ORDER, check_steps
from securetune.privacy.noise import SAMPLING_STREAM, SecretKey, keystream_words
from securetune.privacy.sampling import Sampler

__all__ = ["EpochOrderSampler", "Participation", "ParticipationTracker"]

_MAX_BATCHES = 2**32 - 1  # what the exact multiply-and-shift below can hold


@dataclass(frozen=True, kw_only=True)
class Participation:
    """A promise about every unit of a run: the participation pattern ``(k, b)``.

    Attributes:
        steps: Planned number of steps of the run, from 1 to ``MAX_STEPS``.
        max_participations: At most so many steps ``k`` that one unit takes part in, >= 1.
        min_separation: At least so many steps ``b`` from one of them to the next, >= 1; 1 allows every step.

    Raises:
        ValueError: If a value is out of its range.
    """

    steps: int
    max_participations: int
    min_separation: int

    def __post_init__(self) -> None:
        check_steps(self.steps, at_least=1)
        if self.max_participations < 1:
            raise ValueError(f"max_participations must be >= 1, got {self.max_participations}.")
        if self.min_separation < 1:
            raise ValueError(f"min_separation must be >= 1, got {self.min_separation}.")

    @property
    def possible_participations(self) -> int:
        """How often a unit can take part: ``max_participations``, or fewer where the run is too short."""
        return min(self.max_participations, -(-self.steps // self.min_separation))

    def check_step(self, step: int) -> None:
        """Refuse a step that was not planned.

        Args:
            step: Logical step of the run, from 0.

        Raises:
            ValueError: If ``step`` is negative.
            PrivacyError: If ``step`` lies behind the planned steps.
        """
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}.")
        if step >= self.steps:
            raise PrivacyError(
                f"step {step} was not planned: the run's epsilon covers the {self.steps} steps from 0 to "
                f"{self.steps - 1}. End the run here, or start a new run, whose epsilon adds to this one's."
            )


class ParticipationTracker:
    """Refuse batches in which a unit takes part more often, or sooner again, than was promised.

    Args:
        participation: What was promised.
    """

    def __init__(self, participation: Participation) -> None:
        self.participation = participation
        self._last_step = 0
        self._taken: dict[int, tuple[int, int]] = {}  # unit -> (participations, last step)

    def admit(self, step: int, units: Iterable[int]) -> None:
        """Count the units of a batch, or of a part of it, before anything is computed from it.

        Args:
            step: Logical step of the run, from 0; may repeat (micro-batches) but never go back.
            units: Who takes part; nobody twice in one step.

        Raises:
            ValueError: If ``step`` is negative.
            PrivacyError: If a unit breaks the promise, or the step was not planned or goes back; nobody of
                ``units`` is counted then, and the batch must not be used.
        """
        self.participation.check_step(step)
        if step < self._last_step:
            raise PrivacyError(
                f"units of step {step} came after those of step {self._last_step}. Count the steps upwards."
            )
        limit, separation = self.participation.max_participations, self.participation.min_separation
        admitted: dict[int, tuple[int, int]] = {}
        for unit in units:
            count, last = admitted.get(unit) or self._taken.get(unit) or (0, step - separation)
            if count >= limit:
                raise PrivacyError(
                    f"unit {unit} would take part {count + 1} times by step {step}: max_participations is "
                    f"{limit}. Leave it out of this batch, or plan a run with more participations."
                )
            if step - last < separation:
                raise PrivacyError(
                    f"unit {unit} would take part at step {step} after step {last}: min_separation is "
                    f"{separation}. Keep a fixed order of the batches, or plan a run with a smaller one."
                )
            admitted[unit] = count + 1, step
        self._taken.update(admitted)
        self._last_step = step


class EpochOrderSampler(Sampler):
    """Give each record a secret batch of its own, once, and take the batches in turn: fixed-order epochs.

    With :class:`securetune.privacy.units.UserSampler` it is users that have a batch of their own. To the
    accountant, a step on these samples is a whole run of one mechanism, at rate 1.

    Record ``i`` belongs to batch ``floor(w * batches_per_epoch / 2**32)``, where ``w`` is the high half of
    word ``i`` of the ChaCha20 keystream (step 0 of stream ``SAMPLING_STREAM``, in the layout of
    :mod:`securetune.privacy.noise`); step ``t`` takes batch ``t mod batches_per_epoch``. So batch sizes vary
    from batch to batch, and a batch may be empty.

    Guarantees:
        A record takes part exactly every ``batches_per_epoch`` steps, so :attr:`participation` holds. Each
        record's batch is drawn independently of the other records, so adding or removing one leaves the
        others' where they are. The key is not shown by ``repr`` and cannot be pickled or copied.

    Args:
        num_records: Number of records, >= 1. Private: it appears in nothing that is released.
        batches_per_epoch: Steps ``b`` from one use of a record to the next, from 1 to 2**32 - 1; a public
            constant of the recipe.
        steps: Planned number of steps, from 1 to ``MAX_STEPS``; need not be whole epochs.
        key: 32 bytes, for tests only.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, num_records: int, batches_per_epoch: int, *, steps: int, key: bytes | SecretKey | None = None
    ) -> None:
        if not 1 <= batches_per_epoch <= _MAX_BATCHES:
            raise ValueError(f"batches_per_epoch must be from 1 to {_MAX_BATCHES}, got {batches_per_epoch}.")
        check_steps(steps, at_least=1)
        super().__init__(num_records, 1.0, FIXED_ORDER, key)
        self._participation = Participation(
            steps=steps,
            max_participations=-(-steps // batches_per_epoch),
            min_separation=batches_per_epoch,
        )
        words = keystream_words(self._key, stream=SAMPLING_STREAM, step=0, start=0, count=num_records)
        self._batch_of = (words >> np.uint64(32)) * np.uint64(batches_per_epoch) >> np.uint64(32)

    def __repr__(self) -> str:
        key = "<secret>" if self._has_secret_key else "<fixed, for tests>"
        return (
            f"EpochOrderSampler(num_records={self._num_records}, "
            f"batches_per_epoch={self._participation.min_separation}, "
            f"steps={self._participation.steps}, key={key})"
        )

    @property
    def participation(self) -> Participation:
        """The pattern that these batches keep: the one that the mechanism must be built for."""
        return self._participation

    def draw(self, step: int) -> list[int]:
        """Give the batch of one step.

        Args:
            step: Logical step of the run, from 0.

        Returns:
            Positions of the records that take part, increasing; may be empty.

        Raises:
            ValueError: If ``step`` is negative.
            PrivacyError: If ``step`` was not planned.
        """
        self._participation.check_step(step)
        batch = np.uint64(step % self._participation.min_separation)
        return np.flatnonzero(self._batch_of == batch).tolist()
