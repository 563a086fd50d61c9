"""The keyring: one random key per compartment, wrapped for recipients and under a passphrase.

Which compartments' keys somebody was given is the only access control that is cryptographic. Everybody who is
given any key is also given the key of ``meta``, which authenticates the keyring itself.
"""

import base64
import binascii
import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, NoReturn, TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from securetune.errors import AccessDenied, CheckpointError, ConfigError
from securetune.files import canonical_json

from ._json import parse_strict
from .cobblestone import KEY_BYTES, decrypt, encrypt
from .keys import recipient_id
from .manifest import COMPARTMENTS, FORMAT_VERSION, META, describe_invalid

MAX_KEYRING_BYTES = 1 << 20
_MAX_SLOTS = 64
_MAX_PASSPHRASES = 4  # each one costs a full Argon2id to try
_SALT_BYTES = 16
_HPKE: Final = "hpke-x25519-hkdfsha256-aes256gcm"
_PASSPHRASE: Final = "pass-argon2id"
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_SLOT_PREFIX = b"securetune/v1/slot\0"
_MAC_INFO = b"securetune/v1/keyring-mac"
_DENIED = (
    "no key slot could be opened: the key or passphrase does not fit this checkpoint, or its keyring was "
    "changed. Give the private key of one of its recipients, or its passphrase."
)


@dataclass(frozen=True)
class Argon2Params:
    """Cost of turning a passphrase into a key; the defaults take about 0.3 s and 64 MiB.

    Args:
        memory_kib: Memory in KiB, from 8 per lane to 1 GiB.
        iterations: Passes over the memory, 1 to 10.
        lanes: Parallel lanes, 1 to 16.

    Raises:
        ConfigError: If a value is out of bounds; readers refuse the same values before they allocate
            anything.
    """

    memory_kib: int = 65536
    iterations: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        if not (
            1 <= self.lanes <= 16
            and 1 <= self.iterations <= 10
            and 8 * self.lanes <= self.memory_kib <= 1 << 20
        ):
            raise ConfigError(
                "Argon2id must use 1 to 16 lanes, 1 to 10 iterations and 8 KiB per lane to 1 GiB, "
                f"got {self}."
            )


@dataclass(frozen=True)
class Recipient:
    """Somebody who can open a checkpoint with a private key.

    Args:
        public_key: The recipient's key.
        compartments: What the recipient can read; ``None`` means every compartment.
    """

    public_key: X25519PublicKey
    compartments: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if unknown := (self.compartments or frozenset()) - set(COMPARTMENTS):
            raise ConfigError(f"unknown compartments {sorted(unknown)}; allowed: {', '.join(COMPARTMENTS)}.")


@dataclass(frozen=True)
class PassphraseKey:
    """A key derived from a passphrase, and how to derive it again; its repr never shows the key."""

    salt: bytes
    params: Argon2Params
    key: bytearray = field(repr=False)

    @classmethod
    def derive(
        cls, passphrase: bytes | bytearray, params: Argon2Params, salt: bytes | None = None
    ) -> "PassphraseKey":
        """Run Argon2id.

        Args:
            passphrase: At least one byte.
            params: The cost.
            salt: 16 bytes; ``None`` draws a new one.

        Returns:
            The derived key.
        """
        salt = os.urandom(_SALT_BYTES) if salt is None else salt
        key = bytearray(KEY_BYTES)
        Argon2id(
            salt=salt,
            length=KEY_BYTES,
            iterations=params.iterations,
            lanes=params.lanes,
            memory_cost=params.memory_kib,
        ).derive_into(memoryview(passphrase), key)  # pyright: ignore[reportArgumentType] - takes any buffer
        return cls(salt, params, key)


class _Slot(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    comp: Literal["adapter", "evidence", "meta", "optimizer", "rng", "weights"]
    epoch: Annotated[int, Field(ge=1)]
    ct: Annotated[str, Field(max_length=4096)]


class _HpkeSlot(_Slot):
    kind: Literal["hpke-x25519-hkdfsha256-aes256gcm"] = _HPKE
    recipient_kid: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _PassphraseSlot(_Slot):
    kind: Literal["pass-argon2id"] = _PASSPHRASE
    salt: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{22}==$")]
    m: Annotated[int, Field(ge=8, le=1 << 20)]
    t: Annotated[int, Field(ge=1, le=10)]
    p: Annotated[int, Field(ge=1, le=16)]


_AnySlot: TypeAlias = Annotated[_HpkeSlot | _PassphraseSlot, Field(discriminator="kind")]


class _Keyring(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    v: Literal["securetune.vault/1"]
    ckpt: str
    epoch: Annotated[int, Field(ge=1)]
    slots: Annotated[list[_AnySlot], Field(min_length=1, max_length=_MAX_SLOTS)]
    mac: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def build_keyring(
    keys: Mapping[str, bytearray],
    *,
    ckpt: str,
    epoch: int,
    recipients: Iterable[Recipient],
    passphrase: PassphraseKey | None,
) -> bytes:
    """Wrap the compartments' keys.

    Args:
        keys: 32 random bytes per compartment, ``meta`` among them.
        ckpt: The checkpoint the keys belong to.
        epoch: Number of the keys within the checkpoint's life.
        recipients: Who can open which compartments.
        passphrase: Opens every compartment; ``None`` for none.

    Returns:
        The content of ``keyring.json``.

    Raises:
        ConfigError: If nobody could open it, there are too many slots, or a recipient's key is not usable.
    """
    slots: list[dict[str, Any]] = []
    for recipient in recipients:
        granted = set(keys) if recipient.compartments is None else {META, *recipient.compartments} & set(keys)
        for compartment in sorted(granted):
            slot = _new_slot(_HPKE, compartment, epoch) | {
                "recipient_kid": recipient_id(recipient.public_key)
            }
            try:
                sealed = _SUITE.encrypt(keys[compartment], recipient.public_key, _slot_context(slot, ckpt))
            except ValueError as error:  # a low-order point
                raise ConfigError("a recipient's public key is not usable; make a new key pair.") from error
            slots.append(slot | {"ct": base64.b64encode(sealed).decode()})
    if passphrase is not None:
        params = passphrase.params
        for compartment in sorted(keys):
            slot = _new_slot(_PASSPHRASE, compartment, epoch) | {
                "salt": base64.b64encode(passphrase.salt).decode(),
                "m": params.memory_kib,
                "t": params.iterations,
                "p": params.lanes,
            }
            sealed = encrypt(keys[compartment], key=passphrase.key, context=_slot_context(slot, ckpt))
            slots.append(slot | {"ct": base64.b64encode(sealed).decode()})
    if not 1 <= len(slots) <= _MAX_SLOTS:
        raise ConfigError(
            f"a keyring has 1 to {_MAX_SLOTS} slots (one per compartment and recipient), got {len(slots)}."
        )
    if closed := keys.keys() - {slot["comp"] for slot in slots}:
        raise ConfigError(f"nobody could open {sorted(closed)}: give a recipient for it, or a passphrase.")
    keyring: dict[str, Any] = {"v": FORMAT_VERSION, "ckpt": ckpt, "epoch": epoch, "slots": slots}
    return canonical_json(keyring | {"mac": _mac(keys[META], keyring)})


def open_keyring(
    content: bytes,
    *,
    name: str,
    ckpt: str,
    epoch: int,
    identity: X25519PrivateKey | None,
    passphrase: bytes | bytearray | None,
    compartments: Sequence[str] | None = None,
) -> dict[str, bytearray]:
    """Unwrap the compartments' keys.

    Guarantees:
        A wrong key, a wrong passphrase, a changed, moved, added or removed slot and a slot that was never
        there end in the same :class:`~securetune.errors.AccessDenied` after the same work. Costs of Argon2id
        are checked before it runs.

    Args:
        content: The content of ``keyring.json``.
        name: What to call the keyring in an error message.
        ckpt: The checkpoint it must belong to.
        epoch: The epoch it must belong to.
        identity: A recipient's private key.
        passphrase: A passphrase.
        compartments: Which keys are wanted; ``None`` means all that can be opened, at least one.

    Returns:
        The keys by compartment, ``meta`` always among them; overwrite them after use.

    Raises:
        CheckpointError: If the keyring is malformed or belongs elsewhere.
        AccessDenied: If a wanted key cannot be opened.
    """
    document = parse_strict(content, name, max_bytes=MAX_KEYRING_BYTES, canonical=True)
    try:
        keyring = _Keyring.model_validate(document)
    except ValidationError as error:
        raise CheckpointError(f"{name} is not a valid keyring: {describe_invalid(error)}.") from error
    if (keyring.ckpt, keyring.epoch) != (ckpt, epoch):
        raise CheckpointError(f"{name} belongs to another checkpoint or epoch.")
    derived = _derive_all(keyring, name, passphrase)
    keys: dict[str, bytearray] = {}
    conflict = False
    for slot in keyring.slots:
        key = _open_slot(slot, ckpt, identity, derived)
        if key is not None:
            conflict |= not hmac.compare_digest(keys.setdefault(slot.comp, key), key)
    for entry in derived.values():
        wipe([entry.key])
    body = {field: value for field, value in document.items() if field != "mac"}
    mac_fits = META in keys and hmac.compare_digest(_mac(keys[META], body), keyring.mac)
    wanted = set(keys) if compartments is None else {META, *compartments}
    nothing_opened = compartments is None and not keys.keys() - {META}
    if conflict or not mac_fits or nothing_opened or not wanted <= keys.keys():
        wipe(keys.values())
        _deny()
    wipe(key for compartment, key in keys.items() if compartment not in wanted)
    return {compartment: keys[compartment] for compartment in wanted}


def wipe(secrets: Iterable[bytearray]) -> None:
    """Overwrite secrets with zeros; copies inside libraries are out of reach."""
    for secret in secrets:
        secret[:] = bytes(len(secret))


def _deny() -> NoReturn:
    raise AccessDenied(_DENIED)


def _new_slot(kind: str, compartment: str, epoch: int) -> dict[str, Any]:
    return {"id": os.urandom(8).hex(), "kind": kind, "comp": compartment, "epoch": epoch}


def _slot_context(slot: Mapping[str, Any], ckpt: str) -> bytes:
    """Bind a wrapped key to its checkpoint and to everything the slot says about it."""
    fields = {name: value for name, value in slot.items() if name != "ct"}
    return _SLOT_PREFIX + canonical_json(fields | {"ckpt": ckpt})


def _mac(meta_key: bytearray, keyring: Mapping[str, Any]) -> str:
    mac_key = HKDFExpand(SHA256(), KEY_BYTES, _MAC_INFO).derive(meta_key)
    return hmac.digest(mac_key, canonical_json(keyring), "sha256").hex()


def _derive_all(
    keyring: _Keyring, name: str, passphrase: bytes | bytearray | None
) -> dict[tuple[str, Argon2Params], PassphraseKey]:
    costs = {
        (slot.salt, _params(slot)): slot.salt for slot in keyring.slots if isinstance(slot, _PassphraseSlot)
    }
    if len(costs) > _MAX_PASSPHRASES:
        raise CheckpointError(f"{name} holds {len(costs)} passphrases; at most {_MAX_PASSPHRASES} are tried.")
    if passphrase is None:
        return {}
    return {
        (salt, params): PassphraseKey.derive(passphrase, params, base64.b64decode(salt))
        for salt, params in costs
    }


def _params(slot: _PassphraseSlot) -> Argon2Params:
    try:
        return Argon2Params(slot.m, slot.t, slot.p)
    except (
        ConfigError
    ) as error:  # memory too small for the lanes: the single bounds hold, both together do not
        raise CheckpointError(f"slot {slot.id}: {error}") from error


def _open_slot(
    slot: _HpkeSlot | _PassphraseSlot,
    ckpt: str,
    identity: X25519PrivateKey | None,
    derived: Mapping[tuple[str, Argon2Params], PassphraseKey],
) -> bytearray | None:
    context = _slot_context(slot.model_dump(), ckpt)
    try:
        wrapped = base64.b64decode(slot.ct, validate=True)
        if isinstance(slot, _HpkeSlot):
            # tried whatever its recipient_kid says: the time taken does not tell which slot fits
            key = _SUITE.decrypt(wrapped, identity, context) if identity is not None else None
        elif derived:
            key = decrypt(wrapped, key=derived[slot.salt, _params(slot)].key, context=context)
        else:
            key = None
    except (InvalidTag, CheckpointError, ValueError, binascii.Error):
        return None
    return bytearray(key) if key is not None and len(key) == KEY_BYTES else None
