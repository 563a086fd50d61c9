"""Triton implementation of ``pgd_step``: one sweep per token, two where the ball spans a sample."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .reference import INSIDE, ROUNDING, Direction, Norm, round_toward_zero

# Threads per program so that each holds 8 to 32 elements of a token; counted, not swept on a GPU.
ELEMENTS_PER_WARP = 512
MAX_WARPS = 16
BLOCK_TOKENS = 1024  # tokens whose sums one program of the reduction loads at once

# Divisors are kept in this range: their reciprocals stay normal numbers, and the largest quotient's square
# is finite.
SMALLEST_DIVISOR = tl.constexpr(2.0**-120)
LARGEST_DIVISOR = tl.constexpr(2.0**120)
# Only infinity is above it: where rounding may not be to infinity, but to anything else.
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# Bounds the rounding of ||delta + step||^2 when it is put together from three sums that may cancel.
CANCELLATION = tl.constexpr(2.0**-20)
# Columns of the tables: per token the gradient's largest entry, its squares in that unit, the mixed sum and
# delta's squares; per sample the factors of the gradient (two, so that neither overflows), of the sum, and
# how to round.
NUM_TERMS = tl.constexpr(4)


@triton.jit
def _load_token(
    ptr, sample, token, sample_stride, token_stride, embed_stride, num_read, BLOCK_EMBED: tl.constexpr
):
    # the first num_read entries of a token, zeros after them
    cols = tl.arange(0, BLOCK_EMBED).to(tl.int64)  # [BLOCK_EMBED]
    ptrs = ptr + sample * sample_stride + token * token_stride + cols * embed_stride
    return tl.load(ptrs, mask=cols < num_read, other=0.0).to(tl.float32)


@triton.jit
def _is_finite(values):
    # a count, because a maximum may drop NaN; NaN < inf is false
    return tl.sum(tl.where(tl.abs(values) < float("inf"), 0, 1), axis=0) == 0


@triton.jit
def _divisor(values):
    return tl.minimum(tl.maximum(tl.max(tl.abs(values), axis=0), SMALLEST_DIVISOR), LARGEST_DIVISOR)


@triton.jit
def _sign(values):
    return tl.where(values > 0, 1.0, 0.0) - tl.where(values < 0, 1.0, 0.0)


@triton.jit
def _cast_within(values, bounds, DTYPE: tl.constexpr):
    # to the nearest number of DTYPE, or one step nearer to zero where the magnitude would be above its bound
    if DTYPE == tl.float32:  # noqa: SIM300
        result = values
    else:
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            # to nearest even, spelled out: Triton's interpreter truncates in this cast, a GPU does not
            bits = values.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            nearest = bits.to(tl.uint16).to(DTYPE, bitcast=True)
        else:
            nearest = values.to(DTYPE)
        # floats are stored as sign and magnitude: one bit pattern less is one step toward zero, for either
        # sign
        smaller = (nearest.to(tl.int16, bitcast=True) - 1).to(DTYPE, bitcast=True)
        result = tl.where(tl.abs(nearest.to(tl.float32)) > bounds, smaller, nearest)
    return result


@triton.jit
def _token_kernel(
    delta_ptr,
    grad_ptr,
    mask_ptr,
    out_ptr,
    num_tokens,
    num_embed,
    delta_sample_stride,
    delta_token_stride,
    delta_embed_stride,
    grad_sample_stride,
    grad_token_stride,
    grad_embed_stride,
    mask_sample_stride,
    mask_token_stride,
    step_size,
    limit,
    relative_rounding,
    absolute_rounding,
    IS_LINF: tl.constexpr,
    IS_SIGN: tl.constexpr,
    BLOCK_EMBED: tl.constexpr,
):
    # one program per token: reads it once, moves, projects and writes it
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // num_tokens, row % num_tokens
    # torch.compile passes Python floats as float64 before torch 2.15
    step_size = tl.cast(step_size, tl.float32)
    limit = tl.cast(limit, tl.float32)
    relative_rounding = tl.cast(relative_rounding, tl.float32)
    absolute_rounding = tl.cast(absolute_rounding, tl.float32)
    attacked = tl.load(mask_ptr + sample * mask_sample_stride + token * mask_token_stride) != 0
    num_read = tl.where(attacked, num_embed, 0)
    delta = _load_token(
        delta_ptr,
        sample,
        token,
        delta_sample_stride,
        delta_token_stride,
        delta_embed_stride,
        num_read,
        BLOCK_EMBED,
    )
    grad = _load_token(
        grad_ptr,
        sample,
        token,
        grad_sample_stride,
        grad_token_stride,
        grad_embed_stride,
        num_read,
        BLOCK_EMBED,
    )

    if IS_SIGN:
        step = _sign(grad)
    else:
        scaled = grad * (1.0 / _divisor(grad))
        length = tl.max(tl.abs(scaled), axis=0) if IS_LINF else tl.sqrt(tl.sum(scaled * scaled, axis=0))
        step = scaled * (1.0 / tl.where(length > 0, length, 1.0))
    step = tl.where(_is_finite(grad), step, 0.0)
    moved = tl.where(_is_finite(delta), delta + step_size * step, 0.0)

    if IS_LINF:
        moved = tl.minimum(tl.maximum(moved, -limit), limit)
        bounds = limit
    else:
        divisor = _divisor(moved)
        scaled = moved * (1.0 / divisor)
        length = divisor * tl.sqrt(tl.sum(scaled * scaled, axis=0))
        moved = tl.where(length > limit, moved * (limit / tl.maximum(length, limit)), moved)
        may_leave = length * (1.0 + relative_rounding) + absolute_rounding > limit
        bounds = tl.where(may_leave, tl.abs(moved), LARGEST_FLOAT)
    cols = tl.arange(0, BLOCK_EMBED)  # [BLOCK_EMBED]
    result = _cast_within(moved, bounds, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_embed + cols, result, mask=cols < num_embed)


@triton.jit
def _token_sums_kernel(
    delta_ptr,
    grad_ptr,
    mask_ptr,
    sums_ptr,
    num_tokens,
    num_embed,
    delta_sample_stride,
    delta_token_stride,
    delta_embed_stride,
    grad_sample_stride,
    grad_token_stride,
    grad_embed_stride,
    mask_sample_stride,
    mask_token_stride,
    step_size,
    unit,
    IS_SIGN: tl.constexpr,
    BLOCK_EMBED: tl.constexpr,
):
    # one program per token: the sums from which its sample's norms are put together
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // num_tokens, row % num_tokens
    step_size = tl.cast(step_size, tl.float32)
    unit = tl.cast(unit, tl.float32)
    attacked = tl.load(mask_ptr + sample * mask_sample_stride + token * mask_token_stride) != 0
    num_read = tl.where(attacked, num_embed, 0)
    delta = _load_token(
        delta_ptr,
        sample,
        token,
        delta_sample_stride,
        delta_token_stride,
        delta_embed_stride,
        num_read,
        BLOCK_EMBED,
    )
    grad = _load_token(
        grad_ptr,
        sample,
        token,
        grad_sample_stride,
        grad_token_stride,
        grad_embed_stride,
        num_read,
        BLOCK_EMBED,
    )
    in_units = delta * (1.0 / unit)
    largest = _divisor(grad)
    if IS_SIGN:
        grad_squares = 0.0
        moved = in_units + (step_size / unit) * _sign(grad)
        mixed = tl.sum(moved * moved, axis=0)
    else:
        scaled = grad * (1.0 / largest)
        grad_squares = tl.sum(scaled * scaled, axis=0)
        mixed = tl.sum(in_units * scaled, axis=0)
    # infinity marks a gradient that must not be used; NaN could be lost in a later maximum
    largest = tl.where(_is_finite(grad), largest, float("inf"))
    ptr = sums_ptr + row * NUM_TERMS
    tl.store(ptr, largest)
    tl.store(ptr + 1, grad_squares)
    tl.store(ptr + 2, mixed)
    tl.store(ptr + 3, tl.sum(in_units * in_units, axis=0))


@triton.jit
def _sample_factors_kernel(
    sums_ptr,
    factors_ptr,
    num_tokens,
    step_size,
    unit,
    limit,
    relative_rounding,
    absolute_rounding,
    IS_SIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    # one program per sample: adds the sums of its tokens in a fixed order
    sample = tl.program_id(0).to(tl.int64)
    step_size = tl.cast(step_size, tl.float32)
    unit = tl.cast(unit, tl.float32)
    limit = tl.cast(limit, tl.float32)
    relative_rounding = tl.cast(relative_rounding, tl.float32)
    absolute_rounding = tl.cast(absolute_rounding, tl.float32)
    first_ptr = sums_ptr + sample * num_tokens * NUM_TERMS
    largest = SMALLEST_DIVISOR + tl.zeros((BLOCK_TOKENS,), dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
        values = tl.load(first_ptr + tokens * NUM_TERMS, mask=tokens < num_tokens, other=0.0)
        largest = tl.maximum(largest, values)
    largest = tl.max(largest, axis=0)
    grad_is_finite = largest < float("inf")

    grad_squares = tl.zeros((BLOCK_TOKENS,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_TOKENS,), dtype=tl.float32)
    delta_squares = tl.zeros((BLOCK_TOKENS,), dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
        mask = tokens < num_tokens
        ptrs = first_ptr + tokens * NUM_TERMS
        if IS_SIGN:
            mixed += tl.load(ptrs + 2, mask=mask, other=0.0)
        else:
            share = tl.load(ptrs, mask=mask, other=0.0) / largest
            grad_squares += tl.load(ptrs + 1, mask=mask, other=0.0) * share * share
            mixed += tl.load(ptrs + 2, mask=mask, other=0.0) * share
        delta_squares += tl.load(ptrs + 3, mask=mask, other=0.0)
    total = tl.sum(delta_squares, axis=0)
    mixed_total = tl.sum(mixed, axis=0)
    grad_length = tl.sqrt(tl.sum(grad_squares, axis=0))

    in_units = step_size / unit
    if IS_SIGN:
        takes_step = grad_is_finite
        moved_squares = mixed_total
    else:
        takes_step = grad_is_finite & (grad_length > 0)
        cosine_part = mixed_total / tl.where(grad_length > 0, grad_length, 1.0)
        moved_squares = total + 2.0 * in_units * cosine_part + in_units * in_units
        moved_squares = tl.maximum(moved_squares, 0.0) + CANCELLATION * (total + in_units * in_units)
    length = unit * tl.sqrt(tl.where(takes_step, moved_squares, total))
    # exactly 1 inside the ball, which x / x need not be with a fast division
    shrink = tl.where(length > limit, limit / tl.maximum(length, limit), 1.0)
    may_leave = length * (1.0 + relative_rounding) + absolute_rounding > limit
    if IS_SIGN:
        step_factor = step_size
        inverse_largest = 1.0
    else:
        step_factor = step_size / tl.where(grad_length > 0, grad_length, 1.0)
        inverse_largest = 1.0 / largest
    ptr = factors_ptr + sample * NUM_TERMS
    tl.store(ptr, tl.where(takes_step, inverse_largest, 0.0))
    tl.store(ptr + 1, tl.where(takes_step, step_factor, 0.0))
    # a perturbation that is not finite becomes zero; NaN < inf is false
    tl.store(ptr + 2, tl.where(total < float("inf"), shrink, 0.0))
    tl.store(ptr + 3, may_leave.to(tl.float32))


@triton.jit
def _apply_sample_factors_kernel(
    delta_ptr,
    grad_ptr,
    mask_ptr,
    factors_ptr,
    out_ptr,
    num_tokens,
    num_embed,
    delta_sample_stride,
    delta_token_stride,
    delta_embed_stride,
    grad_sample_stride,
    grad_token_stride,
    grad_embed_stride,
    mask_sample_stride,
    mask_token_stride,
    IS_SIGN: tl.constexpr,
    BLOCK_EMBED: tl.constexpr,
):
    # one program per token: moves it with its sample's factors and writes it
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // num_tokens, row % num_tokens
    inverse_largest = tl.load(factors_ptr + sample * NUM_TERMS)
    step_factor = tl.load(factors_ptr + sample * NUM_TERMS + 1)
    shrink = tl.load(factors_ptr + sample * NUM_TERMS + 2)
    may_leave = tl.load(factors_ptr + sample * NUM_TERMS + 3) > 0
    attacked = tl.load(mask_ptr + sample * mask_sample_stride + token * mask_token_stride) != 0
    # what must not count is not read: 0 * NaN would be NaN
    num_read = tl.where(attacked & (shrink > 0), num_embed, 0)
    delta = _load_token(
        delta_ptr,
        sample,
        token,
        delta_sample_stride,
        delta_token_stride,
        delta_embed_stride,
        num_read,
        BLOCK_EMBED,
    )
    num_read = tl.where(step_factor > 0, num_read, 0)
    grad = _load_token(
        grad_ptr,
        sample,
        token,
        grad_sample_stride,
        grad_token_stride,
        grad_embed_stride,
        num_read,
        BLOCK_EMBED,
    )
    step = _sign(grad) if IS_SIGN else grad * inverse_largest
    moved = (delta + step_factor * step) * shrink
    cols = tl.arange(0, BLOCK_EMBED)  # [BLOCK_EMBED]
    bounds = tl.where(may_leave, tl.abs(moved), LARGEST_FLOAT)
    result = _cast_within(moved, bounds, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * num_embed + cols, result, mask=cols < num_embed)


def warps_for(block_embed: int) -> int:
    """Return how many warps share one token."""
    return min(MAX_WARPS, max(1, block_embed // ELEMENTS_PER_WARP))


def pgd_step_triton(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor,
    *,
    step_size: float,
    radius: float,
    norm: Norm,
    direction: Direction,
) -> Tensor:
    """Launch the kernels; arguments are already checked by :func:`securetune_kernels.pgd_step`."""
    num_samples, num_tokens, num_embed = delta.shape
    out = torch.empty(delta.shape, device=delta.device, dtype=delta.dtype)
    mask = mask.view(torch.uint8)
    strides = (*delta.stride(), *grad.stride(), *mask.stride())
    block_embed = triton.next_power_of_2(num_embed)
    warps = warps_for(block_embed)
    is_sign = direction == "sign"
    limit = INSIDE * radius
    if norm == "linf":
        limit = round_toward_zero(torch.tensor(radius, dtype=torch.float64), delta.dtype).item()
    relative, absolute = ROUNDING[delta.dtype]
    unit_size = num_embed * (num_tokens if norm == "l2_sample" else 1)
    absolute *= math.sqrt(unit_size)
    grid = (num_samples * num_tokens,)
    with on_device_of(delta):
        if norm != "l2_sample":
            _token_kernel[grid](
                delta, grad, mask, out, num_tokens, num_embed, *strides, step_size, limit, relative, absolute,
                IS_LINF=norm == "linf", IS_SIGN=is_sign, BLOCK_EMBED=block_embed, num_warps=warps,
            )  # fmt: skip
            return out
        sums = torch.empty(num_samples, num_tokens, 4, device=delta.device, dtype=torch.float32)
        factors = torch.empty(num_samples, 4, device=delta.device, dtype=torch.float32)
        unit = max(radius, step_size)
        _token_sums_kernel[grid](
            delta, grad, mask, sums, num_tokens, num_embed, *strides, step_size, unit,
            IS_SIGN=is_sign, BLOCK_EMBED=block_embed, num_warps=warps,
        )  # fmt: skip
        _sample_factors_kernel[(num_samples,)](
            sums, factors, num_tokens, step_size, unit, limit, relative, absolute,
            IS_SIGN=is_sign, BLOCK_TOKENS=BLOCK_TOKENS, num_warps=4,
        )  # fmt: skip
        _apply_sample_factors_kernel[grid](
            delta, grad, mask, factors, out, num_tokens, num_embed, *strides,
            IS_SIGN=is_sign, BLOCK_EMBED=block_embed, num_warps=warps,
        )  # fmt: skip
    return out
