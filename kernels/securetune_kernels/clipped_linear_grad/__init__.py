"""Weighted sum of a dense layer's per-sample gradients, without the gradients."""

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend
from .._linear import Segments, check_layer_factors, is_in_float64, offsets_of
from .._linear.inputs import refuse_overlap
from .reference import clipped_linear_grad_reference
from .torch_path import clipped_linear_grad_torch

__all__ = ["clipped_linear_grad", "clipped_linear_grad_reference"]


@torch.no_grad()
def clipped_linear_grad(
    a: Tensor,
    g: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    cu_seqlens: Tensor | Segments | None = None,
    backend: Backend = "auto",
) -> None:
    """Add ``sum_i f_i g_i^T a_i``, a dense layer's clipped gradient, to ``out`` in one sweep.

    The second product of book-keeping (Bu et al. 2022, https://arxiv.org/abs/2210.00038). The kernel
    multiplies each unit's float32 sum by its factor, so that no factor is rounded to the inputs' precision.

    Guarantees:
        A unit whose factor is zero is not read by the kernels: it adds exactly zero, whatever it holds.
        Sums are float32 whatever the inputs' dtype and torch's precision settings, and so are the factors.
        The same call on the same machine gives the same bits; no atomic additions.

    Args:
        a: ``[U, T, d]``, float32, bfloat16, float16 or float64 (torch only): inputs of the layer, any
            strides. With ``cu_seqlens``: ``[N, d]``.
        g: ``[U, T, p]``, or ``[N, p]``; same dtype: gradients of the layer's outputs.
        factors: ``[U]``, float32 or float64 (torch only): weight of each unit.
        out: ``[p, d]``, float32 or float64 (torch only), any strides: added to in place.
        cu_seqlens: ``[U + 1]``, int32 or int64, from 0 to ``N``: the units' tokens, packed without padding.
            Their values are checked, which waits for the device; ``Segments`` checked once per batch save
            that.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or ``cu_seqlens`` does not fit, or ``out`` overlaps itself.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        _in_a_graph(a, g, factors, out, offsets_of(cu_seqlens), backend)
        return
    segments = check_layer_factors(a, g, cu_seqlens)
    _check_factors_and_out(a, g, factors, out, len(a) if segments is None else segments.num_units)
    if a.numel() == 0 or g.numel() == 0:
        return
    unsupported = is_in_float64(a, factors, out)
    if resolve_backend(backend, a, op="clipped_linear_grad", unsupported=unsupported) == "torch":
        clipped_linear_grad_torch(a, g, factors, out, segments=segments)
        return
    from .triton_kernels import clipped_linear_grad_triton  # triton is optional: imported on first use

    clipped_linear_grad_triton(a, g, factors, out, segments=segments)


@torch.library.custom_op(f"{NAMESPACE}::clipped_linear_grad", mutates_args={"out"})
def _in_a_graph(
    a: Tensor, g: Tensor, factors: Tensor, out: Tensor, cu_seqlens: Tensor | None, backend: str
) -> None:
    clipped_linear_grad(a, g, factors, out, cu_seqlens=cu_seqlens, backend=backend)  # pyright: ignore[reportArgumentType]


def _check_factors_and_out(a: Tensor, g: Tensor, factors: Tensor, out: Tensor, num_units: int) -> None:
    for name, tensor, form, shape in (
        ("factors", factors, "[U]", (num_units,)),
        ("out", out, "[p, d]", (g.shape[-1], a.shape[-1])),
    ):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {tensor.dtype}.")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {form} = {shape}, got {tuple(tensor.shape)}.")
        if tensor.device != a.device:
            raise ValueError(f"{name} is on {tensor.device} and a on {a.device}; both must be on one device.")
    refuse_overlap("out", out)
