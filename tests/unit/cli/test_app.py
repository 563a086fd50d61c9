"""The command line as a whole: help, speed, errors."""

import errno
import os
import subprocess
import sys

import pytest

import securetune
from securetune.cli import file_commands
from securetune.cli.output import clean_exit
from securetune.errors import DataError, GateFailed

COMMANDS = [
    "plan",
    "validate",
    "train",
    "evaluate",
    "init",
    "ls",
    "cp",
    "doctor",
    "export",
    "schema",
    "publish",
    "checkpoint",
]


def test_help_lists_every_command(run_cli):
    outcome = run_cli("--help")
    assert outcome.code == 0
    assert all(f" {command} " in outcome.out for command in COMMANDS)


@pytest.mark.parametrize(
    "command", [*COMMANDS, *(f"checkpoint {verb}" for verb in ("keygen", "seal", "open", "verify"))]
)
def test_every_command_has_help(run_cli, command):
    assert run_cli(*command.split(), "--help").code == 0


def test_version(run_cli):
    assert run_cli("--version").out == f"securetune {securetune.__version__}\n"


@pytest.mark.parametrize(
    "module",
    ["cli.app", "config", "config.template", "errors", "files", "evidence", "cli.machine", "cli.validation"],
)
def test_importing_the_command_line_imports_nothing_heavy(module):
    heavy = {"torch", "transformers", "matplotlib", "scipy", "numpy", "pyarrow", "peft", "accelerate"}
    code = f"import sys, securetune.{module}; print(*(set(sys.modules) & {heavy!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_help_does_not_load_the_schema():
    code = "import sys, securetune.cli.app; print('pydantic' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_usage_errors_exit_with_2(run_cli):
    assert run_cli("no-such-command").code == 2
    assert run_cli("plan").code == 2


def test_an_error_is_one_block_without_a_traceback(run_cli):
    outcome = run_cli("plan", "missing.yaml")
    assert outcome.code == 2
    assert (
        outcome.err
        == "ConfigError: missing.yaml: no such file. 'securetune ls' lists what comes with securetune.\n"
    )
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("bad [red]text[/]"), 2, "DataError: bad [red]text[/]"),
        (GateFailed("no"), 1, "GateFailed: no"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "ckpt"),
            2,
            "ckpt: No space left on device. Free some space",
        ),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x"), 2, "x: Permission denied."),
        (KeyboardInterrupt(), 130, "Start the same command with --resume"),
    ],
)
def test_exit_status_and_message(error, code, message, capsys):
    with pytest.raises(SystemExit) as caught, clean_exit():
        raise error
    assert caught.value.code == code
    assert message in capsys.readouterr().err


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), clean_exit():
        _ = 1 / 0


def test_unexpected_errors_in_commands_are_not_hidden(run_cli, monkeypatch):
    monkeypatch.setattr(file_commands, "console", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli("ls")
