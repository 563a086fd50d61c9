"""Triton implementation of ``clipped_linear_grad``: one program per tile of the sum, over all units."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._linear import Segments
from .._linear.triton_kernels import (
    layout_of,
    must_widen,
    product_over_tokens,
    product_tile,
    token_range,
)
from .._tiles import Tile, architecture_of

# Rows of tiles whose programs run together: 8 x 8 tiles share 16 strips of loads in L2 where a row of 64
# tiles would need 65. Counted, not swept on a GPU.
GROUP_ROWS = 8
# Short units would leave a deep step mostly empty.
SHORT_DEPTH = 16


@triton.jit
def _clipped_product_kernel(
    a_ptr,
    g_ptr,
    factors_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_units,
    num_tokens,
    num_inputs,
    num_outputs,
    a_unit_stride,
    a_token_stride,
    a_stride,
    g_unit_stride,
    g_token_stride,
    g_stride,
    factor_stride,
    out_row_stride,
    out_col_stride,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # one program per tile of out; it alone adds to that tile, unit after unit, so the order is fixed
    program = tl.program_id(0).to(tl.int64)
    tiles_p, tiles_d = tl.cdiv(num_outputs, BLOCK_P), tl.cdiv(num_inputs, BLOCK_D)
    first_row = program // (GROUP * tiles_d) * GROUP
    rows_in_group = tl.minimum(tiles_p - first_row, GROUP)
    within = program % (GROUP * tiles_d)
    outputs = (first_row + within % rows_in_group) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inputs = (within // rows_in_group) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    in_outputs, in_inputs = outputs < num_outputs, inputs < num_inputs
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for index in range(0, num_units):
        unit = tl.cast(index, tl.int64)
        factor = tl.load(factors_ptr + unit * factor_stride)
        start, length = token_range(cu_seqlens_ptr, unit, num_tokens, HAS_SEGMENTS)
        # a unit left out is never read: 0 * NaN would be NaN
        length = tl.where(factor != 0.0, length, 0)
        grad = product_over_tokens(
            g_ptr + unit * g_unit_stride + start * g_token_stride,
            a_ptr + unit * a_unit_stride + start * a_token_stride,
            outputs, inputs, in_outputs, in_inputs, length,
            g_token_stride, g_stride, a_token_stride, a_stride, BLOCK_P, BLOCK_D, BLOCK_T, WIDEN,
        )  # fmt: skip
        total += factor * grad
    mask = in_outputs[:, None] & in_inputs[None, :]
    out_ptrs = out_ptr + outputs[:, None] * out_row_stride + inputs[None, :] * out_col_stride
    tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + total, mask=mask)


def sum_tile(max_tokens: int, dtype: torch.dtype, architecture: str) -> Tile:
    """Return the tile, whose depth suits the units' length."""
    tile = product_tile("sum", dtype, architecture)
    return tile._replace(depth=SHORT_DEPTH) if max_tokens <= SHORT_DEPTH else tile


def clipped_linear_grad_triton(
    a: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, segments: Segments | None = None
) -> None:
    """Launch the kernel; arguments are already checked by :func:`securetune_kernels.clipped_linear_grad`."""
    layout = layout_of(a, segments)
    tile = sum_tile(layout.max_tokens, a.dtype, architecture_of(a.device))
    num_tiles = triton.cdiv(g.shape[-1], tile.rows) * triton.cdiv(a.shape[-1], tile.cols)
    with on_device_of(a):
        _clipped_product_kernel[(num_tiles,)](
            a,
            g,
            factors,
            a if layout.segments is None else layout.segments,  # not read without segments
            out,
            layout.num_units,
            layout.max_tokens,
            a.shape[-1],
            g.shape[-1],
            *layout.strides(a),
            *layout.strides(g),
            factors.stride(0),
            *out.stride(),
            HAS_SEGMENTS=layout.segments is not None,
            BLOCK_P=tile.rows,
            BLOCK_D=tile.cols,
            BLOCK_T=tile.depth,
            GROUP=GROUP_ROWS,
            WIDEN=must_widen(a.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
