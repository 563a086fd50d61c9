"""The manifest: what ``vault.json`` says about a checkpoint, signed by its owner.

Readers refuse unknown fields. So a field added later (a policy's digest, an expiry) is never skipped by an
older reader.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securetune.errors import CheckpointError, SignatureError
from securetune.files import canonical_json

from .cobblestone import plaintext_length
from .dsse import Statement, sign_statement, verify_statement
from .folders import check_name
from .signing import SIGNATURE_NAME, root_digest

FORMAT_VERSION = "securetune.vault/1"
META = "meta"
COMPARTMENTS = ("adapter", "evidence", "optimizer", "rng", "weights")
VAULT_NAME = "vault.json"
KEYRING_NAME = "keyring.json"
SHARD_FOLDER = "shards"
INNER_NAME = "inner.json"
MAX_INNER_BYTES = 16 << 20
_SUITE = "cobblestone-256"
_PREDICATE_TYPE = "https://securetune.dev/vault/v1"
_SEALED_SUFFIX = ".c256"
# names that this format uses or keeps for what it will hold later
_RESERVED = {
    VAULT_NAME,
    KEYRING_NAME,
    SIGNATURE_NAME,
    SHARD_FOLDER,
    INNER_NAME + _SEALED_SUFFIX,
    "policy.json",
    "attestations",
    "audit",
}
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Uuid = Annotated[str, Field(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]
_Size = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint.

    Args:
        path: Where it lies, relative to the checkpoint.
        name: The name it was sealed or published under.
        compartment: The compartment it is sealed in; ``None`` for a public file.
        size: Its size on disk in bytes.
        sha256: Digest of the bytes on disk, in hexadecimal.
    """

    path: str
    name: str
    compartment: str | None
    size: int
    sha256: str

    @property
    def length(self) -> int:
        """Size of the content in bytes, before sealing."""
        return self.size if self.compartment is None else plaintext_length(self.size)


@dataclass(frozen=True)
class Manifest:
    """What the owner signed about a checkpoint.

    Args:
        checkpoint_id: UUID of this one checkpoint.
        lineage: UUID shared by all checkpoints of one run or model.
        generation: Number within the lineage, from 1.
        epoch: Number of the keys within the checkpoint's life, from 1.
        created: UTC time by the owner's clock, ``YYYY-MM-DDTHH:MM:SSZ``.
        files: Sealed and public files, sorted by path; the sealed metadata is among them.
        keyring: The keyring.
    """

    checkpoint_id: str
    lineage: str
    generation: int
    epoch: int
    created: str
    files: tuple[FileEntry, ...]
    keyring: FileEntry

    @property
    def digest(self) -> str:
        """SHA-256 over all files' digests in the order of their paths: names the checkpoint's content."""
        return root_digest(self.digests)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by path of every file but ``vault.json`` and ``model.sig``."""
        return {entry.path: entry.sha256 for entry in (*self.files, self.keyring)}

    @property
    def compartments(self) -> tuple[str, ...]:
        """The compartments that hold files, without the one of the metadata."""
        return tuple(sorted({entry.compartment for entry in self.files if entry.compartment} - {META}))


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _WireSealed(_Wire):
    name: str
    comp: Literal["adapter", "evidence", "meta", "optimizer", "rng", "weights"]
    clen: _Size
    c_sha256: _Digest


class _WirePublic(_Wire):
    name: str
    len: _Size
    sha256: _Digest


class _WireManifest(_Wire):
    v: Literal["securetune.vault/1"]
    suite: Literal["cobblestone-256"]
    ckpt: _Uuid
    lineage: _Uuid
    generation: Annotated[int, Field(ge=1)]
    epoch: Annotated[int, Field(ge=1)]
    created: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    files: Annotated[list[_WireSealed], Field(min_length=1)]
    public: list[_WirePublic]
    keyring: _WirePublic


def sealed_path(compartment: str, name: str) -> str:
    """Return where a sealed file lies; ``name`` belongs to ``compartment``."""
    if compartment == META:
        return name + _SEALED_SUFFIX
    return f"{SHARD_FOLDER}/{compartment}.{name}{_SEALED_SUFFIX}"


def file_context(checkpoint_id: str, epoch: int, compartment: str, name: str, length: int) -> bytes:
    """Return what a file is sealed to: it opens in no other checkpoint, epoch, compartment or place."""
    return canonical_json(
        {
            "v": FORMAT_VERSION,
            "ckpt": checkpoint_id,
            "epoch": epoch,
            "comp": compartment,
            "file": name,
            "len": length,
        }
    )


def check_public_name(name: str) -> None:
    """Refuse a public file's name that is unsafe or that the format uses itself.

    Args:
        name: The file's name.

    Raises:
        CheckpointError: If the name must not be used.
    """
    check_name(name, "public file")
    if name.casefold() in _RESERVED or name.endswith(_SEALED_SUFFIX):
        raise CheckpointError(f"public file {name!r}: this name is reserved by the format. Choose another.")


def utc_now() -> str:
    """Return the time as a manifest writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sign_manifest(manifest: Manifest, signing_key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the content of ``vault.json``."""
    predicate = {
        "v": FORMAT_VERSION,
        "suite": _SUITE,
        "ckpt": manifest.checkpoint_id,
        "lineage": manifest.lineage,
        "generation": manifest.generation,
        "epoch": manifest.epoch,
        "created": manifest.created,
        "files": [
            {"name": entry.name, "comp": entry.compartment, "clen": entry.size, "c_sha256": entry.sha256}
            for entry in manifest.files
            if entry.compartment is not None
        ],
        "public": [_public(entry) for entry in manifest.files if entry.compartment is None],
        "keyring": _public(manifest.keyring),
    }
    statement = Statement(manifest.checkpoint_id, manifest.digest, predicate)
    return sign_statement(statement, signing_key, predicate_type=_PREDICATE_TYPE)


def read_manifest(
    content: bytes, public_key: ec.EllipticCurvePublicKey, *, path: str | os.PathLike[str]
) -> Manifest:
    """Verify ``vault.json`` and return what it says.

    Args:
        content: The content of ``vault.json``.
        public_key: The owner's key.
        path: Where it lies, used in messages.

    Returns:
        The manifest.

    Raises:
        SignatureError: If the signature does not hold.
        CheckpointError: If the version, a field or a name is unknown or not allowed.
    """
    name = os.fspath(path)
    statement = verify_statement(
        content, public_key, predicate_type=_PREDICATE_TYPE, name=name, canonical=True
    )
    version = statement.predicate.get("v")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{name} is written in the format {version!r}; this version of securetune reads "
            f"{FORMAT_VERSION!r} only. Use the version that wrote it, or a newer one."
        )
    try:
        wire = _WireManifest.model_validate(statement.predicate)
    except ValidationError as error:
        raise CheckpointError(f"{name} is not a valid manifest: {describe_invalid(error)}.") from error
    for sealed in wire.files:
        check_name(sealed.name, f"{name}: sealed file")
        if (sealed.comp == META) != (sealed.name == INNER_NAME):
            raise CheckpointError(f"{name}: {sealed.name!r} must not lie in the compartment {sealed.comp!r}.")
        try:
            plaintext_length(sealed.clen)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {sealed.name!r} cannot have {sealed.clen} bytes.") from error
    for public in wire.public:
        check_public_name(public.name)
    if wire.keyring.name != KEYRING_NAME:
        raise CheckpointError(f"{name}: the keyring must be {KEYRING_NAME!r}, got {wire.keyring.name!r}.")
    manifest = Manifest(
        wire.ckpt,
        wire.lineage,
        wire.generation,
        wire.epoch,
        wire.created,
        tuple(
            sorted(
                [
                    FileEntry(
                        sealed_path(file.comp, file.name), file.name, file.comp, file.clen, file.c_sha256
                    )
                    for file in wire.files
                ]
                + [FileEntry(file.name, file.name, None, file.len, file.sha256) for file in wire.public],
                key=lambda entry: entry.path,
            )
        ),
        FileEntry(KEYRING_NAME, KEYRING_NAME, None, wire.keyring.len, wire.keyring.sha256),
    )
    paths = [entry.path.casefold() for entry in manifest.files]
    if len(set(paths)) < len(paths) or sealed_path(META, INNER_NAME) not in paths:
        raise CheckpointError(f"{name} lists a file twice, or lacks the sealed metadata.")
    if (statement.name, statement.sha256) != (manifest.checkpoint_id, manifest.digest):
        raise SignatureError(f"{name}: its subject does not match the files it lists.")
    return manifest


def describe_invalid(error: ValidationError) -> str:
    """Return the first problem of a document in one line, without echoing its content."""
    first: Any = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the document'}: {first['msg']}"


def _public(entry: FileEntry) -> dict[str, str | int]:
    return {"name": entry.name, "len": entry.size, "sha256": entry.sha256}
