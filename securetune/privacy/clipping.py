"""How one unit's gradient becomes a summand of bounded size, and how large that bound is.

A unit (a record, or all records of one user) contributes ``f_k g_k`` to the sum, for each group ``k`` of
parameters. The factor ``f_k`` follows from the norms of this unit's own gradient alone, and ``f_k ||g_k||``
is at most ``C_k``. So one unit moves the whole sum by at most ``sqrt(sum_k C_k^2)`` in L2 norm: the
sensitivity. It is read from the object that clips, and from nowhere else.

Numbers: norms and factors are computed in float64 and the factors are rounded down to float32, so rounding
lengthens no summand. What is left is rounding in the norms that are handed in and in the products that are
summed; ``ROUNDING_EXCESS`` adds it to the sensitivity. Not covered: the order of additions in a float32 sum,
which may change the last bits of the sum (see :mod:`securetune.privacy.noise`).

Dimensions: ``U`` units, ``G`` groups.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from securetune.errors import CheckpointError, PrivacyError
from securetune.privacy.noise import Noise

__all__ = [
    "LARGEST_THRESHOLD",
    "ROUNDING_EXCESS",
    "SMALLEST_THRESHOLD",
    "AutomaticClipping",
    "Clipping",
    "FlatClipping",
    "GroupClipping",
    "NormalizedClipping",
    "PerLayerClipping",
    "check_threshold",
    "layer_of",
    "split_evenly",
]

# Largest relative amount by which a norm handed in may be too small, and a summed product too long: a promise
# of whoever computes them, which their tests must keep. The price is as much more noise: 0.01 %.
ROUNDING_EXCESS = 1e-4
# Squares of entries below 1e-19 vanish in float32. Even 1e12 such entries have a norm of only 1.1e-13, which
# does not count beside this.
SMALLEST_THRESHOLD = 1e-10
LARGEST_THRESHOLD = 1e18  # its square must fit into float32
# a layer's name ends before these: what peft puts into a layer belongs to the layer
_PARTS_OF_A_LAYER = frozenset(
    (
        "base_layer",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "ia3_l",
    )
)


class Clipping(abc.ABC):
    """Bound what one unit adds to the gradient sum, and own the sensitivity of that sum.

    One object belongs to one run: :meth:`assign` binds it to the parameters. In each logical step call
    :meth:`factors` for every unit exactly once, over any number of micro-batches, then :meth:`noise_stddev`,
    then :meth:`finish`.

    Guarantees:
        A unit's factors depend on that unit's norms and on public numbers only. The factors bound its part
        of the sum by :attr:`sensitivity` in L2 norm. A unit with a norm that is not finite has factors zero,
        all of them.

    Attributes:
        mode: Name of the kind of clipping, as recipes and ledgers call it.
        counts: ``[2, G]``, int64: how many units of the running step kept their length in each group, and
            how many were shortened. Un-noised private statistics: never log or store them. Where several
            processes share a step, add them up over all before :meth:`finish`.
    """

    mode: ClassVar[str]

    def __init__(self) -> None:
        self._names: tuple[str, ...] | None = None
        self._assignment: tuple[int, ...] = ()
        self._thresholds: dict[str, float] = {}  # by group name, in group order
        self._clipped_fraction: tuple[float, ...] | None = None
        self.counts = torch.zeros(2, 0, dtype=torch.int64)

    @abc.abstractmethod
    def _label(self, name: str) -> str:
        """Name the group of one parameter."""

    @abc.abstractmethod
    def _choose_thresholds(self, labels: list[str]) -> list[float]:
        """Give the threshold ``C_k`` of each group."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What the user chose, JSON-able."""

    def assign(self, parameter_names: Sequence[str]) -> tuple[int, ...]:
        """Bind to the trainable parameters and put each into a group.

        Args:
            parameter_names: Names of all trainable parameters, in the order of the flat vector, without the
                prefixes of wrappers.

        Returns:
            The group of each parameter, from 0 to ``G - 1``; groups are numbered as they first appear.

        Raises:
            PrivacyError: If the object is bound to other parameters, a parameter does not fall into exactly
                one group, a group has no parameter, or a threshold is out of range.
        """
        names = tuple(parameter_names)
        if self._names is not None:
            if names != self._names:
                raise PrivacyError(
                    f"this {type(self).__name__} belongs to a run with {len(self._names)} other trainable "
                    f"parameters (got {len(names)}). Make a new one for each run."
                )
            return self._assignment
        if not names or len(set(names)) != len(names):
            raise PrivacyError(
                f"clipping needs trainable parameters with different names, got {len(names)} names of which "
                f"{len(set(names))} differ. Give each trainable parameter once."
            )
        label_of = [self._label(name) for name in names]
        labels = list(dict.fromkeys(label_of))
        thresholds = self._choose_thresholds(labels)
        for label, threshold in zip(labels, thresholds, strict=True):
            check_threshold(f"the threshold of group {label!r}", threshold)
        self._names = names
        self._thresholds = dict(zip(labels, thresholds, strict=True))
        self._assignment = tuple(labels.index(label) for label in label_of)
        self.discard()
        return self._assignment

    @property
    def num_groups(self) -> int:
        """Number of groups ``G``."""
        return len(self.thresholds)

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold ``C_k`` of each group in this step, by the group's name, in group order."""
        if self._names is None:
            raise PrivacyError(f"this {type(self).__name__} has no groups yet: call assign() first.")
        return dict(self._thresholds)

    @property
    def sensitivity(self) -> float:
        """Largest L2 norm of one unit's part of this step's whole sum, rounding included."""
        return math.hypot(*self.thresholds.values()) * (1 + ROUNDING_EXCESS)

    @property
    def clipped_fraction(self) -> tuple[float, ...] | None:
        """Fraction of units shortened in each group in the last finished step; NaN for a step without units.

        An un-noised private statistic, which epsilon does not cover: show it on this machine only, never log,
        store or publish it. ``None`` before the first step.
        """
        return self._clipped_fraction

    @torch.no_grad()
    def factors(self, squared_norms: Tensor) -> Tensor:
        """Compute what each unit's gradient is multiplied by, and count it.

        Where a factor is zero the unit must be masked, not multiplied: zero times infinity is NaN. A squared
        norm that overflowed to infinity rejects its unit; hand in float64 to keep units longer than 1.8e19.
        A squared norm below zero (a difference of rounding errors) makes that group's factor zero.

        Args:
            squared_norms: ``[U, G]``, float32 or float64: squared L2 norm of each unit's gradient in each
                group. Real units only, each once in a step; mark padding with NaN, which counts for nothing.

        Returns:
            ``[U, G]``, float32: factors >= 0.

        Raises:
            TypeError: If the dtype is another.
            ValueError: If the shape does not fit.
        """
        thresholds = list(self.thresholds.values())
        if squared_norms.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"squared_norms must be float32 or float64, got {squared_norms.dtype}.")
        if squared_norms.ndim != 2 or squared_norms.shape[1] != len(thresholds):
            raise ValueError(
                f"squared_norms must have shape [U, {len(thresholds)}], one column for each group, got "
                f"{tuple(squared_norms.shape)}."
            )
        squares = squared_norms.double()
        usable = squares.isfinite().all(dim=1, keepdim=True)
        norms = torch.where(usable, squares, 0.0).clamp(min=0.0).sqrt()
        exact = self._exact_factors(norms, squares.new_tensor(thresholds))
        shortened = (exact < 1) & (norms > 0)
        tally = torch.stack([(usable & ~shortened).sum(dim=0), (usable & shortened).sum(dim=0)])
        self.counts = self.counts.to(tally.device) + tally
        factors = exact.float()
        factors = torch.where(factors.double() > exact, factors.nextafter(torch.zeros_like(factors)), factors)
        # Subnormal factors may be rounded up or flushed by the device that multiplies.
        keep = usable & (squares >= 0) & (factors >= torch.finfo(torch.float32).tiny)
        return torch.where(keep, factors, 0.0)

    def _exact_factors(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        """Abadi et al. 2016, https://arxiv.org/abs/1607.00133: ``min(1, C / norm)``, in float64."""
        return torch.where(norms > thresholds, thresholds / norms, 1.0)

    def noise_stddev(self, noise_multiplier: float) -> float:
        """Say how much noise the gradient sum of this step needs.

        Args:
            noise_multiplier: Of the one Gaussian mechanism that the whole step shall cost, >= 0: noise
                standard deviation over sensitivity.

        Returns:
            Standard deviation of the noise on each entry of the sum, in gradient units.

        Raises:
            PrivacyError: If no finite noise on the sum keeps the step's cost.
        """
        return self._gradient_noise_multiplier(noise_multiplier) * self.sensitivity

    def _gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        if not 0 <= noise_multiplier < math.inf:
            raise PrivacyError(f"noise_multiplier must be a finite number >= 0, got {noise_multiplier}.")
        return noise_multiplier

    def finish(self, noise: "Noise", *, step: int, noise_multiplier: float) -> None:
        """End a logical step, also one without units, after the ledger charged it and its sum was noised.

        Args:
            noise: The run's noise.
            step: The step that the gradient's noise was drawn for.
            noise_multiplier: As given to :meth:`noise_stddev`.

        """
        kept, shortened = self.counts.tolist()
        self._clipped_fraction = tuple(
            lost / (kept_here + lost) if kept_here + lost else math.nan
            for kept_here, lost in zip(kept, shortened, strict=True)
        )
        self.discard()

    def discard(self) -> None:
        """Forget the units counted so far, together with the sum: after a probe or an aborted step."""
        self.counts = torch.zeros(2, self.num_groups, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, between two steps: public numbers, JSON-able.

        Returns:
            The adaptive thresholds; empty for fixed ones, which the recipe holds.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; call :meth:`assign` first.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            CheckpointError: If the state is of another kind of clipping or of other groups.
            PrivacyError: If a step is running, whose sensitivity would change.
        """
        if state:
            raise CheckpointError(
                f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)}. Resume "
                "with the clipping of the saved run."
            )

    def describe(self) -> dict[str, Any]:
        """Describe the clipping for plans and ledgers; public, JSON-able.

        Returns:
            ``mode`` and the settings; once bound, also ``thresholds`` and ``sensitivity`` of this step.
        """
        described = {"mode": self.mode, **self._settings()}
        if self._names is not None:
            described |= {"thresholds": self.thresholds, "sensitivity": self.sensitivity}
        return described


class FlatClipping(Clipping):
    """Scale each unit's whole gradient to L2 norm at most ``max_grad_norm``: one group.

    Args:
        max_grad_norm: Clipping threshold ``C``, from 1e-10 to 1e18, in units of the gradient's L2 norm.

    Raises:
        PrivacyError: If it is out of range.
    """

    mode = "flat"

    def __init__(self, max_grad_norm: float) -> None:
        super().__init__()
        check_threshold("max_grad_norm", max_grad_norm)
        self.max_grad_norm = max_grad_norm

    def _label(self, name: str) -> str:
        return "all"

    def _choose_thresholds(self, labels: list[str]) -> list[float]:
        return [self.max_grad_norm]

    def _settings(self) -> dict[str, Any]:
        return {"max_grad_norm": self.max_grad_norm}


class AutomaticClipping(FlatClipping):
    """Scale each unit's gradient by ``C / (norm + stability)``, so that ``C`` needs no tuning (AUTO-S).

    Bu et al. 2023, https://arxiv.org/abs/2206.07136. Short gradients are lengthened, none reaches ``C``.

    Args:
        max_grad_norm: ``C``, as for :class:`FlatClipping`.
        stability: Added to the norm, from 1e-10 to 1e18; the paper's value is 0.01.

    Raises:
        PrivacyError: If a number is out of range.
    """

    mode = "automatic"

    def __init__(self, max_grad_norm: float = 1.0, stability: float = 0.01) -> None:
        super().__init__(max_grad_norm)
        check_threshold("stability", stability)
        self.stability = stability

    def _exact_factors(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        return thresholds / (norms + self.stability)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "stability": self.stability}


class NormalizedClipping(FlatClipping):
    """Scale every unit's gradient to exactly ``max_grad_norm``, rounded down.

    A gradient shorter than 1e-10 counts as zero and stays so: float32 squares do not tell its length.

    Args:
        max_grad_norm: ``C``, as for :class:`FlatClipping`.

    Raises:
        PrivacyError: If it is out of range.
    """

    mode = "normalized"

    def _exact_factors(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        return torch.where(norms >= SMALLEST_THRESHOLD, thresholds / norms, 0.0)


class PerLayerClipping(Clipping):
    """Clip each layer on its own: weight and bias together, all parts of a layer's adapter together.

    Args:
        max_grad_norm: One number: the sensitivity ``C`` of the whole sum, split evenly into ``C / sqrt(G)``.
            Or one threshold for each layer, in the order of the layers. From 1e-10 to 1e18.

    Raises:
        PrivacyError: If a threshold is out of range.
    """

    mode = "per_layer"

    def __init__(self, max_grad_norm: float | Sequence[float]) -> None:
        super().__init__()
        is_total = isinstance(max_grad_norm, int | float)
        self.max_grad_norm = max_grad_norm if is_total else list(max_grad_norm)
        for threshold in [max_grad_norm] if is_total else max_grad_norm:
            check_threshold("max_grad_norm", threshold)

    def _label(self, name: str) -> str:
        return layer_of(name)

    def _choose_thresholds(self, labels: list[str]) -> list[float]:
        if isinstance(self.max_grad_norm, int | float):
            return split_evenly(self.max_grad_norm, len(labels))
        if len(self.max_grad_norm) != len(labels):
            raise PrivacyError(
                f"max_grad_norm must have one threshold for each of the {len(labels)} trainable layers, got "
                f"{len(self.max_grad_norm)}. The layers are, in order: {', '.join(labels)}."
            )
        return self.max_grad_norm

    def _settings(self) -> dict[str, Any]:
        return {"max_grad_norm": self.max_grad_norm}


class GroupClipping(Clipping):
    """Clip groups of parameters that the user names, each to a threshold of its own.

    Args:
        groups: Threshold ``C_k``, from 1e-10 to 1e18, of each name pattern (``*``, ``?`` and ``[...]`` as in
            file names, case counts). Every trainable parameter must match exactly one pattern.

    Raises:
        PrivacyError: If a threshold is out of range or there is no group.
    """

    mode = "groups"

    def __init__(self, groups: Mapping[str, float]) -> None:
        super().__init__()
        if not groups:
            raise PrivacyError("groups must name at least one pattern, for example {'*': 1.0}.")
        for pattern, threshold in groups.items():
            check_threshold(f"groups[{pattern!r}]", threshold)
        self.groups = dict(groups)

    def _label(self, name: str) -> str:
        matching = [pattern for pattern in self.groups if fnmatchcase(name, pattern)]
        if len(matching) != 1:
            raise PrivacyError(
                f"parameter {name!r} must match exactly one pattern of groups, but matches "
                f"{' and '.join(map(repr, matching)) or 'none'} of {sorted(self.groups)}. Change the "
                "patterns, or freeze the parameter."
            )
        return matching[0]

    def _choose_thresholds(self, labels: list[str]) -> list[float]:
        empty = sorted(set(self.groups) - set(labels))
        if empty:
            raise PrivacyError(
                f"groups: no trainable parameter matches {', '.join(map(repr, empty))}. Its threshold would "
                "add noise for nothing: remove or correct the pattern."
            )
        return [self.groups[label] for label in labels]

    def _settings(self) -> dict[str, Any]:
        return {"groups": self.groups}


def check_threshold(name: str, value: float) -> None:
    """Refuse a threshold that float32 norms cannot be compared with.

    Args:
        name: What the user calls it.
        value: The threshold.

    Raises:
        PrivacyError: If ``value`` is outside ``SMALLEST_THRESHOLD`` .. ``LARGEST_THRESHOLD``.
    """
    if not SMALLEST_THRESHOLD <= value <= LARGEST_THRESHOLD:
        raise PrivacyError(
            f"{name} must be > 0, from {SMALLEST_THRESHOLD:g} to {LARGEST_THRESHOLD:g}, got {value}."
        )


def split_evenly(total: float, num_groups: int) -> list[float]:
    """Split one sensitivity into equal thresholds whose squares add up to its square.

    Args:
        total: Sensitivity of the whole sum, > 0.
        num_groups: Number of thresholds, >= 1.

    Returns:
        ``num_groups`` times ``total / sqrt(num_groups)``.
    """
    return [total / math.sqrt(num_groups)] * num_groups


def layer_of(name: str) -> str:
    """Cut a parameter's name down to the name of its layer; an adapter's parts belong to the adapted layer.

    Args:
        name: For example ``h.0.fc.weight`` or ``h.0.fc.lora_A.default.weight``.

    Returns:
        For both, ``h.0.fc``; ``(root)`` for a parameter of the model itself.
    """
    parts = name.split(".")
    ends = (i for i, part in enumerate(parts) if part in _PARTS_OF_A_LAYER)
    return ".".join(parts[: next(ends, len(parts) - 1)]) or "(root)"
