"""Clipping thresholds that follow a quantile of the gradient norms, learned with differential privacy."""

import math
from collections.abc import Mapping
from typing import Any

from securetune.errors import CheckpointError, PrivacyError
from securetune.privacy.clipping import (
    LARGEST_THRESHOLD,
    SMALLEST_THRESHOLD,
    Clipping,
    check_threshold,
    layer_of,
    split_evenly,
)
from securetune.privacy.noise import Noise, NoiseSource

__all__ = ["COUNT_NOISE_STREAM", "AdaptiveClipping"]

COUNT_NOISE_STREAM = 1  # the gradient's noise has stream 0
ADAPTIVE_RANGE = 1e6  # thresholds stay within this factor of their first value


class AdaptiveClipping(Clipping):
    """Let each threshold follow a quantile of the units' norms, and pay for learning it.

    Algorithm 1 and Theorem 1 of Andrew et al. 2021, https://arxiv.org/abs/1905.03871, for one group or one
    for each layer. Each step a unit votes ``+1/2`` in a group where it kept its length, ``-1/2`` where it was
    clipped, and 0 if it was rejected, so it moves the ``G`` sums of votes by at most ``sqrt(G) / 2`` in L2
    norm. The sums are released with Gaussian noise, and each threshold is multiplied by ``exp(-learning_rate
    * (votes / expected_batch_size + 1/2 - target_quantile))``.

    Guarantees:
        The gradient sum and the votes come from the same sample, so a step is one Gaussian mechanism of the
        ``noise_multiplier`` z that is charged: the sum is noised with ``(z^-2 - count_noise_multiplier^-2)^
        -1/2``. The size of the sample is used nowhere. Thresholds follow from released numbers only, and
        stay within a factor of 1e6 of the first ones.

    Args:
        initial_norm: First sensitivity of the whole sum, from 1e-10 to 1e18; split evenly over the layers
            where ``per_layer``.
        target_quantile: Fraction of units to keep unclipped, in (0, 1).
        learning_rate: Of the logarithm of the thresholds, > 0.
        count_noise_multiplier: Noise standard deviation over sensitivity, for the sums of votes; above the
            ``noise_multiplier`` of the run. The paper's choice for one group, a standard deviation of a
            twentieth of the units of a step, is ``expected_batch_size / 10``.
        expected_batch_size: Expected number of units in a step, > 0: a public constant.
        per_layer: One threshold for each layer, as in :class:`PerLayerClipping`, instead of one for all.

    Raises:
        PrivacyError: If a number is out of range.
    """

    mode = "adaptive"

    def __init__(
        self,
        initial_norm: float,
        target_quantile: float = 0.5,
        *,
        learning_rate: float = 0.2,
        count_noise_multiplier: float,
        expected_batch_size: float,
        per_layer: bool = False,
    ) -> None:
        super().__init__()
        check_threshold("initial_norm", initial_norm)
        if not 0 < target_quantile < 1:
            raise PrivacyError(f"target_quantile must be in (0, 1), got {target_quantile}.")
        for name, value in (
            ("learning_rate", learning_rate),
            ("count_noise_multiplier", count_noise_multiplier),
            ("expected_batch_size", expected_batch_size),
        ):
            if not 0 < value < math.inf:
                raise PrivacyError(f"{name} must be a finite number > 0, got {value}.")
        self.initial_norm = initial_norm
        self.target_quantile = target_quantile
        self.learning_rate = learning_rate
        self.count_noise_multiplier = count_noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.per_layer = per_layer
        self._last_step = -1

    def _label(self, name: str) -> str:
        return layer_of(name) if self.per_layer else "all"

    def _choose_thresholds(self, labels: list[str]) -> list[float]:
        return split_evenly(self.initial_norm, len(labels))

    def _settings(self) -> dict[str, Any]:
        return {
            "initial_norm": self.initial_norm,
            "target_quantile": self.target_quantile,
            "learning_rate": self.learning_rate,
            "count_noise_multiplier": self.count_noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
            "per_layer": self.per_layer,
        }

    def _gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        ratio = super()._gradient_noise_multiplier(noise_multiplier) / self.count_noise_multiplier
        if not ratio < 1:
            raise PrivacyError(
                f"count_noise_multiplier={self.count_noise_multiplier:g} must be above noise_multiplier="
                f"{noise_multiplier:g}: at it, releasing how many units were clipped costs the step's whole "
                "budget and leaves none for the gradient. Raise count_noise_multiplier; several times "
                "noise_multiplier costs little."
            )
        return noise_multiplier / math.sqrt((1 - ratio) * (1 + ratio))

    def _bounds(self) -> tuple[float, float]:
        first = self.initial_norm / math.sqrt(self.num_groups)
        return (
            max(first / ADAPTIVE_RANGE, SMALLEST_THRESHOLD),
            min(first * ADAPTIVE_RANGE, LARGEST_THRESHOLD),
        )

    def finish(self, noise: "Noise", *, step: int, noise_multiplier: float) -> None:
        """End a logical step: release the noised votes and move the thresholds, also without units.

        Args:
            noise: The run's noise, a :class:`~securetune.privacy.noise.NoiseSource`: independent over the
                steps. The votes' has the stream ``COUNT_NOISE_STREAM``.
            step: The step that the gradient's noise was drawn for, above the last one.
            noise_multiplier: As given to :meth:`noise_stddev`.

        Raises:
            PrivacyError: As :meth:`noise_stddev`, or if the step was finished before or the noise is
                correlated over the steps; nothing is released then.
        """
        self._gradient_noise_multiplier(noise_multiplier)
        if not isinstance(noise, NoiseSource):
            raise PrivacyError(
                f"adaptive clipping cannot use {type(noise).__name__}: its thresholds change from step to "
                "step, and with them the noise, which must be independent then. Use fixed thresholds or a "
                "NoiseSource."
            )
        if step <= self._last_step:
            raise PrivacyError(
                f"step {step} was finished before (the last one is {self._last_step}): its noise would be "
                "used for two different counts and reveal their difference. Count steps upwards."
            )
        drawn = noise.normal(
            step=step,
            stream=COUNT_NOISE_STREAM,
            start=0,
            count=self.num_groups,
            stddev=self.count_noise_multiplier * math.sqrt(self.num_groups) / 2,
        )
        self._last_step = step
        votes = (self.counts[0] - self.counts[1]).cpu().double() / 2 + drawn.double()
        low, high = self._bounds()
        for (label, threshold), noisy in zip(self.thresholds.items(), votes.tolist(), strict=True):
            unclipped = noisy / self.expected_batch_size + 0.5
            moved = math.log(threshold) - self.learning_rate * (unclipped - self.target_quantile)
            # clamped before the exponential, which overflows where the noise is far larger than the batch
            self._thresholds[label] = min(max(math.exp(min(moved, math.log(high))), low), high)
        super().finish(noise, step=step, noise_multiplier=noise_multiplier)

    def state_dict(self) -> dict[str, Any]:
        """Return the thresholds, between two steps; they follow from released numbers only.

        Returns:
            ``{"thresholds": {group: C_k}}``, JSON-able.
        """
        return {"thresholds": self.thresholds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with saved thresholds; call :meth:`assign` first.

        Args:
            state: From :meth:`state_dict` of a run with the same groups and settings.

        Raises:
            CheckpointError: If the state is of another kind of clipping, of other groups, or out of range.
            PrivacyError: If a step is running, whose sensitivity would change.
        """
        if self.counts.any():
            raise PrivacyError(
                "thresholds cannot change within a step: some units are already clipped to the old ones. "
                "Load the state before the first step."
            )
        saved = state.get("thresholds") if set(state) == {"thresholds"} else None
        if not isinstance(saved, Mapping) or set(saved) != set(self.thresholds):
            raise CheckpointError(
                f"the saved clipping state does not hold thresholds of these {self.num_groups} groups. "
                "Resume with the clipping and the trainable layers of the saved run."
            )
        low, high = self._bounds()
        for label, threshold in saved.items():
            if isinstance(threshold, bool) or not isinstance(threshold, int | float):
                raise CheckpointError(f"the saved threshold of group {label!r} is no number: {threshold!r}.")
            if not low <= threshold <= high:
                raise CheckpointError(
                    f"the saved threshold of group {label!r} must be from {low:g} to {high:g} for "
                    f"initial_norm={self.initial_norm:g}, got {threshold}. Resume with the initial_norm of "
                    "the saved run."
                )
        self._thresholds = {label: float(saved[label]) for label in self._thresholds}
