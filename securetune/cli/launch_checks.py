"""The checks of ``securetune doctor --launch``: would this configuration start the run as it is meant?"""

import contextlib
import io
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple, cast

from securetune.cli.machine import Check
from securetune.config.launch import Launch, examine_launch
from securetune.config.schema import Recipe


class PlannedLaunch(NamedTuple):
    """What ``accelerate launch`` would do with a configuration file."""

    environment: dict[str, str]
    """Variables of the first process on this machine."""
    num_processes: int
    """Processes the file asks for, on all machines."""
    num_machines: int
    """Machines."""
    starts_processes: bool
    """Whether it starts several processes itself; without, MPI has to."""
    over_ssh: bool
    """Whether DeepSpeed's launcher starts the other machines."""
    ignored: list[str]
    """Options of the file that accelerate does not know, and drops."""


def check_launch(path: Path, recipe: Recipe | None = None) -> Iterator[Check]:
    """Check a configuration file of ``accelerate launch``.

    Args:
        path: The file.
        recipe: Also check what this recipe asks for: batch sizes and number formats.

    Yields:
        One result per check.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            planned = plan_launch(path)
    except (Exception, SystemExit) as error:  # accelerate raises whatever its parsing runs into
        found = str(error) or type(error).__name__
        yield Check("fail", "launch", f"accelerate cannot use {path}: {found}", "repair the file")
        return
    launch, problems = examine_launch(planned.environment, recipe)
    processes = f"{launch.world_size} process{'' if launch.world_size == 1 else 'es'}"
    machines = f" on {planned.num_machines} machines" if planned.num_machines > 1 else ""
    yield Check("ok", "launch", f"{path}: {launch.strategy}, {processes}{machines}")
    for problem in problems:
        yield Check("fail", "setting", problem)
    yield from _processes(planned)
    yield _backend(launch)
    if launch.strategy.startswith("zero"):
        yield _deepspeed()
    yield _devices(launch, recipe)
    if recipe is not None:
        yield from batch_arithmetic(recipe, launch.world_size)


def plan_launch(path: Path) -> PlannedLaunch:
    """Let accelerate parse a configuration file, and say what it would start.

    Args:
        path: The file.

    Returns:
        The environment and the number of processes.

    Raises:
        ValueError: If accelerate cannot use the file, or the launcher is not supported.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import launch as environments

    parsed = launch_command_parser().parse_args(["--config_file", str(path), "harden.py"])
    known = set(vars(parsed))
    args, defaults, _ = cast("tuple[Any, Any, bool]", _validate_launch_command(parsed))
    if args.tpu or not hasattr(args, "num_machines"):
        raise ValueError("TPUs and SageMaker are not supported. Use a file of recipes/accelerate")
    num_processes, num_machines = int(args.num_processes), int(args.num_machines or 1)
    starts_processes, over_ssh = not args.cpu, False
    if args.use_deepspeed and not args.cpu:
        args.deepspeed_fields_from_accelerate_config = ""
        environment = environments.prepare_deepspeed_cmd_env(args)[1]
        over_ssh = num_machines > 1 and args.deepspeed_multinode_launcher != "standard"
    elif (args.use_fsdp or args.use_megatron_lm or args.multi_gpu) and not args.cpu:
        environment = environments.prepare_multi_gpu_env(args)
    else:
        environment = environments.prepare_simple_launcher_cmd_env(args)[1]
        starts_processes = False
    if starts_processes:
        local = max(1, num_processes // num_machines)
        rank = int(args.machine_rank or 0) * local
        environment |= {
            "WORLD_SIZE": str(num_processes),
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": str(local),
        }
    sections = {"fsdp_config": "fsdp_", "deepspeed_config": "", "parallelism_config": ""}
    ignored = [
        f"{section}.{key}"
        for section, prefix in sections.items()
        for key in getattr(defaults, section)
        if not known & {key, f"{prefix}{key}"}
    ]
    return PlannedLaunch(environment, num_processes, num_machines, starts_processes, over_ssh, ignored)


def _processes(planned: PlannedLaunch) -> Iterator[Check]:
    for option in planned.ignored:
        yield Check("warn", "setting", f"accelerate does not know {option} and drops it", "remove it")
    if planned.num_processes > 1 and not planned.starts_processes:
        yield Check(
            "fail",
            "processes",
            f"num_processes is {planned.num_processes}, but accelerate starts one with this distributed_type",
            "set distributed_type to MULTI_GPU, which starts processes on a machine without GPUs too",
        )
    if planned.num_processes % planned.num_machines:
        yield Check(
            "fail",
            "processes",
            f"{planned.num_processes} processes do not divide among {planned.num_machines} machines",
            f"set num_processes, which counts all machines, to a multiple of {planned.num_machines}",
        )
    if planned.over_ssh:
        yield Check(
            "warn",
            "launcher",
            "DeepSpeed's launcher writes environment variables, secrets among them, into .deepspeed_env",
            "set deepspeed_config.deepspeed_multinode_launcher to standard, and start each machine",
        )


def _backend(launch: Launch) -> Check:
    import torch
    from torch import distributed

    if launch.strategy == "single":
        return Check("ok", "backend", "none needed for one process")
    if not distributed.is_available():
        return Check(
            "fail", "backend", "this torch has no torch.distributed", "install another build of torch"
        )
    has = {"nccl": distributed.is_nccl_available(), "gloo": distributed.is_gloo_available()}
    needed = ("nccl", "gloo") if torch.cuda.is_available() else ("gloo",)
    missing = [name for name in needed if not has[name]]
    if missing:
        return Check(
            "fail",
            "backend",
            f"this torch has no {' and no '.join(missing)}",
            "install another build of torch",
        )
    return Check("ok", "backend", " and ".join(needed))


def _deepspeed() -> Check:
    from packaging.requirements import Requirement

    texts = [Requirement(text) for text in requires("securetune") or []]
    (needed,) = (requirement.specifier for requirement in texts if requirement.name == "deepspeed")
    install = "pip install 'securetune[deepspeed]' --no-build-isolation"
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        return Check("fail", "deepspeed", f"not installed, needs {needed}", install)
    if not needed.contains(found, prereleases=True):
        return Check("fail", "deepspeed", f"{found}, needs {needed}", install)
    return Check("ok", "deepspeed", found)


def _devices(launch: Launch, recipe: Recipe | None) -> Check:
    import os

    import torch

    local, devices = launch.local_world_size, torch.cuda.device_count()
    wants_cpu = recipe is not None and recipe.model.device == "cpu"
    if devices and not wants_cpu:
        if local > devices:
            return Check(
                "fail",
                "devices",
                f"{local} processes on this machine, which has {devices} GPUs: NCCL takes one for each",
                f"set num_processes to at most {devices} for each machine",
            )
        return Check("ok", "devices", f"{local} of {devices} GPUs on this machine")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    status = "ok" if local <= cores else "warn"
    detail = f"{local} process{'' if local == 1 else 'es'} on the CPU, {cores} cores"
    return Check(status, "devices", detail, "start at most one process for each core")


def batch_arithmetic(recipe: Recipe, world_size: int) -> Iterator[Check]:
    """Say how a step's records spread over processes and micro-batches.

    Args:
        recipe: The recipe.
        world_size: Number of processes.

    Yields:
        One result per check.
    """
    privacy, training = recipe.privacy, recipe.training
    units = privacy.expected_batch_size / world_size
    most = privacy.max_records_per_user or 1
    per_batch = training.micro_batch_tokens // recipe.data.max_length
    num_batches = -(-privacy.expected_batch_size * most // (world_size * per_batch))
    detail = (
        f"about {units:,.1f} {privacy.unit}s of privacy.expected_batch_size = "
        f"{privacy.expected_batch_size:,} for each of {world_size:,} processes and step; at most about "
        f"{num_batches:,} micro-batches of {per_batch:,} records of data.max_length"
    )
    remedy = "use fewer processes, or raise privacy.expected_batch_size and privacy.sample_rate with it"
    if units < 1:
        yield Check("warn", "batch", f"{detail}; some processes have none and wait", remedy)
    else:
        yield Check("ok", "batch", detail)
    if privacy.expected_records < world_size:
        yield Check(
            "warn",
            "records",
            f"about {privacy.expected_records:,.0f} training {privacy.unit}s for {world_size:,} processes",
            "use fewer processes",
        )
