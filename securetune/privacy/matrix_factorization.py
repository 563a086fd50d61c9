"""Noise that is correlated over the steps of a run (DP-FTRL), for batches without amplification by sampling.

A run of ``n`` steps releases ``g_t + (C^-1 z)_t`` at step ``t``: the clipped sum plus a mixture of this
step's and earlier normals ``z``. That is post-processing of ``C g + z``, one Gaussian mechanism for the
whole run, whose sensitivity is that of ``C`` under the run's participation pattern; the gradients may depend
on what was released before (Denisov et al. 2022, https://arxiv.org/abs/2202.08312). A good ``C`` makes the
noise of later steps cancel that of earlier ones, so the sums over steps, which the weights follow, are
disturbed less at the same epsilon.

The choice here is the banded inverse square root (Kalinin et al. 2025, https://arxiv.org/abs/2505.12128):
``C^-1`` is lower-triangular Toeplitz with the first coefficients of ``(1 - x)^(1/2)``, that is 1, -1/2, -1/8,
-1/16, ..., and zero from ``bands`` on. One band is independent noise. As many bands as steps give the square
root of the prefix-sum matrix (Fichtenberger et al. 2022, https://arxiv.org/abs/2202.11205), whose largest
error at one participation no lower-triangular Toeplitz matrix beats (Dvijotham et al. 2024,
https://arxiv.org/abs/2404.16706). Because noise has addresses, the earlier normals are drawn again instead of
stored: a step costs ``bands`` draws of noise, and no memory.

Sensitivity. The coefficients ``c`` of ``C`` are >= 0 and do not increase: ``c_t`` is a weighted sum, with
weights >= 0, of the up to ``bands - 1`` coefficients before it; below ``bands`` it is ``binom(2t, t) / 4^t``,
and from there on the differences follow the same recursion. So the inner product of columns ``i < j``, the
sum of ``c_s c_(s + j - i)`` over ``s < n - j``, is >= 0 and never grows when ``j`` or ``j - i`` grows. The
first gives that a unit does most when its vectors are all equal and of full norm and it takes part as often
as it may; the second that its worst steps are ``0, b, 2b, ...``: earlier and closer together than in any
other pattern. Hence ``sensitivity = || sum over j < k of column j b ||``, exactly (also Kalinin and Lampert
2024, https://arxiv.org/abs/2405.13763, theorem 2).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch import Tensor

from securetune.errors import PrivacyError
from securetune.privacy.ledger import Ledger, LedgerState
from securetune.privacy.loss_distribution import FIXED_ORDER, Phase
from securetune.privacy.noise import MAX_NOISE_STREAM, NoiseSource, SecretKey, refuse_to_copy, reused_noise
from securetune.privacy.participation import Participation

if TYPE_CHECKING:
    from dp_accounting import DpEvent

__all__ = ["CorrelatedNoise", "MatrixMechanism", "WholeRunCharge"]

_CHUNK = 1 << 22  # normals mixed at a time: 32 MiB of float64


@dataclass(frozen=True, kw_only=True)
class MatrixMechanism:
    """The banded inverse square root mechanism for one run.

    Guarantees:
        With noise from :class:`CorrelatedNoise`, all planned steps together are one Gaussian mechanism of the
        noise multiplier that each step asks for, for adding or removing one unit that keeps ``participation``
        and moves each step's sum by at most the clipping threshold. A run that ends early costs the same.

    Attributes:
        participation: The steps, and how often and how far apart a unit takes part in them.
        bands: Steps whose normals one step's noise mixes, its own included, from 1 to the number of steps.
            More bands cost more draws; :attr:`rmse` tells what they give.

    Raises:
        ValueError: If ``bands`` is out of range.
    """

    participation: Participation
    bands: int

    def __post_init__(self) -> None:
        if not 1 <= self.bands <= self.participation.steps:
            raise ValueError(
                f"bands must be from 1 to the {self.participation.steps} planned steps, got {self.bands}."
            )

    @cached_property
    def noise_coefficients(self) -> np.ndarray:
        """``[bands]``, float64: the first column of ``C^-1``, down to its last coefficient that is not 0."""
        lag = np.arange(1, self.bands)
        return _frozen(np.cumprod(np.concatenate([[1.0], (lag - 1.5) / lag])))

    @cached_property
    def strategy_coefficients(self) -> np.ndarray:
        """``[steps]``, float64: the first column of ``C``; >= 0, not increasing."""
        from scipy.signal import lfilter

        impulse = np.zeros(self.participation.steps)
        impulse[0] = 1.0
        return _frozen(np.asarray(lfilter([1.0], self.noise_coefficients, impulse)))

    @cached_property
    def sensitivity(self) -> float:
        """Most that one unit moves ``C g`` in L2 norm, in units of the clipping threshold; >= 1."""
        steps, separation = self.participation.steps, self.participation.min_separation
        often = self.participation.possible_participations
        width = min(separation, steps)
        columns = np.zeros(-(-steps // width) * width)
        columns[:steps] = self.strategy_coefficients
        sums = columns.reshape(-1, width).cumsum(axis=0)  # of the columns 0, b, 2b, ..., without an end
        sums[often:] = sums[often:] - sums[:-often]  # of the first k of them
        return float(np.linalg.norm(sums.ravel()[:steps]))

    @cached_property
    def prefix_sum_stddevs(self) -> np.ndarray:
        """``[steps]``, float64: standard deviation of the noise on the sum of the steps up to each one.

        Per coordinate, in units of ``noise_multiplier * max_grad_norm``. With a constant learning rate and
        plain SGD this is what the noise does to the weights; with momentum or Adam it is a guide only.
        """
        coefficients = np.zeros(self.participation.steps)
        coefficients[: self.bands] = self.noise_coefficients
        return _frozen(self.sensitivity * np.sqrt(np.cumsum(np.cumsum(coefficients) ** 2)))

    @property
    def rmse(self) -> float:
        """Root mean square of :attr:`prefix_sum_stddevs`: the smaller, the less the run is disturbed."""
        return float(np.sqrt(np.mean(self.prefix_sum_stddevs**2)))

    @property
    def max_stddev(self) -> float:
        """Largest of :attr:`prefix_sum_stddevs`: that of the sum of all steps."""
        return float(self.prefix_sum_stddevs[-1])

    def phase(self, noise_multiplier: float, *, runs: int = 1) -> Phase:
        """Describe the whole run to the accountant.

        Args:
            noise_multiplier: Noise standard deviation that each step asks for, over the clipping threshold.
            runs: Mechanisms started: 1, and one more each time that the run is resumed, with new noise.

        Returns:
            The phase to give to :func:`securetune.privacy.accounting.epsilon_of_phases`. To calibrate, give
            ``sample_rate=1`` and ``steps=runs`` to
            :func:`securetune.privacy.accounting.calibrate_noise_multiplier`.
        """
        return Phase(noise_multiplier, 1.0, runs, FIXED_ORDER)

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Describe the whole run as a ``dp-accounting`` event.

        Args:
            noise_multiplier: Noise standard deviation that each step asks for, over the clipping threshold.

        Returns:
            The event; compose it once per run, not once per step.
        """
        from dp_accounting import GaussianDpEvent

        return GaussianDpEvent(noise_multiplier)


class CorrelatedNoise:
    """Draw a mechanism's noise by address, where independent noise is drawn from a ``NoiseSource``.

    The noise of step ``t`` is ``stddev * sensitivity`` times the sum over ``j < bands`` of ``c_j z_(t-j)``:
    ``c`` are the mechanism's noise coefficients, and ``z_s`` are the normals of step ``s``, which a
    ``NoiseSource`` of its own holds at step 0 of stream ``stream * steps + s``. They are mixed in float64 and
    rounded to float32 last.

    Guarantees:
        Any slice ``[start, start + count)`` equals that slice of the whole, so shards agree for any world
        size. Different streams never share a normal. Steps never go back, never leave the plan, and keep one
        standard deviation. The key is not shown by ``repr`` and cannot be pickled or copied, so a resumed run
        can only start a new mechanism.

    Args:
        mechanism: The mechanism, for the batches that the run takes.
        key: 32 bytes, for tests only: a run with a fixed key reports no epsilon. By default a new key from
            the operating system, kept in memory and nowhere else.

    Raises:
        ValueError: If ``key`` has the wrong length.
    """

    def __init__(self, mechanism: MatrixMechanism, key: bytes | SecretKey | None = None) -> None:
        self.mechanism = mechanism
        self._source = NoiseSource(key)
        self._last_step = 0
        self._has_run = False
        self._stddevs: dict[int, float] = {}  # stream -> the standard deviation of its first step

    def __repr__(self) -> str:
        return f"CorrelatedNoise({self.mechanism!r}, {self._source!r})"

    def __reduce__(self) -> NoReturn:
        raise refuse_to_copy("CorrelatedNoise")

    @property
    def reportable_epsilon(self) -> bool:
        """Whether an epsilon may be reported for what this noise hides: false for a fixed test key."""
        return self._source.reportable_epsilon

    def begin_run(self) -> None:
        """Belong to one run from now on, as :meth:`NoiseSource.begin_run`.

        Raises:
            PrivacyError: If another run has begun with this noise.
        """
        if self._has_run:
            raise reused_noise("CorrelatedNoise")
        self._has_run = True

    def normal(
        self,
        *,
        step: int,
        stream: int = 0,
        start: int = 0,
        count: int,
        stddev: float,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw the noise of ``count`` consecutive addresses; correlated over steps, not over addresses.

        Args:
            step: Logical step of this run, from 0; may repeat (shards of one step) but never go back.
            stream: Keeps several uses within one step apart, from 0 to ``2**31 / steps`` - 1.
            start: Flat index of the first value, >= 0.
            count: How many, >= 0; ``start + count`` at most 2**48.
            stddev: Standard deviation of the run's one Gaussian mechanism, ``noise_multiplier *
                max_grad_norm``, the same at every step: the sensitivity is multiplied in here.
            device: Where to draw.

        Returns:
            ``[count]``, float32, on ``device``.

        Raises:
            ValueError: If an argument is out of range.
            PrivacyError: If ``step`` is below one already drawn or was not planned, or ``stddev`` changed.
        """
        steps = self.mechanism.participation.steps
        self.mechanism.participation.check_step(step)
        if not 0 <= stream < (MAX_NOISE_STREAM + 1) // steps:
            raise ValueError(f"stream must be from 0 to {(MAX_NOISE_STREAM + 1) // steps - 1}, got {stream}.")
        if start < 0 or count < 0:
            raise ValueError(f"start and count must be >= 0, got {start} and {count}.")
        if not 0 <= stddev < math.inf:
            raise ValueError(f"stddev must be a finite number >= 0, got {stddev}.")
        if step < self._last_step:
            raise PrivacyError(
                f"noise for step {step} was asked for after step {self._last_step}: noise that is used for "
                "two different sums reveals their difference. Use a new CorrelatedNoise for a new run, and "
                "count its steps upwards."
            )
        if stddev != self._stddevs.setdefault(stream, stddev):
            raise PrivacyError(
                f"stddev changed from {self._stddevs[stream]} to {stddev} at step {step}: noise that is "
                "correlated over the steps is one mechanism with one standard deviation. Keep "
                "noise_multiplier and max_grad_norm fixed over the run, or use independent noise."
            )
        self._last_step = step
        out = torch.empty(count, dtype=torch.float32, device=device)
        for low in range(0, count, _CHUNK):
            size = min(_CHUNK, count - low)
            mixed = torch.zeros(size, dtype=torch.float64, device=device)
            for lag, coefficient in enumerate(self.mechanism.noise_coefficients[: step + 1]):
                normals = self._source.normal(
                    step=0,  # one step, for the source, since earlier normals are drawn again
                    stream=stream * steps + step - lag,
                    start=start + low,
                    count=size,
                    stddev=stddev * self.mechanism.sensitivity,
                    device=device,
                )
                mixed.add_(normals.double(), alpha=float(coefficient))
            out[low : low + size] = mixed
        return out


class WholeRunCharge:
    """Charge a run's ledger at its first step for all steps, where a ``PrivateStep`` charges each step.

    A "step" of that ledger is one mechanism: its header has the sampler "fixed order" at rate 1 and as
    ``planned_steps`` how many mechanisms the run may start, 1 and one for each resumption that was planned. A
    resumed run makes a new object, and its first step is a new charge.

    Guarantees:
        The charge is on disk before the run's first noise exists; no step is released that was not planned.

    Args:
        ledger: The run's ledger.
        mechanism: What the run's noise comes from; a ``PrivateStep`` refuses any other noise.

    Attributes:
        mechanism: As given.

    Raises:
        PrivacyError: If the ledger counts steps on a sample.
    """

    def __init__(self, ledger: Ledger, mechanism: MatrixMechanism) -> None:
        counted = ledger.state.phase
        if counted != mechanism.phase(counted.noise_multiplier, runs=counted.steps):
            header = ledger.state.header
            raise PrivacyError(
                f"{ledger.path} counts steps of {header.sampler} sampling at sample_rate="
                f"{header.sample_rate}, but a run with correlated noise is one Gaussian mechanism without "
                "amplification by sampling. Start a new ledger whose header has the sampler "
                "'fixed order' at sample_rate=1 and planned_steps=1 (one more for each resumption you "
                "plan)."
            )
        self.mechanism = mechanism
        self._ledger = ledger
        self._steps_taken = 0
        self._has_run = False

    @property
    def state(self) -> LedgerState:
        """The ledger as it is on disk."""
        return self._ledger.state

    def begin_run(self) -> None:
        """Belong to one run from now on.

        Raises:
            PrivacyError: If another run, with noise of its own, has begun with this object.
        """
        if self._has_run:
            raise PrivacyError(
                "this WholeRunCharge paid for another run, and new noise is another mechanism to pay for. "
                "Make a new WholeRunCharge for each run and each resumption."
            )
        self._has_run = True

    def charge(self) -> int:
        """Pay for one more step; the noise of that step may be released after this returns.

        Returns:
            The number of mechanisms charged to the ledger, this one included.

        Raises:
            PrivacyError: If all planned steps are taken, or the ledger allows no further mechanism.
            OSError: If the charge cannot be made durable; the noise must not be released.
        """
        self.mechanism.participation.check_step(self._steps_taken)
        charged = self._ledger.charge() if self._steps_taken == 0 else self._ledger.steps_charged
        self._steps_taken += 1
        return charged


def _frozen(values: np.ndarray) -> np.ndarray:
    values.setflags(write=False)
    return values
