"""Squared norms of an embedding table's per-sample gradients, and what a tied output layer adds."""

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend, why_products_cannot_compile
from .._linear import Segments, is_in_float64, offsets_of
from .._linear.inputs import FACTOR_DTYPES, segments_of
from .reference import embedding_grad_norms_reference, tied_cross_products_reference
from .torch_path import embedding_grad_norms_torch, tied_cross_products_torch

__all__ = [
    "embedding_grad_norms",
    "embedding_grad_norms_reference",
    "tied_cross_products",
    "tied_cross_products_reference",
]


@torch.no_grad()
def embedding_grad_norms(
    ids: Tensor, g: Tensor, *, cu_seqlens: Tensor | Segments | None = None, backend: Backend = "auto"
) -> Tensor:
    """Square the L2 norm of each unit's gradient of an embedding table: equal ids add up before the square.

    The kernel gets the tokens sorted by unit and id; the first of equal ones adds them all up in their order.
    The table's gradient is never written.

    Guarantees:
        A NaN or an infinite entry makes its own unit's result not finite and touches no other unit.
        Sums are float32 whatever the inputs' dtype.
        The same call on the same machine gives the same bits; no atomic additions.

    Args:
        ids: ``[U, T]``, int64 or int32, at least 0: rows of the table that were looked up. With
            ``cu_seqlens``: ``[N]``.
        g: ``[U, T, d]``, float32, bfloat16, float16 or float64 (torch only): gradients of the rows, any
            strides. With
            ``cu_seqlens``: ``[N, d]``.
        cu_seqlens: ``[U + 1]``, int32 or int64, from 0 to ``N``: the units' tokens, packed without padding.
            Their values are checked, which waits for the device; ``Segments`` checked once per batch save
            that.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Returns:
        ``[U]``, float32 (float64 for float64).

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or ``cu_seqlens`` does not fit.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        return _norms_in_a_graph(ids, g, offsets_of(cu_seqlens), backend)
    segments = segments_of(g, cu_seqlens)
    _check_lookup(ids, g)
    if g.numel() == 0:
        num_units = len(ids) if segments is None else segments.num_units
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        return torch.zeros(num_units, device=g.device, dtype=dtype)
    if resolve_backend(backend, g, op="embedding_grad_norms", unsupported=is_in_float64(g)) == "torch":
        return embedding_grad_norms_torch(ids, g, segments=segments)
    from .triton_kernels import embedding_grad_norms_triton  # triton is optional: imported on first use

    return embedding_grad_norms_triton(ids, g, segments=segments)


@torch.no_grad()
def tied_cross_products(
    a: Tensor, g: Tensor, ids: Tensor, lookup_g: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Multiply the two gradients of a matrix that is embedding table and output layer, and add up.

    For each unit the sum over the entries of ``(g_i^T a_i) * (table gradient)``, which the squared norm of
    their sum holds twice. Computed as the sum over pairs of positions ``s`` and ``t`` of
    ``g[s, ids[t]] (a[s] . lookup_g[t])``, without either gradient; the kernel writes no matrix of pairs
    either.

    Guarantees:
        A NaN or an infinite entry of a position makes its own unit's result not finite, if that entry is
        used, and touches no other unit.
        Products of float32 inputs are computed in float32, those of bfloat16 and float16 inputs are added up
        in float32, whatever torch's precision settings.
        The same call on the same machine gives the same bits; no atomic additions.

    Args:
        a: ``[U, S, d]``, float32, bfloat16, float16 or float64 (torch only): inputs of the output layer, any
            strides.
        g: ``[U, S, V]``, same dtype: gradients of its outputs.
        ids: ``[U, T]``, int64 or int32, at least 0 and below ``V``: rows of the table that were looked up.
        lookup_g: ``[U, T, d]``, same dtype: gradients of those rows.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Returns:
        ``[U]``, float32 (float64 for float64).

    Raises:
        TypeError: If a dtype is not among those above, or the dtypes differ.
        ValueError: If a shape or a device does not fit.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        return _products_in_a_graph(a, g, ids, lookup_g, backend)
    _check_lookup(ids, lookup_g)
    if a.ndim != 3 or g.ndim != 3 or lookup_g.ndim != 3:
        shapes = f"{tuple(a.shape)}, {tuple(g.shape)} and {tuple(lookup_g.shape)}"
        raise ValueError(f"a, g and lookup_g must have shapes [U, S, d], [U, S, V], [U, T, d], got {shapes}.")
    if a.shape[:2] != g.shape[:2] or a.shape[0] != len(ids) or a.shape[2] != lookup_g.shape[2]:
        shapes = f"{tuple(a.shape)}, {tuple(g.shape)} and {tuple(lookup_g.shape)}"
        raise ValueError(f"a [U, S, d], g [U, S, V] and lookup_g [U, T, d] do not match: {shapes}.")
    if not a.dtype == g.dtype == lookup_g.dtype:
        raise TypeError(f"a, g and lookup_g must have one dtype, got {a.dtype}, {g.dtype}, {lookup_g.dtype}.")
    if not a.device == g.device == ids.device:
        raise ValueError(f"a is on {a.device}, g on {g.device} and ids on {ids.device}; all must be on one.")
    if 0 in (a.numel(), g.numel(), lookup_g.numel()):
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        return torch.zeros(len(a), device=a.device, dtype=dtype)
    unsupported = is_in_float64(a) or why_products_cannot_compile(a)
    if resolve_backend(backend, a, op="tied_cross_products", unsupported=unsupported) == "torch":
        return tied_cross_products_torch(a, g, ids.long(), lookup_g)
    from .triton_kernels import tied_cross_products_triton  # triton is optional: imported on first use

    return tied_cross_products_triton(a, g, ids, lookup_g)


@torch.library.custom_op(f"{NAMESPACE}::embedding_grad_norms", mutates_args=())
def _norms_in_a_graph(ids: Tensor, g: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    return embedding_grad_norms(ids, g, cu_seqlens=cu_seqlens, backend=backend)  # pyright: ignore[reportArgumentType]


@_norms_in_a_graph.register_fake
def _(ids: Tensor, g: Tensor, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    num_units = len(ids) if cu_seqlens is None else len(cu_seqlens) - 1
    return g.new_empty(num_units, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::tied_cross_products", mutates_args=())
def _products_in_a_graph(a: Tensor, g: Tensor, ids: Tensor, lookup_g: Tensor, backend: str) -> Tensor:
    return tied_cross_products(a, g, ids, lookup_g, backend=backend)  # pyright: ignore[reportArgumentType]


@_products_in_a_graph.register_fake
def _(a: Tensor, *_: object) -> Tensor:
    return a.new_empty(len(a), dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


def _check_lookup(ids: Tensor, g: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}.")
    if g.dtype not in FACTOR_DTYPES:
        raise TypeError(f"gradients must be float32, bfloat16, float16 or float64, got {g.dtype}.")
    if ids.shape != g.shape[:-1]:
        raise ValueError(
            f"ids must have shape {tuple(g.shape[:-1])} to match gradients {tuple(g.shape)}, got "
            f"{tuple(ids.shape)}."
        )
    if ids.device != g.device:
        raise ValueError(f"ids is on {ids.device} and gradients on {g.device}; both must be on one device.")
