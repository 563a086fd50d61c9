"""The run folder: where everything of a run lies, and what a killed run finds again."""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from securetune.config.loader import dump_recipe, recipe_digest
from securetune.config.schema import Recipe
from securetune.errors import ConfigError, MachineError
from securetune.files import append_durable, read_json, write_atomic

_MAX_WORK_BYTES = 256 << 20
NOT_COVERED = "not covered by epsilon"


class RunFolder:
    """Paths of one run, and the results of its finished stages.

    A stage's result is written whole when the stage is done, so a killed run finds each stage done or not
    done.

    Attributes:
        root: The run folder itself, mode 0700.
    """

    def __init__(self, root: Path) -> None:
        """Name the paths; :meth:`open` makes the folder.

        Args:
            root: The run folder.
        """
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.plan = root / "plan.json"
        self.metrics = root / "metrics.jsonl"
        self.ledger = root / "ledger.jsonl"
        self.checkpoint = root / "checkpoint"
        self.report_json = root / "report.json"
        self.report_html = root / "report.html"
        self.public_key = root / "publisher.pub"
        self.keys = root / "keys"
        self.work = root / "work"
        self._is_read_only = False

    @classmethod
    @contextlib.contextmanager
    def open(cls, recipe: Recipe, *, resume: bool) -> Iterator[Self]:
        """Start a run folder, or go on with one.

        Args:
            recipe: The recipe of the run.
            resume: Go on if the folder holds a run of the same recipe.

        Yields:
            The folder, locked against a second run.

        Raises:
            ConfigError: If the folder holds a run and ``resume`` is false, a run of another recipe, or other
                things than a run.
            MachineError: If the folder cannot be written, or another process runs in it.
        """
        folder = cls(recipe.run_folder)
        try:
            folder._refuse_other_contents()
            for path in (folder.root, folder.work, folder.keys):
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(0o700)
        except OSError as error:
            raise MachineError(
                f"run_dir: {folder.root} cannot be written: {error.strerror}. Choose another with --set "
                "run_dir=FOLDER."
            ) from error
        with folder._lock():
            if folder.has_begun:
                folder._check_recipe(recipe, resume=resume)
            else:
                write_atomic(folder.work / "recipe_digest", recipe_digest(recipe))
                write_atomic(folder.recipe, dump_recipe(recipe))
            yield folder

    @classmethod
    def follow(cls, recipe: Recipe) -> Self:
        """Read the run folder that another process of the same run has opened.

        Args:
            recipe: The recipe of the run.

        Returns:
            The folder; results and metrics given to it are left to the other process.
        """
        folder = cls(recipe.run_folder)
        folder._is_read_only = True
        return folder

    def _refuse_other_contents(self) -> None:
        """Refuse a folder of other things: a run makes its folder private."""
        if not self.root.is_dir() or self.work.is_dir():
            return
        found = min(self.root.iterdir(), default=None)
        if found is not None:
            raise ConfigError(
                f"run_dir: {self.root} holds {found.name} and is no run folder. Choose a new or empty folder "
                "with --set run_dir=FOLDER. Nothing was changed."
            )

    @property
    def has_begun(self) -> bool:
        """Whether anything was trained or charged here: from then on recipe and split are fixed."""
        trained = any(self.work.glob("*-state")) or any(self.work.glob("trained_*"))
        return trained or self.ledger.exists() or self.checkpoint.exists()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the wall-clock time of a stage; the time of a resumed stage adds up.

        Args:
            name: The stage, as the report shows it.

        Yields:
            Nothing.
        """
        started = time.monotonic()
        try:
            yield
        finally:
            times = self.stage_times()
            times[name] = times.get(name, 0.0) + time.monotonic() - started
            self.save("stage_times", times)

    def stage_times(self) -> dict[str, float]:
        """Return the seconds each stage has taken so far, in the order they began."""
        return self.load("stage_times") if self.has("stage_times") else {}

    def has(self, name: str) -> bool:
        """Say whether a result was saved under ``name``."""
        return self._work_file(name).is_file()

    def save(self, name: str, result: Any) -> None:
        """Keep a result; it may hold statistics of private data, so it stays in the run folder, mode 0600.

        Args:
            name: What to find it by.
            result: Anything JSON can hold.
        """
        if not self._is_read_only:
            write_atomic(self._work_file(name), json.dumps(result))

    def load(self, name: str) -> Any:
        """Return the result saved under ``name``."""
        return read_json(self._work_file(name), _MAX_WORK_BYTES)

    def log_metrics(self, values: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``, marked as not covered by epsilon.

        Args:
            values: What was measured.
        """
        if self._is_read_only:
            return
        append_durable(self.metrics, json.dumps({**values, "privacy": NOT_COVERED}))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of ``metrics.jsonl``; one that a kill tore is left out."""
        if not self.metrics.is_file():
            return []
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def secret(self, name: str) -> bytes:
        """Return 32 secret random bytes of this run, made at the first call and kept in ``keys/``, mode 0600.

        For splits that a resumed run must repeat. Keys of noise and sampling are never kept.

        Args:
            name: What the key is for.

        Returns:
            The key.

        Raises:
            ConfigError: If the run has begun and the key is gone: a new one would mix trained and held-out
                records. Or if the key is damaged.
        """
        path = self.keys / f"{name}.key"
        if not path.is_file():
            if self.has_begun or not self.keys.is_dir():
                raise ConfigError(
                    f"{path} is missing. It decides which records are held out, so without it the run in "
                    f"{self.root} can be neither resumed nor evaluated. Restore it, or start a new run."
                )
            write_atomic(path, os.urandom(32).hex())
        text = path.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{64}", text) is None:
            raise ConfigError(
                f"{path} is damaged: it must hold 64 hexadecimal digits. Restore it, or start a new run."
            )
        return bytes.fromhex(text.decode())

    def _work_file(self, name: str) -> Path:
        return self.work / f"{name}.json"

    def _check_recipe(self, recipe: Recipe, *, resume: bool) -> None:
        digest = self.work / "recipe_digest"
        if not resume:
            raise ConfigError(
                f"run_dir: {self.root} already holds a run. Add --resume to go on with it, or choose another "
                "folder with --set run_dir=FOLDER. Nothing was changed."
            )
        if not digest.is_file() or digest.read_text(encoding="ascii") != recipe_digest(recipe):
            raise ConfigError(
                f"run_dir: {self.root} holds a run of another recipe ({self.recipe}), which can't be resumed "
                "with this one. Choose another folder with --set run_dir=FOLDER. Nothing was changed."
            )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MachineError(
                    f"run_dir: another process is running in {self.root}. Wait for it, or choose another "
                    "folder with "
                    "--set run_dir=FOLDER."
                ) from error
            yield
