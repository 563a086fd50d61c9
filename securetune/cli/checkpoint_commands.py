"""Commands on sealed checkpoints: ``checkpoint keygen | seal | open | verify``."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from securetune.cli.arguments import IdentityFile, PassphraseFile, PublicKeyFile, read_passphrase
from securetune.cli.output import console
from securetune.errors import CheckpointError, ConfigError, MachineError

app = typer.Typer(help="Keys and sealed checkpoints.", no_args_is_help=True)

Checkpoint = Annotated[Path, typer.Argument(help="Folder of the checkpoint.")]


@app.command()
def keygen(
    folder: Annotated[Path, typer.Argument(help="Folder for the keys; made if needed, for your eyes only.")],
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Also make a file with a random passphrase.")
    ] = False,
) -> None:
    """Make a signing key and a recipient key."""
    from securetune.checkpoints import generate_recipient_key, generate_signing_key
    from securetune.files import write_atomic

    signing_key, identity = folder / "signing.key", folder / "recipient.key"
    passphrase_file = folder / "passphrase.txt"
    for path in (signing_key, identity, *([passphrase_file] if passphrase else [])):
        if path.exists():
            raise ConfigError(f"{path} exists, and a key is never overwritten. Choose another folder.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    signing_public = generate_signing_key(signing_key)
    recipient_public = generate_recipient_key(identity)
    lines = ["checkpoint:", f"  recipients: [{recipient_public}]", f"  signing_key: {signing_key}"]
    if passphrase:
        write_atomic(passphrase_file, secrets.token_urlsafe(32) + "\n", mode=0o600)
        lines.append(f"  passphrase_file: {passphrase_file}")
    out = console()
    out.print(
        f"{signing_key} signs checkpoints: keep it secret. Give {signing_public} to whoever verifies them."
    )
    out.print(f"{identity} opens checkpoints: keep it secret, and a copy where it cannot get lost.")
    out.print("\n".join(["In the recipe:", *lines]))


@app.command()
def seal(
    source: Annotated[Path, typer.Argument(help="Folder with the files to seal.")],
    checkpoint: Checkpoint,
    signing_key: Annotated[Path, typer.Option("--signing-key", help="Private key (PEM) that signs.")],
    recipients: Annotated[
        list[Path] | None,
        typer.Option("--recipient", help="Public-key file of somebody who may open it. Repeatable."),
    ] = None,
    passphrase_file: PassphraseFile = None,
    compartment: Annotated[
        str | None,
        typer.Option(
            "--compartment", help="Default: adapter if there is an adapter_config.json, else weights."
        ),
    ] = None,
) -> None:
    """Encrypt and sign the files of a folder; folders named like a compartment go into it."""
    from securetune.checkpoints import load_passphrase, load_recipient, load_signing_key
    from securetune.checkpoints import seal as seal_files

    files = _files_by_compartment(source, compartment)
    manifest = seal_files(
        checkpoint,
        sealed=files,
        signing_key=load_signing_key(signing_key),
        recipients=[load_recipient(path) for path in recipients or ()],
        passphrase=load_passphrase(passphrase_file) if passphrase_file else None,
    )
    console().print(
        f"Sealed {sum(map(len, files.values()))} files of {source} in {checkpoint} "
        f"({', '.join(manifest.compartments)}). The files in {source} are as readable as before."
    )


@app.command("open")
def open_checkpoint(
    checkpoint: Checkpoint,
    destination: Annotated[Path, typer.Argument(help="New folder for the decrypted files.")],
    public_key: PublicKeyFile,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    compartments: Annotated[
        list[str] | None,
        typer.Option("--compartment", help="Only this one. Repeatable; default: all you may."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model of an adapter; default: the one the checkpoint names."),
    ] = None,
) -> None:
    """Verify a checkpoint, then decrypt it to a folder, where nothing protects it any longer.

    A whole model, and an adapter made loadable: AutoModelForCausalLM.from_pretrained(DESTINATION/weights), or
    DESTINATION/adapter.
    """
    from securetune.checkpoints import load_identity, load_public_key, open_vault

    with open_vault(
        checkpoint,
        public_key=load_public_key(public_key),
        identity=load_identity(identity) if identity else None,
        passphrase=None if identity and not passphrase_file else read_passphrase(passphrase_file),
        compartments=compartments,
    ) as vault:
        vault.extract(destination)
        opened = {name: vault.names(name) for name in vault.compartments}
        metadata = vault.metadata.get("base")
        trained_on = metadata if isinstance(metadata, dict) else {}
    out = console()
    out.print(f"Signatures valid. Decrypted to {destination}, where nothing protects it any longer:")
    for name, files in opened.items():
        out.print(f"  {name}/  {', '.join(files)}")
    if "adapter_config.json" in opened.get("adapter", ()):
        out.print(_connect_to_base(destination / "adapter", base, trained_on))
    elif "config.json" in opened.get("weights", ()):
        out.print(_how_to_load(destination / "weights"))


@app.command()
def verify(checkpoint: Checkpoint, public_key: PublicKeyFile) -> None:
    """Check the signatures and every file of a checkpoint; no secret key is needed."""
    from securetune.checkpoints import load_public_key
    from securetune.checkpoints import verify as verify_checkpoint

    manifest = verify_checkpoint(checkpoint, load_public_key(public_key))
    console().print(
        f"{checkpoint}: signatures valid, all {len(manifest.files)} files unchanged. Generation "
        f"{manifest.generation} of {manifest.created}, holds {', '.join(manifest.compartments)}."
    )


def _connect_to_base(adapter: Path, base: str | None, trained_on: Mapping[str, Any]) -> str:
    """Make an adapter folder loadable with transformers, and say how."""
    from securetune.config.schema import ModelConfig
    from securetune.models.adapters import open_adapter_folder
    from securetune.models.base import folder_digest, local_folder, resolve_base

    named, expected = trained_on.get("name"), trained_on.get("digest")
    if not isinstance(named, str) or not isinstance(expected, str):
        return "The checkpoint does not name its base model: point base_model_name_or_path to it to load it."
    # The signer chose the name: without --base nothing is fetched and no other folder is read because of it.
    name = base or (named if named.startswith("package:") else None)
    if name is None:
        return f"It was trained on {named!r}: open it again with --base {named} (or a folder) to load it."
    try:
        folder = local_folder(resolve_base(ModelConfig(name=name)))
    except (ConfigError, MachineError) as error:
        if base:
            raise
        return f"Its base model is not here; to load it, open it again with --base. ({error})"
    if folder_digest(folder) != expected:
        raise CheckpointError(
            f"{name} here is not the base model this adapter was trained on: {named}, "
            f"digest {expected[:12]}.... Get that one, and give its folder with --base."
        )
    open_adapter_folder(adapter, folder)
    return _how_to_load(adapter)


def _how_to_load(folder: Path) -> str:
    return f"Load it: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"


def _files_by_compartment(source: Path, compartment: str | None) -> dict[str, dict[str, Path]]:
    from securetune.checkpoints import COMPARTMENTS

    if not source.is_dir():
        raise ConfigError(f"{source} is not a folder.")
    if compartment is not None and compartment not in COMPARTMENTS:
        raise ConfigError(f"--compartment must be one of {', '.join(COMPARTMENTS)}, got '{compartment}'.")
    default = compartment or ("adapter" if (source / "adapter_config.json").exists() else "weights")
    result: dict[str, dict[str, Path]] = {}
    for path in sorted(source.iterdir()):
        if not path.is_dir():
            result.setdefault(default, {})[path.name] = path
        elif path.name in COMPARTMENTS:
            for inner in sorted(path.iterdir()):
                result.setdefault(path.name, {})[inner.name] = inner
        else:
            raise ConfigError(
                f"{path} is a folder; the only folders sealed are those named {', '.join(COMPARTMENTS)}."
            )
    if not result:
        raise ConfigError(f"{source} holds no files to seal.")
    return result
