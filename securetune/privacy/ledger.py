"""The ledger of a private run: every step is on disk before its noise is released.

A JSON-lines file. The first line is the header: the public constants that epsilon follows from. Then one line
per step charged, with a random name of the process that charged it, and one per noised release of held-out
statistics. It holds no private data: no batch sizes, no losses, no norms.
"""

import fcntl
import json
import math
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

from pydantic import ValidationError

from securetune.errors import DataError, PrivacyError
from securetune.files import append_durable, canonical_json, fsync_folder, parse_json
from securetune.privacy.accounting import (
    epsilon_of_phases,
    max_true_positive_rate,
    max_true_positive_rate_of_run,
)
from securetune.privacy.ledger_header import FORMAT, LedgerHeader
from securetune.privacy.loss_distribution import Phase

__all__ = ["Ledger", "LedgerHeader", "LedgerState", "read_ledger"]

MAX_LEDGER_BYTES = 1 << 28


class LedgerState(NamedTuple):
    """What a ledger file says.

    Attributes:
        header: The run's public constants.
        steps_charged: Steps whose noise may have been released; a step repeated after a crash counts each
            time.
        release_epsilons: Epsilon of each release of held-out statistics.
        writers: Random name of each process that charged steps: which run this is the ledger of.
    """

    header: LedgerHeader
    steps_charged: int
    release_epsilons: tuple[float, ...]
    writers: frozenset[str] = frozenset()

    @property
    def remaining_steps(self) -> int:
        """Steps that may still be charged."""
        return max(0, self.header.planned_steps - self.steps_charged)

    @property
    def phase(self) -> Phase:
        """The charged steps as the accountant takes them."""
        header = self.header
        return Phase(header.noise_multiplier, header.sample_rate, self.steps_charged, header.sampling)

    def epsilon(self) -> float | None:
        """Compute what training has cost so far.

        Returns:
            Epsilon of the charged steps at the header's delta; ``None`` where a fixed test key forbids to
            report one.
        """
        if not self.header.reportable_epsilon:
            return None
        return epsilon_of_phases([self.phase], self.header.delta)

    def total_epsilon(self) -> float | None:
        """Compute what training and all releases cost one record together.

        A record is in the training part or in the held-out part, by a keyed hash of the record itself, so it
        pays for one of the two (parallel composition); releases add up among themselves.

        Returns:
            Epsilon at the header's delta; ``None`` where a fixed test key forbids to report one.
        """
        training = self.epsilon()
        return None if training is None else max(training, math.fsum(self.release_epsilons))

    def summary(self) -> dict[str, Any]:
        """Put the privacy statement into a JSON-serialisable form, for plans, reports and model cards.

        Returns:
            The header's fields, and ``steps_charged``, ``remaining_steps``, ``epsilon``, ``release_epsilon``
            (the sum), ``total_epsilon``, and the highest true-positive rate at 1 % false positives of any
            membership attack on the training: ``max_tpr_at_1pct_fpr`` from ``(epsilon, delta)`` alone,
            ``max_tpr_at_1pct_fpr_pld`` from all pairs that hold. ``None`` where there is no epsilon.
        """
        epsilon = self.epsilon()
        return {
            **self.header.model_dump(),
            "steps_charged": self.steps_charged,
            "remaining_steps": self.remaining_steps,
            "epsilon": epsilon,
            "release_epsilon": math.fsum(self.release_epsilons),
            "total_epsilon": self.total_epsilon(),
            "max_tpr_at_1pct_fpr": (
                None if epsilon is None else max_true_positive_rate(epsilon, self.header.delta, 0.01)
            ),
            "max_tpr_at_1pct_fpr_pld": (
                None if epsilon is None else max_true_positive_rate_of_run([self.phase], 0.01)
            ),
        }


class Ledger:
    """Charge the steps of one run, as its only writer.

    Guarantees:
        When :meth:`charge` returns, the step is on disk; only then may its noise be released. So no released
        step is ever missing, a step that is repeated after a crash counts twice, and a line torn by a crash
        counts as a step. A file that something else changed meanwhile is refused. At most ``planned_steps``
        steps are ever charged, so epsilon never passes the plan's: lost steps shorten the run.

    Args:
        path: The ledger's file; made if there is none, continued if there is one.
        header: The run's public constants; must equal those of an existing ledger.

    Raises:
        PrivacyError: If the file is another run's ledger, is no ledger, another process writes to it, or its
            folder does not exist.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], header: LedgerHeader) -> None:
        self.path = Path(path)
        self._name = secrets.token_hex(8)
        self._lock = _open_locked(self.path)
        try:
            line = canonical_json(header.model_dump()).decode()
            content = self.path.read_bytes()
            if b"\n" not in content and (line + "\n").encode().startswith(content):
                # New, or torn while it was made: no step can have been charged before the header was on disk.
                self._lock.truncate(0)
                append_durable(self.path, line)
                fsync_folder(self.path.parent)
            self._state = read_ledger(self.path)
            _refuse_other_header(self.path, self._state.header, header)
            self._size = os.fstat(self._lock.fileno()).st_size
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up the file to other writers; what was charged stays charged."""
        self._lock.close()

    @property
    def state(self) -> LedgerState:
        """The ledger as it is on disk."""
        return self._state

    @property
    def steps_charged(self) -> int:
        """Steps whose noise may have been released, in this process or an earlier one."""
        return self._state.steps_charged

    @property
    def remaining_steps(self) -> int:
        """Steps that may still be charged."""
        return self._state.remaining_steps

    def epsilon(self) -> float | None:
        """Compute what training has cost so far.

        Returns:
            See :meth:`LedgerState.epsilon`.
        """
        return self._state.epsilon()

    def summary(self) -> dict[str, Any]:
        """Put the privacy statement into a JSON-serialisable form.

        Returns:
            See :meth:`LedgerState.summary`.
        """
        return self._state.summary()

    def charge(self, step: int | None = None) -> int:
        """Put one step on disk; its noise may be released after this returns.

        Args:
            step: The optimizer step it pays for, for the reader of the file; every call counts, also for a
                step charged before. By default the number of steps charged so far.

        Returns:
            The number of steps charged, this one included.

        Raises:
            PrivacyError: If all planned steps are charged, the ledger is closed, or something else changed
                the file; nothing is written then.
            OSError: If the line cannot be made durable; the noise must not be released.
        """
        self._refuse_if_closed()
        if self.remaining_steps == 0:
            raise PrivacyError(
                f"all {self._state.header.planned_steps} planned steps are charged in {self.path}: another "
                "would pass the planned epsilon. End the run here, or plan more steps in a new run folder."
            )
        self._append({"step": self.steps_charged if step is None else step, "writer": self._name})
        self._state = self._state._replace(
            steps_charged=self.steps_charged + 1, writers=self._state.writers | {self._name}
        )
        return self.steps_charged

    def charge_release(self, epsilon: float) -> float:
        """Put one release of held-out statistics on disk; it may be drawn after this returns.

        Args:
            epsilon: What the release costs each held-out record, > 0.

        Returns:
            What all releases together have cost each held-out record.

        Raises:
            ValueError: If ``epsilon`` is not a finite number > 0.
            PrivacyError: If the ledger is closed, or something else changed the file.
            OSError: If the line cannot be made durable; the release must not be drawn.
        """
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon must be a finite number > 0, got {epsilon}.")
        self._refuse_if_closed()
        self._append({"release_epsilon": epsilon})
        epsilons = (*self._state.release_epsilons, float(epsilon))
        self._state = self._state._replace(release_epsilons=epsilons)
        return math.fsum(epsilons)

    def _append(self, entry: dict[str, float | int | str]) -> None:
        self._refuse_if_changed()
        append_durable(self.path, canonical_json(entry).decode())
        self._size = os.fstat(self._lock.fileno()).st_size

    def _refuse_if_changed(self) -> None:
        """The file must be as this writer left it: charges that others removed would be forgotten."""
        own = os.fstat(self._lock.fileno())
        found = os.stat(self.path) if self.path.exists() else None
        if found is None or not os.path.samestat(found, own) or own.st_size != self._size:
            raise PrivacyError(
                f"the ledger {self.path} was removed, replaced or written to by something else while it was "
                f"open, so its count is no longer the run's: {self.steps_charged} steps are charged. Restore "
                "it to that number, or start a new run with a new ledger (its epsilon adds to this one's)."
            )

    def _refuse_if_closed(self) -> None:
        if self._lock.closed:
            raise PrivacyError(f"the ledger {self.path} is closed. Open it again to charge to it.")


def read_ledger(path: str | os.PathLike[str]) -> LedgerState:
    """Read a ledger without becoming its writer.

    Args:
        path: The ledger's file.

    Returns:
        What it says; a line that cannot be read, torn by a crash, counts as a step.

    Raises:
        PrivacyError: If the file is missing, is no ledger, or of an unknown version.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_LEDGER_BYTES + 1)
    except FileNotFoundError as error:
        raise PrivacyError(
            f"there is no ledger {os.fspath(path)}: without it nobody knows what the run cost. Restore the "
            "file, or train again in a new run folder."
        ) from error
    if len(content) > MAX_LEDGER_BYTES:
        raise PrivacyError(f"{os.fspath(path)} is larger than {MAX_LEDGER_BYTES} bytes: it is no ledger.")
    first, *lines = content.split(b"\n")
    header = _parse_header(first, os.fspath(path))
    steps = 0
    releases: list[float] = []
    writers: set[str] = set()
    for line in lines:
        if not line:
            continue
        entry = _parse_entry(line)
        release = _release_of(entry)
        if release is not None:
            releases.append(release)
            continue
        steps += 1
        if isinstance(writer := entry.get("writer"), str):
            writers.add(writer)
    return LedgerState(header, steps, tuple(releases), frozenset(writers))


def _parse_header(line: bytes, name: str) -> LedgerHeader:
    try:
        return LedgerHeader.model_validate(parse_json(line, name))
    except (DataError, ValidationError) as error:
        detail = (
            str(error)
            if isinstance(error, DataError)
            else "; ".join(
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}"
                for problem in error.errors()
            )
        )
        raise PrivacyError(
            f"{name} is not a ledger of format {FORMAT}: its first line is not a valid header ({detail}). "
            "Give the path of a ledger, or upgrade securetune if a newer version wrote it."
        ) from error


def _parse_entry(line: bytes) -> dict[str, Any]:
    """Read a line; an empty dictionary where it cannot be read, which counts as a step."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _release_of(entry: dict[str, Any]) -> float | None:
    """Read the epsilon of a release; ``None`` for everything else, all of which counts as a step."""
    epsilon = entry.get("release_epsilon") if len(entry) == 1 else None
    return float(epsilon) if isinstance(epsilon, int | float) and 0 < epsilon < math.inf else None


def _open_locked(path: Path) -> BinaryIO:
    if path.is_dir() or not path.parent.is_dir():
        raise PrivacyError(
            f"the ledger {path} must be a file in a folder that exists. "
            + ("Name a file in it." if path.is_dir() else f"Make the folder {path.parent} first.")
        )
    file = open(path, "a+b", opener=lambda name, flags: os.open(name, flags | os.O_CLOEXEC, 0o600))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise PrivacyError(
            f"another run is writing to the ledger {path}. Wait for it to end or stop it, or give this run a "
            "run_dir of its own."
        ) from error
    return file


def _refuse_other_header(path: Path, found: LedgerHeader, asked: LedgerHeader) -> None:
    different = [
        f"  {field}: {getattr(found, field)!r} in the ledger, {getattr(asked, field)!r} now"
        for field in LedgerHeader.model_fields
        if getattr(found, field) != getattr(asked, field)
    ]
    if different:
        raise PrivacyError(
            f"{path} belongs to a run with other settings, and epsilon of a mixture would be wrong:\n"
            + "\n".join(different)
            + "\nGo on with the ledger's settings, or start a new run folder."
        )
