"""Write sealed checkpoints: encrypt, sign, and swap the new folder in as one step.

Several processes can write one checkpoint: each seals its own files into one folder, and the first, which has
made the keys, signs what it was told of them and swaps the folder in.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self, TypeAlias

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from securetune.errors import CheckpointError, ConfigError
from securetune.files import canonical_json

from . import folders
from ._json import parse_strict
from .cobblestone import KEY_BYTES, encrypt_stream
from .keyring import Argon2Params, PassphraseKey, Recipient, build_keyring, wipe
from .manifest import (
    COMPARTMENTS,
    FORMAT_VERSION,
    INNER_NAME,
    KEYRING_NAME,
    MAX_INNER_BYTES,
    META,
    SHARD_FOLDER,
    VAULT_NAME,
    FileEntry,
    Manifest,
    check_public_name,
    file_context,
    sealed_path,
    sign_manifest,
    utc_now,
)
from .peers import ALONE, Peers, agreement
from .safe_loading import check_file_name, check_payload_at, check_public_payload
from .signing import SIGNATURE_NAME, build_signature

Content: TypeAlias = bytes | Path | io.RawIOBase
_Readable: TypeAlias = io.BytesIO | io.RawIOBase
SealedFiles: TypeAlias = Mapping[str, Mapping[str, Content]]
_OWN_FILES = 4  # vault.json, keyring.json, inner.json.c256 and model.sig
_EPOCH = 1  # every save has keys of its own; rotation within a checkpoint's life will count up from here


def seal(
    out_dir: str | os.PathLike[str],
    *,
    sealed: SealedFiles,
    signing_key: ec.EllipticCurvePrivateKey,
    recipients: Iterable[X25519PublicKey | Recipient] = (),
    passphrase: bytes | bytearray | None = None,
    public_files: Mapping[str, Content] | None = None,
    metadata: Mapping[str, Any] | None = None,
    lineage: str | None = None,
    generation: int = 1,
    published: bool = False,
    argon2: Argon2Params | None = None,
) -> Manifest:
    """Write one sealed checkpoint; to save often, keep a :class:`Sealer`.

    Args:
        out_dir: The checkpoint's folder. An older checkpoint there is replaced as one step; any other folder
            that is not empty is refused.
        sealed: Content by compartment and name: bytes, the path of a file to read, or an open binary stream
            that can seek. See ``COMPARTMENTS``.
        signing_key: The owner's ECDSA P-256 private key.
        recipients: Who can open it; a plain key opens every compartment.
        passphrase: Opens every compartment.
        public_files: Content by name that stays readable, covered by the signatures.
        metadata: JSON object, sealed; numbers come back as JSON has them (1.0 as 1).
        lineage: UUID of the run or model; ``None`` starts a new one.
        generation: Number of this checkpoint within the lineage.
        published: Whether others on this machine may read the folder: modes 0644 and 0755 in place of 0600
            and 0700.
        argon2: Cost of the passphrase; ``None`` for the default.

    Returns:
        What was signed.

    Raises:
        ConfigError: If nobody could open it, or an argument is not allowed.
        CheckpointError: If content is not allowed, or the disk is full; an older checkpoint stays whole.
    """
    with Sealer(
        signing_key=signing_key,
        recipients=recipients,
        passphrase=passphrase,
        lineage=lineage,
        generation=generation,
        argon2=argon2,
    ) as sealer:
        return sealer.seal(out_dir, sealed, public_files=public_files, metadata=metadata, published=published)


class Sealer:
    """Save checkpoints of one lineage again and again; the cost of the passphrase is paid once.

    Guarantees:
        Every save has a new checkpoint id, new random keys and new salts: nothing of one save opens another.
        The derived passphrase key lives in memory until :meth:`close`; the passphrase itself is not kept. The
        repr shows no key.
    """

    def __init__(
        self,
        *,
        signing_key: ec.EllipticCurvePrivateKey,
        recipients: Iterable[X25519PublicKey | Recipient] = (),
        passphrase: bytes | bytearray | None = None,
        lineage: str | None = None,
        generation: int = 1,
        argon2: Argon2Params | None = None,
    ) -> None:
        """Derive what every save needs.

        Args:
            signing_key: The owner's ECDSA P-256 private key.
            recipients: Who can open the checkpoints; a plain key opens every compartment.
            passphrase: Opens every compartment.
            lineage: UUID of the run or model; ``None`` starts a new one. Take it from the manifest when a run
                is resumed.
            generation: Number of the next save within the lineage.
            argon2: Cost of the passphrase; ``None`` for the default.

        Raises:
            ConfigError: If nobody could open the checkpoints, or an argument is not allowed.
        """
        self._recipients = tuple(
            entry if isinstance(entry, Recipient) else Recipient(entry) for entry in recipients
        )
        if not self._recipients and not passphrase:
            raise ConfigError(
                "nobody could open the checkpoint: give at least one recipient or a passphrase."
            )
        if not isinstance(signing_key.curve, ec.SECP256R1):
            raise ConfigError(f"the signing key must be ECDSA P-256, got {signing_key.curve.name}.")
        if generation < 1:
            raise ConfigError(f"generation must be at least 1, got {generation}.")
        self.lineage = _checked_uuid(lineage) if lineage is not None else str(uuid.uuid4())
        self.generation = generation
        self._signing_key = signing_key
        self._passphrase = PassphraseKey.derive(passphrase, argon2 or Argon2Params()) if passphrase else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Sealer(lineage={self.lineage!r}, generation={self.generation})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Sealer holds keys and is not pickled.")

    def close(self) -> None:
        """Overwrite the derived passphrase key; the sealer cannot be used afterwards."""
        if self._passphrase is not None:
            wipe([self._passphrase.key])
        self._passphrase = None
        self._recipients = ()

    def seal(
        self,
        out_dir: str | os.PathLike[str],
        sealed: SealedFiles,
        *,
        public_files: Mapping[str, Content] | None = None,
        metadata: Mapping[str, Any] | None = None,
        published: bool = False,
        peers: Peers = ALONE,
    ) -> Manifest:
        """Write one checkpoint and count the generation up; see :func:`seal`.

        Args:
            out_dir: The checkpoint's folder; where several processes write, on a file system they share.
            sealed: Content by compartment and name. With ``peers``, the part of the first process, which
                names every compartment that the others use.
            public_files: Content by name that stays readable.
            metadata: JSON object, sealed.
            published: Whether others on this machine may read the folder.
            peers: The processes that write together. The first calls this, the others :func:`seal_part`.

        Returns:
            What was signed.

        Raises:
            ConfigError: If an argument is not allowed.
            CheckpointError: If content is not allowed, the disk is full, or another process failed; an older
                checkpoint stays whole.
        """
        target = Path(out_dir)
        keys: dict[str, bytearray] = {}
        try:
            with contextlib.ExitStack() as stack:
                with agreement(peers, f"{target} is saved"), _explained(target):
                    if not self._recipients and self._passphrase is None:
                        raise ConfigError("this Sealer is closed; make a new one.")
                    _check_compartments(sealed)
                    if not any(sealed.values()):
                        raise ConfigError("a checkpoint must seal at least one file.")
                    keys |= {name: bytearray(os.urandom(KEY_BYTES)) for name in (*sealed, META)}
                    building = stack.enter_context(
                        folders.replace_folder(target, marker=VAULT_NAME, mode=0o755 if published else 0o700)
                    )
                    (building / SHARD_FOLDER).mkdir()
                    (building / SHARD_FOLDER).chmod(0o755 if published else 0o700)
                    mode = 0o644 if published else 0o600
                    writer = _Writer(building, str(uuid.uuid4()), keys, file_mode=mode)
                peers.share([str(building.absolute()), writer.checkpoint_id, list(keys), mode])
                peers.share_secret(b"".join(keys.values()), KEY_BYTES * len(keys))
                with agreement(peers, f"the files of {target} are sealed"), _explained(target):
                    writer.add_all(sealed)
                others = peers.collect(None)[1:]
                with agreement(peers, f"{target} is signed"), _explained(target):
                    for number, entries in enumerate(others, 1):
                        writer.adopt([FileEntry(*entry) for entry in entries], number)
                    manifest = self._finish(writer, public_files or {}, metadata or {}, target)
                    stack.close()  # puts the folder in place
        finally:
            wipe(keys.values())
        self.generation += 1
        return manifest

    def _finish(
        self,
        writer: "_Writer",
        public_files: Mapping[str, Content],
        metadata: Mapping[str, Any],
        target: Path,
    ) -> Manifest:
        count = len(writer.entries) + len(public_files)
        if count > folders.MAX_FILES - _OWN_FILES:
            raise CheckpointError(
                f"a checkpoint holds at most {folders.MAX_FILES - _OWN_FILES} files, got {count}. "
                "Use larger ones."
            )
        writer.add_sealed(META, INNER_NAME, _encode_metadata(metadata, writer.checkpoint_id))
        for name, content in public_files.items():
            writer.add_public(name, content)
        keyring = build_keyring(
            writer.keys,
            ckpt=writer.checkpoint_id,
            epoch=_EPOCH,
            recipients=self._recipients,
            passphrase=self._passphrase,
        )
        manifest = Manifest(
            checkpoint_id=writer.checkpoint_id,
            lineage=self.lineage,
            generation=self.generation,
            epoch=_EPOCH,
            created=utc_now(),
            files=tuple(sorted(writer.entries, key=lambda entry: entry.path)),
            keyring=writer.write(KEYRING_NAME, keyring),
        )
        # vault.json and model.sig come last: a folder without them is not a checkpoint
        vault = writer.write(VAULT_NAME, sign_manifest(manifest, self._signing_key))
        digests = manifest.digests | {VAULT_NAME: vault.sha256}
        name = target.absolute().name
        writer.write(SIGNATURE_NAME, build_signature(digests, self._signing_key, name=name))
        return manifest


def seal_part(sealed: SealedFiles, peers: Peers) -> None:
    """Seal this process' files into the checkpoint that the first process writes by :meth:`Sealer.seal`.

    Guarantees:
        On return the whole checkpoint is in place; after an error none of it is, whichever process failed.

    Args:
        sealed: Content by compartment and name; no other process may use the same names.
        peers: The processes that write together; not for the first of them.

    Raises:
        CheckpointError: If content is not allowed, the disk is full, or another process failed.
    """
    with agreement(peers, "a checkpoint is saved"):
        _check_compartments(sealed)
    folder, checkpoint_id, names, mode = peers.share(None)
    secret = peers.share_secret(None, KEY_BYTES * len(names))
    keys = {name: bytearray(secret[at * KEY_BYTES : (at + 1) * KEY_BYTES]) for at, name in enumerate(names)}
    try:
        writer = _Writer(Path(folder), checkpoint_id, keys, file_mode=mode)
        with agreement(peers, "the files of a checkpoint are sealed"), _explained(Path(folder)):
            writer.add_all(sealed)
    finally:
        wipe(keys.values())
    peers.collect([dataclasses.astuple(entry) for entry in writer.entries])
    with agreement(peers, "a checkpoint is signed"):
        pass


class _Writer:
    """Writes the files of one checkpoint and keeps what the manifest says about them."""

    def __init__(
        self, folder: Path, checkpoint_id: str, keys: Mapping[str, bytearray], *, file_mode: int
    ) -> None:
        self.checkpoint_id = checkpoint_id
        self.entries: list[FileEntry] = []
        self.keys = keys
        self._folder = folder
        self._file_mode = file_mode

    def add_all(self, sealed: SealedFiles) -> None:
        """Seal files; see :func:`seal`."""
        if not self._folder.is_dir():
            raise CheckpointError(_not_shared(self._folder))
        for compartment, contents in sealed.items():
            if compartment not in self.keys:
                raise CheckpointError(
                    f"the first process seals nothing in {compartment}, so it made no key for it; allowed: "
                    f"{', '.join(self.keys)}."
                )
            for name, content in contents.items():
                self.add_sealed(compartment, name, content)

    def adopt(self, entries: Iterable[FileEntry], number: int) -> None:
        """Take over files that another process has sealed into the folder."""
        for entry in entries:
            self._check_new(entry.path)
            path = self._folder / entry.path
            if not path.is_file() or path.stat().st_size != entry.size:
                raise CheckpointError(f"process {number} wrote {path}: {_not_shared(self._folder)}")
            self.entries.append(entry)

    def add_sealed(self, compartment: str, name: str, content: Content) -> None:
        folders.check_name(name, "sealed file")
        path = sealed_path(compartment, name)
        self._check_new(path)
        with _open_content(content, name) as source:
            length = source.seek(0, io.SEEK_END)
            check_payload_at(name, lambda offset, count: _read_at(source, offset, count), length)
            source.seek(0)
            with _HashingSink(self._folder / path, self._file_mode) as sink:
                context = file_context(self.checkpoint_id, _EPOCH, compartment, name, length)
                count = encrypt_stream(source, sink, key=self.keys[compartment], context=context)
        if count != length:
            raise CheckpointError(f"{name} changed while it was read. Save again when nothing writes to it.")
        self.entries.append(FileEntry(path, name, compartment, sink.size, sink.sha256))

    def add_public(self, name: str, content: Content) -> None:
        check_public_name(name)
        self._check_new(name)
        with _open_content(content, name) as source:
            data = source.read()
        check_public_payload(name, data[:4])
        self.entries.append(self.write(name, data))

    def write(self, name: str, content: bytes) -> FileEntry:
        folders.write_file(self._folder / name, content, self._file_mode)
        return FileEntry(name, name, None, len(content), hashlib.sha256(content).hexdigest())

    def _check_new(self, path: str) -> None:
        if path.casefold() in {entry.path.casefold() for entry in self.entries}:
            raise CheckpointError(f"{path}: two files would have one name on some systems. Rename one.")


class _HashingSink:
    """A new file that hashes what is written to it and is on disk when it is closed."""

    def __init__(self, path: Path, mode: int) -> None:
        self.size = 0
        self._digest = hashlib.sha256()
        self._descriptor = folders.create_file(path, mode)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        try:
            if exc_type is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, data: memoryview | bytes) -> None:
        self._digest.update(data)
        self.size += len(data)
        folders.write_all(self._descriptor, data)


def _encode_metadata(metadata: Mapping[str, Any], checkpoint_id: str) -> bytes:
    try:
        content = canonical_json({"v": FORMAT_VERSION, "ckpt": checkpoint_id, "metadata": dict(metadata)})
        # what a reader would refuse must not be written
        parse_strict(content, "metadata", max_bytes=MAX_INNER_BYTES, floats=True)
    except (ValueError, TypeError, CheckpointError) as error:
        raise ConfigError(f"metadata must be a JSON object that can be read back: {error}") from error
    return content


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn what the system refuses into an error that says what it means."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be saved: {error.strerror or error}. What was there before is whole. "
            "Free some space, or write elsewhere."
        ) from error


def _not_shared(folder: Path) -> str:
    return (
        f"{folder} is not the same here as where it was written. All processes must write to one file "
        "system: choose a folder (run_dir) that every machine mounts."
    )


def _check_compartments(sealed: SealedFiles) -> None:
    if unknown := set(sealed) - set(COMPARTMENTS):
        raise ConfigError(f"unknown compartments {sorted(unknown)}; allowed: {', '.join(COMPARTMENTS)}.")
    for contents in sealed.values():
        for name in contents:
            check_file_name(name)


def _open_content(content: Content, name: str) -> _Readable:
    if isinstance(content, bytes):
        return io.BytesIO(content)
    if not isinstance(content, Path):
        return content
    try:
        descriptor = os.open(content, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{name}: {content} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{name}: {content} is not a regular file.")
    return io.FileIO(descriptor, "rb")


def _read_at(source: _Readable, offset: int, count: int) -> bytes:
    source.seek(offset)
    return source.read(count)


def _checked_uuid(value: str) -> str:
    try:
        canonical = str(uuid.UUID(value))
    except ValueError:
        canonical = ""
    if canonical != value:
        raise ConfigError(f"lineage must be a UUID in lower case with dashes, got {value!r}.")
    return value
