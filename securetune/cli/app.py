"""The command ``securetune``: every verb is registered here, and its work is imported when it is called."""

from typing import Annotated

import typer

from securetune import __version__
from securetune.cli import (
    checkpoint_commands,
    doctor_command,
    file_commands,
    recipe_commands,
    release_commands,
)
from securetune.cli.output import clean_exit

app = typer.Typer(
    name="securetune",
    help="Fine-tune language models on sensitive text, privately and hardened against attack, and prove it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"securetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version


_START, _RUN, _RELEASE = "Start", "Run", "Release"
app.command("init", rich_help_panel=_START)(file_commands.init)
app.command("ls", rich_help_panel=_START)(file_commands.ls)
app.command("cp", rich_help_panel=_START)(file_commands.cp)
app.command("schema", rich_help_panel=_START)(file_commands.schema)
app.command("doctor", rich_help_panel=_START)(doctor_command.doctor)
app.command("validate", rich_help_panel=_RUN)(recipe_commands.validate)
app.command("plan", rich_help_panel=_RUN)(recipe_commands.plan)
app.command("train", rich_help_panel=_RUN)(recipe_commands.train)
app.command("evaluate", rich_help_panel=_RUN)(recipe_commands.evaluate)
app.command("publish", rich_help_panel=_RELEASE)(release_commands.publish)
app.command("export", rich_help_panel=_RELEASE)(release_commands.export)
app.add_typer(checkpoint_commands.app, name="checkpoint", rich_help_panel=_RELEASE)


def main() -> None:
    """Run the command line."""
    with clean_exit():
        app()


if __name__ == "__main__":
    main()
