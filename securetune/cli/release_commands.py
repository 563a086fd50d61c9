"""Commands that let something out: ``publish`` (through the gate) and ``export`` (without protection)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from securetune.errors import ConfigError

if TYPE_CHECKING:
    from securetune.config.schema import Recipe
    from securetune.report.summary import Report


def publish(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would leave the machine, and write nothing.")
    ] = False,
) -> None:
    """Publish a finished run, if its evidence meets the release gate."""
    from securetune.checkpoints import load_signing_key
    from securetune.publishing import publish as publish_folder
    from securetune.publishing import what_would_leave
    from securetune.report.summary import load_report
    from securetune.training.release import released_evidence

    recipe = load(config, overrides)
    folder = recipe.run_folder
    report = load_report(folder / "report.json")
    _require_recipe_of_run(recipe, report)
    signing_key = load_signing_key(_signing_key_file(recipe))
    released = released_evidence(recipe)
    out = console()
    if dry_run:
        for file in what_would_leave(
            folder / "checkpoint",
            report,
            rules=recipe.gate.rules,
            public_key=signing_key.public_key(),
            released=released,
        ):
            size = "" if file.size is None else f"{file.size:,} bytes"
            out.print(f"{file.path:<48} {size:>18}  {file.what}")
        return
    published = publish_folder(
        folder / "checkpoint",
        recipe.publish_folder,
        report,
        rules=recipe.gate.rules,
        signing_key=signing_key,
        released=released,
    )
    out.print(f"The release gate passed. Published {len(published.files)} files to {published.folder}.")


def export(
    config: Config,
    destination: Annotated[Path, typer.Argument(help="New folder for the plain model.")],
    overrides: Overrides = None,
    checkpoint: CheckpointFolder = None,
    public_key: SignerFile = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Write a plain transformers folder, adapters merged. It leaves encryption, signature and gate behind."""
    from securetune.training.export import export_plain

    recipe = load(config, overrides)
    with open_run_checkpoint(
        recipe,
        checkpoint=checkpoint,
        public_key=public_key,
        identity=identity,
        passphrase_file=passphrase_file,
    ) as vault:
        export_plain(recipe, vault, destination)
    console().print(
        f"Wrote {destination}. It is not encrypted, not signed and has passed no gate: "
        "whoever reads the folder has the model."
    )


def _require_recipe_of_run(recipe: "Recipe", report: "Report") -> None:
    """Refuse another recipe than the run's: its release rules were not the ones this run was made for."""
    from securetune.config.loader import recipe_digest

    digest = recipe_digest(recipe)
    if digest != report.recipe.digest:
        folder = recipe.run_folder
        raise ConfigError(
            f"{folder / 'report.json'} is the report of another recipe ({report.recipe.digest[:12]}, this "
            f"one is {digest[:12]}), so nothing was published. Publish with the recipe as it was run, "
            f"without --set ({folder / 'recipe.yaml'} is a copy), or run the changed recipe in another "
            "run_dir."
        )


def _signing_key_file(recipe: "Recipe") -> Path:
    return recipe.checkpoint.signing_key or recipe.run_folder / "keys" / "publisher.key"
