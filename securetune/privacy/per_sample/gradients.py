"""What one backward pass recorded: per-sample norms, and the weighted sum, of every parameter's gradient.

Two ways to hold a parameter's per-sample gradients. *Rows*: written out, one flat row per sample, for
parameters whose per-sample gradient is small (adapters, biases, norm layers). *Factors*: the layer's inputs
``a`` and output gradients ``g``, whose product is the gradient (book-keeping, Bu et al. 2022,
https://arxiv.org/abs/2210.00038); norms come from Gram matrices, the weighted sum from one product after the
norms are known. Either way no gradient is computed twice and none is computed unweighted.

Dimensions: ``B`` samples, ``U`` privacy units, ``G`` clipping groups, ``T`` positions, ``d`` input features,
    ``p`` output features, ``P`` trainable parameters.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from securetune_kernels import (
    clipped_linear_grad,
    embedding_grad_norms,
    linear_grad_norms,
    tied_cross_products,
)
from securetune_kernels.numerics import add_rows, full_precision, row_squared_norms

# A norm taken from factors is a sum of products that may cancel, so its rounding error is relative to
# the sum of their magnitudes. So many units in the last place of that sum are added, which makes the norm an
# upper bound.
_GRAM_SLACK_ULPS = 2


@dataclass(frozen=True)
class TrainableParameter:
    """A trainable parameter and its place in the canonical flat vector.

    Attributes:
        name: As in ``model.named_parameters()``, without the names that wrappers insert; a tied parameter has
            its first name.
        parameter: The parameter itself.
        index: Position among the trainable parameters.
        start: Flat index of its first entry.
        stop: Flat index after its last entry.
        shape: Of the whole parameter, also where a wrapper holds a part of it only.
    """

    name: str
    parameter: nn.Parameter
    index: int
    start: int
    stop: int
    shape: torch.Size


@dataclass
class Uses:
    """How one factored parameter was used: all its gradients add up."""

    dense: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # a [B, T, d], g [B, T, p]
    lookups: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # ids [B, T], g [B, T, d]
    # a [B, S, d], g [B, S, p], expert [B, S]; a or g may hold a token once for its k slots: [B, S / k, ...]
    routed: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    written: Tensor | None = None  # [B, p * d]: where the product is no larger than its factors

    def add_dense(self, a: Tensor, g: Tensor, dtype: torch.dtype, *, is_tied: bool) -> None:
        """Keep one use of a dense layer, as factors or, where that takes less, as their product."""
        tokens, d, p = a.shape[1], a.shape[2], g.shape[2]
        is_smaller = tokens > 1 and tokens * (d + p) >= d * p and not self.dense and not is_tied
        if self.written is None and not is_smaller:
            self.dense.append((a, g))
            return
        product = dense_rows(a, g, dtype).flatten(1)
        self.written = product if self.written is None else self.written.add_(product)


class BatchGradients:
    """The per-sample gradients of one backward pass, never summed without factors.

    Valid until the next backward pass of the same engine, which reuses the buffer.

    Args:
        parameters: The trainable parameters in canonical order.
        rows: ``[B, R]``, float32 or float64: the written gradients.
        row_columns: First and last column, exclusive, of each parameter that is written, by its index.
        factored: The factors of every other parameter that got a gradient, by its index.
        unit_index: ``[B]``, int64, or None where every sample is a unit of its own.

    Attributes:
        num_samples: ``B``.
        unit_index: ``[B]``, int64: the privacy unit, from 0, that each sample belongs to.
        num_units: ``U``.
    """

    def __init__(
        self,
        parameters: Sequence[TrainableParameter],
        rows: Tensor,
        row_columns: dict[int, tuple[int, int]],
        factored: dict[int, Uses],
        unit_index: Tensor | None,
    ) -> None:
        self._parameters = parameters
        self._rows = rows  # [B, R]
        self._row_columns = row_columns
        self._factored = factored
        self.num_samples = rows.shape[0]
        self._has_joint_units = unit_index is not None
        self.unit_index = torch.arange(len(rows), device=rows.device) if unit_index is None else unit_index
        self.num_units = int(self.unit_index.max()) + 1 if len(rows) else 0

    @property
    def num_params(self) -> int:
        """Number of trainable parameters, ``P``."""
        return self._parameters[-1].stop

    @property
    def flat_rows(self) -> Tensor | None:
        """``[B, P]``: the written rows, where they hold everything and each sample is a unit of its own."""
        is_whole = self._rows.shape[1] == self.num_params and not self._has_joint_units
        return self._rows if is_whole else None

    def squared_norms(self, group_of: Sequence[int] | None = None, num_groups: int = 1) -> Tensor:
        """Square the L2 norm of every unit's summed gradient, group by group.

        Args:
            group_of: Group of each parameter, in canonical order; one group when None.
            num_groups: ``G``.

        Returns:
            ``[U, G]``, float32 (float64 for a float64 model). Not finite where a gradient is not.
        """
        groups = [0] * len(self._parameters) if group_of is None else group_of
        norms = torch.zeros(self.num_units, num_groups, dtype=self._rows.dtype, device=self._rows.device)
        if self.num_samples == 0:
            return norms
        with full_precision():
            unit_rows = self._sum_by_unit(self._rows)
            if num_groups == 1:
                norms[:, 0] = row_squared_norms(unit_rows)
            else:
                for index, (start, stop) in self._row_columns.items():
                    norms[:, groups[index]] += row_squared_norms(unit_rows[:, start:stop])
            for index, uses in self._factored.items():
                norms[:, groups[index]] += self._factored_norms(uses)
        return norms

    def accumulate(self, factors: Tensor, out: Tensor, group_of: Sequence[int] | None = None) -> None:
        """Add the weighted sum of the units' gradients to ``out``.

        A unit whose factor is zero is left out, not multiplied, so that its gradient may be anything.

        Args:
            factors: ``[U, G]``, float32: weight of each unit in each group.
            out: ``[P]``, float32: accumulator in canonical order.
            group_of: Group of each parameter, in canonical order; one group when None.
        """
        self._add_range(slice(0, self.num_params), self._weigh(factors, group_of), out)

    def accumulate_layers(
        self, factors: Tensor, layers: Sequence[slice], group_of: Sequence[int] | None = None
    ) -> Iterator[Tensor]:
        """Yield the weighted sum of the units' gradients, one range of the flat vector after another.

        Args:
            factors: ``[U, G]``, float32: weight of each unit in each group.
            layers: Ranges that cut no parameter.
            group_of: Group of each parameter, in canonical order; one group when None.

        Yields:
            1-D, float32: the sum of the next range.
        """
        weights = self._weigh(factors, group_of)
        for layer in layers:
            out = self._rows.new_zeros(layer.stop - layer.start)
            self._add_range(layer, weights, out)
            yield out

    def _weigh(self, factors: Tensor, group_of: Sequence[int] | None) -> "_Weights":
        by_row = factors.to(self._rows.dtype)[self.unit_index]  # [B, G]
        return _Weights(
            groups=[0] * len(self._parameters) if group_of is None else group_of,
            by_row=by_row,
            kept=[(by_row[:, group] != 0).nonzero().flatten() for group in range(factors.shape[1])],
        )

    def _add_range(self, within: slice, weighed: "_Weights", out: Tensor) -> None:
        if self.num_samples == 0:
            return
        groups, by_row, kept = weighed
        with full_precision():
            for run in self._column_runs(groups, within):
                keep, weights = kept[run.group], by_row[:, run.group]
                rows = self._rows[:, run.columns]
                if len(keep) < self.num_samples:
                    rows, weights = rows[keep], weights[keep]
                part = out[run.flat.start - within.start : run.flat.stop - within.start]
                part.addmv_(rows.t().to(out.dtype), weights.to(out.dtype))
            for index, uses in self._factored.items():
                place = self._parameters[index]
                if _is_within(place, within):
                    keep, weights = kept[groups[index]], by_row[:, groups[index]]
                    part = out[place.start - within.start : place.stop - within.start]
                    accumulate_factored(uses, keep, weights, part)

    def materialize(self) -> Tensor:
        """Write every sample's gradient out, for checks and tests: ``B * P`` numbers.

        Returns:
            ``[B, P]``, in canonical order.
        """
        rows = self._rows.new_zeros(self.num_samples, self.num_params)
        for index, (start, stop) in self._row_columns.items():
            place = self._parameters[index]
            rows[:, place.start : place.stop] = self._rows[:, start:stop]
        with full_precision():
            for sample in range(self.num_samples):
                keep = torch.tensor([sample], device=rows.device)
                weights = rows.new_zeros(self.num_samples).index_fill_(0, keep, 1.0)
                for index, uses in self._factored.items():
                    place = self._parameters[index]
                    accumulate_factored(uses, keep, weights, rows[sample, place.start : place.stop])
        return rows

    def _sum_by_unit(self, rows: Tensor) -> Tensor:
        if not self._has_joint_units:
            return rows
        return add_rows(rows.new_zeros(self.num_units, rows.shape[1]), self.unit_index, rows)

    def _joined(self, uses: Sequence[tuple[Tensor, ...]], *, widen: bool = True) -> list[Tensor]:
        """Join all uses along ``T``, and the samples of a unit too: ``[U, M T, ...]``, padded with zeros."""
        tensors: list[Tensor] = []
        for position in range(len(uses[0])):
            parts = [use[position] for use in uses]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            tensors.append(whole.to(self._rows.dtype) if widen and whole.is_floating_point() else whole)
        if not self._has_joint_units:
            return tensors
        order = torch.argsort(self.unit_index, stable=True)
        counts = torch.bincount(self.unit_index, minlength=self.num_units)
        first = counts.cumsum(0) - counts
        slot = torch.arange(self.num_samples, device=order.device) - first[self.unit_index[order]]
        most = int(counts.max())
        joined: list[Tensor] = []
        for tensor in tensors:
            padded = tensor.new_zeros(self.num_units, most, *tensor.shape[1:])
            padded[self.unit_index[order], slot] = tensor[order]
            joined.append(padded.flatten(1, 2))
        return joined

    def _factored_norms(self, uses: Uses) -> Tensor:
        if uses.written is not None:
            return row_squared_norms(self._sum_by_unit(uses.written))
        if uses.routed:
            return routed_squared_norms(*self._joined(uses.routed))
        is_wide = self._rows.dtype == torch.float64
        if not uses.dense:
            return embedding_grad_norms(*self._joined(uses.lookups, widen=is_wide))
        if not uses.lookups:
            return dense_squared_norms(*self._joined(uses.dense, widen=is_wide))
        a, g = self._joined(uses.dense)
        ids, lookup_g = self._joined(uses.lookups)
        total = dense_squared_norms(a, g) + embedding_grad_norms(ids, lookup_g)
        lengths = _lengths(a, g) + torch.linalg.vector_norm(lookup_g, dim=2).sum(1)
        return (total + 2 * tied_cross_products(a, g, ids, lookup_g)).clamp_min(0) + _slack(lengths)

    def _column_runs(self, groups: Sequence[int], within: slice) -> Iterator["_ColumnRun"]:
        """Yield maximal ranges of row columns that lie together in the flat vector and share a group."""
        run: _ColumnRun | None = None
        for index, (start, stop) in sorted(self._row_columns.items()):
            place = self._parameters[index]
            if not _is_within(place, within):
                continue
            if (
                run
                and run.flat.stop == place.start
                and run.columns.stop == start
                and run.group == groups[index]
            ):
                run = _ColumnRun(slice(run.columns.start, stop), slice(run.flat.start, place.stop), run.group)
                continue
            if run:
                yield run
            run = _ColumnRun(slice(start, stop), slice(place.start, place.stop), groups[index])
        if run:
            yield run


def _is_within(place: TrainableParameter, within: slice) -> bool:
    if place.start >= within.stop or place.stop <= within.start:
        return False
    assert within.start <= place.start, "a range cuts a parameter"
    assert place.stop <= within.stop, "a range cuts a parameter"
    return True


class _Weights(NamedTuple):
    groups: Sequence[int]  # of each parameter
    by_row: Tensor  # [B, G]
    kept: list[Tensor]  # rows whose weight is not zero, by group


@dataclass(frozen=True)
class _ColumnRun:
    columns: slice
    flat: slice
    group: int


def dense_rows(a: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """Write ``g_i^T a_i`` out.

    Args:
        a: ``[B, T, d]``: inputs of a dense layer.
        g: ``[B, T, p]``: gradients of its outputs.
        dtype: To compute in.

    Returns:
        ``[B, p, d]``.
    """
    return torch.bmm(g.to(dtype).transpose(1, 2), a.to(dtype))


def lookup_rows(ids: Tensor, g: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Write the gradient of a table out.

    Args:
        ids: ``[B, T]``: what was looked up.
        g: ``[B, T, d]``: gradients of the outputs.
        size: Rows of the table, ``V``.
        dtype: To compute in.

    Returns:
        ``[B, V, d]``.
    """
    first = size * torch.arange(len(ids), device=ids.device)[:, None]
    rows = g.new_zeros(len(ids) * size, g.shape[2], dtype=dtype)
    return add_rows(rows, (ids + first).flatten(), g.flatten(0, 1).to(dtype)).unflatten(0, (len(ids), size))


def dense_squared_norms(a: Tensor, g: Tensor) -> Tensor:
    """Square the norm of ``g_i^T a_i`` for every ``i``, rounded up.

    Args:
        a: ``[U, T, d]``: inputs of a dense layer.
        g: ``[U, T, p]``: gradients of its outputs.

    Returns:
        ``[U]``: an upper bound of the squared norms that is tight up to a few units in the last place of the
            sum of the products' magnitudes.
    """
    squared, lengths, rounding = linear_grad_norms(*_of_one_dtype(a, g))
    return (squared * (1 + rounding) if rounding else squared) + _slack(lengths)


def routed_squared_norms(a: Tensor, g: Tensor, expert: Tensor) -> Tensor:
    """Square the norm of all experts' gradients together, for every unit.

    Args:
        a: ``[U, S, d]``, or ``[U, S / k, d]`` where ``k`` slots in a row share an entry: the experts' inputs.
        g: ``[U, S, p]``, or ``[U, S / k, p]``: gradients of their outputs.
        expert: ``[U, S]``, int64: the expert that each slot was sent to.

    Returns:
        ``[U]``, an upper bound as in :func:`dense_squared_norms`.
    """
    norms = a.new_zeros(len(a))
    for _, part_a, part_g in by_expert(a, g, expert):
        norms += dense_squared_norms(part_a, part_g)
    return norms


def by_expert(a: Tensor, g: Tensor, expert: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that was used, with each unit's slots that it got, padded with zeros.

    Args:
        a: ``[U, S, d]``, or ``[U, S / k, d]`` where ``k`` slots in a row share an entry.
        g: ``[U, S, p]``, or ``[U, S / k, p]``.
        expert: ``[U, S]``, int64.

    Yields:
        The expert, ``[U, M, d]`` and ``[U, M, p]``.
    """
    for index in expert.unique().tolist():
        unit, slot = (expert == index).nonzero(as_tuple=True)
        counts = torch.bincount(unit, minlength=len(expert))
        place = torch.arange(len(unit), device=unit.device) - (counts.cumsum(0) - counts)[unit]
        parts: list[Tensor] = []
        for tensor in (a, g):
            part = tensor.new_zeros(len(expert), int(counts.max()), tensor.shape[2])
            part[unit, place] = tensor[unit, slot // (expert.shape[1] // tensor.shape[1])]
            parts.append(part)
        yield index, parts[0], parts[1]


def accumulate_factored(uses: Uses, keep: Tensor, weights: Tensor, out: Tensor) -> None:
    """Add a parameter's gradient, summed with ``weights [B]``, to ``out [p * d]``; ``keep``: not zero."""
    for a, g in uses.dense:
        clipped_linear_grad(*_of_one_dtype(a, g), weights, out.view(g.shape[2], a.shape[2]))
    everything = len(keep) == len(weights)
    weights = (weights if everything else weights[keep]).to(out.dtype)
    if uses.written is not None:
        rows = uses.written if everything else uses.written[keep]
        out.addmv_(rows.t().to(out.dtype), weights)
    for a, g, expert in uses.routed:
        a, g, expert = (a, g, expert) if everything else (a[keep], g[keep], expert[keep])
        a, g = a.to(out.dtype), g.to(out.dtype) * weights[:, None, None]
        for index, part_a, part_g in by_expert(a, g, expert):
            matrix = out.view(-1, g.shape[2], a.shape[2])[index]
            matrix.addmm_(part_g.flatten(0, 1).t(), part_a.flatten(0, 1))
    for ids, g in uses.lookups:
        ids, g = (ids, g) if everything else (ids[keep], g[keep])
        weighted = g.to(out.dtype) * weights[:, None, None]
        add_rows(out.view(-1, g.shape[2]), ids.flatten(), weighted.flatten(0, 1))


def _of_one_dtype(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, g.dtype)
    return a.to(dtype), g.to(dtype)


def _lengths(a: Tensor, g: Tensor) -> Tensor:
    """Sum the norms of the positions' gradients, as if none cancelled: ``[U]``."""
    return torch.linalg.vecdot(torch.linalg.vector_norm(a, dim=2), torch.linalg.vector_norm(g, dim=2))


def _slack(lengths: Tensor) -> Tensor:
    return _GRAM_SLACK_ULPS * torch.finfo(lengths.dtype).eps * lengths.square()


def as_3d(x: Tensor) -> Tensor:
    """View ``[B, ..., d]`` as ``[B, T, d]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def index_units(unit_ids: Sequence[Hashable], device: torch.device) -> Tensor | None:
    """Number the units from 0 in order of appearance; None where every sample is its own unit."""
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(unit, len(numbers)) for unit in unit_ids]
    return torch.tensor(index, device=device) if len(numbers) < len(index) else None
