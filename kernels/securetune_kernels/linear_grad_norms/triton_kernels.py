"""Triton implementation of ``linear_grad_norms``: tiles of Gram matrices or gradients, kept in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._linear import Segments
from .._linear.triton_kernels import (
    Layout,
    add_up,
    layout_of,
    must_widen,
    product_over_tokens,
    product_tile,
    token_range,
)
from .._tiles import Tile, architecture_of
from .reference import LinearGradNorms, rounding_of_sums

# Smallest tile of a Gram matrix, for short units: in a larger one most products would be of padding.
SMALL_GRAM = 32
SMALL_GRAM_WARPS = 4
# Tokens x features that a program of the token norms loads at once: 4 KiB of half precision, read once.
NORM_TOKENS = 16
NORM_FEATURES = 128
NORM_WARPS = 4


@triton.jit
def _triangle_tile(index):
    # row and column, row >= column, of the index-th tile of a lower triangle; the root may be off by one
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int64)
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def _gram_tile(
    x_ptr,
    rows,
    cols,
    length,
    token_stride,
    feature_stride,
    num_features,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # inner products of the tokens in rows with the tokens in cols, [BLOCK_T, BLOCK_T]
    acc = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    in_rows, in_cols = rows < length, cols < length
    row_ptrs, col_ptrs = x_ptr + rows * token_stride, x_ptr + cols * token_stride
    for start in range(0, num_features, BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        here = features < num_features
        offsets = features.to(tl.int64) * feature_stride
        left = tl.load(row_ptrs[:, None] + offsets[None, :], mask=in_rows[:, None] & here[None, :], other=0.0)
        right = tl.load(
            col_ptrs[:, None] + offsets[None, :], mask=in_cols[:, None] & here[None, :], other=0.0
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def _gram_kernel(
    a_ptr,
    g_ptr,
    cu_seqlens_ptr,
    squares_ptr,
    lengths_ptr,
    num_tokens,
    num_tiles,
    num_blocks,
    num_inputs,
    num_outputs,
    a_unit_stride,
    a_token_stride,
    a_stride,
    g_unit_stride,
    g_token_stride,
    g_stride,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # one program per unit and tile of the lower triangle of its two Gram matrices
    program = tl.program_id(0).to(tl.int64)
    unit, index = program // num_tiles, program % num_tiles
    tile_row, tile_col = _triangle_tile(index)
    start, length = token_range(cu_seqlens_ptr, unit, num_tokens, HAS_SEGMENTS)
    # nothing is read for a tile beyond a short unit's end
    is_inside = tile_row * BLOCK_T < length
    rows = tile_row * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    cols = tile_col * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    gram_a = _gram_tile(
        a_ptr + unit * a_unit_stride + start * a_token_stride,
        rows, cols, length, a_token_stride, a_stride, tl.where(is_inside, num_inputs, 0),
        BLOCK_T, BLOCK_K, WIDEN,
    )  # fmt: skip
    gram_g = _gram_tile(
        g_ptr + unit * g_unit_stride + start * g_token_stride,
        rows, cols, length, g_token_stride, g_stride, tl.where(is_inside, num_outputs, 0),
        BLOCK_T, BLOCK_K, WIDEN,
    )  # fmt: skip
    total = tl.sum(tl.sum(gram_a * gram_g, axis=1), axis=0)
    # the tile on the other side of the diagonal holds the same products
    tl.store(squares_ptr + program, tl.where(tile_row == tile_col, total, 2.0 * total))
    if tile_row == tile_col:
        on_diagonal = rows[:, None] == cols[None, :]
        squares_a = tl.sum(tl.where(on_diagonal, gram_a, 0.0), axis=1)  # [BLOCK_T]
        squares_g = tl.sum(tl.where(on_diagonal, gram_g, 0.0), axis=1)
        norms = tl.sqrt_rn(squares_a) * tl.sqrt_rn(squares_g)
        tl.store(lengths_ptr + unit * num_blocks + tile_row, tl.sum(norms, axis=0))


@triton.jit
def _direct_kernel(
    a_ptr,
    g_ptr,
    cu_seqlens_ptr,
    squares_ptr,
    num_tokens,
    num_tiles,
    num_inputs,
    num_outputs,
    a_unit_stride,
    a_token_stride,
    a_stride,
    g_unit_stride,
    g_token_stride,
    g_stride,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # one program per unit and tile of its gradient, summed over all of the unit's tokens
    program = tl.program_id(0).to(tl.int64)
    unit, index = program // num_tiles, program % num_tiles
    tiles_d = tl.cdiv(num_inputs, BLOCK_D)
    start, length = token_range(cu_seqlens_ptr, unit, num_tokens, HAS_SEGMENTS)
    outputs = (index // tiles_d) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    inputs = (index % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    grad = product_over_tokens(
        g_ptr + unit * g_unit_stride + start * g_token_stride,
        a_ptr + unit * a_unit_stride + start * a_token_stride,
        outputs, inputs, outputs < num_outputs, inputs < num_inputs, length,
        g_token_stride, g_stride, a_token_stride, a_stride, BLOCK_P, BLOCK_D, BLOCK_T, WIDEN,
    )  # fmt: skip
    tl.store(squares_ptr + program, tl.sum(tl.sum(grad * grad, axis=1), axis=0))


@triton.jit
def _squared_token_norms(
    x_ptr,
    tokens,
    here,
    token_stride,
    feature_stride,
    num_features,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for start in range(0, num_features, BLOCK_K):
        features = (start + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K]
        mask = here[:, None] & (features < num_features)[None, :]
        ptrs = x_ptr + tokens[:, None] * token_stride + features[None, :] * feature_stride
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        acc += x * x
    return tl.sum(acc, axis=1)


@triton.jit
def _lengths_kernel(
    a_ptr,
    g_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
    num_tokens,
    num_blocks,
    num_inputs,
    num_outputs,
    a_unit_stride,
    a_token_stride,
    a_stride,
    g_unit_stride,
    g_token_stride,
    g_stride,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one program per unit and block of its tokens: sum of |a_t| |g_t|
    program = tl.program_id(0).to(tl.int64)
    unit, block = program // num_blocks, program % num_blocks
    start, length = token_range(cu_seqlens_ptr, unit, num_tokens, HAS_SEGMENTS)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    here = tokens < length
    squares_a = _squared_token_norms(
        a_ptr + unit * a_unit_stride + start * a_token_stride,
        tokens, here, a_token_stride, a_stride, num_inputs, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    squares_g = _squared_token_norms(
        g_ptr + unit * g_unit_stride + start * g_token_stride,
        tokens, here, g_token_stride, g_stride, num_outputs, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    tl.store(lengths_ptr + program, tl.sum(tl.sqrt_rn(squares_a) * tl.sqrt_rn(squares_g), axis=0))


def is_gram_cheaper(layout: Layout, num_inputs: int, num_outputs: int) -> bool:
    """Tell which way takes fewer FLOPs: ``T^2 (d + p)`` a unit for one triangle, or ``2 T d p``."""
    gram_flops = layout.num_pairs * (num_inputs + num_outputs)
    return gram_flops < 2 * layout.num_tokens * num_inputs * num_outputs


def gram_tile(max_tokens: int, dtype: torch.dtype, architecture: str) -> Tile:
    """Return a square tile no larger than the longest unit needs."""
    tile = product_tile("gram", dtype, architecture)
    size = min(tile.rows, max(SMALL_GRAM, triton.next_power_of_2(max_tokens)))
    warps = tile.num_warps if size == tile.rows else SMALL_GRAM_WARPS
    return tile._replace(rows=size, cols=size, num_warps=warps)


def linear_grad_norms_triton(a: Tensor, g: Tensor, *, segments: Segments | None = None) -> LinearGradNorms:
    """Launch the kernels; arguments are already checked by :func:`securetune_kernels.linear_grad_norms`."""
    layout = layout_of(a, segments)
    launch = _launch_gram if is_gram_cheaper(layout, a.shape[-1], g.shape[-1]) else _launch_direct
    with on_device_of(a):
        partial_squares, partial_lengths, longest_sum = launch(a, g, layout)
        squared, lengths = (add_up(partials) for partials in (partial_squares, partial_lengths))
    return LinearGradNorms(squared, lengths, rounding_of_sums(longest_sum, squared.dtype))


def _launch_gram(a: Tensor, g: Tensor, layout: Layout) -> tuple[Tensor, Tensor, int]:
    tile = gram_tile(layout.max_tokens, a.dtype, architecture_of(a.device))
    num_blocks = triton.cdiv(layout.max_tokens, tile.rows)
    num_tiles = num_blocks * (num_blocks + 1) // 2
    squares = torch.empty(layout.num_units, num_tiles, device=a.device, dtype=torch.float32)
    lengths = torch.empty(layout.num_units, num_blocks, device=a.device, dtype=torch.float32)
    _gram_kernel[(squares.numel(),)](
        a,
        g,
        a if layout.segments is None else layout.segments,  # not read without segments
        squares,
        lengths,
        layout.max_tokens,
        num_tiles,
        num_blocks,
        a.shape[-1],
        g.shape[-1],
        *layout.strides(a),
        *layout.strides(g),
        HAS_SEGMENTS=layout.segments is not None,
        BLOCK_T=tile.rows,
        BLOCK_K=tile.depth,
        WIDEN=must_widen(a.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return squares, lengths, a.shape[-1] + g.shape[-1]


def _launch_direct(a: Tensor, g: Tensor, layout: Layout) -> tuple[Tensor, Tensor, int]:
    tile = product_tile("direct", a.dtype, architecture_of(a.device))
    num_tiles = triton.cdiv(g.shape[-1], tile.rows) * triton.cdiv(a.shape[-1], tile.cols)
    num_blocks = triton.cdiv(layout.max_tokens, NORM_TOKENS)
    squares = torch.empty(layout.num_units, num_tiles, device=a.device, dtype=torch.float32)
    lengths = torch.empty(layout.num_units, num_blocks, device=a.device, dtype=torch.float32)
    segments = a if layout.segments is None else layout.segments  # not read without segments
    sizes = (a.shape[-1], g.shape[-1], *layout.strides(a), *layout.strides(g))
    _direct_kernel[(squares.numel(),)](
        a,
        g,
        segments,
        squares,
        layout.max_tokens,
        num_tiles,
        *sizes,
        HAS_SEGMENTS=layout.segments is not None,
        BLOCK_P=tile.rows,
        BLOCK_D=tile.cols,
        BLOCK_T=tile.depth,
        WIDEN=must_widen(a.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    _lengths_kernel[(lengths.numel(),)](
        a,
        g,
        segments,
        lengths,
        layout.max_tokens,
        num_blocks,
        *sizes,
        HAS_SEGMENTS=layout.segments is not None,
        BLOCK_T=NORM_TOKENS,
        BLOCK_K=NORM_FEATURES,
        num_warps=NORM_WARPS,
    )
    return squares, lengths, 2 * layout.max_tokens
