"""Position-addressed Gaussian noise: the noise of an entry is decided by its address, not by who draws it."""

from typing import Any

import torch
from torch import Tensor

from .._backend import NAMESPACE, Backend, resolve_backend
from .reference import (
    Generator,
    chacha20_words_reference,
    gaussian_noise_reference,
    philox_words_reference,
)

__all__ = [
    "Generator",
    "chacha20_words_reference",
    "gaussian_noise",
    "gaussian_noise_reference",
    "philox_words_reference",
]

KEY_WORDS = 8
MAX_ADDRESS = 2**48  # keeps two bits of the generator's counter for the summands
LARGEST_STDDEV = 1e37  # 9.42 of them fit into float32


@torch.no_grad()
def gaussian_noise(
    out: Tensor,
    *,
    key: Tensor,
    step: Tensor,
    stddev: float,
    stream: int = 0,
    start: int = 0,
    coefficients: Tensor | None = None,
    generator: Generator = "chacha20",
    summands: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Add Gaussian noise to ``out``, whose value is decided by ``(key, stream, step, address)`` alone.

    Entry ``i`` has the address ``start + i``. Eight addresses share a block of ChaCha20 (RFC 8439, section
    2.3: words 12 and 13 are the block number ``address // 8``, 14 is the step, 15 the stream), whose sixteen
    words make four pairs of 64-bit words, and each pair two normals (Box and Muller 1958). Philox-4x32-10
    (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) gives two addresses from a counter; it is
    not a cryptographic generator, so use it where no privacy is promised.

    Guarantees:
        Any part of a vector gets the noise that the whole vector would: shards agree for any sharding.
        Different addresses, steps, streams and keys never share a word of the generator.
        The generator's words are the same bits on every backend and device; the normals agree within a few
        units in the last place. The same call on the same machine gives the same bits.
        Magnitudes reach ``9.42 * stddev``: the tail that is cut has mass below 1e-20.
        ``key`` and ``step`` are read on the device when the kernel runs: no key is compiled into a kernel,
        and a replayed CUDA graph draws fresh noise once ``step`` was raised.

    Args:
        out: ``[N]``, float32, contiguous: added to in place.
        key: ``[8]``, int32, on the same device: the little-endian words of a 32-byte key. Philox uses the
            first two.
        step: One int64 on the same device, from 0 to 2^32 - 1 (not checked on a GPU, where that would wait).
        stddev: Standard deviation, from 0 to 1e37.
        stream: Keeps several uses of one key within a step apart, from 0 to 2^32 - 1.
        start: Address of the first entry; ``start + N`` at most 2^48.
        coefficients: ``[K]``, float32, on the same device: the noise is the sum over ``k`` of
            ``coefficients[k]`` times the noise of step ``step - k``, as far as there are such steps (banded
            matrix factorisation). None means independent steps.
        generator: ``"chacha20"`` or ``"philox"``.
        summands: 4 makes each value of half the sum of four normals, which makes the attacks on
            floating-point noise of Mironov (2012, https://doi.org/10.1145/2382196.2382264) harder (Holohan
            and Braghin 2021, https://arxiv.org/abs/2107.10138), at four times the cost; else 1.
        backend: ``"triton"``, ``"torch"`` (the reference) or ``"auto"`` (see ``resolve_backend``).

    Returns:
        ``out``.

    Raises:
        TypeError: If a dtype is not among those above.
        ValueError: If a shape, a device or a number does not fit.
        RuntimeError: If ``backend="triton"`` cannot run here.
    """
    options: dict[str, Any] = {
        "stddev": stddev,
        "stream": stream,
        "start": start,
        "coefficients": coefficients,
        "generator": generator,
        "summands": summands,
    }
    if torch.compiler.is_compiling():
        _in_a_graph(out, key, step, **options, backend=backend)
        return out
    _check_out(out, start)
    check_draw(
        out, key, step, stddev, stream=stream, coefficients=coefficients, generator=generator,
        summands=summands,
    )  # fmt: skip
    if out.numel() == 0 or stddev == 0:
        return out
    if resolve_backend(backend, out, op="gaussian_noise") == "torch":
        return gaussian_noise_reference(out, key=key, step=step, **options)
    from .triton_kernels import gaussian_noise_triton  # triton is optional: imported on first use

    gaussian_noise_triton(out, key, step, **options)
    return out


@torch.library.custom_op(f"{NAMESPACE}::gaussian_noise", mutates_args={"out"})
def _in_a_graph(
    out: Tensor,
    key: Tensor,
    step: Tensor,
    stddev: float,
    stream: int,
    start: int,
    coefficients: Tensor | None,
    generator: str,
    summands: int,
    backend: str,
) -> None:
    gaussian_noise(
        out,
        key=key,
        step=step,
        stddev=stddev,
        stream=stream,
        start=start,
        coefficients=coefficients,
        generator=generator,  # pyright: ignore[reportArgumentType]
        summands=summands,
        backend=backend,  # pyright: ignore[reportArgumentType]
    )


def _check_out(out: Tensor, start: int) -> None:
    if out.dtype != torch.float32:
        raise TypeError(f"out must be float32, so that noise keeps its digits, got {out.dtype}.")
    if out.ndim != 1 or not out.is_contiguous():
        raise ValueError(
            f"out must be 1-D [N] and contiguous, got shape {tuple(out.shape)} with strides {out.stride()}."
        )
    if start < 0 or start + out.numel() > MAX_ADDRESS:
        raise ValueError(
            f"start must be >= 0 and start + N at most {MAX_ADDRESS}, got start {start} and N {out.numel()}."
        )


def check_draw(
    like: Tensor,
    key: Tensor,
    step: Tensor,
    stddev: float,
    *,
    stream: int,
    coefficients: Tensor | None,
    generator: str,
    summands: int,
) -> None:
    """Check what every op that draws noise takes; arguments as in :func:`gaussian_noise`.

    Args:
        like: A tensor on the device that everything must be on.
        key: The key.
        step: The step.
        stddev: Standard deviation.
        stream: Stream.
        coefficients: Coefficients of past steps.
        generator: Name of the generator.
        summands: 1 or 4.

    Raises:
        TypeError: If a dtype does not fit.
        ValueError: If a shape, a device or a number does not fit.
    """
    if key.dtype != torch.int32:
        raise TypeError(f"key must be int32 (the 32-bit words of the key), got {key.dtype}.")
    if tuple(key.shape) != (KEY_WORDS,) or not key.is_contiguous():
        raise ValueError(
            f"key must be [{KEY_WORDS}] and contiguous: 32 bytes as words, got shape {tuple(key.shape)}."
        )
    if step.dtype != torch.int64 or step.numel() != 1:
        raise TypeError(f"step must be one int64 in a tensor, got {step.dtype} of shape {tuple(step.shape)}.")
    if not 0 <= stddev <= LARGEST_STDDEV:
        raise ValueError(f"stddev must be from 0 to {LARGEST_STDDEV:g}, got {stddev}.")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be from 0 to 2^32 - 1, got {stream}.")
    if generator not in ("chacha20", "philox"):
        raise ValueError(f"generator must be 'chacha20' or 'philox', got {generator!r}.")
    if summands not in (1, 4):
        raise ValueError(f"summands must be 1 or 4, got {summands}.")
    named = {"key": key, "step": step}
    if coefficients is not None:
        if coefficients.dtype != torch.float32:
            raise TypeError(f"coefficients must be float32, got {coefficients.dtype}.")
        if coefficients.ndim != 1 or coefficients.numel() == 0 or not coefficients.is_contiguous():
            raise ValueError(
                f"coefficients must be [K] with K >= 1 and contiguous, got shape {tuple(coefficients.shape)}."
            )
        named["coefficients"] = coefficients
    for name, tensor in named.items():
        if tensor.device != like.device:
            raise ValueError(
                f"{name} is on {tensor.device} and the values on {like.device}; all must be on one device."
            )
