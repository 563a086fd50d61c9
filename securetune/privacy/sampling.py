"""Poisson sampling under a secret key: at each step each record is taken independently, with one probability.

The amplification by sampling that the accountant relies on needs the sample to be secret, so the key comes
from the operating system, never from a recipe's seed, and is never stored. A resumed run draws a new key.
"""

from fractions import Fraction
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from securetune.privacy.loss_distribution import Phase, step_event
from securetune.privacy.noise import SAMPLING_STREAM, check_step, keystream_words, refuse_to_copy, secret_key

if TYPE_CHECKING:
    from dp_accounting import DpEvent

__all__ = ["PoissonSampler"]

_CHUNK_RECORDS = 1 << 20  # 8 MiB of keystream at a time; a multiple of a ChaCha20 block


class PoissonSampler:
    """Draw a Poisson sample of record positions at each step.

    Record ``i`` is taken at step ``t`` when word ``i`` of the ChaCha20 keystream of ``t`` (stream
    ``SAMPLING_STREAM`` in the layout of :mod:`securetune.privacy.noise`) is below ``floor(sample_rate *
    2**64)``: an exact integer comparison.

    Guarantees:
        Each record is taken with probability ``floor(q * 2**64) / 2**64``, at most ``q``, independently over
        records and steps. Adding a record at the end changes the others' samples in nothing. A sample may be
        empty. The key is not shown by ``repr`` and cannot be pickled or copied.

    Args:
        num_records: Number of records, >= 1. Private: it appears in nothing that is released.
        sample_rate: Probability ``q`` in (0, 1] of each record at each step, a public constant.
        key: 32 bytes, for tests only: a run with a fixed key reports no epsilon.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, num_records: int, sample_rate: float, key: bytes | None = None) -> None:
        if num_records < 1:
            raise ValueError(f"num_records must be >= 1, got {num_records}.")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}.")
        self._key = secret_key(key)
        self._has_secret_key = key is None
        self._num_records = num_records
        self._sample_rate = sample_rate
        self._threshold = int(Fraction(sample_rate) * 2**64)  # exact, rounded down; 2**64 for a rate of 1

    def __repr__(self) -> str:
        key = "<secret>" if self._has_secret_key else "<fixed, for tests>"
        return f"PoissonSampler(num_records={self._num_records}, sample_rate={self._sample_rate}, key={key})"

    def __reduce__(self) -> NoReturn:
        raise refuse_to_copy("PoissonSampler")

    @property
    def num_records(self) -> int:
        """Number of records sampled from."""
        return self._num_records

    @property
    def sample_rate(self) -> float:
        """Probability of each record at each step: the number that the accountant must use."""
        return self._sample_rate

    @property
    def reportable_epsilon(self) -> bool:
        """Whether an epsilon may be reported for these samples: false for a fixed test key."""
        return self._has_secret_key

    def draw(self, step: int) -> list[int]:
        """Draw the sample of one step; the same step of the same sampler gives the same sample.

        Args:
            step: Logical step of the run, from 0.

        Returns:
            Positions of the records taken, increasing; may be empty.

        Raises:
            ValueError: If ``step`` is out of range.
        """
        check_step(step)
        if self._threshold == 2**64:
            return list(range(self._num_records))
        taken: list[int] = []
        for start in range(0, self._num_records, _CHUNK_RECORDS):
            count = min(_CHUNK_RECORDS, self._num_records - start)
            words = keystream_words(self._key, stream=SAMPLING_STREAM, step=step, start=start, count=count)
            taken += (np.flatnonzero(words < np.uint64(self._threshold)) + start).tolist()
        return taken

    def phase(self, noise_multiplier: float, steps: int) -> Phase:
        """Describe steps on these samples to the accountant: the sample rate has no second copy.

        Args:
            noise_multiplier: Noise standard deviation over the clipping threshold.
            steps: Number of steps.

        Returns:
            The phase to give to :func:`securetune.privacy.accounting.epsilon_of_phases`.
        """
        return Phase(noise_multiplier, self._sample_rate, steps)

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Describe one step on these samples as a ``dp-accounting`` event.

        Args:
            noise_multiplier: Noise standard deviation over the clipping threshold.

        Returns:
            The event; compose it once per step.
        """
        return step_event(noise_multiplier, self._sample_rate)
