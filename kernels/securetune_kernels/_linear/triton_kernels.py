"""Tiles of a dense layer's products in Triton, shared by the ops on its factors."""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import Tile, tile_of
from .inputs import Segments

# Triton's interpreter multiplies bfloat16 as if the bit patterns were integers, so there it is widened first.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# On AMD one stage of loads in flight; more would not fit the 64 KiB of local memory of a gfx942.
HALF_STAGES = 2 if torch.version.hip else 3
BLOCK_PARTIALS = 1024  # partial sums that the reduction loads at once


# Counted, not swept on a GPU. Half precision: a step of 128 x 128 x 64 does 2.1 MFLOP on 32 KiB of loads, 64
# FLOP a byte, and neighbours share loads in L2; three stages are 96 KiB of shared memory and 128 x 128
# float32 sums are 64 registers of each of 256 threads, so that two tiles of sums fit.
HALF_TILE = Tile(128, 128, 64, 8, HALF_STAGES)
# Float32 in full precision does not run on NVIDIA's tensor cores: 64 x 64 sums are 16 registers of each of
# 256 threads, and 16 KiB of loads feed 0.26 MFLOP, 16 FLOP a byte, at a tenth of the tensor cores' rate.
FLOAT_TILE = Tile(64, 64, 32, 8, 2)


def product_tile(kernel: str, dtype: torch.dtype, architecture: str) -> Tile:
    """Return a kernel's tile for inputs of this dtype."""
    return tile_of(kernel, dtype, architecture, FLOAT_TILE if dtype == torch.float32 else HALF_TILE)


def must_widen(dtype: torch.dtype) -> bool:
    """Whether inputs of this dtype are converted to float32 before a product."""
    return IS_INTERPRETED and dtype == torch.bfloat16


class Layout(NamedTuple):
    """Units and strides of a batch or of packed segments, as the kernels take them."""

    num_units: int
    max_tokens: int
    num_tokens: int  # of all units
    num_pairs: int  # of tokens of one unit, ordered
    segments: Tensor | None

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """Return the strides from unit to unit, token to token and feature to feature."""
        return (0, *x.stride()) if self.segments is not None else x.stride()


def layout_of(x: Tensor, segments: Segments | None) -> Layout:
    """Read the layout off one of the factors."""
    if segments is None:
        units, tokens = x.shape[:2]
        return Layout(units, tokens, units * tokens, units * tokens**2, None)
    num_pairs = sum((stop - start) ** 2 for start, stop in segments.ranges())
    return Layout(segments.num_units, segments.max_tokens, x.shape[0], num_pairs, segments.cu_seqlens)


@triton.jit
def token_range(cu_seqlens_ptr, unit, num_tokens, HAS_SEGMENTS: tl.constexpr):
    # the unit's first token among the packed ones (0 in a batch) and its number of tokens
    if HAS_SEGMENTS:
        start = tl.load(cu_seqlens_ptr + unit).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + unit + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = unit * 0
        length = num_tokens
    return start, length


@triton.jit
def product_over_tokens(
    left_ptr,
    right_ptr,
    rows,
    cols,
    in_rows,
    in_cols,
    length,
    left_token_stride,
    left_stride,
    right_token_stride,
    right_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # sum over one unit's tokens of left[t, rows]^T right[t, cols], [BLOCK_ROWS, BLOCK_COLS] in float32
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32)
    for start in range(0, length, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
        here = tokens < length
        places = tokens.to(tl.int64)
        left_ptrs = left_ptr + rows[:, None] * left_stride + places[None, :] * left_token_stride
        right_ptrs = right_ptr + places[:, None] * right_token_stride + cols[None, :] * right_stride
        left = tl.load(left_ptrs, mask=in_rows[:, None] & here[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=here[:, None] & in_cols[None, :], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _add_up_kernel(
    partials_ptr, cu_seqlens_ptr, out_ptr, num_partials, HAS_SEGMENTS: tl.constexpr, BLOCK: tl.constexpr
):
    # one program per unit, over its partial sums in a fixed order; float64, so that thousands cost no digits
    unit = tl.program_id(0).to(tl.int64)
    if HAS_SEGMENTS:
        start = tl.load(cu_seqlens_ptr + unit).to(tl.int64) * num_partials
        stop = tl.load(cu_seqlens_ptr + unit + 1).to(tl.int64) * num_partials
    else:
        start, stop = unit * num_partials, (unit + 1) * num_partials
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for offset in range(start, stop, BLOCK):
        index = offset + tl.arange(0, BLOCK)  # [BLOCK]
        total += tl.load(partials_ptr + index, mask=index < stop, other=0.0).to(tl.float64)
    tl.store(out_ptr + unit, tl.sum(total, axis=0).to(tl.float32))


def add_up(partials: Tensor, segments: Segments | None = None) -> Tensor:
    """Add up each unit's partial sums in a fixed order.

    Args:
        partials: ``[U, K]``, float32; with segments ``[N, K]``: those of each token.
        segments: Of packed tokens.

    Returns:
        ``[U]``, float32.
    """
    num_units = len(partials) if segments is None else segments.num_units
    out = torch.empty(num_units, device=partials.device, dtype=torch.float32)
    block = BLOCK_PARTIALS
    if segments is None:
        block = min(block, triton.next_power_of_2(partials.shape[1]))
    _add_up_kernel[(num_units,)](
        partials,
        partials if segments is None else segments.cu_seqlens,  # not read without segments
        out,
        partials.shape[1],
        HAS_SEGMENTS=segments is not None,
        BLOCK=block,
        num_warps=1 if block <= 64 else 4,
    )
    return out
