"""The keys of a run: who may open its checkpoints, and who signs them; from files, never from a prompt."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from securetune.checkpoints import (
    ALONE,
    Peers,
    Sealer,
    Vault,
    generate_recipient_key,
    generate_signing_key,
    load_identity,
    load_passphrase,
    load_public_key,
    load_recipient,
    load_signing_key,
    open_vault,
)
from securetune.config.schema import Recipe
from securetune.errors import ConfigError
from securetune.files import write_atomic
from securetune.training.folder import RunFolder


@dataclass(frozen=True)
class Access:
    """Keys of a run.

    Attributes:
        recipients: Public keys of those who may open the checkpoints.
        passphrase: Opens the checkpoints too; a killed run resumes with it. None: it can't resume training.
        signing_key: The publisher's ECDSA P-256 private key.
        public_key: Its public half.
        identity_file: Private key file of the demo recipient, if the run made one.
    """

    recipients: tuple[X25519PublicKey, ...]
    passphrase: bytearray | None = field(repr=False)
    signing_key: EllipticCurvePrivateKey = field(repr=False)
    public_key: EllipticCurvePublicKey
    identity_file: Path | None

    def sealer(self, *, lineage: str | None = None, generation: int = 1) -> Sealer:
        """Make what seals checkpoints for these recipients.

        Args:
            lineage: UUID of the run; None starts a new one.
            generation: Number of the next checkpoint in the lineage.

        Returns:
            The sealer; close it when done.
        """
        return Sealer(
            signing_key=self.signing_key,
            recipients=self.recipients,
            passphrase=self.passphrase,
            lineage=lineage,
            generation=generation,
        )

    def open(self, checkpoint: Path, *, peers: Peers = ALONE) -> Vault:
        """Open a checkpoint of this run, verified first.

        Args:
            checkpoint: Its folder.
            peers: The processes that open it together.

        Returns:
            The open checkpoint.

        Raises:
            ConfigError: If the run has no passphrase.
        """
        if self.passphrase is None:
            raise ConfigError(
                f"checkpoint.passphrase_file: going on from {checkpoint} needs a passphrase, and this "
                "recipe names none: its "
                "checkpoints open with the recipients' private keys only. Start a new run, with a "
                "passphrase_file if it should "
                "be resumable."
            )
        return open_vault(checkpoint, public_key=self.public_key, passphrase=self.passphrase, peers=peers)


def prepare_access(recipe: Recipe, run: RunFolder) -> Access:
    """Load the keys the recipe names, or make demo keys; put the publisher's public key into the run folder.

    Args:
        recipe: The recipe.
        run: The run's folder.

    Returns:
        The keys.

    Raises:
        ConfigError: If a key is missing, of the wrong kind, or readable by others.
    """
    settings = recipe.checkpoint
    if settings.demo_keys:
        return _demo_access(run)
    if settings.signing_key is None:
        raise ConfigError(
            "checkpoint.signing_key: a key that signs the checkpoint is needed. Make one with 'securetune "
            "checkpoint keygen', or "
            "set checkpoint.demo_keys: true to try things out."
        )
    signing_key = load_signing_key(settings.signing_key)
    _write_public_key(signing_key, run.public_key)
    return Access(
        recipients=tuple(load_recipient(path) for path in settings.recipients),
        passphrase=None if settings.passphrase_file is None else load_passphrase(settings.passphrase_file),
        signing_key=signing_key,
        public_key=load_public_key(run.public_key),
        identity_file=None,
    )


def _demo_access(run: RunFolder) -> Access:
    """Make one recipient, one signer and a passphrase in ``keys/`` at the first call."""
    import secrets

    run.keys.mkdir(exist_ok=True, mode=0o700)
    identity, signer, passphrase = (
        run.keys / name for name in ("recipient.key", "publisher.key", "passphrase.txt")
    )
    for path, generate in ((identity, generate_recipient_key), (signer, generate_signing_key)):
        if path.exists():
            continue
        if path.with_name(path.name + ".pub").exists():
            raise ConfigError(
                f"{path} is gone, which this run's checkpoints need. Restore it, or start a new run in "
                "another folder."
            )
        generate(path)
    if not passphrase.exists():
        write_atomic(passphrase, secrets.token_urlsafe(24) + "\n")
    signing_key = load_signing_key(signer)
    _write_public_key(signing_key, run.public_key)
    return Access(
        recipients=(load_identity(identity).public_key(),),  # a kill may have left no public file
        passphrase=load_passphrase(passphrase),
        signing_key=signing_key,
        public_key=load_public_key(run.public_key),
        identity_file=identity,
    )


def _write_public_key(signing_key: EllipticCurvePrivateKey, path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = signing_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if not path.exists() or path.read_bytes() != pem:
        write_atomic(path, pem, mode=0o644)


def forget(checkpoint: Path) -> None:
    """Delete a checkpoint that is no longer needed.

    Args:
        checkpoint: Its folder; may be gone already.
    """
    shutil.rmtree(checkpoint, ignore_errors=True)
