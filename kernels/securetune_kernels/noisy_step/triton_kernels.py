"""Triton implementation of ``noisy_adamw_step`` and ``noisy_sgd_step``: one sweep, one program per chunk."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._rng import chacha20, noise_tile
from .table import CHUNK, ParameterTable

# one generator block of eight entries a thread: its state stays in registers
NUM_WARPS = 4


@triton.jit
def _load_chunk(chunks_ptr, num_chunks, PARAM: tl.constexpr):
    # where the program's parameter begins, its first and last flat index, and the chunk's aligned start
    index = tl.program_id(0).to(tl.int64)
    low = tl.load(chunks_ptr + num_chunks + index)
    high = tl.load(chunks_ptr + 2 * num_chunks + index)
    param_ptr = tl.load(chunks_ptr + index).to(tl.pointer_type(PARAM))
    return param_ptr, low, high


@triton.jit
def _random_bits(key_ptr, block, step, stream):
    # one uniform number of 16 bits for each of the eight entries of a block
    low = block.to(tl.uint32)
    w = chacha20(key_ptr, low, (block >> 32).to(tl.uint32), (low ^ low) + step, (low ^ low) + stream)
    even = tl.join(tl.join(w[0], w[8]), tl.join(w[4], w[12]))
    odd = tl.join(tl.join(w[2], w[10]), tl.join(w[6], w[14]))
    return tl.reshape(tl.join(even, odd), (8 * block.shape[0],)) >> 16


@triton.jit
def _rounded_to_bfloat16(bits, offset):
    # float32's bits after the offset was added, without the last 16; what is not finite stays as it is
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, (bits + offset) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _noisy_gradient(
    summed_ptr, public_ptr, key_ptr, step, block, place, inside, stddev, divisor, stream,
    IS_CHACHA: tl.constexpr, SUMMANDS: tl.constexpr, HAS_PUBLIC: tl.constexpr,
):  # fmt: skip
    noise = noise_tile(key_ptr, summed_ptr, block, step, stream, 0, IS_CHACHA, False, SUMMANDS)
    total = tl.load(summed_ptr + place, mask=inside, other=0.0) + tl.cast(stddev, tl.float32) * noise
    grad = tl.div_rn(total, tl.cast(divisor, tl.float32))
    if HAS_PUBLIC:
        grad += tl.load(public_ptr + place, mask=inside, other=0.0)
    tl.store(summed_ptr + place, tl.zeros_like(grad), mask=inside)
    return grad


@triton.jit
def _store_values(
    values, param_ptr, masters_ptr, key_ptr, step, block, place, low, inside, rounding_stream,
    PARAM: tl.constexpr, HAS_MASTERS: tl.constexpr, IS_RANDOM: tl.constexpr,
):  # fmt: skip
    if HAS_MASTERS:
        tl.store(masters_ptr + place, values, mask=inside)
    if PARAM == tl.bfloat16:  # noqa: SIM300
        bits = values.to(tl.uint32, bitcast=True)
        if IS_RANDOM:
            stream = tl.cast(rounding_stream, tl.uint32)
            offset = _random_bits(key_ptr, block, step.to(tl.uint32), stream)
        else:
            # to nearest even, spelled out: Triton's interpreter truncates in the cast, a GPU does not
            offset = 0x7FFF + ((bits >> 16) & 1)
        values = _rounded_to_bfloat16(bits, offset)
    tl.store(param_ptr + (place - low), values.to(PARAM), mask=inside)


@triton.jit
def _noisy_adamw_kernel(
    chunks_ptr, num_chunks, summed_ptr, exp_avg_ptr, exp_avg_sq_ptr, public_ptr, masters_ptr,
    corrections_ptr, key_ptr, step_ptr, stddev, divisor, learning_rate, rest1, beta2, rest2, eps, decay,
    noise_variance, stream, rounding_stream,
    PARAM: tl.constexpr, IS_CHACHA: tl.constexpr, SUMMANDS: tl.constexpr, HAS_PUBLIC: tl.constexpr,
    HAS_MASTERS: tl.constexpr, IS_RANDOM: tl.constexpr, IS_DP_CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program per chunk of at most 8 * BLOCK entries of one parameter
    param_ptr, low, high = _load_chunk(chunks_ptr, num_chunks, PARAM)
    first = low // (8 * BLOCK) * BLOCK
    block = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
    place = first * 8 + tl.arange(0, 8 * BLOCK).to(tl.int64)  # [8 * BLOCK]: flat index
    inside = (place >= low) & (place < high)
    step = tl.load(step_ptr)
    grad = _noisy_gradient(
        summed_ptr, public_ptr, key_ptr, step, block, place, inside, stddev, divisor,
        tl.cast(stream, tl.uint32), IS_CHACHA, SUMMANDS, HAS_PUBLIC,
    )  # fmt: skip
    first_moment = tl.load(exp_avg_ptr + place, mask=inside, other=0.0)
    second_moment = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0)
    # one minus each beta comes rounded once: a float32 difference would leave three digits of 1 - 0.9999
    first_moment += tl.cast(rest1, tl.float32) * (grad - first_moment)
    second_moment = tl.cast(beta2, tl.float32) * second_moment + tl.cast(rest2, tl.float32) * grad * grad
    tl.store(exp_avg_ptr + place, first_moment, mask=inside)
    tl.store(exp_avg_sq_ptr + place, second_moment, mask=inside)
    second = second_moment / tl.load(corrections_ptr + 1)
    eps = tl.cast(eps, tl.float32)
    if IS_DP_CORRECTED:
        root = tl.sqrt_rn(tl.maximum(second - tl.cast(noise_variance, tl.float32), eps * eps))
    else:
        root = tl.sqrt_rn(second) + eps
    if HAS_MASTERS:
        values = tl.load(masters_ptr + place, mask=inside, other=0.0)
    else:
        values = tl.load(param_ptr + (place - low), mask=inside, other=0.0).to(tl.float32)
    values = values * tl.cast(decay, tl.float32)
    update = (first_moment / tl.load(corrections_ptr)) / root
    values = values - tl.cast(learning_rate, tl.float32) * update
    _store_values(
        values, param_ptr, masters_ptr, key_ptr, step, block, place, low, inside, rounding_stream,
        PARAM, HAS_MASTERS, IS_RANDOM,
    )  # fmt: skip


@triton.jit
def _noisy_sgd_kernel(
    chunks_ptr, num_chunks, summed_ptr, momentum_ptr, public_ptr, masters_ptr, key_ptr, step_ptr, stddev,
    divisor, learning_rate, momentum, decay, stream, rounding_stream,
    PARAM: tl.constexpr, IS_CHACHA: tl.constexpr, SUMMANDS: tl.constexpr, HAS_PUBLIC: tl.constexpr,
    HAS_MASTERS: tl.constexpr, IS_RANDOM: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    IS_NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program per chunk of at most 8 * BLOCK entries of one parameter
    param_ptr, low, high = _load_chunk(chunks_ptr, num_chunks, PARAM)
    first = low // (8 * BLOCK) * BLOCK
    block = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
    place = first * 8 + tl.arange(0, 8 * BLOCK).to(tl.int64)  # [8 * BLOCK]: flat index
    inside = (place >= low) & (place < high)
    step = tl.load(step_ptr)
    grad = _noisy_gradient(
        summed_ptr, public_ptr, key_ptr, step, block, place, inside, stddev, divisor,
        tl.cast(stream, tl.uint32), IS_CHACHA, SUMMANDS, HAS_PUBLIC,
    )  # fmt: skip
    if HAS_MASTERS:
        values = tl.load(masters_ptr + place, mask=inside, other=0.0)
    else:
        values = tl.load(param_ptr + (place - low), mask=inside, other=0.0).to(tl.float32)
    grad = grad + tl.cast(decay, tl.float32) * values
    if HAS_MOMENTUM:
        momentum = tl.cast(momentum, tl.float32)
        buffer = momentum * tl.load(momentum_ptr + place, mask=inside, other=0.0) + grad
        tl.store(momentum_ptr + place, buffer, mask=inside)
        grad = grad + momentum * buffer if IS_NESTEROV else buffer
    values = values - tl.cast(learning_rate, tl.float32) * grad
    _store_values(
        values, param_ptr, masters_ptr, key_ptr, step, block, place, low, inside, rounding_stream,
        PARAM, HAS_MASTERS, IS_RANDOM,
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def noisy_adamw_step_triton(
    params: ParameterTable,
    summed: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    corrections: Tensor,
    betas: tuple[float, float],
    eps: float,
    noise_variance: float | None,
    **options: Any,
) -> None:
    """Launch the kernel; arguments are already checked by :func:`securetune_kernels.noisy_adamw_step`."""
    chunks = params.chunks
    with on_device_of(summed):
        _noisy_adamw_kernel[(chunks.shape[1],)](
            chunks,
            chunks.shape[1],
            summed,
            exp_avg,
            exp_avg_sq,
            corrections_ptr=corrections,
            rest1=1 - betas[0],
            beta2=betas[1],
            rest2=1 - betas[1],
            eps=eps,
            decay=1.0 - options["learning_rate"] * options["weight_decay"],
            noise_variance=0.0 if noise_variance is None else noise_variance,
            IS_DP_CORRECTED=noise_variance is not None,
            **_shared_arguments(params, summed, **options),
        )


def noisy_sgd_step_triton(
    params: ParameterTable,
    summed: Tensor,
    momentum_buffer: Tensor | None,
    *,
    momentum: float,
    nesterov: bool,
    **options: Any,
) -> None:
    """Launch the kernel; arguments are already checked by :func:`securetune_kernels.noisy_sgd_step`."""
    chunks = params.chunks
    with on_device_of(summed):
        _noisy_sgd_kernel[(chunks.shape[1],)](
            chunks,
            chunks.shape[1],
            summed,
            momentum_ptr=summed if momentum_buffer is None else momentum_buffer,
            momentum=momentum,
            decay=options["weight_decay"],
            HAS_MOMENTUM=momentum_buffer is not None,
            IS_NESTEROV=nesterov,
            **_shared_arguments(params, summed, **options),
        )


def _shared_arguments(
    params: ParameterTable,
    summed: Tensor,
    *,
    key: Tensor,
    step: Tensor,
    stddev: float,
    divisor: float,
    learning_rate: float,
    weight_decay: float,
    public: Tensor | None,
    masters: Tensor | None,
    stream: int,
    rounding_stream: int | None,
    generator: str,
    summands: int,
) -> dict[str, Any]:
    return {
        # a kernel needs some pointer where there is none; the flags keep it from being read
        "public_ptr": summed if public is None else public,
        "masters_ptr": summed if masters is None else masters,
        "key_ptr": key,
        "step_ptr": step,
        "stddev": stddev,
        "divisor": divisor,
        "learning_rate": learning_rate,
        "stream": stream,
        "rounding_stream": 0 if rounding_stream is None else rounding_stream,
        "PARAM": _TYPES[params.dtype],
        "IS_CHACHA": generator == "chacha20",
        "SUMMANDS": summands,
        "HAS_PUBLIC": public is not None,
        "HAS_MASTERS": masters is not None,
        "IS_RANDOM": rounding_stream is not None,
        "BLOCK": CHUNK // 8,
        "num_warps": NUM_WARPS,
    }
