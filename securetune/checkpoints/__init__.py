"""Sealed checkpoints: encrypted, signed folders in a subset of the format ``securetune.vault/1``.

A checkpoint is a folder:

- ``vault.json``: in-toto statement in a DSSE bundle, signed by the owner: identity, generation, digests.
- ``keyring.json``: one random key per compartment, wrapped for recipients (HPKE) or by a passphrase.
- ``shards/*.c256``: the sealed files, each one Cobblestone-256 message.
- ``inner.json.c256``: the metadata, sealed.
- public files, in clear (model card, privacy ledger), covered by the signatures.
- ``model.sig``: OpenSSF Model Signing v1.0 bundle over the whole folder.

What holds:
    Loading verifies both signatures against a public key that the *caller* gives, then decrypts. A changed,
    added, removed or renamed file is refused by name. A sealed file opens only in its own checkpoint,
    compartment and place. A compartment opens only with its key. Saving is atomic: after a full disk or a
    kill the old or the new checkpoint is there, whole. That also holds where several processes write or open
    one checkpoint together (``Peers``): what fails on one of them fails on all.

What is not defended yet:
    An older checkpoint of the same owner verifies as well as the newest (no rollback detection:
    ``Manifest.generation`` is signed, but nothing here remembers the highest one seen). There are no roles,
    expiry, revocation or audit log. Whoever once unwrapped a compartment's key keeps it. File names, sizes
    and recipients' key ids are visible to everybody. Key wrapping is not post-quantum. Plaintext in the
    memory of the process, its swap and its core dumps is not protected.
"""

from .cobblestone import RangeDecryptor, decrypt, decrypt_stream, encrypt, encrypt_stream
from .folders import replace_folder
from .keyring import Argon2Params, Recipient
from .keys import (
    generate_recipient_key,
    generate_signing_key,
    load_identity,
    load_passphrase,
    load_public_key,
    load_recipient,
    load_signing_key,
    recipient_id,
    signer_id,
)
from .manifest import COMPARTMENTS, FORMAT_VERSION, FileEntry, Manifest
from .peers import ALONE, Alone, Peers, agreement
from .safe_loading import check_adapter_config, check_payload, check_safetensors_bytes, check_safetensors_file
from .sealing import Sealer, seal, seal_part
from .signing import SIGNATURE_NAME, sign_folder, verify_folder
from .vault import Vault, open_vault, verify

__all__ = [
    "ALONE",
    "COMPARTMENTS",
    "FORMAT_VERSION",
    "SIGNATURE_NAME",
    "Alone",
    "Argon2Params",
    "FileEntry",
    "Manifest",
    "Peers",
    "RangeDecryptor",
    "Recipient",
    "Sealer",
    "Vault",
    "agreement",
    "check_adapter_config",
    "check_payload",
    "check_safetensors_bytes",
    "check_safetensors_file",
    "decrypt",
    "decrypt_stream",
    "encrypt",
    "encrypt_stream",
    "generate_recipient_key",
    "generate_signing_key",
    "load_identity",
    "load_passphrase",
    "load_public_key",
    "load_recipient",
    "load_signing_key",
    "open_vault",
    "recipient_id",
    "replace_folder",
    "seal",
    "seal_part",
    "sign_folder",
    "signer_id",
    "verify",
    "verify_folder",
]
