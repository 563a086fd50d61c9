"""Folders that change as one: read every file once, write a new folder beside the old one and swap them."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from securetune.errors import CheckpointError
from securetune.files import fsync_folder

_LOGGER = logging.getLogger(__name__)
MAX_FILES = 512  # each stays open while the folder is in use
_MAX_DEPTH = 8
_OPEN_ATTEMPTS = 10
_BLOCK_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")  # leaves room for what the format adds
_WINDOWS_DEVICE = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_name(name: str, what: str) -> None:
    """Refuse a file name that is not safe on every system.

    Args:
        name: One path component.
        what: What the name is for, used in the message.

    Raises:
        CheckpointError: If the name is not 1 to 100 of ``A-Z a-z 0-9 . _ -``, starts or ends with a dot, or
            is a device name on Windows.
    """
    if not _NAME.fullmatch(name) or name.endswith(".") or _WINDOWS_DEVICE.fullmatch(name):
        raise CheckpointError(
            f"{what} {name!r} is not allowed: use 1 to 100 letters, digits, '.', '_' or '-', no dot first or "
            "last, and no Windows device name."
        )


class FolderReader:
    """Every file of a folder, each opened once and read only through that descriptor.

    Guarantees:
        No symbolic link is followed, at or below the folder. Hard links, devices, pipes and sockets are
        refused. A file that is replaced later is still read from the descriptor opened first; one changed in
        place is the caller's to detect, by digest.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the folder and all files below it.

        Args:
            path: The folder.

        Raises:
            CheckpointError: If it is not a folder, or holds something that must not be there.
        """
        self.path = Path(path)
        self.sizes: dict[str, int] = {}
        self.folders: set[str] = set()
        self._descriptors: dict[str, int] = {}
        for attempt in range(_OPEN_ATTEMPTS):
            try:
                self._open_root()
                return
            except FileNotFoundError as error:
                # a writer swapped the folder and removed the old files: start again with the new ones
                self.close()
                if attempt == _OPEN_ATTEMPTS - 1 or not self.path.exists():
                    raise CheckpointError(_not_openable(self.path, error)) from error
            except OSError as error:
                self.close()
                raise CheckpointError(_not_openable(self.path, error)) from error
            except CheckpointError:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self.sizes.clear()
        self.folders.clear()

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return the content of a small file.

        Args:
            name: Path below the folder.
            max_bytes: The largest size accepted.

        Returns:
            The content.

        Raises:
            CheckpointError: If the file is larger, or shrank since it was opened.
        """
        size = self.sizes[name]
        if size > max_bytes:
            raise CheckpointError(f"{self.path / name} has {size} bytes; at most {max_bytes} are accepted.")
        content = b"".join(self.blocks(name))
        if len(content) != size:
            raise CheckpointError(f"{self.path / name} changed while it was read.")
        return content

    def read_at(self, name: str, offset: int, count: int) -> bytes:
        """Return up to ``count`` bytes of a file from ``offset`` on."""
        return os.pread(self._descriptors[name], count, offset)

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's content in blocks of up to 1 MiB, no more than it had when it was opened."""
        offset = 0
        while offset < self.sizes[name]:
            block = self.read_at(name, offset, min(_BLOCK_BYTES, self.sizes[name] - offset))
            if not block:
                return
            offset += len(block)
            yield block

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file's content, in hexadecimal."""
        digest = hashlib.sha256()
        for block in self.blocks(name):
            digest.update(block)
        return digest.hexdigest()

    def _open_root(self) -> None:
        root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._open_all(root, "")
            # a folder that was swapped away meanwhile may have been emptied before it was listed
            here, opened = os.stat(self.path, follow_symlinks=False), os.fstat(root)
            if (here.st_dev, here.st_ino) != (opened.st_dev, opened.st_ino):
                raise FileNotFoundError(
                    errno.ENOENT, "the folder was replaced while it was opened", self.path
                )
        finally:
            os.close(root)

    def _open_all(self, folder: int, prefix: str) -> None:
        for entry in sorted(os.listdir(folder)):
            name = prefix + entry
            mode = os.stat(entry, dir_fd=folder, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                if name.count("/") >= _MAX_DEPTH:
                    raise CheckpointError(f"{self.path / name}: folders are nested too deeply.")
                self.folders.add(name)
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                child = os.open(entry, flags, dir_fd=folder)
                try:
                    self._open_all(child, name + "/")
                finally:
                    os.close(child)
            elif stat.S_ISREG(mode):
                self._open_file(folder, entry, name)
            else:
                raise CheckpointError(
                    f"{self.path / name} is a symbolic link, pipe or device; only regular files are allowed."
                )

    def _open_file(self, folder: int, entry: str, name: str) -> None:
        if len(self._descriptors) >= MAX_FILES:
            raise CheckpointError(f"{self.path} holds more than {MAX_FILES} files.")
        # O_NONBLOCK: should the file have become a pipe since, opening it must not wait for a writer
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        self._descriptors[name] = descriptor
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise CheckpointError(
                f"{self.path / name} has {status.st_nlink} names (hard links) or is not a regular file; "
                "copy the folder without links."
            )
        self.sizes[name] = status.st_size


def _not_openable(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return f"{path} is a symbolic link; give the folder it points to, {path.resolve()}."
    return f"{path} is not a folder that can be opened: {error.strerror} ({error.filename})."


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Write a new file durably: mode as given whatever the umask is, content on disk on return."""
    descriptor = create_file(path, mode)
    try:
        write_all(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_file(path: Path, mode: int) -> int:
    """Create a file that must not exist yet and return a descriptor open for writing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    os.fchmod(descriptor, mode)
    return descriptor


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of ``content``, however the system splits it."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def replace_folder(
    target: str | os.PathLike[str], *, marker: str | None = None, mode: int = 0o700
) -> Iterator[Path]:
    """Build a folder aside and put it in place of another as one step.

    Guarantees:
        If the block raises, or the process is killed at any moment, ``target`` is the complete old folder (or
        absent, if there was none) or the complete new one. On a normal return the new one is on disk. What a
        killed process left beside the target is tidied up by the next call.

    Args:
        target: The folder to make or replace; its parent must exist.
        marker: A folder that exists and is not empty is replaced only if it holds a file of this name;
            ``None``: never.
        mode: Permission bits of the new folder.

    Yields:
        An empty folder to fill. Files in it must be made durable by the caller; its folders are made durable
        here.

    Raises:
        CheckpointError: If another process is writing the same target, or the target must not be replaced.
        OSError: If the disk is full or the folder cannot be written; the old folder stays whole.
    """
    target = Path(target).absolute()
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: the folder {target.parent} does not exist. Make it first.")
    with _lock(target, wait=False):
        _recover(target)
        _check_replaceable(target, marker)
        # a name of its own: a process that still writes for a save that failed cannot write into this one
        building = _sibling(target, f"new-{secrets.token_hex(8)}")
        os.mkdir(building, 0o700)  # noqa: PTH102
        try:
            yield building
            os.chmod(building, mode)  # noqa: PTH101
            for folder, _, _ in os.walk(building):
                fsync_folder(folder)
            _swap_in(building, target)
        finally:
            _discard(building)  # what was swapped out, or what could not be finished


def recover_folder(target: str | os.PathLike[str]) -> None:
    """Put the old folder back if a writer was killed between its two renames; needed before reading only."""
    target = Path(target).absolute()
    if not os.path.lexists(target) and _sibling(target, "old").is_dir():
        with _lock(target, wait=True):
            _recover(target)


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


@contextlib.contextmanager
def _lock(target: Path, *, wait: bool) -> Iterator[None]:
    path = _sibling(target, "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            os.close(descriptor)
            raise CheckpointError(
                f"another process is writing {target}. Wait for it to end, or write elsewhere."
            ) from error
        # the holder before us may have removed the file we opened: then a third process can lock a new one
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _recover(target: Path) -> None:
    old = _sibling(target, "old")
    if old.is_dir():
        if os.path.lexists(target):
            _discard(old)
        else:
            os.rename(old, target)  # noqa: PTH104
            fsync_folder(target.parent)
    left_over = re.compile(re.escape(_sibling(target, "new-").name) + "[0-9a-f]{16}")
    for entry in list(target.parent.iterdir()):
        if left_over.fullmatch(entry.name):
            _discard(entry)


def _check_replaceable(target: Path, marker: str | None) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target} exists and is not a folder. Remove it or write elsewhere.")
    if any(target.iterdir()) and (marker is None or not (target / marker).is_file()):
        wanted = "is not empty" if marker is None else f"holds other files and no {marker}"
        raise CheckpointError(f"{target} {wanted}, so it is not replaced. Remove it or write elsewhere.")


def _swap_in(building: Path, target: Path) -> None:
    """Put ``building`` in place of ``target``, durably, or leave both as they were."""
    old = _sibling(target, "old")
    if not os.path.lexists(target):
        moves = [(building, target)]
    elif _exchange(building, target):
        try:
            fsync_folder(target.parent)
        except OSError:
            _exchange(building, target)
            raise
        return
    else:
        moves = [(target, old), (building, target)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            os.rename(source, destination)  # noqa: PTH104
            done.append((source, destination))
        fsync_folder(target.parent)
    except OSError:
        for source, destination in reversed(done):
            os.rename(destination, source)  # noqa: PTH104
        raise
    _discard(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), os.fspath(one))


def _discard(folder: Path) -> None:
    """Remove a folder that no longer matters; failing at that must not fail a save that succeeded."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        _LOGGER.warning(
            "%s could not be removed (%s). It is not needed: remove it by hand.", folder, error.strerror
        )
