"""Samplers under a secret key: which records a step takes, and what that means to the accountant.

The amplification by sampling that the accountant relies on needs the sample to be secret, so the key comes
from the operating system, never from a recipe's seed, and is never stored. A resumed run draws a new key.

A sampler draws for the whole logical step, over all ranks and micro-batches, and describes itself to the
accountant: :meth:`Sampler.phase` is the only place where a sampler's numbers become an epsilon.
"""

import abc
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from securetune.privacy.loss_distribution import (
    POISSON,
    Phase,
    Sampling,
    SamplingKind,
    check_sampling,
    step_event,
)
from securetune.privacy.noise import (
    SAMPLING_STREAM,
    SecretKey,
    check_step,
    keystream_words,
    refuse_to_copy,
    secret_key,
)

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from securetune.privacy.participation import Participation

__all__ = [
    "FixedSizeSampler",
    "PaddedBatch",
    "PoissonSampler",
    "Sampler",
    "SamplingStatement",
    "TruncatedPoissonSampler",
    "pad_batch",
    "refuse_other_records",
]

TRUNCATION_STREAM = SAMPLING_STREAM - 1  # far above those of the noise
_CHUNK_RECORDS = 1 << 20  # 8 MiB of keystream at a time; a multiple of a ChaCha20 block


class SamplingStatement(NamedTuple):
    """What a plan, a ledger and a report say about a sampler: public constants only.

    Attributes:
        sampler: How the units of a step are chosen.
        neighbouring_relation: How two neighbouring data sets differ.
        unit: What is sampled, clipped and protected as a whole: "record" or "user".
        sample_rate: Probability of each unit at each step, before truncation.
        num_units: Number of units where epsilon depends on it, which makes it public; ``None`` where it is
            private.
        max_batch_size: Most units in one step; ``None`` without a limit.
        max_records_per_unit: Most records of one unit in one step.
    """

    sampler: SamplingKind
    neighbouring_relation: str
    unit: str
    sample_rate: float
    num_units: int | None
    max_batch_size: int | None
    max_records_per_unit: int

    def __str__(self) -> str:
        limit = "" if self.max_batch_size is None else f", at most {self.max_batch_size} {self.unit}s a step"
        size = "private" if self.num_units is None else f"public ({self.num_units})"
        return (
            f"{self.sampler} sampling at rate {self.sample_rate:g}{limit}; {self.neighbouring_relation} "
            f"{self.unit}; the number of {self.unit}s is {size}"
        )


class Sampler(abc.ABC):
    """Draw the record positions of each step, and describe them to the accountant.

    Guarantees:
        The same step of the same sampler gives the same sample. The key is not shown by ``repr`` and cannot
        be pickled or copied.

    Args:
        num_records: Number of records, >= 1.
        sample_rate: Probability in (0, 1] of each record at each step, before truncation.
        sampling: How the records are chosen.
        key: 32 bytes, for tests only: a run with a fixed key reports no epsilon.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, num_records: int, sample_rate: float, sampling: Sampling, key: bytes | SecretKey | None
    ) -> None:
        if num_records < 1:
            raise ValueError(f"num_records must be >= 1, got {num_records}.")
        check_sampling(sampling, sample_rate)
        self._key = secret_key(key)
        self._has_secret_key = not isinstance(key, bytes)
        self._num_records = num_records
        self._sample_rate = sample_rate
        self._sampling = sampling
        self._next_step = 0

    def __repr__(self) -> str:
        key = "<secret>" if self._has_secret_key else "<fixed, for tests>"
        limit = "" if self.max_batch_size is None else f", max_batch_size={self.max_batch_size}"
        return (
            f"{type(self).__name__}(num_records={self._num_records}, sample_rate={self._sample_rate}{limit}, "
            f"key={key})"
        )

    def __reduce__(self) -> NoReturn:
        raise refuse_to_copy(type(self).__name__)

    @property
    def num_records(self) -> int:
        """Number of records sampled from; private, except where :attr:`sampling` holds it."""
        return self._num_records

    @property
    def sample_rate(self) -> float:
        """Probability of each record at each step, before truncation: the accountant's number."""
        return self._sample_rate

    @property
    def sampling(self) -> Sampling:
        """How the records are chosen, as the accountant must know it."""
        return self._sampling

    @property
    def max_batch_size(self) -> int | None:
        """Most records in one step: the size to pad to; ``None`` without a limit."""
        return self._sampling.max_batch_size

    @property
    def reportable_epsilon(self) -> bool:
        """Whether an epsilon may be reported for these samples: false for a fixed test key."""
        return self._has_secret_key

    @property
    def participation(self) -> "Participation | None":
        """How often, and how far apart, a record is taken; ``None`` where chance decides at each step."""
        return None

    @abc.abstractmethod
    def draw(self, step: int) -> list[int]:
        """Draw the sample of one step; the same step of the same sampler gives the same sample.

        Args:
            step: Logical step of the run, from 0.

        Returns:
            Positions of the records taken, increasing; may be empty.

        Raises:
            ValueError: If ``step`` is out of range.
        """

    def draw_next(self) -> list[int]:
        """Draw a sample that no call of this method had, so that runs which share a sampler share no sample.

        Returns:
            As :meth:`draw`.
        """
        return self.draw(self.begin_step())

    def begin_step(self) -> int:
        """Count one step.

        Returns:
            A step that this method never returned before.
        """
        self._next_step += 1
        return self._next_step - 1

    def phase(self, noise_multiplier: float, steps: int) -> Phase:
        """Describe steps on these samples to the accountant: the sample rate has no second copy.

        Args:
            noise_multiplier: Noise standard deviation over the clipping threshold.
            steps: Number of steps.

        Returns:
            The phase to give to :func:`securetune.privacy.accounting.epsilon_of_phases`.
        """
        return Phase(noise_multiplier, self._sample_rate, steps, self._sampling)

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Describe one step on these samples as a ``dp-accounting`` event.

        Args:
            noise_multiplier: Noise standard deviation over the clipping threshold.

        Returns:
            The event; compose it once per step.
        """
        return step_event(noise_multiplier, self._sample_rate, self._sampling)

    def describe(self) -> SamplingStatement:
        """Say how records are sampled, under which neighbouring relation, and what that makes public.

        Returns:
            The statement; it holds nothing private, and ``str`` of it is a sentence.
        """
        return SamplingStatement(
            sampler=self._sampling.kind,
            neighbouring_relation=self._sampling.neighbouring_relation,
            unit="record",
            sample_rate=self._sample_rate,
            num_units=self._sampling.num_records,
            max_batch_size=self._sampling.max_batch_size,
            max_records_per_unit=1,
        )


class PoissonSampler(Sampler):
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

    def __init__(self, num_records: int, sample_rate: float, key: bytes | SecretKey | None = None) -> None:
        super().__init__(num_records, sample_rate, POISSON, key)
        self._threshold = _threshold(sample_rate)

    def draw(self, step: int) -> list[int]:
        """Draw the sample of one step; see :meth:`Sampler.draw`."""
        return _poisson_draw(self._key, self._num_records, self._threshold, step)


class TruncatedPoissonSampler(Sampler):
    """Draw a Poisson sample, and of one larger than ``max_batch_size`` a uniformly random part of that size.

    So a step has a known greatest size, for padding to fixed shapes. Truncation is over the whole logical
    step, never per rank or per micro-batch. It costs privacy: a record can push another one out, which the
    accountant counts, and epsilon depends on ``num_records``, which is public under this accounting.

    The Poisson sample is that of :class:`PoissonSampler` with the same key. The ``j``-th record of a sample
    that is too large gets word ``j`` of the keystream of stream ``TRUNCATION_STREAM``; the smallest stay.

    Guarantees:
        At most ``max_batch_size`` records are taken, each set of one size with the same probability (up to
        ties of 64-bit words), independently over steps.

    Args:
        num_records: Number of records, >= 1; public.
        sample_rate: Probability ``q`` in (0, 1] of each record at each step before truncation, a public
            constant.
        max_batch_size: Most records in one step, from 1 to ``num_records``, a public constant.
        key: 32 bytes, for tests only: a run with a fixed key reports no epsilon.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, num_records: int, sample_rate: float, max_batch_size: int, key: bytes | SecretKey | None = None
    ) -> None:
        super().__init__(
            num_records, sample_rate, Sampling("truncated Poisson", num_records, max_batch_size), key
        )
        self._threshold = _threshold(sample_rate)
        self._max_batch_size = max_batch_size

    def draw(self, step: int) -> list[int]:
        """Draw the sample of one step; see :meth:`Sampler.draw`."""
        taken = _poisson_draw(self._key, self._num_records, self._threshold, step)
        if len(taken) <= self._max_batch_size:
            return taken
        words = keystream_words(self._key, stream=TRUNCATION_STREAM, step=step, start=0, count=len(taken))
        kept = np.sort(np.argsort(words, kind="stable")[: self._max_batch_size])
        return [taken[index] for index in kept.tolist()]


class FixedSizeSampler(Sampler):
    """Draw a uniformly random set of ``batch_size`` records at each step, without replacement.

    Every step has one shape, at a price: a record's neighbour is another record in its place (replace one),
    which moves the sum by up to ``2 C``, so the same noise buys less: several times the epsilon of Poisson
    sampling. The number of records is public.

    The records with the ``batch_size`` smallest words of the step's keystream (stream ``SAMPLING_STREAM``)
    are taken.

    Guarantees:
        Exactly ``batch_size`` records are taken, each set with the same probability (up to ties of 64-bit
        words), independently over steps.

    Args:
        num_records: Number of records, >= 1; public.
        batch_size: Records in each step, from 1 to ``num_records``, a public constant.
        key: 32 bytes, for tests only: a run with a fixed key reports no epsilon.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, num_records: int, batch_size: int, key: bytes | SecretKey | None = None) -> None:
        if not 1 <= batch_size <= num_records:
            raise ValueError(f"batch_size must be from 1 to num_records ({num_records}), got {batch_size}.")
        sampling = Sampling("fixed size", num_records, batch_size)
        super().__init__(num_records, batch_size / num_records, sampling, key)
        self._batch_size = batch_size

    def draw(self, step: int) -> list[int]:
        """Draw the sample of one step; see :meth:`Sampler.draw`. It is never empty."""
        check_step(step)
        smallest = np.empty(0, dtype=np.uint64)
        positions = np.empty(0, dtype=np.int64)
        for start in range(0, self._num_records, _CHUNK_RECORDS):
            count = min(_CHUNK_RECORDS, self._num_records - start)
            words = keystream_words(self._key, stream=SAMPLING_STREAM, step=step, start=start, count=count)
            smallest = np.concatenate([smallest, words])
            positions = np.concatenate([positions, np.arange(start, start + count)])
            best = np.argsort(smallest, kind="stable")[: self._batch_size]
            smallest, positions = smallest[best], positions[best]
        return np.sort(positions).tolist()


class PaddedBatch(NamedTuple):
    """A sample brought to a fixed size.

    Attributes:
        positions: Record positions, then -1 for each row of padding.
        is_padding: Which rows stand for no record and must weigh exactly zero.
    """

    positions: list[int]
    is_padding: list[bool]


def pad_batch(drawn: Sequence[int], size: int) -> PaddedBatch:
    """Pad a sample with rows that stand for no record, so that every step has one shape.

    Args:
        drawn: Record positions; may be empty.
        size: Rows wanted: the sampler's ``max_batch_size``, or that rounded up to what the ranks share.

    Returns:
        The padded sample.

    Raises:
        ValueError: If the sample is larger than ``size``: no record may be dropped here.
    """
    missing = size - len(drawn)
    if missing < 0:
        raise ValueError(
            f"a sample of {len(drawn)} records does not fit into {size} rows, and dropping some would make "
            "epsilon wrong. Use a TruncatedPoissonSampler with max_batch_size at most that, or more rows."
        )
    return PaddedBatch([*drawn, *[-1] * missing], [False] * len(drawn) + [True] * missing)


def _threshold(sample_rate: float) -> int:
    return int(Fraction(sample_rate) * 2**64)  # exact, rounded down; 2**64 for a rate of 1


def _poisson_draw(key: bytes, num_records: int, threshold: int, step: int) -> list[int]:
    check_step(step)
    if threshold == 2**64:
        return list(range(num_records))
    taken: list[int] = []
    for start in range(0, num_records, _CHUNK_RECORDS):
        count = min(_CHUNK_RECORDS, num_records - start)
        words = keystream_words(key, stream=SAMPLING_STREAM, step=step, start=start, count=count)
        taken += (np.flatnonzero(words < np.uint64(threshold)) + start).tolist()
    return taken


def refuse_other_records(name: str, records: Any) -> None:
    """Refuse what no random sample can be drawn from.

    Args:
        name: What the caller calls the records.
        records: Whatever was given.

    Raises:
        ValueError: If they have no length or can't be taken by number (a stream, a ``DataLoader``, a
            dictionary of splits), or there are none.
    """
    has_rows = hasattr(records, "__len__") and hasattr(records, "__getitem__")
    is_empty = has_rows and not len(records)
    if has_rows and not is_empty:
        try:
            records[0]
        except KeyError:  # a dictionary of splits, a data frame
            has_rows = False
    if not has_rows or is_empty:
        raise ValueError(
            f"{name} must have a length and rows by number, at least one row (a list, a map-style torch "
            f"Dataset, a datasets.Dataset), got {'an empty ' if is_empty else ''}{type(records).__name__}: "
            "each step takes a random sample of all records. Load a stream into a list; of a DataLoader give "
            "its dataset, of a dictionary of splits one, of a data frame to_dict('records')."
        )
