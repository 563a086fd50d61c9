"""``pgd_step`` in PyTorch in few sweeps; a unit with unusual numbers is done again by the reference."""

import torch
from torch import Tensor

from .reference import INSIDE, Direction, Norm, cast_within, pgd_step_reference, round_toward_zero

# Between these a float32 norm is as good as one in float64: no square overflows or vanishes.
SMALLEST_PLAIN_NORM = 1e-15
LARGEST_PLAIN_NORM = 1e18


def pgd_step_torch(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor,
    *,
    step_size: float,
    radius: float,
    norm: Norm,
    direction: Direction,
) -> Tensor:
    """Do what :func:`securetune_kernels.pgd_step` does, whose checks have already passed."""
    masked_out = ~mask[:, :, None]
    # two new tensors, so that all that follows may work in place
    moved = torch.empty(delta.shape, device=delta.device, dtype=torch.float32).copy_(grad)
    moved.masked_fill_(masked_out, 0.0)
    start = delta.float().masked_fill(masked_out, 0.0)
    # a sum is finite only if all its terms are; an L2 norm below tells the same of delta
    is_plain = _sums_are_finite(start, norm) if norm == "linf" else torch.tensor(True, device=delta.device)
    if direction == "sign":
        is_plain = is_plain & _sums_are_finite(moved, norm)
        moved.sign_().mul_(step_size)
    else:
        length = moved.abs().amax(dim=2, keepdim=True) if norm == "linf" else _l2_norm(moved, norm)
        nothing_to_move = masked_out.all(dim=1, keepdim=True) if norm == "l2_sample" else masked_out
        in_range = (length >= SMALLEST_PLAIN_NORM) & (length <= LARGEST_PLAIN_NORM)
        is_plain = is_plain & (in_range | nothing_to_move)
        moved.mul_(torch.where(nothing_to_move, 0.0, step_size / length))
    moved.add_(start)
    if norm == "linf":
        limit = round_toward_zero(torch.tensor(radius, dtype=torch.float64), delta.dtype).item()
        result = moved.clamp_(-limit, limit).to(delta.dtype)
    else:
        length = _l2_norm(moved, norm)
        is_plain = is_plain & (length <= LARGEST_PLAIN_NORM)
        inside = INSIDE * radius
        moved.mul_((inside / length).clamp(max=1.0))
        unit_size = delta.shape[2] * (delta.shape[1] if norm == "l2_sample" else 1)
        result = cast_within(moved, length, inside, unit_size, delta.dtype)
    if not bool(is_plain.all()):
        # only the unit itself goes another way: the bits of the others must not depend on it
        unusual = ~is_plain[:, :, 0]
        options = {"step_size": step_size, "radius": radius, "norm": norm, "direction": direction}
        if norm == "l2_sample":
            rows = unusual[:, 0]
            result[rows] = pgd_step_reference(delta[rows], grad[rows], mask[rows], **options)
        else:
            tokens = (delta[unusual][:, None], grad[unusual][:, None], mask[unusual][:, None])
            result[unusual] = pgd_step_reference(*tokens, **options)[:, 0]
    return result


def _sums_are_finite(values: Tensor, norm: Norm) -> Tensor:
    finite = values.sum(dim=2, keepdim=True).isfinite()
    return finite.all(dim=1, keepdim=True) if norm == "l2_sample" else finite


def _l2_norm(values: Tensor, norm: Norm) -> Tensor:
    """Return the L2 norm of each unit, token by token first: one long float32 sum is not accurate enough."""
    tokens = torch.linalg.vector_norm(values, dim=2, keepdim=True)
    return torch.linalg.vector_norm(tokens, dim=1, keepdim=True) if norm == "l2_sample" else tokens
