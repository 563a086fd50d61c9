"""References for ``embedding_grad_norms`` and ``tied_cross_products``: the truth of their tests."""

import torch
from torch import Tensor

from .._linear import Segments


def embedding_grad_norms_reference(ids: Tensor, g: Tensor, *, segments: Segments | None = None) -> Tensor:
    """Do what :func:`securetune_kernels.embedding_grad_norms` does; float64 input is computed in float64."""
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    units = range(len(ids)) if segments is None else [slice(*ends) for ends in segments.ranges()]
    norms = torch.zeros(len(units), dtype=dtype, device=g.device)
    for index, unit in enumerate(units):
        table: dict[int, Tensor] = {}
        for token, grad in zip(ids[unit].tolist(), g[unit].to(dtype), strict=True):
            table[token] = table[token] + grad if token in table else grad
        for row in table.values():
            norms[index] += row.square().sum()
    return norms


def tied_cross_products_reference(a: Tensor, g: Tensor, ids: Tensor, lookup_g: Tensor) -> Tensor:
    """Do what :func:`securetune_kernels.tied_cross_products` does; float64 input is computed in float64."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    products = a.new_zeros(len(a), dtype=dtype)
    for unit in range(len(a)):
        as_head = g[unit].to(dtype).t() @ a[unit].to(dtype)  # [V, d]
        as_table = torch.zeros_like(as_head).index_add_(0, ids[unit], lookup_g[unit].to(dtype))
        products[unit] = (as_head * as_table).sum()
    return products
