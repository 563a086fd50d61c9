"""Reference for ``clip_and_accumulate`` in plain PyTorch: slow, obvious, the truth of its tests."""

import torch
from torch import Tensor


def clip_and_accumulate_reference(
    per_sample_grads: Tensor, accumulator: Tensor, max_grad_norm: float, *, valid: Tensor | None = None
) -> Tensor:
    """Do what :func:`securetune_kernels.clip_and_accumulate` does; float64 input is computed in float64."""
    grads = per_sample_grads if per_sample_grads.dtype == torch.float64 else per_sample_grads.float()
    if valid is not None:
        grads = torch.where(valid[:, None], grads, 0.0)
    # squares of float32 numbers neither overflow nor vanish in float64
    norms = torch.linalg.vector_norm(grads, dim=1, dtype=torch.float64).to(grads.dtype)
    factors = clip_factors(norms, max_grad_norm)
    clipped = torch.where(factors[:, None] > 0, factors[:, None] * grads, 0.0)
    accumulator += clipped.sum(dim=0).to(accumulator.dtype)
    return norms


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """Return the factor of each row: ``min(1, C / norm)``, and zero for a row that must not contribute."""
    factors = torch.where(norms > max_grad_norm, max_grad_norm / norms, 1.0)
    # Below the smallest normal number rounding could double a factor, and with it the sensitivity. Such a
    # row is over 1e37 times too long. NaN < inf is false, so both NaN and infinite norms are dropped.
    usable = (norms < torch.inf) & (factors >= torch.finfo(factors.dtype).tiny)
    return torch.where(usable, factors, 0.0)
