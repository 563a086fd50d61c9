"""``lora_per_sample_grads`` in PyTorch: batched products in the layout that CPUs multiply fast."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._linear import Segments
from ..numerics import full_precision, row_squared_norms
from .reference import Adapter


def lora_per_sample_grads_torch(
    adapters: Sequence[Adapter],
    *,
    scaling: float,
    segments: Segments | None = None,
    accumulate: bool = False,
    squared_norms: Tensor | None = None,
) -> None:
    """Do what :func:`securetune_kernels.lora_per_sample_grads` does, whose checks have already passed."""
    with full_precision():
        for index, adapter in enumerate(adapters):
            for part in _parts(adapter, segments):
                _write(part, scaling, accumulate)
            if squared_norms is not None:
                squared_norms[:, index, 0] = row_squared_norms(adapter.grad_a.flatten(1))
                squared_norms[:, index, 1] = row_squared_norms(adapter.grad_b.flatten(1))


def _write(adapter: Adapter, scaling: float, accumulate: bool) -> None:
    # Products in the buffer's float32: exact to its rounding, and faster than many small bfloat16 products on
    # a CPU.
    dtype = adapter.grad_a.dtype
    x, h, g, g_low = (factor.to(dtype) for factor in adapter[:4])
    grad_a = torch.bmm(g_low.transpose(1, 2), x)
    # B's gradient comes transposed, [U, r, p]: on CPUs products with r rows are three times as fast as
    # products with r columns.
    grad_b = torch.bmm(h.transpose(1, 2) * scaling, g).transpose(1, 2)
    for place, grad in ((adapter.grad_a, grad_a), (adapter.grad_b, grad_b)):
        if accumulate:
            place += grad
        else:
            place.copy_(grad)


def _parts(adapter: Adapter, segments: Segments | None) -> list[Adapter]:
    if segments is None:
        return [adapter]
    return [
        Adapter(
            *(factor[None, start:stop] for factor in adapter[:4]),
            *(grad[unit : unit + 1] for grad in adapter[4:]),
        )
        for unit, (start, stop) in enumerate(segments.ranges())
    ]
