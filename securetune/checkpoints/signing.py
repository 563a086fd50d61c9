"""Signed folders: OpenSSF Model Signing v1.0, accepted by the stock ``model_signing verify key``.

``python -m model_signing verify key FOLDER --signature FOLDER/model.sig --public_key OWNER.pub``
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from securetune.errors import CheckpointError, SignatureError
from securetune.files import write_atomic

from .dsse import MAX_BUNDLE_BYTES, Statement, sign_statement, verify_statement
from .folders import FolderReader

SIGNATURE_NAME = "model.sig"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
# the stock verifier never looks at these at the top of a folder, so nothing there can be signed
_UNSIGNABLE = {".git", ".gitattributes", ".github", ".gitignore"}
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BAD_COMPONENT = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]|[. ]$|^(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)')


class SignedFiles(NamedTuple):
    """What a verified ``model.sig`` covers."""

    name: str
    digests: dict[str, str]
    ignored: frozenset[str]


def sign_folder(
    folder: str | os.PathLike[str],
    signing_key: ec.EllipticCurvePrivateKey,
    *,
    ignore: Collection[str] = (),
    file_mode: int = 0o644,
) -> Path:
    """Sign every file of a folder; ``model.sig`` appears whole or not at all.

    Args:
        folder: The folder; an older ``model.sig`` at its top is replaced.
        signing_key: ECDSA P-256 private key.
        ignore: Relative paths of files or folders left out. They stay unprotected: verifying needs the same
            list.
        file_mode: Permission bits of ``model.sig``.

    Returns:
        The path of ``model.sig``.

    Raises:
        CheckpointError: If the folder holds links, unsafe names or git files, which this format cannot
            protect.
    """
    with FolderReader(folder) as reader:
        names = [name for name in reader.sizes if name != SIGNATURE_NAME and not _is_below(name, ignore)]
        digests = {name: reader.sha256(name) for name in names}
    path = Path(folder).absolute()
    bundle = build_signature(digests, signing_key, name=path.name, ignore=ignore)
    write_atomic(path / SIGNATURE_NAME, bundle, mode=file_mode)
    return path / SIGNATURE_NAME


def verify_folder(
    folder: str | os.PathLike[str], public_key: ec.EllipticCurvePublicKey, *, ignore: Collection[str] = ()
) -> dict[str, str]:
    """Verify that a folder holds exactly the files that were signed.

    Guarantees:
        Stricter than the stock verifier: every file must be signed, hidden and git files too; symbolic and
        hard links, unsafe or colliding names, unsorted or repeated entries and everything
        :func:`dsse.verify_statement` lists are refused.

    Args:
        folder: The folder, with ``model.sig`` at its top.
        public_key: The signer's key, from a source the reader trusts; never from the folder.
        ignore: Relative paths that the caller accepts unsigned.

    Returns:
        The SHA-256 of every signed file by relative path.

    Raises:
        CheckpointError: If the folder cannot be read safely.
        SignatureError: If the signature is missing or does not hold; the message names the file.
    """
    with FolderReader(folder) as reader:
        signed = read_signature(reader, public_key)
        check_files(reader, signed, ignore=ignore)
        for name, digest in signed.digests.items():
            if reader.sha256(name) != digest:
                raise SignatureError(changed_message(reader.path / name))
    return signed.digests


def build_signature(
    digests: Mapping[str, str],
    signing_key: ec.EllipticCurvePrivateKey,
    *,
    name: str,
    ignore: Collection[str] = (),
) -> bytes:
    """Return the content of ``model.sig`` for files whose SHA-256 is known.

    Args:
        digests: SHA-256 in hexadecimal by relative path.
        signing_key: ECDSA P-256 private key.
        name: The folder's name; informative only.
        ignore: Relative paths left out besides ``model.sig``.

    Returns:
        The bundle.

    Raises:
        CheckpointError: If a name cannot be protected.
    """
    _check_names(digests)
    predicate = {
        "resources": [
            {"name": path, "algorithm": "sha256", "digest": digests[path]} for path in sorted(digests)
        ],
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": sorted({*ignore, SIGNATURE_NAME}),
        },
    }
    statement = Statement(name or "model", root_digest(digests), predicate)
    return sign_statement(statement, signing_key, predicate_type=_PREDICATE_TYPE)


def read_signature(reader: FolderReader, public_key: ec.EllipticCurvePublicKey) -> SignedFiles:
    """Verify ``model.sig`` itself and return what it covers; the files are not looked at.

    Args:
        reader: The folder.
        public_key: The signer's key.

    Returns:
        The signed files.

    Raises:
        SignatureError: If ``model.sig`` is missing or does not hold.
    """
    path = reader.path / SIGNATURE_NAME
    if SIGNATURE_NAME not in reader.sizes:
        raise SignatureError(f"{reader.path} has no {SIGNATURE_NAME}: it is not signed, so it is not opened.")
    bundle = reader.read(SIGNATURE_NAME, MAX_BUNDLE_BYTES)
    statement = verify_statement(bundle, public_key, predicate_type=_PREDICATE_TYPE, name=str(path))
    predicate = statement.predicate
    if predicate.keys() != {"resources", "serialization"}:
        raise SignatureError(f"{path}: the predicate must hold resources and serialization, nothing else.")
    digests = _read_resources(predicate["resources"], path)
    if root_digest(digests) != statement.sha256:
        raise SignatureError(f"{path}: the root digest does not match the list of files.")
    return SignedFiles(statement.name, digests, _read_serialization(predicate["serialization"], path))


def check_files(reader: FolderReader, signed: SignedFiles, *, ignore: Collection[str] = ()) -> None:
    """Check that the folder holds all signed files and no other.

    Args:
        reader: The folder.
        signed: What ``model.sig`` covers.
        ignore: Relative paths that the caller accepts unsigned.

    Raises:
        SignatureError: If a file is missing or is not covered.
    """
    for name in reader.sizes:
        if name in signed.digests or name == SIGNATURE_NAME:
            continue
        if not _is_below(name, set(ignore) & signed.ignored):
            raise SignatureError(
                f"{reader.path / name} is not covered by the signature: it was added later. Remove it or get "
                "the original again."
            )
    for name in signed.digests:
        if name not in reader.sizes:
            raise SignatureError(
                f"{reader.path / name} is missing, but it was signed. Get the original again."
            )


def root_digest(digests: Mapping[str, str]) -> str:
    """Return the SHA-256 over all digests in the order of their paths: one name for the whole folder."""
    return hashlib.sha256(b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))).hexdigest()


def changed_message(path: Path) -> str:
    """Return the message for a file whose content is not what was signed."""
    return f"{path} does not match its signature: its content was changed. Get the original again."


def _is_below(name: str, paths: Collection[str]) -> bool:
    return any(name == path or name.startswith(path + "/") for path in paths)


def _read_resources(resources: Any, path: Path) -> dict[str, str]:
    if not isinstance(resources, list):
        raise SignatureError(f"{path}: resources must be a list.")
    digests: dict[str, str] = {}
    last = ""
    for entry in resources:
        if not isinstance(entry, dict) or entry.keys() != {"name", "algorithm", "digest"}:
            raise SignatureError(
                f"{path}: every resource must hold name, algorithm and digest, nothing else."
            )
        name, digest = entry["name"], entry["digest"]
        if entry["algorithm"] != "sha256" or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise SignatureError(f"{path}: every digest must be a sha256 in lower-case hexadecimal.")
        if not isinstance(name, str) or name <= last:
            raise SignatureError(f"{path}: resources must be sorted by name, each name once; got {name!r}.")
        digests[name] = digest
        last = name
    try:
        _check_names(digests)
    except CheckpointError as error:
        raise SignatureError(f"{path}: {error}") from error
    return digests


def _read_serialization(serialization: Any, path: Path) -> frozenset[str]:
    if not isinstance(serialization, dict):
        raise SignatureError(f"{path}: serialization must be an object.")
    ignored = serialization.get("ignore_paths", [])
    expected = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}
    if {"ignore_paths": ignored, **serialization} != expected or serialization.get(
        "allow_symlinks"
    ) is not False:
        raise SignatureError(
            f"{path}: only files hashed with sha256 and no symbolic links are supported, "
            f"got {serialization!r}."
        )
    if not isinstance(ignored, list) or not all(isinstance(item, str) for item in ignored):
        raise SignatureError(f"{path}: ignore_paths must be a list of strings.")
    return frozenset(ignored)


def _check_names(names: Collection[str]) -> None:
    seen: dict[str, str] = {}
    for name in sorted(names):
        parts = name.split("/")
        if parts[0] in _UNSIGNABLE:
            raise CheckpointError(
                f"{name!r} cannot be signed: the stock verifier ignores git files. Remove it."
            )
        if any(part in ("", ".", "..") or _BAD_COMPONENT.search(part) for part in parts):
            raise CheckpointError(f"{name!r} is not a safe relative path.")
        if unicodedata.normalize("NFC", name) != name:
            raise CheckpointError(f"{name!r} is not in Unicode normal form C.")
        for depth in range(1, len(parts) + 1):
            prefix = "/".join(parts[:depth])
            other = seen.setdefault(prefix.casefold(), prefix)
            if other != prefix:
                raise CheckpointError(f"{prefix!r} and {other!r} are one name on some systems. Rename one.")
