"""Commands that run a recipe or look at it: ``validate``, ``plan``, ``train`` and ``evaluate``."""

import json
import signal
import subprocess
import sys
from typing import Annotated

import typer

from securetune.cli.arguments import (
    CheckpointFolder,
    Config,
    IdentityFile,
    Overrides,
    PassphraseFile,
    SignerFile,
    load,
    open_run_checkpoint,
)
from securetune.cli.output import console

Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def validate(
    config: Config,
    overrides: Overrides = None,
    skip_lengths: Annotated[
        bool,
        typer.Option("--skip-lengths", help="Do not load the tokenizer, so leave record lengths unchecked."),
    ] = False,
) -> None:
    """Check a recipe and its data, without training."""
    from securetune.cli.validation import check_data

    recipe = load(config, overrides)
    console().print(f"recipe    {config}: valid, task {recipe.task}, run folder {recipe.run_dir}")
    for line in check_data(recipe, with_lengths=not skip_lengths):
        console().print(line)


def plan(
    config: Config,
    overrides: Overrides = None,
    as_json: Json = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, help="Show the memory of each of so many processes; default: GPUs here."
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", min=0.1, help="GiB that each process has; default: as on this machine."),
    ] = None,
) -> None:
    """Show noise, privacy budget, time and memory of a run before anything is spent."""
    from securetune.training.plan import make_plan

    if processes is None and _num_gpus() > 1:
        processes = _num_gpus()
    made = make_plan(
        load(config, overrides),
        num_processes=processes,
        memory_bytes=None if memory is None else int(memory * 2**30),
    )
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))
    else:
        console().print(made.render())


def train(config: Config, overrides: Overrides = None, resume: Resume = False) -> None:
    """Run a recipe: plan, train, seal, evaluate, check the gate, report, publish."""
    from securetune.config.launch import one_process_environment, recipe_arguments
    from securetune.config.packaged import find_config, recipes_folder

    path = find_config(config)
    recipe = load(config, overrides)
    script = str(recipes_folder() / "harden.py")
    arguments = recipe_arguments(path, overrides or (), resume=resume)
    environment = one_process_environment(use_cpu=recipe.model.device == "cpu" or not _num_gpus())
    sys.exit(_run_to_the_end([sys.executable, script, *arguments], environment))


def evaluate(
    config: Config,
    overrides: Overrides = None,
    checkpoint: CheckpointFolder = None,
    public_key: SignerFile = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> None:
    """Measure a sealed checkpoint on the run's held-out records. The figures are not covered by epsilon."""
    from securetune.evidence import describe_metric
    from securetune.training.evaluate import evaluate_checkpoint

    recipe = load(config, overrides)
    with open_run_checkpoint(
        recipe,
        checkpoint=checkpoint,
        public_key=public_key,
        identity=identity,
        passphrase_file=passphrase_file,
    ) as vault:
        evidence = evaluate_checkpoint(recipe, vault)
    if as_json:
        typer.echo(json.dumps([item.model_dump(mode="json") for item in evidence], indent=2))
        return
    for item in evidence:
        value = "-" if item.value is None else f"{item.value:.4f}"
        interval = f" [{item.interval.low:.4f}, {item.interval.high:.4f}]" if item.interval else ""
        settings = ", ".join(f"{name} {setting}" for name, setting in item.params.items())
        name = f"{describe_metric(item.metric)} ({settings})" if settings else describe_metric(item.metric)
        console().print(f"{item.subject:<10} {name}: {value}{interval}, n = {item.n}, {item.status}")


def _run_to_the_end(command: list[str], environment: dict[str, str]) -> int:
    # Ctrl-C reaches the child too, which says how to go on; subprocess.run would kill it before it is done
    previous = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with subprocess.Popen(command, env=environment) as process:
            status = process.wait()
            return status if status >= 0 else 128 - status  # a signal, as shells say it
    finally:
        signal.signal(signal.SIGINT, previous)


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
