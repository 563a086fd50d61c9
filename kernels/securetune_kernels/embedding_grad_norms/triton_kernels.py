"""Triton implementation of ``embedding_grad_norms`` and ``tied_cross_products``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._linear import Segments
from .._linear.triton_kernels import FLOAT_TILE, add_up, must_widen
from .._tiles import Tile, architecture_of, tile_of
from .torch_path import unit_of_tokens

# Features that a program adds up at once, counted, not swept on a GPU: 1 KiB of half precision from each of
# the equal tokens, and four programs for a token of 2048 features. Rows are read once.
BLOCK_FEATURES = 512
FEATURE_WARPS = 4
# Half precision: a step of 64 x 64 x 64 keeps 32 float32 sums in each of 128 threads, which leaves registers
# for the pointers into the output gradients, one for each pair of positions.
HALF_CROSS_TILE = Tile(64, 64, 64, 4, 2)


@triton.jit
def _equal_tokens_kernel(
    g_ptr,
    order_ptr,
    run_ends_ptr,
    partials_ptr,
    num_blocks,
    num_per_unit,
    num_features,
    g_unit_stride,
    g_token_stride,
    g_stride,
    BLOCK: tl.constexpr,
):
    # one program per token, in sorted order, and block of features; the first of equal tokens adds them all
    # up
    program = tl.program_id(0).to(tl.int64)
    position, block = program // num_blocks, program % num_blocks
    features = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = features < num_features
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    # no tokens where this one is not the first of its kind
    count = (tl.load(run_ends_ptr + position) - position).to(tl.int32)
    for offset in range(0, count):
        token = tl.load(order_ptr + position + offset)
        unit, within = token // num_per_unit, token % num_per_unit
        ptrs = g_ptr + unit * g_unit_stride + within * g_token_stride + features * g_stride
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(partials_ptr + program, tl.sum(acc * acc, axis=0))


@triton.jit
def _cross_kernel(
    a_ptr,
    g_ptr,
    ids_ptr,
    lookup_ptr,
    partials_ptr,
    num_positions,
    num_lookups,
    num_rows,
    num_features,
    a_unit_stride,
    a_token_stride,
    a_stride,
    g_unit_stride,
    g_token_stride,
    g_stride,
    ids_unit_stride,
    ids_stride,
    lookup_unit_stride,
    lookup_token_stride,
    lookup_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # one program per unit and tile of its pairs of positions and lookups
    program = tl.program_id(0).to(tl.int64)
    tiles_s, tiles_t = tl.cdiv(num_positions, BLOCK_S), tl.cdiv(num_lookups, BLOCK_T)
    unit, index = program // (tiles_s * tiles_t), program % (tiles_s * tiles_t)
    positions = (index // tiles_t) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    lookups = (index % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    is_position, is_lookup = positions < num_positions, lookups < num_lookups
    a_ptrs = a_ptr + unit * a_unit_stride + positions * a_token_stride
    lookup_ptrs = lookup_ptr + unit * lookup_unit_stride + lookups * lookup_token_stride
    inner = tl.zeros((BLOCK_S, BLOCK_T), dtype=tl.float32)
    for start in range(0, num_features, BLOCK_K):
        features = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        here = features < num_features
        places = features.to(tl.int64)
        left = tl.load(
            a_ptrs[:, None] + places[None, :] * a_stride, mask=is_position[:, None] & here[None, :], other=0.0
        )
        right = tl.load(
            lookup_ptrs[None, :] + places[:, None] * lookup_stride,
            mask=is_lookup[None, :] & here[:, None],
            other=0.0,
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        inner = tl.dot(left, right, inner, input_precision="ieee")
    ids = tl.load(ids_ptr + unit * ids_unit_stride + lookups * ids_stride, mask=is_lookup, other=0).to(
        tl.int64
    )
    # an id outside of the table is not followed
    is_row = is_lookup & (ids >= 0) & (ids < num_rows)
    g_ptrs = g_ptr + unit * g_unit_stride + positions[:, None] * g_token_stride + ids[None, :] * g_stride
    at_ids = tl.load(g_ptrs, mask=is_position[:, None] & is_row[None, :], other=0.0).to(tl.float32)
    tl.store(partials_ptr + program, tl.sum(tl.sum(at_ids * inner, axis=1), axis=0))


def embedding_grad_norms_triton(ids: Tensor, g: Tensor, *, segments: Segments | None = None) -> Tensor:
    """Launch the kernels; :func:`securetune_kernels.embedding_grad_norms` has checked the arguments."""
    # packed tokens are one long unit to the first kernel, which only looks for equal neighbours
    num_per_unit = ids.shape[-1]
    strides = g.stride() if segments is None else (0, *g.stride())
    order, run_ends = sort_tokens(ids, segments)
    num_blocks = triton.cdiv(g.shape[-1], BLOCK_FEATURES)
    partials = torch.empty(*ids.shape, num_blocks, device=g.device, dtype=torch.float32)
    with on_device_of(g):
        _equal_tokens_kernel[(partials.numel(),)](
            g,
            order,
            run_ends,
            partials,
            num_blocks,
            num_per_unit,
            g.shape[-1],
            *strides,
            BLOCK=BLOCK_FEATURES,
            num_warps=FEATURE_WARPS,
        )
        return add_up(partials if segments is not None else partials.flatten(1), segments)


def sort_tokens(ids: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Sort tokens by unit and id, without waiting for the device.

    Args:
        ids: ``[U, T]``, or ``[N]`` with segments.
        segments: Of packed tokens.

    Returns:
        ``order``: ``[N]``, int64: the tokens, counted over all units. ``run_ends``: ``[N]``, int64: for the
        first of equal tokens of a unit the place after the last of them, for every other token its own place.
    """
    flat, units = ids.reshape(-1), unit_of_tokens(ids, segments).reshape(-1)
    by_id = torch.argsort(flat, stable=True)
    order = by_id[torch.argsort(units[by_id], stable=True)]
    keys, owners = flat[order], units[order]
    places = torch.arange(len(flat) + 1, device=ids.device)
    is_first = torch.ones(len(flat) + 1, dtype=torch.bool, device=ids.device)
    is_first[1:-1] = (keys[1:] != keys[:-1]) | (owners[1:] != owners[:-1])
    # from the back: the nearest first token at each place or after it
    next_first = torch.where(is_first, places, len(flat)).flip(0).cummin(0).values.flip(0)
    return order, torch.where(is_first[:-1], next_first[1:], places[:-1])


def cross_tile(dtype: torch.dtype, architecture: str) -> Tile:
    """Return the tile of the pairs of positions and lookups."""
    return tile_of("cross", dtype, architecture, FLOAT_TILE if dtype == torch.float32 else HALF_CROSS_TILE)


def tied_cross_products_triton(a: Tensor, g: Tensor, ids: Tensor, lookup_g: Tensor) -> Tensor:
    """Launch the kernels; arguments are already checked by :func:`securetune_kernels.tied_cross_products`."""
    tile = cross_tile(a.dtype, architecture_of(a.device))
    num_tiles = triton.cdiv(a.shape[1], tile.rows) * triton.cdiv(ids.shape[1], tile.cols)
    partials = torch.empty(len(a), num_tiles, device=a.device, dtype=torch.float32)
    with on_device_of(a):
        _cross_kernel[(partials.numel(),)](
            a,
            g,
            ids,
            lookup_g,
            partials,
            a.shape[1],
            ids.shape[1],
            g.shape[2],
            a.shape[2],
            *a.stride(),
            *g.stride(),
            *ids.stride(),
            *lookup_g.stride(),
            BLOCK_S=tile.rows,
            BLOCK_T=tile.cols,
            BLOCK_K=tile.depth,
            WIDEN=must_widen(a.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return add_up(partials)
