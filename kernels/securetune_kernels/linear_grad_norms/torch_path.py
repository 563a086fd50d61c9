"""``linear_grad_norms`` in PyTorch: Gram matrices or the product itself, whichever takes fewer FLOPs."""

import torch
from torch import Tensor

from .._linear import Segments
from ..numerics import full_precision, row_squared_norms
from .reference import LinearGradNorms


def linear_grad_norms_torch(a: Tensor, g: Tensor, *, segments: Segments | None = None) -> LinearGradNorms:
    """Do what :func:`securetune_kernels.linear_grad_norms` does, whose checks have already passed."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, g = a.to(dtype), g.to(dtype)
    with full_precision():
        if segments is None:
            return LinearGradNorms(*_batch_norms(a, g), 0.0)
        squared, lengths = a.new_empty(segments.num_units), a.new_empty(segments.num_units)
        for unit, (start, stop) in enumerate(segments.ranges()):
            part = slice(unit, unit + 1)
            squared[part], lengths[part] = _batch_norms(a[None, start:stop], g[None, start:stop])
        return LinearGradNorms(squared, lengths, 0.0)


def _batch_norms(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    tokens, d, p = a.shape[1], a.shape[2], g.shape[2]
    if tokens == 1:
        squared = a.flatten(1).square().sum(1) * g.flatten(1).square().sum(1)
        return squared, squared.sqrt()
    if tokens * (d + p) >= d * p:  # the gradient itself costs less than the Gram matrices
        small, large = (a, g) if d <= p else (g, a)
        squared = row_squared_norms(torch.bmm(small.transpose(1, 2), large).flatten(1))
        token_norms = torch.linalg.vector_norm(a, dim=2), torch.linalg.vector_norm(g, dim=2)
        return squared, torch.linalg.vecdot(*token_norms)
    gram_a, gram_g = torch.bmm(a, a.transpose(1, 2)), torch.bmm(g, g.transpose(1, 2))
    lengths = (_diagonal(gram_a) * _diagonal(gram_g)).sqrt().sum(1)
    return torch.linalg.vecdot(gram_a.flatten(1), gram_g.flatten(1)).clamp_min(0), lengths


def _diagonal(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).clamp_min(0)
