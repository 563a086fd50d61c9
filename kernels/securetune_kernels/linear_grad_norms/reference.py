"""Reference for ``linear_grad_norms`` in plain PyTorch: slow, obvious, the truth of its tests."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._linear import Segments

# Tensor cores add up 16 products at a time and may round each sum toward zero (Fasi et al. 2021,
# https://doi.org/10.7717/peerj-cs.330), so a long sum comes out short: one unit in the last place for each
# such addition. Float32 products are added one by one and rounded to nearest: expect the root of their
# number. The larger of both is stated.
PRODUCTS_PER_ADDITION = 16


class LinearGradNorms(NamedTuple):
    """Squared norms of a dense layer's per-sample gradients, and what their rounding is relative to."""

    squared: Tensor  # [U]
    lengths: Tensor  # [U]: sum of the norms of the tokens' gradients, as if none cancelled
    rounding: (
        float  # relative rounding of the products' sums, beside a few units in the last place of lengths^2
    )


def linear_grad_norms_reference(a: Tensor, g: Tensor, *, segments: Segments | None = None) -> LinearGradNorms:
    """Do what :func:`securetune_kernels.linear_grad_norms` does; float64 input is computed in float64."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    pairs = zip(a, g, strict=True) if segments is None else _pieces(a, g, segments)
    squared, lengths = [], []
    for inputs, output_grads in pairs:
        wide_a, wide_g = inputs.to(dtype), output_grads.to(dtype)
        squared.append((wide_g.t() @ wide_a).square().sum())
        lengths.append((wide_a.norm(dim=1) * wide_g.norm(dim=1)).sum())
    empty = a.new_zeros(0, dtype=dtype)
    if not squared:
        return LinearGradNorms(empty, empty, 0.0)
    return LinearGradNorms(torch.stack(squared), torch.stack(lengths), 0.0)


def rounding_of_sums(longest_sum: int, dtype: torch.dtype) -> float:
    """Bound the relative rounding of sums of so many products, none for float64."""
    num_roundings = max(longest_sum / PRODUCTS_PER_ADDITION, longest_sum**0.5)
    return 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps * num_roundings


def _pieces(a: Tensor, g: Tensor, segments: Segments) -> list[tuple[Tensor, Tensor]]:
    return [(a[start:stop], g[start:stop]) for start, stop in segments.ranges()]
