"""Triton implementation of ``gaussian_noise``: generator, Box-Muller and addition in one sweep."""

import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._rng import noise_tile

# Generator blocks of eight normals in a program: one a thread, so that sixteen words of state, eight of the
# key and eight normals stay in registers. Counted, not swept on a GPU.
BLOCK = 128
NUM_WARPS = 4


@triton.jit
def _gaussian_noise_kernel(
    out_ptr,
    key_ptr,
    step_ptr,
    coefficients_ptr,
    start,
    count,
    stream,
    stddev,
    num_coefficients,
    IS_CHACHA: tl.constexpr,
    HAS_COEFFICIENTS: tl.constexpr,
    SUMMANDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # one program per 8 * BLOCK consecutive addresses
    start = tl.cast(start, tl.int64)
    first = start // 8 + tl.program_id(0).to(tl.int64) * BLOCK
    block = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
    noise = noise_tile(
        key_ptr,
        coefficients_ptr,
        block,
        tl.load(step_ptr),
        tl.cast(stream, tl.uint32),
        num_coefficients,
        IS_CHACHA,
        HAS_COEFFICIENTS,
        SUMMANDS,
    )
    place = first * 8 + tl.arange(0, 8 * BLOCK).to(tl.int64) - start  # [8 * BLOCK]
    inside = (place >= 0) & (place < count)
    before = tl.load(out_ptr + place, mask=inside, other=0.0)
    # rounded before it is added, so that the noise is the same whatever it is added to
    tl.store(out_ptr + place, before + tl.cast(stddev, tl.float32) * noise, mask=inside)


def gaussian_noise_triton(
    out: Tensor,
    key: Tensor,
    step: Tensor,
    *,
    stddev: float,
    stream: int,
    start: int,
    coefficients: Tensor | None,
    generator: str,
    summands: int,
) -> None:
    """Launch the kernel; arguments are already checked by :func:`securetune_kernels.gaussian_noise`."""
    count = out.numel()
    blocks = (start + count - 1) // 8 - start // 8 + 1
    with on_device_of(out):
        _gaussian_noise_kernel[(triton.cdiv(blocks, BLOCK),)](
            out,
            key,
            step,
            # a kernel needs some pointer where there are none; HAS_COEFFICIENTS keeps it from being read
            out if coefficients is None else coefficients,
            start,
            count,
            stream,
            stddev,
            0 if coefficients is None else coefficients.numel(),
            IS_CHACHA=generator == "chacha20",
            HAS_COEFFICIENTS=coefficients is not None,
            SUMMANDS=summands,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
