"""Several "processes" of one test: threads that save and open checkpoints together."""

import json
import threading
from collections.abc import Callable
from typing import Any

from securetune.errors import MachineError


class ThreadPeers:
    """One of several threads; as :class:`securetune.privacy.distributed.Processes`, for its peers' part."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[str]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def keep_pace(self, what: str) -> None:
        try:
            self._barrier.wait(timeout=120)
        except threading.BrokenBarrierError as error:
            raise MachineError(f"process {self.rank} waited in vain before {what}") from error

    def collect(self, value: Any) -> list[Any]:
        self._board[self.rank] = json.dumps(value)
        self.keep_pace("collecting")
        values = [json.loads(text) for text in self._board] if self.rank == 0 else []
        self.keep_pace("collecting")
        return values

    def share(self, value: Any) -> Any:
        if self.rank == 0:
            self._board[0] = json.dumps(value)
        self.keep_pace("sharing")
        shared = json.loads(self._board[0])
        self.keep_pace("sharing")
        return shared

    def share_secret(self, secret: bytes | None, size: int) -> bytes:
        shared = bytes.fromhex(self.share(None if secret is None else secret.hex()))
        assert len(shared) == size
        return shared

    def leave(self) -> None:
        """Stand for a process that was killed: the others wait in vain."""
        self._barrier.abort()


def run_together(size: int, work: Callable[[ThreadPeers], Any]) -> list[Any]:
    """Call ``work`` on every thread; return each one's result, or the exception it raised."""
    barrier, board = threading.Barrier(size), [""] * size
    results: list[Any] = [None] * size

    def call(rank: int) -> None:
        try:
            results[rank] = work(ThreadPeers(rank, size, barrier, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
