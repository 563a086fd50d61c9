"""Reference for ``lora_per_sample_grads`` in plain PyTorch: slow, obvious, the truth of its tests."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._linear import Segments


class Adapter(NamedTuple):
    """What one LoRA layer ``y = W x + s B (A x)`` saw in a batch, and where its gradients go.

    With ``cu_seqlens`` the first four have no dimension ``U`` and ``N`` tokens instead of ``T``.
    """

    x: Tensor  # [U, T, d]: the layer's input
    h: Tensor  # [U, T, r]: A x
    g: Tensor  # [U, T, p]: gradient of y
    g_low: Tensor  # [U, T, r]: s B^T g
    grad_a: Tensor  # [U, r, d]: written
    grad_b: Tensor  # [U, p, r]: written


def lora_per_sample_grads_reference(
    adapters: Sequence[Adapter],
    *,
    scaling: float,
    segments: Segments | None = None,
    accumulate: bool = False,
    squared_norms: Tensor | None = None,
) -> None:
    """Do what :func:`securetune_kernels.lora_per_sample_grads` does; float64 is computed in float64."""
    for index, adapter in enumerate(adapters):
        dtype = adapter.grad_a.dtype
        units = (
            range(len(adapter.grad_a)) if segments is None else [slice(*ends) for ends in segments.ranges()]
        )
        for unit, tokens in enumerate(units):
            x, h, g, g_low = (factor[tokens].to(dtype) for factor in adapter[:4])
            for place, grad in ((adapter.grad_a, g_low.t() @ x), (adapter.grad_b, scaling * (g.t() @ h))):
                place[unit] = place[unit] + grad if accumulate else grad
            if squared_norms is not None:
                squared_norms[unit, index, 0] = adapter.grad_a[unit].square().sum()
                squared_norms[unit, index, 1] = adapter.grad_b[unit].square().sum()
