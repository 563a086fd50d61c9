"""The processes that save or open one checkpoint together; what one of them cannot do, none of them does."""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from securetune import errors
from securetune.errors import CheckpointError, MachineError


class Peers(Protocol):
    """The processes of a run. Every method is called by all of them, in the same order.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    rank: int
    size: int

    def keep_pace(self, what: str) -> None:
        """Wait until all processes are here; ``what`` comes next."""
        ...

    def share_secret(self, secret: bytes | None, size: int) -> bytes:
        """Give a secret of the first process to all of them, in memory only."""
        ...

    def share(self, value: Any) -> Any:
        """Give a JSON-able value of the first process to all of them."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """Give a JSON-able value of each process to the first, in order; the others get an empty list."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def keep_pace(self, what: str) -> None:
        """Wait for nobody."""

    def share_secret(self, secret: bytes | None, size: int) -> bytes:
        """Return the secret."""
        assert secret is not None
        assert len(secret) == size
        return secret

    def share(self, value: Any) -> Any:
        """Return the value."""
        return value

    def collect(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]


ALONE = Alone()


@contextlib.contextmanager
def agreement(peers: Peers, what: str) -> Iterator[None]:
    """Do something on each process, and leave the block together: if it fails on one, it raises on all.

    Args:
        peers: The processes; nothing in the block may need them.
        what: What is waited for, for the message of a process that waits in vain.

    Yields:
        Nothing.

    Raises:
        SecuretuneError: On the other processes: of the same kind and with the same message, which names the
            process.
    """
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        caught = error
    failure = None if caught is None else [peers.rank, type(caught).__name__, str(caught)]
    try:
        peers.keep_pace(what)
        failures = [found for found in peers.collect(failure) if found is not None]
        first = peers.share(failures[0] if failures else None)
    except MachineError:
        if caught is None:
            raise
        first = failure
    if caught is not None:
        raise caught
    if first is not None:
        rank, kind, message = first
        raise getattr(errors, kind, CheckpointError)(f"process {rank}: {message}")
