"""``embedding_grad_norms`` and ``tied_cross_products`` in PyTorch, for whole batches."""

import torch
from torch import Tensor

from .._linear import Segments
from ..numerics import add_rows, full_precision


def embedding_grad_norms_torch(ids: Tensor, g: Tensor, *, segments: Segments | None = None) -> Tensor:
    """Do what :func:`securetune_kernels.embedding_grad_norms` does, whose checks have already passed."""
    g = g if g.dtype == torch.float64 else g.float()
    units = len(ids) if segments is None else segments.num_units
    row = unit_of_tokens(ids, segments)
    keys, places = torch.unique(row * (ids.max() + 1) + ids, return_inverse=True)
    summed = add_rows(g.new_zeros(len(keys), g.shape[-1]), places.flatten(), g.flatten(0, -2))
    owner = keys // (ids.max() + 1)
    return add_rows(g.new_zeros(units), owner, torch.linalg.vector_norm(summed, dim=1).square())


def unit_of_tokens(ids: Tensor, segments: Segments | None) -> Tensor:
    """Number the unit of each token: the shape of ``ids``, int64."""
    if segments is None:
        return torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
    lengths = segments.cu_seqlens.diff()
    units = torch.arange(segments.num_units, device=ids.device)
    return units.repeat_interleave(lengths, output_size=len(ids))


def tied_cross_products_torch(a: Tensor, g: Tensor, ids: Tensor, lookup_g: Tensor) -> Tensor:
    """Do what :func:`securetune_kernels.tied_cross_products` does, whose checks have already passed."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, g, lookup_g = a.to(dtype), g.to(dtype), lookup_g.to(dtype)
    at_ids = g.gather(2, ids[:, None, :].expand(-1, g.shape[1], -1))  # [U, S, T]
    with full_precision():
        inner = torch.bmm(a, lookup_g.transpose(1, 2))
        return torch.linalg.vecdot(at_ids.flatten(1), inner.flatten(1))
