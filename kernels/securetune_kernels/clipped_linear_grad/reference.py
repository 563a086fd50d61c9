"""Reference for ``clipped_linear_grad`` in plain PyTorch: slow, obvious, the truth of its tests."""

from torch import Tensor

from .._linear import Segments


def clipped_linear_grad_reference(
    a: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, segments: Segments | None = None
) -> None:
    """Do what :func:`securetune_kernels.clipped_linear_grad` does; float64 is computed in float64."""
    units = range(len(factors)) if segments is None else [slice(*ends) for ends in segments.ranges()]
    for unit, factor in zip(units, factors, strict=True):
        if factor != 0:
            out += factor.to(out.dtype) * (g[unit].to(out.dtype).t() @ a[unit].to(out.dtype))
