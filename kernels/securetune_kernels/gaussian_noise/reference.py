"""``gaussian_noise`` in plain PyTorch: the generators word by word, Box-Muller in float64."""

import math
from typing import Literal

import torch
from torch import Tensor

Generator = Literal["chacha20", "philox"]
_MASK = 0xFFFFFFFF
_SIGMA = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)


def chacha20_words_reference(key: Tensor, first: Tensor, second: Tensor, step: int, stream: int) -> Tensor:
    """Compute ChaCha20 blocks (RFC 8439, section 2.3).

    Args:
        key: ``[8]``, int32: the key's little-endian words.
        first: ``[N]``, int64: state word 12, the low half of the block number.
        second: ``[N]``, int64: state word 13, its high half.
        step: State word 14.
        stream: State word 15.

    Returns:
        ``[N, 16]``, int64: words from 0 to 2^32 - 1.
    """
    words = [torch.full_like(first, value) for value in (*_SIGMA, *_unsigned(key))]
    words += [first, second, torch.full_like(first, step), torch.full_like(first, stream)]
    x = list(words)

    def quarter_round(a: int, b: int, c: int, d: int) -> None:
        for target, source, turned, count in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[target] = (x[target] + x[source]) & _MASK
            mixed = x[turned] ^ x[target]
            x[turned] = ((mixed << count) | (mixed >> (32 - count))) & _MASK

    for _ in range(10):
        for column in range(4):
            quarter_round(column, 4 + column, 8 + column, 12 + column)
        for column in range(4):
            quarter_round(column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
    return torch.stack([(end + begin) & _MASK for end, begin in zip(x, words, strict=True)], dim=1)


def philox_words_reference(key: Tensor, first: Tensor, second: Tensor, step: int, stream: int) -> Tensor:
    """Compute Philox-4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405).

    Args:
        key: ``[2]`` or longer, int32: the first two words are the key.
        first: ``[N]``, int64: counter word 0.
        second: ``[N]``, int64: counter word 1.
        step: Counter word 2.
        stream: Counter word 3.

    Returns:
        ``[N, 4]``, int64: words from 0 to 2^32 - 1.
    """
    k0, k1 = _unsigned(key)[:2]
    c0, c1 = first, second
    c2, c3 = torch.full_like(first, step), torch.full_like(first, stream)
    for _ in range(10):
        high0, low0 = _multiplied(0xD2511F53, c0)
        high1, low1 = _multiplied(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1)


def gaussian_noise_reference(
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
) -> Tensor:
    """Do what :func:`securetune_kernels.gaussian_noise` does, in float64 until the end.

    Args:
        out: ``[N]``, float32 or float64: added to in place.
        key: ``[8]``, int32.
        step: One int64.
        stddev: Standard deviation.
        stream: Use of the noise within a step.
        start: Address of the first entry.
        coefficients: ``[K]``, float32, or None.
        generator: Which generator.
        summands: 1 or 4.

    Returns:
        ``out``.

    Raises:
        ValueError: If the step is out of range.
    """
    now = int(step)
    if not 0 <= now < 2**32:  # its other bits would be dropped, and the noise come twice
        raise ValueError(f"step must be from 0 to 2^32 - 1, got {now}.")
    scales = [1.0] if coefficients is None else coefficients.tolist()[: now + 1]
    noise = torch.zeros(out.numel(), dtype=torch.float64, device=out.device)
    for lag, scale in enumerate(scales):
        for part in range(summands):
            normals = _normals(key, now - lag, stream, start, out.numel(), part, generator)
            noise.add_(normals, alpha=scale / math.sqrt(summands))
    noise *= stddev
    out += noise.to(out.dtype).view_as(out)
    return out


def _normals(
    key: Tensor, step: int, stream: int, start: int, count: int, part: int, generator: Generator
) -> Tensor:
    is_chacha = generator == "chacha20"
    size = 8 if is_chacha else 2  # normals in a block of the generator
    first = start // size
    blocks = torch.arange(first, (start + count - 1) // size + 1 if count else first, device=key.device)
    low, high = blocks & _MASK, (blocks >> 32) | (part << 30)
    words = (chacha20_words_reference if is_chacha else philox_words_reference)(key, low, high, step, stream)
    pairs = words.double().view(-1, 4)  # low and high half of the first word, then of the second
    first_word, second_word = (pairs[:, 2 * i + 1] * 2.0**32 + pairs[:, 2 * i] for i in range(2))
    radius = torch.sqrt(-2.0 * torch.log((first_word + 1.0) * 2.0**-64))
    angle = second_word * (2.0**-64 * 2.0 * math.pi)
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1).flatten()
    return normals[start - first * size :][:count]


def _unsigned(key: Tensor) -> list[int]:
    return [word & _MASK for word in key.tolist()]


def _multiplied(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product, in parts that fit into 63 bits."""
    low = constant * (x & 0xFFFF)
    whole = constant * (x >> 16) + (low >> 16)  # the product over 2^16
    return whole >> 16, ((whole << 16) | (low & 0xFFFF)) & _MASK
