"""Refuse every access of an interpreted kernel to memory that is none of its arguments."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


class OutOfBounds(AssertionError):
    """A kernel read or wrote an element that its launch does not hold."""


class MemoryWatch:
    """Stands for the interpreter's module of loads and stores, and checks their addresses.

    A launch may touch the elements of the tensors it got, not the gaps between the elements of a strided one.
    Tables of pointers count as the tensors they name: ``table_ptr`` of ``lora_per_sample_grads``, whose
    tensors all have the first one's layout, and ``chunks_ptr`` of the noisy steps.
    """

    def __init__(self, accesses: Any) -> None:
        self._accesses = accesses
        self._ranges: list[tuple[int, int]] = []  # addresses of dense tensors
        self._elements = np.zeros(0, dtype=np.uint64)  # addresses of the others' elements, sorted
        self._inner: list[tuple[list[tuple[int, int]], np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accesses, name)

    def load(self, ptrs: np.ndarray, mask: np.ndarray, *rest: Any) -> np.ndarray:
        """Check, then load."""
        self._check("reads", ptrs, mask)
        return self._accesses.load(ptrs, mask, *rest)

    def store(self, ptrs: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        """Check, then store."""
        self._check("writes", ptrs, mask)
        self._accesses.store(ptrs, value, mask)

    def _check(self, what: str, ptrs: np.ndarray, mask: np.ndarray) -> None:
        left = np.asarray(ptrs).ravel()[np.broadcast_to(mask, np.shape(ptrs)).ravel().astype(bool)]
        left = left.astype(np.uint64)
        for start, stop in self._ranges:
            if not len(left):
                return
            left = left[(left < start) | (left >= stop)]
        if not len(left):
            return
        places = np.searchsorted(self._elements, left).clip(max=max(0, len(self._elements) - 1))
        foreign = left if not len(self._elements) else left[self._elements[places] != left]
        if len(foreign):
            raise OutOfBounds(f"a kernel {what} {len(foreign)} elements outside of its arguments")

    @contextlib.contextmanager
    def launch(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Allow what a launch got."""
        ranges, elements = [], []
        tensors = {name: part for name, part in arguments.items() if isinstance(part, Tensor)}
        if arguments.get("HAS_TABLE"):
            table = tensors["table_ptr"].view(-1, 3)
            for column, name in enumerate(("wide_ptr", "narrow_ptr", "out_ptr")):
                first = tensors.pop(name)
                moved = _addresses(first) - np.uint64(first.data_ptr())
                elements += [moved + np.uint64(base) for base in table[:, column].tolist()]
        if "chunks_ptr" in tensors:
            size = {"fp32": 4}.get(str(arguments["PARAM"]), 2)
            ranges += [(at, at + (high - low) * size) for at, low, high in tensors["chunks_ptr"].t().tolist()]
        for tensor in tensors.values():
            if tensor.is_contiguous():
                ranges.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
            else:
                elements.append(_addresses(tensor))
        self._inner.append((self._ranges, self._elements))
        self._ranges = ranges
        self._elements = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *elements]))
        try:
            yield
        finally:
            self._ranges, self._elements = self._inner.pop()


def _addresses(tensor: Tensor) -> np.ndarray:
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (offsets.flatten() * tensor.itemsize + tensor.data_ptr()).numpy().astype(np.uint64)


def watch_memory(patch: pytest.MonkeyPatch) -> None:
    """Watch all launches in Triton's interpreter.

    Args:
        patch: Undoes it.
    """
    from triton.runtime import interpreter

    watch = MemoryWatch(interpreter._interpreter)
    run = interpreter.GridExecutor.__call__

    def watched(self: Any, *arguments: Any, **options: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        given = {name: value for name, value in options.items() if name in names}
        with watch.launch(inspect.getcallargs(self.fn, *arguments, **given)):
            run(self, *arguments, **options)

    patch.setattr(interpreter, "_interpreter", watch)
    patch.setattr(interpreter.GridExecutor, "__call__", watched)
