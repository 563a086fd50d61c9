"""Key files: X25519 for recipients, P-256 for signing, and passphrases; refused when others can read them."""

import hashlib
import os
import stat
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from securetune.errors import ConfigError
from securetune.files import fsync_folder

_MAX_KEY_FILE_BYTES = 65536
_MAX_PASSPHRASE_BYTES = 4096
_RECIPIENT_KIND = "X25519 key for recipients"
_SIGNING_KIND = "ECDSA P-256 key for signing"
_Key = TypeVar("_Key")


def generate_recipient_key(path: str | os.PathLike[str]) -> Path:
    """Make a key pair that checkpoints can be sealed for.

    Args:
        path: Where the private key goes (PEM, mode 0600); the public key goes to the same name plus ``.pub``.

    Returns:
        The path of the public key.

    Raises:
        ConfigError: If one of the two files exists: a key is never overwritten.
    """
    return _write_pair(Path(path), X25519PrivateKey.generate())


def generate_signing_key(path: str | os.PathLike[str]) -> Path:
    """Make a key pair that checkpoints are signed with.

    Args:
        path: Where the private key goes (PEM, mode 0600); the public key goes to the same name plus ``.pub``.

    Returns:
        The path of the public key, the file that ``model_signing verify key --public_key`` takes.

    Raises:
        ConfigError: If one of the two files exists: a key is never overwritten.
    """
    return _write_pair(Path(path), ec.generate_private_key(ec.SECP256R1()))


def load_identity(path: str | os.PathLike[str]) -> X25519PrivateKey:
    """Load the private key of a recipient.

    Args:
        path: PEM file, readable by its owner only.

    Returns:
        The private key.

    Raises:
        ConfigError: If the file is missing, readable by others, or holds something else.
    """
    return _load_private(path, X25519PrivateKey, _RECIPIENT_KIND)


def load_recipient(path: str | os.PathLike[str]) -> X25519PublicKey:
    """Load the public key of a recipient.

    Args:
        path: PEM file.

    Returns:
        The public key.

    Raises:
        ConfigError: If the file is missing or holds something else.
    """
    return _load_public(path, X25519PublicKey, _RECIPIENT_KIND)


def load_signing_key(path: str | os.PathLike[str]) -> ec.EllipticCurvePrivateKey:
    """Load the private key of a signer.

    Args:
        path: PEM file, readable by its owner only.

    Returns:
        The private key.

    Raises:
        ConfigError: If the file is missing, readable by others, or holds something else.
    """
    key = _load_private(path, ec.EllipticCurvePrivateKey, _SIGNING_KIND)
    _check_curve(key.curve, path)
    return key


def load_public_key(path: str | os.PathLike[str]) -> ec.EllipticCurvePublicKey:
    """Load the public key of a signer: the one a reader trusts.

    Args:
        path: PEM file.

    Returns:
        The public key.

    Raises:
        ConfigError: If the file is missing or holds something else.
    """
    key = _load_public(path, ec.EllipticCurvePublicKey, _SIGNING_KIND)
    _check_curve(key.curve, path)
    return key


def load_passphrase(path: str | os.PathLike[str]) -> bytearray:
    """Load a passphrase from a file.

    Args:
        path: File that its owner alone can read; one line break at its end is dropped.

    Returns:
        The passphrase; overwrite it after use.

    Raises:
        ConfigError: If the file is missing, readable by others, empty or larger than 4096 bytes.
    """
    content = bytearray(_read(path, "passphrase file", secret=True))
    if content.endswith(b"\n"):
        del content[-1:]
        if content.endswith(b"\r"):
            del content[-1:]
    if not 0 < len(content) <= _MAX_PASSPHRASE_BYTES:
        raise ConfigError(
            f"passphrase file {os.fspath(path)} must hold 1 to {_MAX_PASSPHRASE_BYTES} bytes, "
            f"got {len(content)}."
        )
    return content


def recipient_id(public_key: X25519PublicKey) -> str:
    """Return the name of a recipient's key in a keyring: SHA-256 of its 32 raw bytes, in hexadecimal."""
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()


def signer_id(public_key: ec.EllipticCurvePublicKey) -> str:
    """Return the name of a signer's key in a signature: SHA-256 of its PEM text, in hexadecimal."""
    return hashlib.sha256(_public_pem(public_key)).hexdigest()


def _write_pair(path: Path, key: X25519PrivateKey | ec.EllipticCurvePrivateKey) -> Path:
    public = path.with_name(path.name + ".pub")
    if os.path.lexists(public):
        raise ConfigError(
            f"{public} exists, and a key is never overwritten. Choose another name or remove it."
        )
    private_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(path, private_pem, 0o600)
    _write_new(public, _public_pem(key.public_key()), 0o644)
    fsync_folder(path.parent)
    return public


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists, and a key is never overwritten. Choose another name or remove it."
        ) from error
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: the folder {path.parent} does not exist. Make it first.") from error
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask is
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        os.unlink(path)
        raise


def _public_pem(key: X25519PublicKey | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_private(path: str | os.PathLike[str], kind: type[_Key], wanted: str) -> _Key:
    content = _read(path, wanted, secret=True)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as error:
        raise ConfigError(
            f"{os.fspath(path)} is protected by a password, which is not supported. "
            "Store it without one, mode 0600."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{os.fspath(path)} is not a PEM private key; a {wanted} is needed.") from error
    if not isinstance(key, kind):
        raise ConfigError(f"{os.fspath(path)} holds a {type(key).__name__}; a {wanted} is needed.")
    return key


def _load_public(path: str | os.PathLike[str], kind: type[_Key], wanted: str) -> _Key:
    content = _read(path, wanted, secret=False)
    if b"PRIVATE KEY" in content:
        raise ConfigError(
            f"{os.fspath(path)} holds a private key. Give the public one, {os.fspath(path)}.pub."
        )
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{os.fspath(path)} is not a PEM public key; a {wanted} is needed.") from error
    if not isinstance(key, kind):
        raise ConfigError(f"{os.fspath(path)} holds a {type(key).__name__}; a {wanted} is needed.")
    return key


def _check_curve(curve: ec.EllipticCurve, path: str | os.PathLike[str]) -> None:
    if not isinstance(curve, ec.SECP256R1):
        raise ConfigError(f"{os.fspath(path)} is on the curve {curve.name}; a {_SIGNING_KIND} is needed.")


def _read(path: str | os.PathLike[str], what: str, *, secret: bool) -> bytes:
    name = os.fspath(path)
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{what}: {name} does not exist. `securetune checkpoint keygen` makes keys."
        ) from error
    except OSError as error:
        raise ConfigError(f"{what}: {name} cannot be opened: {error.strerror}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{what}: {name} is not a regular file.")
        mode = stat.S_IMODE(status.st_mode)
        if secret and mode & 0o077:
            raise ConfigError(
                f"{name} can be read or written by others (mode {mode:04o}). Run: chmod 600 {name}"
            )
        content = os.read(descriptor, _MAX_KEY_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MAX_KEY_FILE_BYTES:
        raise ConfigError(f"{what}: {name} is larger than {_MAX_KEY_FILE_BYTES} bytes.")
    return content
