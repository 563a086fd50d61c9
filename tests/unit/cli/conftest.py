"""Runs the command line in this process, as a user would see it."""

import sys
from typing import NamedTuple

import pytest

from securetune.cli.app import main


class Outcome(NamedTuple):
    """Exit status and what was printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(monkeypatch, capsys, tmp_path):
    """Call ``securetune ARGUMENTS`` from an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["securetune", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
