"""Per-sample gradients of biases and of the scales of norm layers: sums over each sample's tokens."""

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend
from .._linear import Segments, is_in_float64, offsets_of
from .._linear.inputs import FACTOR_DTYPES, refuse_overlap, segments_of
from .reference import Normalized, per_sample_sums_reference
from .torch_path import per_sample_sums_torch

__all__ = ["Normalized", "per_sample_sums", "per_sample_sums_reference"]


@torch.no_grad()
def per_sample_sums(
    g: Tensor,
    out: Tensor,
    *,
    normalized: Normalized | None = None,
    cu_seqlens: Tensor | Segments | None = None,
    accumulate: bool = False,
    backend: Backend = "auto",
) -> None:
    """Sum output gradients over each unit's tokens, as they are or times what a norm layer normalised.

    As they are, the sum is the gradient of a bias; times ``(x - mean) * inverse`` it is that of the scale of
    a LayerNorm, or without ``mean`` of an RMSNorm. The products are not written by the kernel.

    Guarantees:
        A NaN or an infinite entry of a unit reaches that unit's sums and no other's.
        Every entry of ``out`` is written; without ``accumulate`` nothing of it is read.
        Products and sums are float32 whatever the inputs' dtype.
        The same call on the same machine gives the same bits; no atomic additions.

    Args:
        g: ``[U, T, d]``, float32, bfloat16, float16 or float64 (torch only): gradients of the layer's
            outputs, any strides. With ``cu_seqlens``: ``[N, d]``.
        out: ``[U, d]``, float32 or float64 (torch only), any strides without overlap: written.
        normalized: What a norm layer's scale was multiplied with; None for a bias.
        cu_seqlens: ``[U + 1]``, int32 or int64, from 0 to ``N``: the units' tokens, packed without padding.
            Their values are checked, which waits for the device; ``Segments`` checked once per batch save
            that.
        accumulate: Add to what ``out`` holds, for a layer that ran more than once.
        backend: ``"triton"``, ``"torch"`` or ``"auto"`` (see ``resolve_backend``).

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or ``cu_seqlens`` does not fit, or ``out`` overlaps itself.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    if torch.compiler.is_compiling():
        x, inverse, mean = (None, None, None) if normalized is None else normalized
        _in_a_graph(g, out, x, inverse, mean, offsets_of(cu_seqlens), accumulate, backend)
        return
    segments = segments_of(g, cu_seqlens)
    _check_arguments(g, out, normalized, len(g) if segments is None else segments.num_units)
    if out.numel() == 0:
        return
    options = {"normalized": normalized, "segments": segments, "accumulate": accumulate}
    unsupported = is_in_float64(g, out, *(part for part in normalized or () if part is not None))
    if resolve_backend(backend, g, op="per_sample_sums", unsupported=unsupported) == "torch":
        per_sample_sums_torch(g, out, **options)
        return
    from .triton_kernels import per_sample_sums_triton  # triton is optional: imported on first use

    per_sample_sums_triton(g, out, **options)


@torch.library.custom_op(f"{NAMESPACE}::per_sample_sums", mutates_args={"out"})
def _in_a_graph(
    g: Tensor,
    out: Tensor,
    x: Tensor | None,
    inverse: Tensor | None,
    mean: Tensor | None,
    cu_seqlens: Tensor | None,
    accumulate: bool,
    backend: str,
) -> None:
    normalized = None if x is None or inverse is None else Normalized(x, inverse, mean)
    options = {"normalized": normalized, "cu_seqlens": cu_seqlens, "accumulate": accumulate}
    per_sample_sums(g, out, backend=backend, **options)  # pyright: ignore[reportArgumentType]


def _check_arguments(g: Tensor, out: Tensor, normalized: Normalized | None, num_units: int) -> None:
    wide = (torch.float32, torch.float64)
    expected = {"g": (g, tuple(g.shape), FACTOR_DTYPES), "out": (out, (num_units, g.shape[-1]), wide)}
    if normalized is not None:
        expected["x"] = (normalized.x, tuple(g.shape), FACTOR_DTYPES)
        expected["inverse"] = (normalized.inverse, tuple(g.shape[:-1]), wide)
        if normalized.mean is not None:
            expected["mean"] = (normalized.mean, tuple(g.shape[:-1]), wide)
    for name, (tensor, shape, dtypes) in expected.items():
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {', '.join(map(str, dtypes))}, got {tensor.dtype}.")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} to match g {tuple(g.shape)}, got {tuple(tensor.shape)}."
            )
        if tensor.device != g.device:
            raise ValueError(f"{name} is on {tensor.device} and g on {g.device}; both must be on one device.")
    refuse_overlap("out", out)
