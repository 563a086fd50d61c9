"""Starting a recipe: the environment of one process, and what a launcher started this process as."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from securetune.config import launch_rules
from securetune.config.deepspeed_rules import broken_options, read_deepspeed_file
from securetune.config.schema import Recipe
from securetune.errors import ConfigError

StrategyName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[StrategyName, ...] = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")

# launchers that say in a variable of their own how many processes they started
_OTHER_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class Launch:
    """What a launcher started this process as.

    Attributes:
        strategy: How processes share the model and its training.
        world_size: Number of processes.
        rank: Number of this process, from 0.
        local_rank: The same among the processes of this machine.
        local_world_size: Number of processes on this machine.
        offload_optimizer: Optimizer state lives in the memory of the CPU, where the engine updates.
        offload_parameters: Weights wait in the memory of the CPU.
        mixed_precision: ``"bf16"`` where DeepSpeed shall keep weights in it, with float32 masters.
    """

    strategy: StrategyName
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    mixed_precision: Literal["no", "bf16"] = "no"


def one_process_environment(*, use_cpu: bool, num_threads: int | None = None) -> dict[str, str]:
    """Return the variables with which a recipe's script runs in one process.

    They are those that ``accelerate launch`` sets for it, whatever configuration accelerate has here. Its own
    launcher would turn every exit status that is not 0 into 1.

    Args:
        use_cpu: Stay on the CPU even if there is a GPU.
        num_threads: CPU threads; None takes ``OMP_NUM_THREADS``, or else every core this process may use.

    Returns:
        This process's variables, with those changed.
    """
    return {
        **os.environ,
        "ACCELERATE_USE_CPU": str(use_cpu),
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "OMP_NUM_THREADS": str(num_threads or _default_threads(os.environ)),
    }


def read_launch(environment: Mapping[str, str] | None = None, recipe: Recipe | None = None) -> Launch:
    """Find out what a launcher started this process as; call it before anything is loaded.

    Args:
        environment: The environment variables; None takes this process's own.
        recipe: The recipe; what contradicts it is refused too.

    Returns:
        The strategy, the places in it, and what the plugins ask for.

    Raises:
        ConfigError: With every setting that would change privacy, or what is computed.
    """
    variables = os.environ if environment is None else environment
    launch, problems = examine_launch(variables, recipe)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  {problem}" for problem in problems]
        raise ConfigError("\n".join([f"{count} in how this run was launched", *lines]))
    return launch


def examine_launch(
    environment: Mapping[str, str], recipe: Recipe | None = None
) -> tuple[Launch, Sequence[str]]:
    """Do what :func:`read_launch` does, and return the problems.

    Args:
        environment: The environment variables.
        recipe: The recipe; what contradicts it is a problem too.

    Returns:
        The launch as far as it can be told, and a line for each problem.
    """
    is_fsdp = launch_rules.flag(environment, "ACCELERATE_USE_FSDP")
    is_deepspeed = launch_rules.flag(environment, "ACCELERATE_USE_DEEPSPEED")
    places, problems = _places(environment, is_plugged=is_fsdp or is_deepspeed)
    settings = [*launch_rules.ALWAYS]
    if launch_rules.flag(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        settings += launch_rules.PARALLELISM
    if is_fsdp and is_deepspeed:
        problems.append("FSDP and DeepSpeed are both switched on. Choose one configuration file.")
    mixed_precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    offload_optimizer = offload_parameters = False
    if is_deepspeed:
        plugin = _DeepSpeed(environment)
        problems += plugin.problems
        strategy = plugin.strategy
        offload_optimizer, offload_parameters = plugin.offload_optimizer, plugin.offload_parameters
        mixed_precision = plugin.mixed_precision
    elif is_fsdp:
        settings += launch_rules.FSDP
        strategy = "fsdp2"
        offload_parameters = offload_optimizer = launch_rules.flag(environment, "FSDP_OFFLOAD_PARAMS")
    else:
        strategy = "ddp" if places["world_size"] > 1 else "single"
    if mixed_precision == "bf16" and not is_deepspeed:
        settings.append(launch_rules.BFLOAT16)
    problems += launch_rules.broken_settings(environment, settings)
    if recipe is not None:
        problems += _contradictions(mixed_precision, recipe)
    return Launch(
        strategy,
        **places,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
        mixed_precision="bf16" if mixed_precision == "bf16" else "no",
    ), problems


class _DeepSpeed:
    """What accelerate's DeepSpeed plugin reads from the environment, and from a file if one is named."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.problems = list(launch_rules.broken_settings(environment, [launch_rules.EXPERTS]))
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2").strip()
        optimizer = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none").lower()
        parameters = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none").lower()
        self.mixed_precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file == "none":
            self.problems += launch_rules.broken_settings(environment, launch_rules.DEEPSPEED)
        elif isinstance(values := read_deepspeed_file(file), str):
            self.problems.append(values)
        else:
            self.problems += broken_options(values)
            stage = str(_option(values, "zero_optimization.stage", missing=0, auto=stage))
            if stage == "0":
                self.problems.append(
                    "zero_optimization.stage is missing or 0 in the DeepSpeed file. Set it to 1, 2 or 3, or "
                    "use recipes/accelerate/ddp.yaml."
                )
            device = "zero_optimization.offload_{}.device"
            optimizer = _option(values, device.format("optimizer"), missing="none", auto=optimizer)
            parameters = _option(values, device.format("param"), missing="none", auto=parameters)
            wants_bf16 = self.mixed_precision == "bf16"
            is_bf16 = _option(values, "bf16.enabled", missing=wants_bf16, auto=wants_bf16)
            self.mixed_precision = "bf16" if is_bf16 else "no"
            if (
                is_bf16
                and stage == "1"
                and _option(values, "data_types.grad_accum_dtype", missing="", auto="")
            ):
                self.problems.append(
                    "data_types.grad_accum_dtype in the DeepSpeed file makes another optimizer of ZeRO-1 "
                    "with bf16, which has a gradient path of its own. Remove it: sums are in float32 anyway."
                )
        stages: dict[str, StrategyName] = {"1": "zero1", "2": "zero2", "3": "zero3"}
        self.strategy: StrategyName = stages.get(stage, "zero2")
        self.offload_optimizer = optimizer != "none"
        self.offload_parameters = parameters != "none"
        if self.offload_parameters and stage != "3":
            self.problems.append(
                f"deepspeed_config.offload_param_device is {parameters} at stage {stage}: only ZeRO-3 can do "
                "that. Set it to none, or zero_stage to 3."
            )


def _option(values: Any, path: str, *, missing: Any, auto: Any) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return missing if values is None else auto if values == "auto" else values


def _places(environment: Mapping[str, str], *, is_plugged: bool) -> tuple[dict[str, int], list[str]]:
    """Read how many processes there are, and which this one is, as torchrun and DeepSpeed say it."""
    one = {"world_size": 1, "rank": 0, "local_rank": 0, "local_world_size": 1}
    start = "Start the run with 'accelerate launch --config_file FILE'; recipes/accelerate has such files."
    if not environment.get("WORLD_SIZE", ""):
        for name in _OTHER_COUNTS:
            count = environment.get(name, "")
            if count.isdecimal() and int(count) > 1:
                return one, [
                    f"{count} processes were started ({name}={count}) that do not know of each other: each "
                    f"would train and spend the budget for itself. {start}"
                ]
        if is_plugged:
            return one, [f"FSDP or DeepSpeed is switched on, but WORLD_SIZE is not set. {start}"]
        return one, []
    text = {
        "world_size": environment["WORLD_SIZE"],
        "rank": environment.get("RANK", ""),
        "local_rank": environment.get("LOCAL_RANK", ""),
        "local_world_size": environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", "")),
    }
    if text == {**dict.fromkeys(text, ""), "world_size": "1"}:
        return one, []
    numbers = {name: int(value) if value.isdecimal() else -1 for name, value in text.items()}
    is_valid = (
        0 <= numbers["rank"] < numbers["world_size"]
        and 0 <= numbers["local_rank"] < numbers["local_world_size"] <= numbers["world_size"]
    )
    if is_valid:
        return numbers, []
    found = ", ".join(f"{name.upper()}={value or 'unset'}" for name, value in text.items())
    return one, [
        f"{found} cannot be: RANK must be below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE. {start}"
    ]


def _contradictions(mixed_precision: str, recipe: Recipe) -> Iterator[str]:
    if mixed_precision == "bf16" and recipe.model.dtype == "float32":
        yield (
            "mixed_precision is bf16, but model.dtype in the recipe is float32. Set mixed_precision to 'no', "
            "or model.dtype to 'bfloat16'."
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
