"""Reference for ``pgd_step`` in plain PyTorch: slow, obvious, and the ground truth of its tests."""

import math
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l2_token", "linf", "l2_sample"]
Direction = Literal["sign", "normalised"]

# Projection aims this much inside the ball, so that float32 rounding of the norm does not end outside of it.
INSIDE = 1.0 - 2.0**-18
# Relative and absolute error of rounding to the nearest number of a dtype: half a unit in the last place,
# and half the distance of subnormal numbers.
ROUNDING = {
    torch.float32: (0.0, 0.0),
    torch.bfloat16: (2.0**-8, 0.0),
    torch.float16: (2.0**-11, 2.0**-25),
}


def pgd_step_reference(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor,
    *,
    step_size: float,
    radius: float,
    norm: Norm,
    direction: Direction,
) -> Tensor:
    """Do what :func:`securetune_kernels.pgd_step` does; float64 input is computed in float64."""
    dtype = torch.float64 if delta.dtype == torch.float64 else torch.float32
    attacked = mask[:, :, None]
    # the unit of the ball, over which norms are taken: one sample, or one token of it
    unit_dims = (1, 2) if norm == "l2_sample" else (2,)
    start = torch.where(attacked, delta.to(dtype), 0.0)
    grads = torch.where(attacked, grad.to(dtype), 0.0)

    start_is_finite = torch.isfinite(start).all(dim=unit_dims, keepdim=True)
    grad_is_finite = torch.isfinite(grads).all(dim=unit_dims, keepdim=True)
    step = _direction_of(torch.where(grad_is_finite, grads, 0.0), direction, norm, unit_dims)
    moved = torch.where(start_is_finite, start + step_size * step, 0.0)
    if norm == "linf":
        bound = round_toward_zero(torch.tensor(radius, dtype=torch.float64, device=delta.device), delta.dtype)
        limit = bound.to(dtype)
        return torch.clamp(moved, -limit, limit).to(delta.dtype)

    length = _l2_norm(moved, unit_dims)
    inside = INSIDE * radius
    moved = torch.where(length > inside, moved * (inside / length), moved)
    return cast_within(moved, length, inside, math.prod(delta.shape[dim] for dim in unit_dims), delta.dtype)


def cast_within(values: Tensor, length: Tensor, inside: float, unit_size: int, dtype: torch.dtype) -> Tensor:
    """Cast to ``dtype``, toward zero where a unit of this ``length`` might be rounded out of the ball."""
    if dtype == values.dtype:
        return values
    relative, absolute = ROUNDING[dtype]
    fits = length * (1.0 + relative) + absolute * math.sqrt(unit_size) <= inside
    nearest = values.to(dtype)
    # an entry too large for float16 would become infinite
    return torch.where(fits & nearest.isfinite(), nearest, round_toward_zero(values, dtype))


def _direction_of(grads: Tensor, direction: Direction, norm: Norm, unit_dims: tuple[int, ...]) -> Tensor:
    if direction == "sign":
        return torch.sign(grads)
    length = grads.abs().amax(dim=unit_dims, keepdim=True) if norm == "linf" else _l2_norm(grads, unit_dims)
    # no gradient, no step
    return grads / torch.where(length > 0, length, 1.0)


def _l2_norm(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the L2 norm over ``dims``; squares of float32 numbers neither overflow nor vanish in float64."""
    return torch.linalg.vector_norm(values, dim=dims, keepdim=True, dtype=torch.float64).to(values.dtype)


def round_toward_zero(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to ``dtype`` so that no element grows in magnitude."""
    nearest = values.to(dtype)
    grew = nearest.abs().to(values.dtype) > values.abs()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # floats are stored as sign and magnitude: one bit pattern less is one step toward zero, for either sign
    return torch.where(grew, (nearest.view(bits) - grew.to(bits)).view(dtype), nearest)
