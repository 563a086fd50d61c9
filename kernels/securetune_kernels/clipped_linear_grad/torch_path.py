"""``clipped_linear_grad`` in PyTorch: one product over all tokens, the narrower factor scaled first."""

import torch
from torch import Tensor

from .._linear import Segments
from ..numerics import full_precision
from ..products import add_product


def clipped_linear_grad_torch(
    a: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, segments: Segments | None = None
) -> None:
    """Do what :func:`securetune_kernels.clipped_linear_grad` does, whose checks have already passed."""
    if segments is not None:  # from here on each token is a unit of its own
        counts = torch.tensor([stop - start for start, stop in segments.ranges()], device=factors.device)
        factors = factors.repeat_interleave(counts)
        a, g = a.unsqueeze(1), g.unsqueeze(1)
    # 0 * NaN is NaN, so a unit that is left out is not multiplied by zero
    kept = factors.nonzero().flatten()
    if len(kept) < len(factors):
        a, g, factors = a[kept], g[kept], factors[kept]
    a, g, factors = a.to(out.dtype), g.to(out.dtype), factors.to(out.dtype)
    if a.shape[2] <= g.shape[2]:
        a = a * factors[:, None, None]
    else:
        g = g * factors[:, None, None]
    with full_precision():
        add_product(out, g.flatten(0, 1), a.flatten(0, 1))
