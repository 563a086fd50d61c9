"""Segments of packed tokens, and the checks of a dense layer's factors."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Segments:
    """Where each unit's tokens lie in packed ``[N, ...]`` tensors; make it with :meth:`of`, once per batch.

    Attributes:
        cu_seqlens: ``[U + 1]``, int32 or int64: unit ``i`` has the tokens ``cu_seqlens[i]`` up to, not
            including, ``cu_seqlens[i + 1]``.
        offsets: The same numbers on the host.
    """

    cu_seqlens: Tensor
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, cu_seqlens: Tensor, num_tokens: int) -> "Segments":
        """Check the offsets, which waits once for their device.

        Args:
            cu_seqlens: ``[U + 1]``, int32 or int64: from 0 up to ``num_tokens``, never decreasing.
            num_tokens: ``N``.

        Returns:
            The segments, which any number of calls on the same batch can share.

        Raises:
            TypeError: If ``cu_seqlens`` is not int32 or int64.
            ValueError: If its shape or its values are not as above.
        """
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}.")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
            raise ValueError(f"cu_seqlens must have shape [U + 1], got {tuple(cu_seqlens.shape)}.")
        offsets = tuple(cu_seqlens.tolist())
        if offsets[0] != 0 or offsets[-1] != num_tokens:
            raise ValueError(
                f"cu_seqlens must go from 0 to the number of tokens, {num_tokens}, got {offsets[0]} to "
                f"{offsets[-1]}."
            )
        for unit, (start, stop) in enumerate(itertools.pairwise(offsets)):
            if stop < start:
                raise ValueError(f"cu_seqlens must not decrease, got {stop} after {start} at unit {unit}.")
        return cls(cu_seqlens.contiguous(), offsets)

    @property
    def num_units(self) -> int:
        """``U``."""
        return len(self.offsets) - 1

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest unit."""
        return max((stop - start for start, stop in self.ranges()), default=0)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield each unit's first token and the one after its last."""
        return itertools.pairwise(self.offsets)


def check_layer_factors(a: Tensor, g: Tensor, cu_seqlens: "Tensor | Segments | None") -> Segments | None:
    """Check a dense layer's inputs and output gradients against each other.

    Args:
        a: ``[U, T, d]``, or ``[N, d]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        g: ``[U, T, p]``, or ``[N, p]``; same dtype and device.
        cu_seqlens: ``[U + 1]``, or segments that are checked already, or None.

    Returns:
        The segments of packed tensors, None for a batch.

    Raises:
        TypeError: If the dtypes differ or are not among those above.
        ValueError: If a shape or a device does not fit.
    """
    ndim, form = (3, "[U, T, d] and [U, T, p]") if cu_seqlens is None else (2, "[N, d] and [N, p]")
    shapes = f"got {tuple(a.shape)} and {tuple(g.shape)}"
    if a.ndim != ndim or g.ndim != ndim:
        given = "without" if cu_seqlens is None else "with"
        raise ValueError(f"a and g must have shapes {form} {given} cu_seqlens, {shapes}.")
    if a.shape[:-1] != g.shape[:-1]:
        raise ValueError(f"a and g must have the same tokens, {form}, {shapes}.")
    if a.dtype != g.dtype or a.dtype not in FACTOR_DTYPES:
        raise TypeError(
            f"a and g must both be float32, bfloat16, float16 or float64, got {a.dtype} and {g.dtype}."
        )
    if a.device != g.device:
        raise ValueError(f"a is on {a.device} and g on {g.device}; both must be on one device.")
    return segments_of(a, cu_seqlens)


def segments_of(x: Tensor, cu_seqlens: "Tensor | Segments | None") -> Segments | None:
    """Check the segments of packed tokens.

    Args:
        x: ``[N, ...]``: the tokens; ``[U, T, ...]`` without segments.
        cu_seqlens: ``[U + 1]``, or segments that are checked already, or None.

    Returns:
        The segments, None for a batch.

    Raises:
        TypeError: If ``cu_seqlens`` is not int32 or int64.
        ValueError: If ``x`` has another number of dimensions or tokens, or another device.
    """
    ndim, form = (3, "[U, T, ...]") if cu_seqlens is None else (2, "[N, ...]")
    if x.ndim != ndim:
        given = "without" if cu_seqlens is None else "with"
        raise ValueError(f"tokens must have shape {form} {given} cu_seqlens, got {tuple(x.shape)}.")
    if cu_seqlens is None:
        return None
    segments = cu_seqlens if isinstance(cu_seqlens, Segments) else Segments.of(cu_seqlens, x.shape[0])
    if segments.offsets[-1] != x.shape[0]:
        raise ValueError(f"cu_seqlens are of {segments.offsets[-1]} tokens, there are {x.shape[0]}.")
    if segments.cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens is on {segments.cu_seqlens.device} and the tokens on {x.device}; both must be on "
            "one device."
        )
    return segments


def refuse_overlap(name: str, out: Tensor) -> None:
    """Refuse an expanded tensor as an output: its elements share memory.

    Args:
        name: What the caller calls it.
        out: What will be written.

    Raises:
        ValueError: If a dimension of several elements has stride 0.
    """
    sizes = zip(out.shape, out.stride(), strict=True)
    if out.numel() > 1 and any(size > 1 and stride == 0 for size, stride in sizes):
        raise ValueError(
            f"{name} has strides {out.stride()} (an expanded tensor): its elements share memory. Pass a copy."
        )


def offsets_of(cu_seqlens: "Tensor | Segments | None") -> Tensor | None:
    """Return the offsets alone, which a graph of torch.compile can hold; there they are checked anew."""
    return cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Segments) else cu_seqlens


def is_in_float64(*tensors: Tensor) -> str | None:
    """Tell why a kernel cannot run where a tensor is float64, None where none is."""
    return "it has no float64 version" if torch.float64 in {tensor.dtype for tensor in tensors} else None
