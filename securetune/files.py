"""Files that survive a crash: atomic writes, durable appends, strict JSON and digests."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import rfc8785

from securetune.errors import DataError

_CHUNK_BYTES = 1 << 20


def write_atomic(path: str | os.PathLike[str], data: bytes | str, *, mode: int = 0o600) -> None:
    """Write a whole file, or leave what was there before untouched.

    Guarantees:
        After a normal return the new content is on disk under ``path``. After an error or a kill at any
        moment ``path`` holds either the complete old content or the complete new one.

    Args:
        path: The file to write; its folder must exist.
        data: The content; text is written as UTF-8.
        mode: Permission bits of the new file.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the old file stays whole.
    """
    target = Path(path)
    content = data.encode() if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        try:
            os.fchmod(descriptor, mode)
            _write_all(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = error.filename or os.fspath(target)  # a failed write names no file
        raise
    fsync_folder(target.parent)


class LazyFiles(Mapping[str, bytes]):
    """Files by name, each made when it is taken out: large ones need not be in memory together.

    Args:
        makers: What makes each file.
    """

    def __init__(self, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._makers = dict(makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __getitem__(self, name: str) -> bytes:
        return self._makers[name]()


def append_durable(path: str | os.PathLike[str], line: str, *, mode: int = 0o600) -> None:
    """Append one line and return only when it is on disk.

    Guarantees:
        A torn last line, left by a kill, is ended first, so it never swallows the new one. If the write
        fails the file is cut back to its old length.

    Args:
        path: The file; made with ``mode`` where it does not exist yet.
        line: One line of text without a line break.
        mode: Permission bits of a new file.

    Raises:
        ValueError: If ``line`` holds a line break.
        OSError: If the disk is full or the file cannot be written.
    """
    if "\n" in line or "\r" in line:
        raise ValueError("line must not hold a line break: one call appends one line.")
    target = Path(path)
    is_new = not target.exists()
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, mode)
    try:
        size = os.fstat(descriptor).st_size
        is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        try:
            _write_all(descriptor, (b"\n" if is_torn else b"") + line.encode() + b"\n")
        except OSError as error:
            os.ftruncate(descriptor, size)
            error.filename = os.fspath(target)
            raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        fsync_folder(target.parent)


def read_json(path: str | os.PathLike[str], max_bytes: int) -> Any:
    """Read a JSON file strictly.

    Args:
        path: The file to read.
        max_bytes: The largest size accepted.

    Returns:
        The parsed value.

    Raises:
        DataError: If the file is larger than ``max_bytes``, is not UTF-8 or JSON, holds a key twice or a
            number that is not finite, or is nested too deeply.
        OSError: If the file cannot be read.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(f"{name} is larger than {max_bytes} bytes, the most that is accepted here.")
    return parse_json(content, name)


def parse_json(content: bytes, name: str) -> Any:
    """Parse JSON as strictly as :func:`read_json`.

    Args:
        content: The bytes to parse.
        name: What to call the content in an error message.

    Returns:
        The parsed value.

    Raises:
        DataError: See :func:`read_json`.
    """

    def refuse_constant(constant: str) -> NoReturn:
        raise DataError(f"{name} holds the number {constant}; only finite numbers are allowed.")

    def refuse_infinite(text: str) -> float:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise DataError(f"{name} holds the number {text}, which is too large.")
        return number

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{name} holds the key {twice!r} twice in one object.")
        return result

    try:
        return json.loads(
            content.decode(),
            parse_constant=refuse_constant,
            parse_float=refuse_infinite,
            object_pairs_hook=refuse_duplicates,
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not valid UTF-8: byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from error
    except RecursionError as error:
        raise DataError(f"{name} is nested too deeply to be read safely.") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{name} holds a whole number of more digits than are accepted.") from error


def canonical_json(value: Any) -> bytes:
    """Encode a value as canonical JSON (RFC 8785): equal values give equal bytes.

    Args:
        value: Nested dicts, lists, strings, booleans, ``None``, finite floats and integers within +-2**53.

    Returns:
        UTF-8 bytes.
    """
    return rfc8785.dumps(value)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hash a file without loading it whole.

    Args:
        path: The file to hash.

    Returns:
        64 lower-case hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable, such as a file just renamed into it.

    Args:
        path: The folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
