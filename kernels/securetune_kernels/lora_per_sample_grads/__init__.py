"""Per-sample gradients of LoRA adapters, written straight into the rows of a buffer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend, why_products_cannot_compile
from .._linear import Segments, is_in_float64, offsets_of
from .._linear.inputs import FACTOR_DTYPES, refuse_overlap, segments_of
from .reference import Adapter, lora_per_sample_grads_reference
from .torch_path import lora_per_sample_grads_torch

__all__ = ["Adapter", "lora_per_sample_grads", "lora_per_sample_grads_reference"]

GRAD_DTYPES = (torch.float32, torch.float64)
FIRST_GRAD = Adapter._fields.index("grad_a")


@torch.no_grad()
def lora_per_sample_grads(
    adapters: Sequence[Adapter],
    *,
    scaling: float,
    cu_seqlens: Tensor | Segments | None = None,
    accumulate: bool = False,
    squared_norms: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Write ``g_low_i^T x_i`` and ``s g_i^T h_i``, the gradients of ``A`` and ``B``, of each unit.

    Both cost the same FLOPs for each unit as their sum over the batch. Adapters of one shape share two
    launches where their tensors have the same strides and lie at multiples of 16 bytes, through a table of
    pointers; others, and those captured into a CUDA graph, have two each. Gradients are written in place, so
    that they can be columns of one ``[U, P]`` buffer.

    Guarantees:
        A NaN or an infinite entry of a unit reaches that unit's gradients and no other's.
        Every entry of the gradients is written; without ``accumulate`` nothing of them is read.
        Products of float32 inputs are computed in float32, those of bfloat16 and float16 inputs are added up
        in float32, whatever torch's precision settings.
        The same call on the same machine gives the same bits; no atomic additions.

    Args:
        adapters: At least one; see :class:`Adapter`. ``x``, ``h``, ``g`` and ``g_low``: float32, bfloat16,
            float16 or float64 (torch only), any strides. ``grad_a`` and ``grad_b``: float32, or float64
            (torch only), any strides without overlap. Shapes and dtypes are the same for all adapters.
        scaling: ``s``, of ``y = W x + s B (A x)``; ``g_low`` holds it already.
        cu_seqlens: ``[U + 1]``, int32 or int64, from 0 to ``N``: the units' tokens, packed without padding.
            Their values are checked, which waits for the device; ``Segments`` checked once per batch save
            that.
        accumulate: Add to what ``grad_a`` and ``grad_b`` hold, for an adapter that ran more than once.
        squared_norms: ``[U, L, 2]``, float32 (float64 for float64), contiguous, for ``L`` adapters: where the
            squared norms of what was written to ``grad_a`` and ``grad_b`` go. None: not computed.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or ``cu_seqlens`` does not fit, or a gradient overlaps itself.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none.")
    if torch.compiler.is_compiling():
        parts = [list(tensors) for tensors in zip(*adapters, strict=True)]
        _in_a_graph(*parts, squared_norms, offsets_of(cu_seqlens), scaling, accumulate, backend)
        return
    first = adapters[0]
    segments = segments_of(first.x, cu_seqlens)
    _check_adapters(adapters, segments, squared_norms)
    if first.grad_a.shape[0] == 0:
        return
    options = {"scaling": scaling, "segments": segments, "accumulate": accumulate}
    unsupported = is_in_float64(*first)
    unsupported = unsupported or why_products_cannot_compile(first.x)
    chosen = resolve_backend(backend, first.x, op="lora_per_sample_grads", unsupported=unsupported)
    if chosen == "torch" or 0 in (first.x.numel(), first.h.numel(), first.g.numel()):
        lora_per_sample_grads_torch(adapters, squared_norms=squared_norms, **options)
        return
    from .triton_kernels import lora_per_sample_grads_triton  # triton is optional: imported on first use

    lora_per_sample_grads_triton(adapters, squared_norms=squared_norms, **options)


@torch.library.custom_op(
    f"{NAMESPACE}::lora_per_sample_grads", mutates_args={"grad_a", "grad_b", "squared_norms"}
)
def _in_a_graph(
    x: Sequence[Tensor],
    h: Sequence[Tensor],
    g: Sequence[Tensor],
    g_low: Sequence[Tensor],
    grad_a: Sequence[Tensor],
    grad_b: Sequence[Tensor],
    squared_norms: Tensor | None,
    cu_seqlens: Tensor | None,
    scaling: float,
    accumulate: bool,
    backend: str,
) -> None:
    lora_per_sample_grads(
        list(map(Adapter, x, h, g, g_low, grad_a, grad_b)),
        scaling=scaling,
        cu_seqlens=cu_seqlens,
        accumulate=accumulate,
        squared_norms=squared_norms,
        backend=backend,  # pyright: ignore[reportArgumentType]
    )


def _check_adapters(
    adapters: Sequence[Adapter], segments: Segments | None, squared_norms: Tensor | None
) -> None:
    first = adapters[0]
    lead, device = tuple(first.x.shape[:-1]), first.x.device
    num_units = lead[0] if segments is None else segments.num_units
    d, r, p = first.x.shape[-1], first.h.shape[-1], first.g.shape[-1]
    shapes = ((*lead, d), (*lead, r), (*lead, p), (*lead, r), (num_units, r, d), (num_units, p, r))
    dtypes = tuple(tensor.dtype for tensor in first)
    for index, adapter in enumerate(adapters):
        for place, tensor in enumerate(adapter):
            name = Adapter._fields[place]
            allowed = GRAD_DTYPES if place >= FIRST_GRAD else FACTOR_DTYPES
            if tensor.shape != shapes[place] or tensor.device != device:
                _check_tensor(f"{name} of adapter {index}", tensor, shapes[place], device)
            if tensor.dtype not in allowed or tensor.dtype != dtypes[place]:
                raise TypeError(
                    f"{name} must be {', '.join(map(str, allowed))}, and the same for all adapters, got "
                    f"{tensor.dtype} for adapter {index} and {dtypes[place]} for the first."
                )
            if place >= FIRST_GRAD and 0 in tensor.stride():
                refuse_overlap(f"{name} of adapter {index}", tensor)
    if first.grad_a.dtype != first.grad_b.dtype:
        raise TypeError(f"grad_a is {first.grad_a.dtype} and grad_b {first.grad_b.dtype}; both must be one.")
    if squared_norms is not None:
        _check_tensor("squared_norms", squared_norms, (num_units, len(adapters), 2), device)
        if squared_norms.dtype != first.grad_a.dtype or not squared_norms.is_contiguous():
            raise TypeError(
                f"squared_norms must be contiguous and of grad_a's dtype, {first.grad_a.dtype}, got "
                f"{squared_norms.dtype} with strides {squared_norms.stride()}."
            )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must have shape {shape} to match the first adapter, got {tuple(tensor.shape)}."
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and x on {device}; both must be on one device.")
