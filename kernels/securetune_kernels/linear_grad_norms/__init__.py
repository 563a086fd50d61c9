"""Squared norms of a dense layer's per-sample gradients, without the gradients."""

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend, why_products_cannot_compile
from .._linear import Segments, check_layer_factors, is_in_float64, offsets_of
from .reference import LinearGradNorms, linear_grad_norms_reference, rounding_of_sums
from .torch_path import linear_grad_norms_torch

__all__ = ["LinearGradNorms", "linear_grad_norms", "linear_grad_norms_reference"]


@torch.no_grad()
def linear_grad_norms(
    a: Tensor, g: Tensor, *, cu_seqlens: Tensor | Segments | None = None, backend: Backend = "auto"
) -> LinearGradNorms:
    """Square the L2 norm of each unit's ``g_i^T a_i``, the weight gradient of a dense layer.

    Two ways, by FLOPs. *Gram* (Goodfellow 2015, https://arxiv.org/abs/1510.01799): the sum over pairs of
    tokens of ``(a_s . a_t) (g_s . g_t)``. Both factors are symmetric, so the kernel computes the tiles of one
    triangle and counts those off the diagonal twice, which makes Gram the cheaper way where ``T < 2 d p / (d
    + p)``. *Direct*: tiles of ``g_i^T a_i``, squared in registers. Neither a ``T x T`` nor a ``p x d`` matrix
    is written to memory by the kernels; the torch path writes one of them for each unit.

    Guarantees:
        A NaN or an infinite entry makes its own unit's result not finite and touches no other unit.
        The same call on the same machine gives the same bits: each tile's sum is written to a buffer, and the
        buffer is added up in a fixed order. No unit's tokens are divided among programs to fill a device.
        Products of float32 inputs are computed in float32, those of bfloat16 and float16 inputs are added up
        in float32, whatever torch's precision settings.

    Args:
        a: ``[U, T, d]``, float32, bfloat16, float16 or float64 (torch only): inputs of the layer, any
            strides. With ``cu_seqlens``: ``[N, d]``.
        g: ``[U, T, p]``, or ``[N, p]``; same dtype: gradients of the layer's outputs.
        cu_seqlens: ``[U + 1]``, int32 or int64, from 0 to ``N``: the units' tokens, packed without padding.
            Their values are checked, which waits for the device; ``Segments`` checked once per batch save
            that.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Returns:
        ``squared``: ``[U]``, float32 (float64 for float64): not finite where a gradient is not, or where its
        square does not fit. ``lengths``: ``[U]``, same dtype: ``sum_t |a_t| |g_t|``, which bounds the norm,
        and whose square is what rounding is relative to where tokens cancel. ``rounding``: the relative error
        that long sums may add to ``squared`` besides.

    Raises:
        TypeError: If a dtype is not among those above, or the dtypes differ.
        ValueError: If a shape, a device or ``cu_seqlens`` does not fit.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        squared, lengths = _in_a_graph(a, g, offsets_of(cu_seqlens), backend)
        # which way and which backend it will be is not known yet: the longest sum of any
        longest_sum = max(a.shape[-1] + g.shape[-1], 2 * a.shape[-2])
        return LinearGradNorms(squared, lengths, rounding_of_sums(longest_sum, squared.dtype))
    segments = check_layer_factors(a, g, cu_seqlens)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    if a.numel() == 0 or g.numel() == 0:
        num_units = a.shape[0] if segments is None else segments.num_units
        zeros = torch.zeros(num_units, device=a.device, dtype=dtype)
        return LinearGradNorms(zeros, zeros.clone(), 0.0)
    unsupported = is_in_float64(a) or why_products_cannot_compile(a)
    chosen = resolve_backend(backend, a, op="linear_grad_norms", unsupported=unsupported)
    if chosen == "torch":
        return linear_grad_norms_torch(a, g, segments=segments)
    from .triton_kernels import linear_grad_norms_triton  # triton is optional: imported on first use

    return linear_grad_norms_triton(a, g, segments=segments)


@torch.library.custom_op(f"{NAMESPACE}::linear_grad_norms", mutates_args=())
def _in_a_graph(a: Tensor, g: Tensor, cu_seqlens: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return linear_grad_norms(a, g, cu_seqlens=cu_seqlens, backend=backend)[:2]  # pyright: ignore[reportArgumentType]


@_in_a_graph.register_fake
def _(a: Tensor, g: Tensor, cu_seqlens: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    num_units = len(a) if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.new_empty(num_units, dtype=dtype), a.new_empty(num_units, dtype=dtype)
