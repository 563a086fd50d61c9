"""Read sealed checkpoints: verify first, decrypt second."""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from securetune.errors import AccessDenied, CheckpointError, ConfigError, SignatureError

from . import folders
from ._json import parse_strict
from .cobblestone import KEY_BYTES, RangeDecryptor, Sink, decrypt_stream
from .dsse import MAX_BUNDLE_BYTES
from .folders import FolderReader
from .keyring import MAX_KEYRING_BYTES, open_keyring, wipe
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
    file_context,
    read_manifest,
)
from .peers import ALONE, Peers, agreement
from .safe_loading import check_file_name, check_payload, check_payload_at, check_public_payload
from .signing import SIGNATURE_NAME, changed_message, check_files, read_signature


def verify(path: str | os.PathLike[str], public_key: ec.EllipticCurvePublicKey) -> Manifest:
    """Verify a checkpoint with nothing but the owner's public key.

    Guarantees:
        On return every byte of every file is what the owner of ``public_key`` signed, no file is missing and
        none was added. Nothing was decrypted, and no key was taken from the checkpoint. An older checkpoint
        of the same owner passes too.

    Args:
        path: The checkpoint's folder.
        public_key: The owner's key, from a source the reader trusts.

    Returns:
        What the owner signed.

    Raises:
        SignatureError: If a signature or a file does not match; the message names the file.
        CheckpointError: If this is no sealed checkpoint, holds a pickle, or is of an unknown version.
    """
    with _open_folder(path) as reader:
        return _verify(reader, public_key)


def open_vault(
    path: str | os.PathLike[str],
    *,
    public_key: ec.EllipticCurvePublicKey,
    identity: X25519PrivateKey | None = None,
    passphrase: bytes | bytearray | None = None,
    compartments: Sequence[str] | None = None,
    peers: Peers = ALONE,
) -> "Vault":
    """Verify a checkpoint, then unwrap its keys.

    Several processes open a checkpoint together: each checks the signatures and hashes a part of the files,
    the first unwraps the keys and shares them, and all of them get an open checkpoint or none does.

    Args:
        path: The checkpoint's folder.
        public_key: The owner's key, from a source the reader trusts.
        identity: A recipient's private key.
        passphrase: The passphrase, in place of or beside ``identity``.
        compartments: Which compartments are wanted; ``None`` means all that the key opens.
        peers: The processes that open it together, which all call this. Only the first needs ``identity`` or
            ``passphrase``.

    Returns:
        The open checkpoint; use it in a ``with`` statement, so that its keys are overwritten.

    Raises:
        ConfigError: If neither ``identity`` nor ``passphrase`` is given, or a compartment is unknown.
        SignatureError: If a signature or a file does not match; the message names the file.
        AccessDenied: If the key or passphrase opens nothing, or not all that is wanted.
        CheckpointError: If this is no sealed checkpoint, holds a pickle, or is of an unknown version.
    """
    with contextlib.ExitStack() as stack:
        with agreement(peers, f"{path} is verified"):
            if identity is None and passphrase is None and peers.rank == 0:
                raise ConfigError(
                    "a sealed checkpoint needs an identity (a recipient's private key) or a passphrase."
                )
            if unknown := set(compartments or ()) - set(COMPARTMENTS):
                raise ConfigError(
                    f"unknown compartments {sorted(unknown)}; allowed: {', '.join(COMPARTMENTS)}."
                )
            reader = stack.enter_context(_open_folder(path))
            manifest = _verify(reader, public_key, part=(peers.rank, peers.size))
        # what the others hashed counts only if it is the same checkpoint
        opened = peers.share(manifest.digest)
        keys: dict[str, bytearray] = {}
        stack.callback(lambda: wipe(keys.values()))
        with agreement(peers, f"{path} is opened"):
            if manifest.digest != opened:
                raise CheckpointError(f"{path} was replaced while it was opened. Try again.")
            if peers.rank == 0:
                content = reader.read(KEYRING_NAME, MAX_KEYRING_BYTES)
                # read again after it was verified, so checked again: it may have been changed in between
                if hashlib.sha256(content).hexdigest() != manifest.keyring.sha256:
                    raise SignatureError(changed_message(reader.path / KEYRING_NAME))
                keys |= open_keyring(
                    content,
                    name=str(reader.path / KEYRING_NAME),
                    ckpt=manifest.checkpoint_id,
                    epoch=manifest.epoch,
                    identity=identity,
                    passphrase=passphrase,
                    compartments=compartments,
                )
        names: list[str] = peers.share(list(keys))
        secret = peers.share_secret(
            b"".join(keys.values()) if peers.rank == 0 else None, KEY_BYTES * len(names)
        )
        for at, name in enumerate(names):
            keys.setdefault(name, bytearray(secret[at * KEY_BYTES : (at + 1) * KEY_BYTES]))
        vault = Vault(reader, manifest, keys)
        stack.pop_all()
        return vault


class Vault:
    """A verified checkpoint whose keys are unwrapped, made by :func:`open_vault`.

    Guarantees:
        Content is returned only if the bytes it comes from still match the owner's signature at that moment,
        so a file changed after verification is refused. Replacing the whole checkpoint meanwhile does no
        harm: the one that was opened stays readable. The repr shows no key, and pickling is refused.
    """

    def __init__(self, reader: FolderReader, manifest: Manifest, keys: dict[str, bytearray]) -> None:
        """Take over an open folder and the keys to it.

        Args:
            reader: The verified folder.
            manifest: What was verified.
            keys: Key by compartment, ``meta`` among them.

        Raises:
            CheckpointError: If the sealed metadata is malformed.
        """
        self.manifest = manifest
        self._reader = reader
        self._keys = keys
        self._ranges: dict[str, RangeDecryptor] = {}
        self.metadata: dict[str, Any] = self._read_metadata()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Vault({str(self._reader.path)!r}, compartments={self.compartments})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Vault holds keys and is not pickled.")

    @property
    def compartments(self) -> tuple[str, ...]:
        """The compartments that can be read."""
        return tuple(sorted(set(self._keys) - {META}))

    def close(self) -> None:
        """Overwrite the keys and close the files."""
        wipe(self._keys.values())
        self._keys.clear()
        self._ranges.clear()
        self._reader.close()

    def names(self, compartment: str) -> tuple[str, ...]:
        """Return the names of the files in a compartment, also of one that cannot be read."""
        return tuple(entry.name for entry in self.manifest.files if entry.compartment == compartment)

    def read(self, compartment: str, name: str) -> bytes:
        """Decrypt one file into memory.

        Args:
            compartment: The compartment it is sealed in.
            name: Its name.

        Returns:
            The content: complete, signed by the owner, and neither a pickle nor malformed safetensors.

        Raises:
            AccessDenied: If the compartment was not opened.
            CheckpointError: If there is no such file, or its content is not allowed.
            SignatureError: If the file was changed since it was verified.
        """
        content = io.BytesIO()
        self._decrypt(self._entry(compartment, name), content)
        plain = content.getvalue()
        check_payload(name, plain)
        return plain

    def read_range(self, compartment: str, name: str, offset: int, count: int) -> bytes:
        """Decrypt a part of one file without reading the rest.

        The part is authenticated by the compartment's key and bound to this checkpoint and file; that the
        owner signed it was checked when the checkpoint was opened and is not checked again. The kind of
        content is not checked.

        Args:
            compartment: The compartment it is sealed in.
            name: Its name.
            offset: Where the part starts.
            count: How many bytes to return.

        Returns:
            Exactly ``count`` bytes.

        Raises:
            AccessDenied: If the compartment was not opened.
            CheckpointError: If there is no such file, or the part was changed.
            ValueError: If the part does not lie within the file.
        """
        entry = self._entry(compartment, name)
        decryptor = self._ranges.get(entry.path)
        if decryptor is None:
            decryptor = self._ranges[entry.path] = RangeDecryptor(
                lambda start, size: self._reader.read_at(entry.path, start, size),
                entry.size,
                key=self._keys[compartment],
                context=self._context(entry),
            )
        return decryptor.read(offset, count)

    def read_public(self, name: str) -> bytes:
        """Read a public file.

        Args:
            name: Its name.

        Returns:
            The content, signed by the owner.

        Raises:
            CheckpointError: If there is no such file.
            SignatureError: If the file was changed since it was verified.
        """
        for entry in self.manifest.files:
            if entry.compartment is None and entry.name == name:
                content = self._reader.read(name, entry.size)
                if hashlib.sha256(content).hexdigest() != entry.sha256:
                    raise SignatureError(changed_message(self._reader.path / name))
                return content
        raise CheckpointError(f"{self._reader.path} has no public file {name!r}.")

    def extract(self, out_dir: str | os.PathLike[str], *, compartments: Sequence[str] | None = None) -> Path:
        """Decrypt files to disk, where nothing protects them any longer.

        Args:
            out_dir: Folder to make; it must not exist or be empty. Files go to ``out_dir/COMPARTMENT/NAME``,
                mode 0600. It appears complete or not at all.
            compartments: Which compartments; ``None`` means all that were opened.

        Returns:
            ``out_dir``.

        Raises:
            AccessDenied: If a compartment was not opened.
            CheckpointError: If ``out_dir`` is not empty, content is not allowed, or the disk is full.
            SignatureError: If a file was changed since it was verified.
        """
        target = Path(out_dir)
        wanted = self.compartments if compartments is None else tuple(dict.fromkeys(compartments))
        if closed := set(wanted) - set(self.compartments):
            raise AccessDenied(_not_opened(sorted(closed), self.compartments))
        try:
            with folders.replace_folder(target) as building:
                for compartment in wanted:
                    (building / compartment).mkdir(mode=0o700)
                    for name in self.names(compartment):
                        self._extract_file(self._entry(compartment, name), building / compartment / name)
        except OSError as error:
            raise CheckpointError(f"{target} could not be written: {error.strerror or error}.") from error
        return target

    def _extract_file(self, entry: FileEntry, path: Path) -> None:
        with open(folders.create_file(path, 0o600), "wb", buffering=0) as file:
            self._decrypt(entry, _Blocks(file.fileno()))
            os.fsync(file.fileno())
        with path.open("rb") as file:
            check_payload_at(entry.name, lambda at, count: os.pread(file.fileno(), count, at), entry.length)

    def _entry(self, compartment: str, name: str) -> FileEntry:
        for entry in self.manifest.files:
            if entry.compartment == compartment and entry.name == name:
                break
        else:
            raise CheckpointError(
                f"{self._reader.path} has no file {name!r} in the compartment {compartment!r}. "
                f"It has: {', '.join(self.names(compartment)) or 'nothing there'}."
            )
        if compartment not in self._keys:
            raise AccessDenied(_not_opened([compartment], self.compartments))
        return entry

    def _context(self, entry: FileEntry) -> bytes:
        manifest = self.manifest
        return file_context(
            manifest.checkpoint_id, manifest.epoch, entry.compartment or "", entry.name, entry.length
        )

    def _decrypt(self, entry: FileEntry, sink: Sink) -> None:
        source = _HashingSource(self._reader, entry.path)
        try:
            decrypt_stream(
                source, sink, key=self._keys[entry.compartment or ""], context=self._context(entry)
            )
        except CheckpointError as error:
            raise CheckpointError(f"{self._reader.path / entry.path}: {error}") from error
        if source.hexdigest() != entry.sha256:
            raise SignatureError(changed_message(self._reader.path / entry.path))

    def _read_metadata(self) -> dict[str, Any]:
        name = f"{INNER_NAME} of {self._reader.path}"
        inner = parse_strict(
            self.read(META, INNER_NAME), name, max_bytes=MAX_INNER_BYTES, floats=True, canonical=True
        )
        expected = {"v": FORMAT_VERSION, "ckpt": self.manifest.checkpoint_id}
        if not isinstance(inner, dict) or inner != expected | {"metadata": inner.get("metadata")}:
            raise CheckpointError(f"{name} has unknown fields or belongs to another checkpoint.")
        if not isinstance(inner["metadata"], dict):
            raise CheckpointError(f"{name}: the metadata must be an object.")
        return inner["metadata"]


class _HashingSource:
    """Reads a file and hashes what was read."""

    def __init__(self, reader: FolderReader, name: str) -> None:
        self._reader = reader
        self._name = name
        self._offset = 0
        self._digest = hashlib.sha256()

    def readinto(self, buffer: memoryview, /) -> int:
        # no more than the file had when it was opened, even if it grows
        count = min(len(buffer), self._reader.sizes[self._name] - self._offset)
        block = self._reader.read_at(self._name, self._offset, count)
        self._digest.update(block)
        self._offset += len(block)
        buffer[: len(block)] = block
        return len(block)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class _Blocks:
    """Writes whole blocks to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: memoryview | bytes, /) -> None:
        folders.write_all(self._descriptor, data)


def _not_opened(closed: Sequence[str], opened: Sequence[str]) -> str:
    return (
        f"the compartments {', '.join(closed)} were not opened. Open the checkpoint with a key that has "
        f"them; open now: {', '.join(opened) or 'none'}."
    )


def _open_folder(path: str | os.PathLike[str]) -> FolderReader:
    folders.recover_folder(path)
    return FolderReader(path)


def _verify(
    reader: FolderReader, public_key: ec.EllipticCurvePublicKey, *, part: tuple[int, int] = (0, 1)
) -> Manifest:
    """Verify all but the content of files that other processes hash: ``part`` is this one, and how many."""
    for name in reader.sizes:
        check_file_name(name)
    if VAULT_NAME not in reader.sizes:
        found = ", ".join(sorted(reader.sizes)[:5]) or "nothing"
        raise CheckpointError(
            f"{reader.path} is not a sealed checkpoint: it has no {VAULT_NAME} (found: {found}). "
            "Plain files are not accepted where a sealed checkpoint is expected."
        )
    signed = read_signature(reader, public_key)
    path = reader.path / VAULT_NAME
    vault = reader.read(VAULT_NAME, MAX_BUNDLE_BYTES)
    manifest = read_manifest(vault, public_key, path=path)
    check_files(reader, signed)
    if signed.digests.get(VAULT_NAME) != hashlib.sha256(vault).hexdigest():
        raise SignatureError(changed_message(path))
    if reader.folders - {SHARD_FOLDER}:
        raise CheckpointError(
            f"{reader.path} holds unknown folders {sorted(reader.folders - {SHARD_FOLDER})}."
        )
    listed = manifest.digests
    if unlisted := signed.digests.keys() ^ (listed.keys() | {VAULT_NAME}):
        raise SignatureError(f"{path} and {SIGNATURE_NAME} do not list the same files: {sorted(unlisted)}.")
    for number, entry in enumerate((*manifest.files, manifest.keyring)):
        check_file_name(entry.name)
        file = reader.path / entry.path
        # sizes first: a huge sparse file is refused before it is read
        if reader.sizes[entry.path] != entry.size or signed.digests[entry.path] != entry.sha256:
            raise SignatureError(changed_message(file))
        is_ours = number % part[1] == part[0]
        if is_ours and reader.sha256(entry.path) != entry.sha256:
            raise SignatureError(changed_message(file))
        if entry.compartment is None and entry is not manifest.keyring:
            check_public_payload(str(file), reader.read_at(entry.path, 0, 4))
    return manifest
