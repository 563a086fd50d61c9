"""Per-sample gradients in two backward passes, which keep no layer's factors.

The first pass takes each layer's part of the norms and lets its factors go; the second adds the weighted sum,
layer by layer (ghost clipping, Li et al. 2022, https://arxiv.org/abs/2110.05679, section 4). Both run through
one graph, so dropout masks are the same.

Dimensions: ``B`` samples, ``U`` privacy units, ``G`` clipping groups, ``T`` positions, ``P`` trainable
    parameters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from securetune.errors import PrivacyError
from securetune.privacy.per_sample.gradients import (
    BatchGradients,
    TrainableParameter,
    Uses,
    accumulate_factored,
)
from securetune_kernels.numerics import full_precision

# Largest difference between a layer's values in the two passes, relative to their norm: they come from the
# same graph, so all that may differ is the order of sums on a GPU. Other dropout masks differ by about 0.4.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-3}
_SAME_LOW_PRECISION = 0.05


class Taker(Protocol):
    """What a pass does with a parameter's factors as soon as a layer gave them."""

    def take(self, place: TrainableParameter, factored: dict[int, Uses]) -> None:
        """Take what is needed of ``factored[place.index]``, and remove it where that is all."""
        ...


class TwoPassGradients(BatchGradients):
    """The per-sample gradients of one batch, of which only norms and small parameters' rows are held.

    Args:
        parameters: The trainable parameters in canonical order.
        rows: ``[B, R]``: the written gradients, filled by the first pass.
        row_columns: As in :class:`BatchGradients`.
        unit_index: As in :class:`BatchGradients`.
        run_again: Runs the second pass: hands the factors to a taker, or returns all of them where there is
            none. Called once.
    """

    def __init__(
        self,
        parameters: Sequence[TrainableParameter],
        rows: Tensor,
        row_columns: dict[int, tuple[int, int]],
        unit_index: Tensor | None,
        run_again: Callable[[Taker | None], dict[int, Uses]],
    ) -> None:
        super().__init__(parameters, rows, row_columns, {}, unit_index)
        self._measured: dict[int, Tensor] = {}  # [U]: squared norms by the parameter's index
        self._prints: dict[int, Tensor] = {}  # [2, 2, B]: what the factors were, by the parameter's index
        self._run_again: Callable[[Taker | None], dict[int, Uses]] | None = run_again

    def squared_norms(self, group_of: Sequence[int] | None = None, num_groups: int = 1) -> Tensor:
        """Square the L2 norm of every unit's summed gradient, as :class:`BatchGradients` does.

        Args:
            group_of: Group of each parameter, in canonical order; one group when None.
            num_groups: ``G``.

        Returns:
            ``[U, G]``, float32 (float64 for a float64 model). Not finite where a gradient is not.
        """
        norms = super().squared_norms(group_of, num_groups)
        for index, measured in self._measured.items():
            norms[:, 0 if group_of is None else group_of[index]] += measured
        return norms

    def accumulate(self, factors: Tensor, out: Tensor, group_of: Sequence[int] | None = None) -> None:
        """Add the weighted sum of the units' gradients to ``out``: the second pass, which frees the graph.

        A unit whose factor is zero is left out, not multiplied, so that its gradient may be anything.

        Args:
            factors: ``[U, G]``, float32: weight of each unit in each group.
            out: ``[P]``, float32: accumulator in canonical order.
            group_of: Group of each parameter, in canonical order; one group when None.

        Raises:
            PrivacyError: If it is called twice, or a layer saw other values than in the first pass.
        """
        run_again = self._take_second_pass()
        super().accumulate(factors, out, group_of)
        summing = _Summing(self, factors, out, group_of)
        run_again(summing)
        summing.finish(self._parameters)

    def accumulate_layers(
        self, factors: Tensor, layers: Sequence[slice], group_of: Sequence[int] | None = None
    ) -> Iterator[Tensor]:
        """Yield what :meth:`BatchGradients.accumulate_layers` does, from one vector: there is one pass more.

        Args:
            factors: ``[U, G]``, float32: weight of each unit in each group.
            layers: Ranges of the flat vector.
            group_of: Group of each parameter, in canonical order; one group when None.

        Yields:
            1-D, float32: the sum of the next range.
        """
        out = self._rows.new_zeros(self.num_params)
        self.accumulate(factors, out, group_of)
        for layer in layers:
            yield out[layer]

    def materialize(self) -> Tensor:
        """Write every sample's gradient out, for checks and tests: the second pass, which frees the graph.

        Returns:
            ``[B, P]``, in canonical order.
        """
        self._factored = self._take_second_pass()(None)
        rows = super().materialize()
        self._factored = {}
        return rows

    def _take_second_pass(self) -> Callable[[Taker | None], dict[int, Uses]]:
        if self._run_again is None:
            raise PrivacyError(
                "the second pass of these gradients has run, and freed the graph. With passes=2 call "
                "accumulate or materialize once for each backward."
            )
        run_again, self._run_again = self._run_again, None
        return run_again


class Measuring:
    """Take each parameter's squared norms.

    Args:
        batch: Where to put them.
        repeated: Indices of the parameters whose uses must all be seen first, for the products between them.

    Attributes:
        found: Indices of other parameters that were used again after their norm was taken.
    """

    def __init__(self, batch: TwoPassGradients, repeated: set[int]) -> None:
        self.found: set[int] = set()
        self._batch, self._repeated = batch, repeated

    def take(self, place: TrainableParameter, factored: dict[int, Uses]) -> None:
        """Take the norms, unless another use may come."""
        if place.index in self._repeated:
            return
        uses = factored.pop(place.index)
        if place.index in self._batch._measured:
            self.found.add(place.index)
        else:
            self._measure(place.index, uses)

    def finish(self, factored: dict[int, Uses]) -> None:
        """Take the norms of the parameters that were used more than once."""
        for index, uses in factored.items():
            self._measure(index, uses)
        factored.clear()

    def _measure(self, index: int, uses: Uses) -> None:
        with full_precision():
            self._batch._measured[index] = self._batch._factored_norms(uses)
            self._batch._prints[index] = _print(uses, self._batch._rows.dtype)


class _Summing:
    """Add each parameter's weighted gradient to the accumulator."""

    def __init__(
        self, batch: TwoPassGradients, factors: Tensor, out: Tensor, group_of: Sequence[int] | None
    ) -> None:
        self._prints = batch._prints  # becomes the difference between the two passes
        self._tolerances: dict[int, float] = {}
        self._out, self._group_of = out, group_of
        self._weights = factors.to(batch._rows.dtype)[batch.unit_index]  # [B, G]
        self._kept = [(self._weights[:, g] != 0).nonzero().flatten() for g in range(factors.shape[1])]

    def take(self, place: TrainableParameter, factored: dict[int, Uses]) -> None:
        """Add this use of the parameter."""
        uses, index = factored.pop(place.index), place.index
        group = 0 if self._group_of is None else self._group_of[index]
        keep, weights = self._kept[group], self._weights[:, group]
        if index not in self._prints:
            _refuse_other_values(place)
        with full_precision():
            self._prints[index][:, 0] -= _print(uses, self._weights.dtype)[:, 0]
            self._tolerances[index] = max(self._tolerances.get(index, 0.0), _tolerance(uses))
            accumulate_factored(uses, keep, weights, self._out[place.start : place.stop])

    def finish(self, parameters: Sequence[TrainableParameter]) -> None:
        """Refuse a second pass through other values than those that were measured.

        Args:
            parameters: All, in canonical order.

        Raises:
            PrivacyError: If there is one; what was added is not clipped then.
        """
        for index, found in self._prints.items():
            group = 0 if self._group_of is None else self._group_of[index]
            difference, size = found[:, :, self._kept[group]].unbind(1)
            size = size.clamp_min(torch.finfo(size.dtype).tiny ** 0.5)  # squares vanish below
            if not bool((difference.abs() <= self._tolerances.get(index, 0.0) * size).all()):
                _refuse_other_values(parameters[index])


def _print(uses: Uses, dtype: torch.dtype) -> Tensor:
    # each sample's inputs and output gradients on fixed waves, and their sizes: [2, 2, B]
    inputs = [use[0] for use in (*uses.dense, *uses.routed)]
    return torch.stack([_project(part, dtype, uses) for part in (inputs, _output_gradients(uses))])


def _project(tensors: Sequence[Tensor], dtype: torch.dtype, uses: Uses) -> Tensor:
    samples = _output_gradients(uses)[0]
    total = torch.zeros(2, len(samples), dtype=dtype, device=samples.device)
    for tensor in tensors:
        wide = tensor.to(dtype)
        across, along = _wave(wide.shape[2], wide), _wave(wide.shape[1], wide)
        total[0] += torch.linalg.vecdot(wide @ across, along)
        total[1] += torch.linalg.vector_norm(wide, dim=(1, 2))
    return total


def _output_gradients(uses: Uses) -> list[Tensor]:
    return [use[1] for use in (*uses.dense, *uses.lookups, *uses.routed)]


def _wave(length: int, like: Tensor) -> Tensor:
    steps = torch.arange(1, length + 1, dtype=like.dtype, device=like.device)
    return torch.sin(steps.square() * 0.6180339887).mul_(2**0.5)


def _tolerance(uses: Uses) -> float:
    return max(_SAME.get(g.dtype, _SAME_LOW_PRECISION) for g in _output_gradients(uses))


def _refuse_other_values(place: TrainableParameter) -> NoReturn:
    raise PrivacyError(
        f"the second pass saw other values in the layer of {place.name} than the first, so its gradient is "
        "not the one that was measured, and clipping would not hold. Random numbers must be the same in both "
        "(preserve_rng_state=False in gradient checkpointing, a random operation of its own): use passes=1."
    )


__all__ = ["Measuring", "Taker", "TwoPassGradients"]
