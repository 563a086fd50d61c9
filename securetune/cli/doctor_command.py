"""The command ``doctor``: what this machine can and cannot do, each with its remedy."""

from typing import Annotated

import typer

from securetune.cli.arguments import Overrides, load
from securetune.cli.output import GATE_EXIT, console


def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Check what this recipe needs, too.")
    ] = None,
    overrides: Overrides = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="FILE",
            help="Check what 'accelerate launch --config_file FILE' would start: a file, or a name (ddp).",
        ),
    ] = None,
) -> None:
    """Check this machine: versions, devices, memory, disk, packaged model and texts, keys; and a launch."""
    from itertools import chain

    from securetune.cli.launch_checks import check_launch
    from securetune.cli.machine import check_machine
    from securetune.config.packaged import find_launch_file

    recipe = load(config, overrides) if config else None
    launched = check_launch(find_launch_file(launch), recipe) if launch else ()
    failed = False
    for check in chain(check_machine(recipe), launched):
        remedy = f"  -> {check.remedy}" if check.remedy and check.status != "ok" else ""
        console().print(f"{check.status:<4}  {check.name:<14} {check.detail}{remedy}")
        failed |= check.status == "fail"
    if failed:
        raise typer.Exit(GATE_EXIT)
