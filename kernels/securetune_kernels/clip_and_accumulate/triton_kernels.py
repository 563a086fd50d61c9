"""Triton implementation of ``clip_and_accumulate``: one sweep for the norms, one for the clipped sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of

# Chosen by counting bytes in flight for an H100 (132 multiprocessors, 3.35 TB/s), not by a sweep on one.
BLOCK_SQUARES = 4096  # columns a program of the first sweep loads at once
SQUARES_WARPS = 8
# Rows are split until there are about eight programs per multiprocessor of an H100. A constant, not the
# number of the GPU at hand, so that the order of additions and with it every bit is the same on all of them.
TARGET_PROGRAMS = 1056
MAX_SPLITS = 1024
SUM_WARPS = 4
# columns x rows of a tile of the second sweep: wide tiles where there are enough columns to fill the GPU
# with them
WIDE_TILE = (512, 8)
NARROW_TILE = (128, 32)

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# Squares are summed three times: as they are, of entries shrunk by 2^-80 and of entries grown by 2^80. For
# every finite row at least one of the three sums neither overflows nor vanishes (after Blue 1978,
# https://doi.org/10.1145/355769.355771).
SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**80)
SMALLEST_PLAIN_SUM = tl.constexpr(2.0**-60)


@triton.jit
def _norm_from_sums(plain, shrunk, grown):
    # NaN or infinite if an entry was
    vanishing = plain < SMALLEST_PLAIN_SUM
    finite = plain < float("inf")
    norm = tl.where(finite, tl.sqrt_rn(plain), tl.sqrt_rn(shrunk) * GROW)
    return tl.where(vanishing, tl.sqrt_rn(grown) * SHRINK, norm)


@triton.jit
def _partial_squares_kernel(
    grads_ptr,
    valid_ptr,
    partials_ptr,
    num_params,
    row_stride,
    col_stride,
    valid_stride,
    columns_per_split,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program per sample and range of columns
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    num_splits = tl.num_programs(1)
    start = split * columns_per_split
    stop = tl.minimum(start + columns_per_split, num_params)
    if HAS_VALID:
        # an empty range: a row of padding is not even read
        stop = tl.where(tl.load(valid_ptr + row * valid_stride) != 0, stop, start)
    row_ptr = grads_ptr + row * row_stride
    plain = tl.zeros((BLOCK,), dtype=tl.float32)
    shrunk = tl.zeros((BLOCK,), dtype=tl.float32)
    grown = tl.zeros((BLOCK,), dtype=tl.float32)
    for offset in range(start, stop, BLOCK):
        cols = offset + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        grad = tl.load(row_ptr + cols * col_stride, mask=cols < stop, other=0.0).to(tl.float32)
        plain += grad * grad
        shrunk += (grad * SHRINK) * (grad * SHRINK)
        grown += (grad * GROW) * (grad * GROW)
    partial_ptr = partials_ptr + (row * num_splits + split) * 3
    tl.store(partial_ptr, tl.sum(plain, axis=0))
    tl.store(partial_ptr + 1, tl.sum(shrunk, axis=0))
    tl.store(partial_ptr + 2, tl.sum(grown, axis=0))


@triton.jit
def _clip_factors_kernel(
    partials_ptr,
    valid_ptr,
    norms_ptr,
    factors_ptr,
    num_splits,
    valid_stride,
    max_grad_norm,
    HAS_VALID: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    # one program per sample: adds its partial sums in a fixed order
    row = tl.program_id(0).to(tl.int64)
    # torch.compile passes Python floats as float64 before torch 2.15
    max_grad_norm = tl.cast(max_grad_norm, tl.float32)
    splits = tl.arange(0, BLOCK_SPLITS)  # [BLOCK_SPLITS]
    mask = splits < num_splits
    partial_ptrs = partials_ptr + (row * num_splits + splits) * 3
    plain = tl.sum(tl.load(partial_ptrs, mask=mask, other=0.0), axis=0)
    shrunk = tl.sum(tl.load(partial_ptrs + 1, mask=mask, other=0.0), axis=0)
    grown = tl.sum(tl.load(partial_ptrs + 2, mask=mask, other=0.0), axis=0)
    norm = _norm_from_sums(plain, shrunk, grown)
    # rounded to nearest: the fast division of NVIDIA chips gives zero for divisors above 2^126
    is_long = norm > max_grad_norm
    factor = tl.where(is_long, tl.div_rn(max_grad_norm, tl.where(is_long, norm, 1.0)), 1.0)
    # NaN < inf is false, so both NaN and infinite samples are dropped; a subnormal factor could be rounded
    # up twofold
    factor = tl.where((norm < float("inf")) & (factor >= SMALLEST_NORMAL), factor, 0.0)
    if HAS_VALID:
        factor = tl.where(tl.load(valid_ptr + row * valid_stride) != 0, factor, 0.0)
    tl.store(norms_ptr + row, norm)
    tl.store(factors_ptr + row, factor)


@triton.jit
def _clipped_sum_kernel(
    grads_ptr,
    factors_ptr,
    accumulator_ptr,
    num_samples,
    num_params,
    row_stride,
    col_stride,
    accumulator_stride,
    BLOCK_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    # one program per block of columns, no atomics: the sum has a fixed order, so runs repeat bit for bit
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    in_row = cols < num_params
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, num_samples, BLOCK_ROWS):
        rows = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BLOCK_ROWS]
        factors = tl.load(factors_ptr + rows, mask=rows < num_samples, other=0.0)
        # a dropped sample is never read: 0 * NaN would be NaN
        mask = (factors > 0.0)[:, None] & in_row[None, :]  # [BLOCK_ROWS, BLOCK_COLS]
        grad_ptrs = grads_ptr + rows[:, None] * row_stride + cols[None, :] * col_stride
        total += factors[:, None] * tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = accumulator_ptr + cols * accumulator_stride
    before = tl.load(out_ptrs, mask=in_row, other=0.0)
    tl.store(out_ptrs, before + tl.sum(total, axis=0), mask=in_row)


def split_columns(num_samples: int, num_params: int) -> tuple[int, int]:
    """Return into how many ranges the first sweep splits a row, and the columns in each."""
    blocks = triton.cdiv(num_params, BLOCK_SQUARES)
    wanted = triton.cdiv(TARGET_PROGRAMS, num_samples)
    splits = min(wanted, blocks, MAX_SPLITS)
    columns_per_split = triton.cdiv(blocks, splits) * BLOCK_SQUARES
    return triton.cdiv(num_params, columns_per_split), columns_per_split


def clip_and_accumulate_triton(
    per_sample_grads: Tensor, accumulator: Tensor, max_grad_norm: float, *, valid: Tensor | None = None
) -> Tensor:
    """Launch the kernels; arguments are already checked by :func:`securetune_kernels.clip_and_accumulate`."""
    num_samples, num_params = per_sample_grads.shape
    row_stride, col_stride = per_sample_grads.stride()
    num_splits, columns_per_split = split_columns(num_samples, num_params)
    device = per_sample_grads.device
    partials = torch.empty(num_samples, num_splits, 3, device=device, dtype=torch.float32)
    norms = torch.empty(num_samples, device=device, dtype=torch.float32)
    factors = torch.empty(num_samples, device=device, dtype=torch.float32)
    has_valid = valid is not None
    # a kernel needs some pointer where there is no mask; HAS_VALID keeps it from being read
    valid_or_any = norms if valid is None else valid.view(torch.uint8)
    valid_stride = 0 if valid is None else valid.stride(0)
    wide_programs = triton.cdiv(num_params, WIDE_TILE[0])
    block_cols, block_rows = WIDE_TILE if wide_programs >= TARGET_PROGRAMS else NARROW_TILE
    with on_device_of(per_sample_grads):
        _partial_squares_kernel[(num_samples, num_splits)](
            per_sample_grads,
            valid_or_any,
            partials,
            num_params,
            row_stride,
            col_stride,
            valid_stride,
            columns_per_split,
            HAS_VALID=has_valid,
            BLOCK=BLOCK_SQUARES,
            num_warps=SQUARES_WARPS,
        )
        _clip_factors_kernel[(num_samples,)](
            partials,
            valid_or_any,
            norms,
            factors,
            num_splits,
            valid_stride,
            max_grad_norm,
            HAS_VALID=has_valid,
            BLOCK_SPLITS=triton.next_power_of_2(num_splits),
            num_warps=1 if num_splits <= 64 else 4,
        )
        _clipped_sum_kernel[(triton.cdiv(num_params, block_cols),)](
            per_sample_grads,
            factors,
            accumulator,
            num_samples,
            num_params,
            row_stride,
            col_stride,
            accumulator.stride(0),
            BLOCK_COLS=block_cols,
            BLOCK_ROWS=block_rows,
            num_warps=SUM_WARPS,
        )
    return norms
