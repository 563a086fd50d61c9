"""Triton implementation of ``lora_per_sample_grads``: one launch for ``A`` of all adapters, one for ``B``."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._linear import Segments
from .._linear.triton_kernels import (
    HALF_STAGES,
    Layout,
    add_up,
    layout_of,
    must_widen,
    product_over_tokens,
    token_range,
)
from .._tiles import Tile, architecture_of, tile_of
from .reference import Adapter

# Counted, not swept on a GPU. With rank 16 a product does 16 FLOP for each byte of half precision that it
# reads, far below what tensor cores need, so what counts is loads in flight: each step reads 64 tokens of 128
# features, 16 KiB, and three stages of four blocks keep 192 KiB in flight on a multiprocessor. All columns of
# the narrow side, up to 64, are in one tile, so that the wide side is read once.
HALF_TILE = Tile(128, 64, 64, 4, HALF_STAGES)
FLOAT_TILE = Tile(128, 64, 32, 4, 2)
SMALLEST_NARROW = 16
ALIGNMENT = 16  # bytes; what vector loads need


class Product(NamedTuple):
    """One of the two gradients of an adapter, ``wide_i^T narrow_i``."""

    wide: Tensor  # [U, T, w]
    narrow: Tensor  # [U, T, r]
    out: Tensor  # [U, w, r]


@triton.jit
def _adapter_pointer(table_ptr, first_ptr, index, HAS_TABLE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    # an adapter's tensor: the table's entry, or the first and only one
    if HAS_TABLE:
        ptr = tl.load(table_ptr + index).to(tl.pointer_type(first_ptr.dtype.element_ty))
        if IS_ALIGNED:
            ptr = tl.multiple_of(ptr, 16)
    else:
        ptr = first_ptr
    return ptr


@triton.jit
def _adapter_kernel(
    table_ptr,
    wide_ptr,
    narrow_ptr,
    cu_seqlens_ptr,
    out_ptr,
    partials_ptr,
    num_units,
    num_tokens,
    num_tiles,
    wide_size,
    narrow_size,
    wide_unit_stride,
    wide_token_stride,
    wide_stride,
    narrow_unit_stride,
    narrow_token_stride,
    narrow_stride,
    out_unit_stride,
    out_wide_stride,
    out_narrow_stride,
    scale,
    HAS_TABLE: tl.constexpr,
    IS_OUT_ALIGNED: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_NARROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # one program per adapter, unit and tile of the gradient, summed over all of the unit's tokens
    program = tl.program_id(0).to(tl.int64)
    adapter, unit = program // num_tiles // num_units, program // num_tiles % num_units
    tile = program % num_tiles
    # torch.compile passes Python floats as float64 before torch 2.15
    scale = tl.cast(scale, tl.float32)
    wide_base = _adapter_pointer(table_ptr, wide_ptr, 3 * adapter, HAS_TABLE, True)
    narrow_base = _adapter_pointer(table_ptr, narrow_ptr, 3 * adapter + 1, HAS_TABLE, True)
    out_base = _adapter_pointer(table_ptr, out_ptr, 3 * adapter + 2, HAS_TABLE, IS_OUT_ALIGNED)
    start, length = token_range(cu_seqlens_ptr, unit, num_tokens, HAS_SEGMENTS)
    narrow_tiles = tl.cdiv(narrow_size, BLOCK_NARROW)
    rows = (tile // narrow_tiles) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)  # [BLOCK_WIDE]
    cols = (tile % narrow_tiles) * BLOCK_NARROW + tl.arange(0, BLOCK_NARROW)  # [BLOCK_NARROW]
    in_rows, in_cols = rows < wide_size, cols < narrow_size
    grad = product_over_tokens(
        wide_base + unit * wide_unit_stride + start * wide_token_stride,
        narrow_base + unit * narrow_unit_stride + start * narrow_token_stride,
        rows, cols, in_rows, in_cols, length,
        wide_token_stride, wide_stride, narrow_token_stride, narrow_stride,
        BLOCK_WIDE, BLOCK_NARROW, BLOCK_T, WIDEN,
    )  # fmt: skip
    grad = grad * scale
    out_ptrs = (
        out_base
        + unit * out_unit_stride
        + (rows[:, None] * out_wide_stride + cols[None, :] * out_narrow_stride)
    )
    mask = in_rows[:, None] & in_cols[None, :]
    if ACCUMULATE:
        grad += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, grad, mask=mask)
    if HAS_NORMS:
        # entries beyond the edges are zero
        tl.store(partials_ptr + program, tl.sum(tl.sum(grad * grad, axis=1), axis=0))


def adapter_tile(rank: int, dtype: torch.dtype, architecture: str) -> Tile:
    """Return the tile for a rank and the inputs' dtype."""
    tile = tile_of("adapter", dtype, architecture, FLOAT_TILE if dtype == torch.float32 else HALF_TILE)
    return tile._replace(cols=min(tile.cols, max(SMALLEST_NARROW, triton.next_power_of_2(rank))))


def lora_per_sample_grads_triton(
    adapters: Sequence[Adapter],
    *,
    scaling: float,
    segments: Segments | None = None,
    accumulate: bool = False,
    squared_norms: Tensor | None = None,
) -> None:
    """Launch the kernels; :func:`securetune_kernels.lora_per_sample_grads` has checked the arguments."""
    products_a = [Product(*_of_one_dtype(one.x, one.g_low), one.grad_a.transpose(1, 2)) for one in adapters]
    products_b = [Product(*_of_one_dtype(one.g, one.h), one.grad_b) for one in adapters]
    layout = layout_of(adapters[0].x, segments)
    with on_device_of(adapters[0].x):
        for index, (products, scale) in enumerate(((products_a, 1.0), (products_b, scaling))):
            groups = [products] if can_share_a_launch(products) else [[product] for product in products]
            norms = [_launch(group, layout, scale, accumulate, squared_norms is not None) for group in groups]
            if squared_norms is not None:
                squared_norms[:, :, index] = torch.cat([part for part in norms if part is not None]).t()


def can_share_a_launch(products: Sequence[Product]) -> bool:
    """Tell whether a table of pointers is enough to find all adapters' tensors, and can be made."""
    if products[0].wide.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # the table comes from the host, which a CUDA graph would have to keep
    strides = {tuple(tensor.stride() for tensor in product) for product in products}
    inputs = [tensor for product in products for tensor in product[:2]]
    return len(strides) == 1 and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in inputs)


def _of_one_dtype(wide: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(wide.dtype, narrow.dtype)
    return wide.to(dtype), narrow.to(dtype)


def _launch(
    products: Sequence[Product], layout: Layout, scale: float, accumulate: bool, has_norms: bool
) -> Tensor | None:
    wide, narrow, out = products[0]
    tile = adapter_tile(narrow.shape[-1], wide.dtype, architecture_of(wide.device))
    num_tiles = triton.cdiv(wide.shape[-1], tile.rows) * triton.cdiv(narrow.shape[-1], tile.cols)
    num_rows = len(products) * layout.num_units
    partials = torch.empty(num_rows if has_norms else 1, num_tiles, device=out.device, dtype=torch.float32)
    has_table = len(products) > 1
    pointers = [tensor.data_ptr() for product in products for tensor in product]
    # a kernel needs some pointer where there is no table; HAS_TABLE keeps it from being read
    table = torch.tensor(pointers, dtype=torch.int64, device=out.device) if has_table else partials
    _adapter_kernel[(num_rows * num_tiles,)](
        table,
        wide,
        narrow,
        table if layout.segments is None else layout.segments,
        out,
        partials,
        layout.num_units,
        layout.max_tokens,
        num_tiles,
        wide.shape[-1],
        narrow.shape[-1],
        *layout.strides(wide),
        *layout.strides(narrow),
        *out.stride(),
        scale,
        HAS_TABLE=has_table,
        IS_OUT_ALIGNED=all(pointer % ALIGNMENT == 0 for pointer in pointers[2::3]),
        HAS_SEGMENTS=layout.segments is not None,
        HAS_NORMS=has_norms,
        ACCUMULATE=accumulate,
        BLOCK_WIDE=tile.rows,
        BLOCK_NARROW=tile.cols,
        BLOCK_T=tile.depth,
        WIDEN=must_widen(wide.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return add_up(partials).view(len(products), layout.num_units) if has_norms else None
