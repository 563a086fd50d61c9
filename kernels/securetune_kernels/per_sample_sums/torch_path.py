"""``per_sample_sums`` in PyTorch: the products, then one sum over the tokens."""

import torch
from torch import Tensor

from .._linear import Segments
from .reference import Normalized


def per_sample_sums_torch(
    g: Tensor,
    out: Tensor,
    *,
    normalized: Normalized | None = None,
    segments: Segments | None = None,
    accumulate: bool = False,
) -> None:
    """Do what :func:`securetune_kernels.per_sample_sums` does, whose checks have already passed."""
    products = g
    if normalized is not None:
        x = normalized.x.to(out.dtype)
        if normalized.mean is not None:
            x = x - normalized.mean.unsqueeze(-1)
        products = (g.to(out.dtype) * x).mul_(normalized.inverse.unsqueeze(-1))
    if segments is None:
        total = products.sum(dim=1, dtype=out.dtype)
    else:
        total = torch.stack(
            [products[start:stop].sum(dim=0, dtype=out.dtype) for start, stop in segments.ranges()]
        )
    if accumulate:
        out += total
    else:
        out.copy_(total)
