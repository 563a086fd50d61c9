"""Arguments and options that several commands share."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from securetune.errors import ConfigError

if TYPE_CHECKING:
    from securetune.checkpoints import Vault
    from securetune.config.schema import Recipe

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A recipe's YAML file, or a name that 'securetune ls' shows.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="OPTION=VALUE", help="Change an option, e.g. privacy.steps=30. Repeatable."
    ),
]
IdentityFile = Annotated[
    Path | None, typer.Option("--identity", help="Private-key file of a recipient of the checkpoint.")
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File that holds the passphrase of the checkpoint.")
]
CheckpointFolder = Annotated[
    Path | None, typer.Option("--checkpoint", help="Folder of a checkpoint; default: the run's own.")
]
SignerFile = Annotated[
    Path | None, typer.Option("--public-key", help="Public key (PEM) of the signer; default: the run's own.")
]
PublicKeyFile = Annotated[
    Path,
    typer.Option("--public-key", help="Public key (PEM) of the signer you expect, from a source you trust."),
]


def load(config: str, overrides: list[str] | None) -> "Recipe":
    """Load a recipe named on the command line.

    Args:
        config: A path or a packaged name.
        overrides: Values of ``--set``.

    Returns:
        The checked recipe.
    """
    from securetune.config.loader import load_recipe
    from securetune.config.packaged import find_config

    return load_recipe(find_config(config), overrides or ())


def read_passphrase(file: Path | None) -> bytearray:
    """Get the passphrase from its file, or from the person at the terminal.

    Args:
        file: The file, if one was given.

    Returns:
        The passphrase.

    Raises:
        ConfigError: If there is neither a file nor a terminal to ask at.
    """
    if file is not None:
        from securetune.checkpoints import load_passphrase

        return load_passphrase(file)
    if not sys.stdin.isatty():
        raise ConfigError(
            "a key is needed: give --identity FILE or --passphrase-file FILE. "
            "(Without a terminal nobody can be asked for the passphrase.)"
        )
    return bytearray(typer.prompt("Passphrase", hide_input=True).encode())


def open_run_checkpoint(
    recipe: "Recipe",
    *,
    checkpoint: Path | None,
    public_key: Path | None,
    identity: Path | None,
    passphrase_file: Path | None,
) -> "Vault":
    """Open a checkpoint of a recipe: what was not given comes from the recipe and its run folder.

    Args:
        recipe: The recipe.
        checkpoint: Folder of the checkpoint; None takes the run's own.
        public_key: The signer's public key; None takes the run's own.
        identity: Private key of a recipient.
        passphrase_file: File with the passphrase; None takes the recipe's, if no identity is given.

    Returns:
        The open checkpoint; use it in a ``with`` statement.
    """
    from securetune.checkpoints import load_identity, load_public_key, open_vault

    folder = recipe.run_folder
    if identity is None and passphrase_file is None:
        demo_passphrase = folder / "keys" / "passphrase.txt" if recipe.checkpoint.demo_keys else None
        passphrase_file = recipe.checkpoint.passphrase_file or demo_passphrase
    needs_passphrase = identity is None or passphrase_file is not None
    return open_vault(
        checkpoint or folder / "checkpoint",
        public_key=load_public_key(public_key or folder / "publisher.pub"),
        identity=None if identity is None else load_identity(identity),
        passphrase=read_passphrase(passphrase_file) if needs_passphrase else None,
    )
