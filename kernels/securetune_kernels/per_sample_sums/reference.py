"""Reference for ``per_sample_sums`` in plain PyTorch: slow, obvious, the truth of its tests."""

from typing import NamedTuple

from torch import Tensor

from .._linear import Segments


class Normalized(NamedTuple):
    """What a norm layer multiplied by its scale: ``(x - mean) * inverse``, token by token.

    With ``cu_seqlens`` there is no dimension ``U``, and ``N`` tokens instead of ``T``.
    """

    x: Tensor  # [U, T, d]: the layer's input
    inverse: Tensor  # [U, T], float32 or float64: one over its length or deviation
    mean: Tensor | None = None  # [U, T], same dtype: None for RMSNorm


def per_sample_sums_reference(
    g: Tensor,
    out: Tensor,
    *,
    normalized: Normalized | None = None,
    segments: Segments | None = None,
    accumulate: bool = False,
) -> None:
    """Do what :func:`securetune_kernels.per_sample_sums` does; float64 is computed in float64."""
    units = range(len(out)) if segments is None else [slice(*ends) for ends in segments.ranges()]
    for index, unit in enumerate(units):
        products = g[unit].to(out.dtype)
        if normalized is not None:
            x = normalized.x[unit].to(out.dtype)
            if normalized.mean is not None:
                x = x - normalized.mean[unit].to(out.dtype)[:, None]
            products = products * x * normalized.inverse[unit].to(out.dtype)[:, None]
        total = products.sum(dim=0)
        out[index] = out[index] + total if accumulate else total
