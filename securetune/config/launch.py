"""Starting a recipe: the one-process command, and the refusal of any other."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from securetune.errors import ConfigError

# the launchers that accelerate understands each announce the number of processes in a variable of their own
_PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def launch_command(
    script: str | os.PathLike[str], arguments: Sequence[str], *, use_cpu: bool, num_threads: int | None = None
) -> list[str]:
    """Build the command that runs a recipe in one process, without asking for an accelerate configuration.

    Args:
        script: The Python file of the recipe.
        arguments: What the recipe gets.
        use_cpu: Stay on the CPU even if there is a GPU.
        num_threads: CPU threads; None takes ``OMP_NUM_THREADS``, or else every core this process may use.

    Returns:
        The words of a command that runs under the same Python.
    """
    threads = num_threads or _default_threads(os.environ)
    options = [
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    options += ["--num_cpu_threads_per_process", str(threads), *(["--cpu"] if use_cpu else [])]
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        *options,
        os.fspath(script),
        *arguments,
    ]


def require_single_process(environment: Mapping[str, str] | None = None) -> None:
    """Refuse to run as one of several processes: sampling, noise and the ledger are not distributed yet.

    Call it before anything is loaded.

    Args:
        environment: The environment variables; None takes this process's own.

    Raises:
        ConfigError: With the command that starts one process.
    """
    variables = os.environ if environment is None else environment
    for name in _PROCESS_COUNTS:
        count = variables.get(name, "")
        if count.isdecimal() and int(count) > 1:
            arguments = [os.path.relpath(sys.argv[0]) if sys.argv[0] else "recipes/harden.py", *sys.argv[1:]]
            raise ConfigError(
                f"{count} processes were started ({name}={count}), but training runs in one process so far: "
                "noise and ledger of several would not agree. Start it with\n"
                f"  accelerate launch --num_processes 1 {shlex.join(arguments)}"
            )


def _default_threads(environment: Mapping[str, str]) -> int:
    wanted = environment.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def recipe_arguments(config: Path, overrides: Sequence[str], *, resume: bool) -> list[str]:
    """Build the arguments of a recipe script.

    Args:
        config: The YAML file.
        overrides: Values of ``--set``.
        resume: Go on with a run that was stopped.

    Returns:
        The words after the script's name.
    """
    sets = [word for override in overrides for word in ("--set", override)]
    return [os.fspath(config), *sets, *(["--resume"] if resume else [])]
