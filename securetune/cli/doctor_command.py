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
) -> None:
    """Check this machine: versions, devices, memory, disk, packaged model and texts, keys."""
    from securetune.cli.machine import check_machine

    recipe = load(config, overrides) if config else None
    failed = False
    for check in check_machine(recipe):
        remedy = f"  -> {check.remedy}" if check.remedy and check.status != "ok" else ""
        console().print(f"{check.status:<4}  {check.name:<14} {check.detail}{remedy}")
        failed |= check.status == "fail"
    if failed:
        raise typer.Exit(GATE_EXIT)
