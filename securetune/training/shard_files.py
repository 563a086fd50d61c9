"""Files that hold parts of named flat vectors, written by many processes and read by any number of others.

Each is a plain safetensors file. An array ``x`` in it is one-dimensional and made of runs of the canonical
flat vector, one after another; ``x.runs`` (int64, ``[R, 2]``) says where each run begins and how long it is.
So a reader finds any range of the vector in whichever files hold it, however many processes wrote them, and
decrypts little more than that.

Dimensions: ``P`` entries of the vector, ``R`` runs.
"""

import io
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from securetune.checkpoints import Vault
from securetune.checkpoints.safe_loading import check_payload_at
from securetune.errors import CheckpointError
from securetune.privacy.reduction import Address

Run = tuple[int, int]
_RUNS = ".runs"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
_DTYPE_OF = {code: dtype for dtype, code in _DTYPES.items()}
# Parts of a file that lie closer together are read at once: decryption works in chunks of 16 KiB anyway.
_GAP_BYTES = 1 << 16
_WINDOW_BYTES = 1 << 24


def runs_of(addresses: Iterable[Address]) -> list[Run]:
    """Return first index and length of each run, in order; neighbours are joined.

    Args:
        addresses: Where the parts of a shard lie.

    Returns:
        The runs.
    """
    runs: list[Run] = []
    for address in addresses:
        for first, length in address.runs():
            if runs and sum(runs[-1]) == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + length)
            else:
                runs.append((first, length))
    return runs


def check_cover(name: str, runs: Iterable[Run], num_params: int) -> None:
    """Refuse runs that do not hold every entry of the vector exactly once.

    Args:
        name: The array, for the message.
        runs: From all processes or files, in any order.
        num_params: ``P``.

    Raises:
        CheckpointError: If entries are missing or are there twice.
    """
    end = 0
    for first, length in [*sorted(run for run in runs if run[1]), (num_params, 0)]:
        if first != end:
            what = "are missing" if first > end else "are there twice"
            raise CheckpointError(
                f"the training state does not hold the {num_params} entries of {name!r} once each: entries "
                f"{min(first, end)} to {max(first, end)} {what}."
            )
        end = first + length


class ShardStream(io.RawIOBase):
    """One file of a process, as a stream that reads the tensors where they are: it is never whole in memory.

    Args:
        arrays: Parts by name, each with its address; contiguous, on any device, unchanged until the stream is
            read.
    """

    def __init__(self, arrays: Mapping[str, Sequence[tuple[Address, Tensor]]]) -> None:
        super().__init__()
        header: dict[str, Any] = {}
        body: list[Tensor] = []
        offset = 0
        tables = {
            name + _RUNS: [
                torch.tensor(runs_of(address for address, _ in parts), dtype=torch.int64).view(-1, 2)
            ]
            for name, parts in arrays.items()
        }
        values = {name: [tensor for _, tensor in parts] for name, parts in arrays.items()}
        widest_first = sorted(
            values, key=lambda name: -max((t.element_size() for t in values[name]), default=0)
        )
        for name, tensors in [*tables.items(), *((name, values[name]) for name in widest_first)]:
            if len({tensor.dtype for tensor in tensors}) > 1:
                raise CheckpointError(f"the parts of {name!r} have several dtypes.")
            dtype = tensors[0].dtype if tensors else torch.float32
            count = sum(tensor.numel() for tensor in tensors)
            size = count * dtype.itemsize
            header[name] = {
                "dtype": _DTYPES[dtype],
                "shape": [count // 2, 2] if name in tables else [count],
                "data_offsets": [offset, offset + size],
            }
            offset += size
            body.extend(tensor.detach().view(-1).view(torch.uint8) for tensor in tensors if tensor.numel())
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        head = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._parts = [head, *body]
        self._ends = list(accumulate(len(part) for part in self._parts))
        self._at = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to an offset."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ends[-1]}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer with the next bytes, and return how many; 0 at the end."""
        if not len(buffer):
            return 0
        out = torch.frombuffer(buffer, dtype=torch.uint8)
        done = 0
        number = bisect_right(self._ends, self._at)
        while done < len(out) and number < len(self._parts):
            part = self._parts[number]
            skip = self._at - (self._ends[number] - len(part))
            piece = part[skip : skip + len(out) - done]
            out[done : done + len(piece)].copy_(piece)
            done += len(piece)
            self._at += len(piece)
            number += 1
        return done


class _Stored(NamedTuple):
    """A run where it lies."""

    first: int
    length: int
    place: tuple[str, str]  # compartment and name of the file
    offset: int  # in bytes, in the file


class _Piece(NamedTuple):
    """Bytes of a file that go to a place of the output."""

    place: tuple[str, str]
    offset: int
    size: int
    to: int


class ShardFiles:
    """Reads any part of the vectors from the files of a sealed checkpoint.

    Args:
        vault: The open checkpoint; keep it open while this is in use.

    Attributes:
        names: The arrays there are.
        num_params: ``P``.

    Raises:
        CheckpointError: If the files do not hold each array once, whole.
    """

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        stored: dict[str, list[_Stored]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for entry in vault.manifest.files:
            if entry.compartment in vault.compartments:
                self._index((entry.compartment or "", entry.name), entry.length, stored)
        self._stored = {name: sorted(runs) for name, runs in stored.items()}
        self._firsts = {name: [run.first for run in runs] for name, runs in self._stored.items()}
        self.names = tuple(sorted(stored))
        self.num_params = max(
            (run[-1].first + run[-1].length for run in self._stored.values() if run), default=0
        )
        for name, runs in self._stored.items():
            check_cover(name, [(run.first, run.length) for run in runs], self.num_params)

    def read(self, name: str, address: Address) -> Tensor:
        """Read entries of an array, and nothing that lies far from them.

        Args:
            name: The array.
            address: Which entries.

        Returns:
            ``address.shape``, as it was saved, on the CPU.

        Raises:
            CheckpointError: If there is no such array or entry, or a file was changed.
        """
        if name not in self._stored:
            raise CheckpointError(f"the training state has no {name!r}; it has: {', '.join(self.names)}.")
        dtype = self._dtypes[name]
        out = torch.empty(address.shape, dtype=dtype)
        raw = out.view(-1).view(torch.uint8) if out.numel() else out
        pieces = sorted(self._pieces(name, address, dtype.itemsize))
        for window in _windows(pieces):
            start, stop = window[0].offset, max(piece.offset + piece.size for piece in window)
            data = bytearray(self._vault.read_range(*window[0].place, start, stop - start))
            content = torch.frombuffer(data, dtype=torch.uint8)
            for piece in window:
                at = piece.offset - start
                raw[piece.to : piece.to + piece.size] = content[at : at + piece.size]
        return out

    def _index(self, place: tuple[str, str], size: int, stored: dict[str, list[_Stored]]) -> None:
        read = partial(self._vault.read_range, *place)
        check_payload_at(place[1], read, size)
        head = 8 + int.from_bytes(read(0, 8), "little")
        header = json.loads(read(8, head - 8))
        for name, fields in header.items():
            if name.endswith(_RUNS):
                continue
            dtype, table = _DTYPE_OF.get(fields["dtype"]), header.get(name + _RUNS, fields)
            if dtype is None or self._dtypes.setdefault(name, dtype) != dtype or table["shape"][1:] != [2]:
                raise CheckpointError(
                    f"{place[1]} is not a file of this version's training states: {name!r} is "
                    f"{fields['dtype']} with the shape {fields['shape']} and the runs {table['shape']}. "
                    "Start a new run."
                )
            start, stop = table["data_offsets"]
            numbers = iter(memoryview(read(head + start, stop - start)).cast("q"))
            offset = head + fields["data_offsets"][0]
            for first, length in zip(numbers, numbers, strict=True):
                stored.setdefault(name, []).append(_Stored(first, length, place, offset))
                offset += length * dtype.itemsize
            if offset != head + fields["data_offsets"][1]:
                raise CheckpointError(f"{place[1]}: the runs of {name!r} do not add up to its size.")

    def _pieces(self, name: str, address: Address, width: int) -> Iterator[_Piece]:
        stored, done = self._stored[name], 0
        for first, length in address.runs():
            if first < 0 or first + length > self.num_params:
                raise CheckpointError(
                    f"the training state has the entries 0 to {self.num_params} of {name!r}, and {first} to "
                    f"{first + length} were asked for."
                )
            at, stop = first, first + length
            number = bisect_right(self._firsts[name], at) - 1
            while at < stop:
                run = stored[number]
                count = min(min(run.first + run.length, stop) - at, _WINDOW_BYTES // width)
                yield _Piece(run.place, run.offset + (at - run.first) * width, count * width, done * width)
                at, done = at + count, done + count
                number += at == run.first + run.length


def _windows(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces, sorted by place and offset, that are read at once."""
    window: list[_Piece] = []
    end = 0
    for piece in pieces:
        fits = (
            window
            and piece.place == window[0].place
            and piece.offset <= end + _GAP_BYTES
            and piece.offset + piece.size <= window[0].offset + 2 * _WINDOW_BYTES
        )
        if window and not fits:
            yield window
            window = []
        end = piece.offset + piece.size if not window else max(end, piece.offset + piece.size)
        window.append(piece)
    if window:
        yield window
