"""One ledger for several processes: the first one writes, and nobody makes noise before it has."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from securetune.privacy.distributed.collectives import Processes
from securetune.privacy.ledger import Ledger, LedgerState
from securetune.privacy.ledger_header import LedgerHeader


class SharedLedger(Ledger):
    """Charge the steps of one run that several processes take together.

    Guarantees:
        As :class:`~securetune.privacy.ledger.Ledger`, on every process: when :meth:`charge` returns anywhere,
        the step is on disk. If charging fails, it raises everywhere, and no process releases anything. A
        process that does not come is named to the others before anything is charged.

    Args:
        path: The ledger's file, read and written by the first process alone.
        header: The run's public constants, the same on every process.
        processes: Those of the run.

    Raises:
        PrivacyError: As a ``Ledger``.
    """

    def __init__(self, path: str | os.PathLike[str], header: LedgerHeader, processes: Processes) -> None:
        self.path = Path(path)
        self._header = header
        self._processes = processes
        self._own: Ledger | None = None
        self._on_first(lambda: None)

    def close(self) -> None:
        """Give up the file to other writers; what was charged stays charged."""
        if self._own is not None:
            self._own.close()

    def charge(self, step: int | None = None) -> int:
        """Put one step on disk, once all processes are here; see ``Ledger.charge``."""
        self._processes.keep_pace("a step is charged")
        self._on_first(lambda: self._first.charge(step))
        return self.steps_charged

    def charge_release(self, epsilon: float) -> float:
        """Put one release of held-out statistics on disk; see ``Ledger.charge_release``."""
        self._on_first(lambda: self._first.charge_release(epsilon))
        return math.fsum(self._state.release_epsilons)

    @property
    def _first(self) -> Ledger:
        if self._own is None:
            self._own = Ledger(self.path, self._header)
        return self._own

    def _on_first(self, write: Callable[[], Any]) -> None:
        """Let the first process write, and tell all what the file then holds."""

        def write_and_tell() -> dict[str, Any]:
            write()
            state = self._first.state
            return {
                "steps_charged": state.steps_charged,
                "release_epsilons": state.release_epsilons,
                "writers": sorted(state.writers),
            }

        told = self._processes.on_first(write_and_tell)
        self._state = LedgerState(
            self._header,
            steps_charged=told["steps_charged"],
            release_epsilons=tuple(told["release_epsilons"]),
            writers=frozenset(told["writers"]),
        )
