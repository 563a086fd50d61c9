"""Triton implementation of ``per_sample_sums``: one program per unit and block of features."""

import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._linear import Segments
from .._linear.triton_kernels import layout_of, token_range
from .reference import Normalized

# Counted, not swept on a GPU: a step loads 32 tokens of 128 features, 8 KiB of half precision from each
# input, in 32 elements for each of 128 threads; a layer of 4096 features has 32 programs for each unit. Read
# once.
BLOCK_T = 32
BLOCK_FEATURES = 128
NUM_WARPS = 4


@triton.jit
def _token_sums_of_units_kernel(
    g_ptr,
    x_ptr,
    inverse_ptr,
    mean_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_blocks,
    num_tokens,
    num_features,
    g_unit_stride,
    g_token_stride,
    g_stride,
    x_unit_stride,
    x_token_stride,
    x_stride,
    inverse_unit_stride,
    inverse_stride,
    mean_unit_stride,
    mean_stride,
    out_unit_stride,
    out_stride,
    IS_NORM: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # one program per unit and block of features; it alone adds them up, so the order is fixed
    program = tl.program_id(0).to(tl.int64)
    unit, block = program // num_blocks, program % num_blocks
    start, length = token_range(cu_seqlens_ptr, unit, num_tokens, HAS_SEGMENTS)
    features = block * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    in_row = features < num_features
    acc = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for offset in range(0, length, BLOCK_T):
        tokens = offset + tl.arange(0, BLOCK_T)  # [BLOCK_T]
        here = tokens < length
        mask = here[:, None] & in_row[None, :]
        places = start + tokens.to(tl.int64)
        g_ptrs = (
            g_ptr + unit * g_unit_stride + places[:, None] * g_token_stride + features[None, :] * g_stride
        )
        product = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        if IS_NORM:
            x_base = x_ptr + unit * x_unit_stride
            x_ptrs = x_base + places[:, None] * x_token_stride + features[None, :] * x_stride
            x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
            if HAS_MEAN:
                mean_ptrs = mean_ptr + unit * mean_unit_stride + places * mean_stride
                x -= tl.load(mean_ptrs, mask=here, other=0.0)[:, None]
            inverse_ptrs = inverse_ptr + unit * inverse_unit_stride + places * inverse_stride
            product = product * x * tl.load(inverse_ptrs, mask=here, other=0.0)[:, None]
        acc += product
    total = tl.sum(acc, axis=0)
    out_ptrs = out_ptr + unit * out_unit_stride + features * out_stride
    if ACCUMULATE:
        total += tl.load(out_ptrs, mask=in_row, other=0.0)
    tl.store(out_ptrs, total, mask=in_row)


def per_sample_sums_triton(
    g: Tensor,
    out: Tensor,
    *,
    normalized: Normalized | None = None,
    segments: Segments | None = None,
    accumulate: bool = False,
) -> None:
    """Launch the kernel; :func:`securetune_kernels.per_sample_sums` has checked the arguments."""
    layout = layout_of(g, segments)
    num_blocks = triton.cdiv(g.shape[-1], BLOCK_FEATURES)
    # a kernel needs some pointer for each argument; the flags keep the wrong ones from being read
    x, inverse, mean = (g, out, None) if normalized is None else normalized
    mean_or_any = inverse if mean is None else mean
    per_token = (0, 0) if normalized is None else _token_strides(inverse, segments)
    with on_device_of(g):
        _token_sums_of_units_kernel[(layout.num_units * num_blocks,)](
            g,
            x,
            inverse,
            mean_or_any,
            out if layout.segments is None else layout.segments,
            out,
            num_blocks,
            layout.max_tokens,
            g.shape[-1],
            *layout.strides(g),
            *layout.strides(x),
            *per_token,
            *((0, 0) if mean is None else _token_strides(mean, segments)),
            *out.stride(),
            IS_NORM=normalized is not None,
            HAS_MEAN=mean is not None,
            HAS_SEGMENTS=layout.segments is not None,
            ACCUMULATE=accumulate,
            BLOCK_T=BLOCK_T,
            BLOCK_F=BLOCK_FEATURES,
            num_warps=NUM_WARPS,
        )


def _token_strides(x: Tensor, segments: Segments | None) -> tuple[int, ...]:
    return x.stride() if segments is None else (0, *x.stride())
