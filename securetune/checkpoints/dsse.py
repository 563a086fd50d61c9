"""Signed statements: an in-toto statement in a DSSE envelope in a Sigstore bundle, signed with ECDSA P-256.

This is the envelope of OpenSSF Model Signing v1.0 (``model.sig``), and ``vault.json`` and attestations use it
too.
"""

import base64
import binascii
from collections.abc import Set
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from securetune.errors import CheckpointError, SignatureError
from securetune.files import canonical_json

from ._json import parse_strict
from .keys import signer_id

MAX_BUNDLE_BYTES = 16 << 20
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


class Statement(NamedTuple):
    """What a verified bundle says: ``predicate`` about the one subject with this name and digest."""

    name: str
    sha256: str
    predicate: dict[str, Any]


def sign_statement(
    statement: Statement, signing_key: ec.EllipticCurvePrivateKey, *, predicate_type: str
) -> bytes:
    """Sign a statement.

    Args:
        statement: What to state.
        signing_key: ECDSA P-256 private key.
        predicate_type: URI that says what kind of statement this is.

    Returns:
        The bundle, canonical JSON.
    """
    payload = canonical_json(
        {
            "_type": _STATEMENT_TYPE,
            "subject": [{"name": statement.name, "digest": {"sha256": statement.sha256}}],
            "predicateType": predicate_type,
            "predicate": statement.predicate,
        }
    )
    signature = signing_key.sign(_pre_authentication(payload), ec.ECDSA(SHA256()))
    return canonical_json(
        {
            "mediaType": _MEDIA_TYPE,
            "verificationMaterial": {
                "publicKey": {"hint": signer_id(signing_key.public_key())},
                "tlogEntries": [],
            },
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": _PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
    )


def verify_statement(
    bundle: bytes,
    public_key: ec.EllipticCurvePublicKey,
    *,
    predicate_type: str,
    name: str,
    canonical: bool = False,
) -> Statement:
    """Verify a bundle against a key that the caller trusts.

    Guarantees:
        No key and no key location inside the bundle is used; a bundle that names another key is refused
        before its signature is looked at, and the payload is parsed only after the signature holds. Stricter
        than the stock verifier: unknown fields, duplicate keys, a missing key hint, zero or several
        signatures, other media, payload or predicate types and the pre-1.0 encodings are refused. Of the two
        values that ECDSA allows for one signature both are accepted, as OpenSSL writes either.

    Args:
        bundle: The bundle's bytes.
        public_key: The signer's ECDSA P-256 public key.
        predicate_type: The kind of statement expected.
        name: What to call the bundle in an error message.
        canonical: Whether bundle and payload must be canonical JSON (as :func:`sign_statement` writes them).

    Returns:
        The statement.

    Raises:
        SignatureError: If anything about the bundle is not as it must be.
    """
    try:
        document = parse_strict(bundle, name, max_bytes=MAX_BUNDLE_BYTES, canonical=canonical)
        payload, signature = _open_bundle(document, name, expected_hint=signer_id(public_key))
        try:
            public_key.verify(signature, _pre_authentication(payload), ec.ECDSA(SHA256()))
        except InvalidSignature as error:
            raise SignatureError(
                f"{name}: the signature does not match its content. It was changed; get the original again."
            ) from error
        statement = parse_strict(
            payload, f"the payload of {name}", max_bytes=MAX_BUNDLE_BYTES, canonical=canonical
        )
        return _read_statement(statement, name, predicate_type)
    except SignatureError:
        raise
    except CheckpointError as error:
        raise SignatureError(str(error)) from error


def _pre_authentication(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)


def _open_bundle(document: Any, name: str, *, expected_hint: str) -> tuple[bytes, bytes]:
    fields = _object(document, name, "the bundle", {"mediaType", "verificationMaterial", "dsseEnvelope"})
    if fields["mediaType"] != _MEDIA_TYPE:
        raise SignatureError(f"{name}: mediaType must be {_MEDIA_TYPE!r}, got {fields['mediaType']!r}.")
    material = _object(
        fields["verificationMaterial"], name, "verificationMaterial", {"publicKey"}, optional={"tlogEntries"}
    )
    if material.get("tlogEntries", []) != []:
        raise SignatureError(f"{name}: tlogEntries must be empty: transparency logs are not supported.")
    hint = _object(material["publicKey"], name, "publicKey", {"hint"})["hint"]
    if hint != expected_hint:
        raise SignatureError(
            f"{name} was signed by another key ({str(hint)[:16]}...) than the public key given "
            f"({expected_hint[:16]}...). Give the public key of the owner you trust."
        )
    envelope = _object(fields["dsseEnvelope"], name, "dsseEnvelope", {"payload", "payloadType", "signatures"})
    if envelope["payloadType"] != _PAYLOAD_TYPE:
        raise SignatureError(
            f"{name}: payloadType must be {_PAYLOAD_TYPE!r}, got {envelope['payloadType']!r}."
        )
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise SignatureError(f"{name} must hold exactly one signature.")
    entry = _object(signatures[0], name, "the signature", {"sig"}, optional={"keyid"})
    if entry.get("keyid") not in (None, ""):
        raise SignatureError(f"{name}: keyid must be empty, got {entry['keyid']!r}.")
    signature = _decode(entry["sig"], name, "sig")
    try:
        is_der = encode_dss_signature(*decode_dss_signature(signature)) == signature
    except ValueError:
        is_der = False
    if not is_der:
        raise SignatureError(f"{name}: the signature is not DER-encoded ECDSA.")
    return _decode(envelope["payload"], name, "payload"), signature


def _read_statement(document: Any, name: str, predicate_type: str) -> Statement:
    fields = _object(document, name, "the statement", {"_type", "subject", "predicateType", "predicate"})
    if fields["_type"] != _STATEMENT_TYPE:
        raise SignatureError(
            f"{name}: the statement's _type must be {_STATEMENT_TYPE!r}, got {fields['_type']!r}."
        )
    if fields["predicateType"] != predicate_type:
        raise SignatureError(f"{name} must state {predicate_type!r}, got {fields['predicateType']!r}.")
    subjects = fields["subject"]
    if not isinstance(subjects, list) or len(subjects) != 1:
        raise SignatureError(f"{name} must have exactly one subject.")
    subject = _object(subjects[0], name, "the subject", {"name", "digest"})
    digest = _object(subject["digest"], name, "the subject's digest", {"sha256"})["sha256"]
    if not isinstance(subject["name"], str) or not isinstance(digest, str):
        raise SignatureError(f"{name}: the subject's name and digest must be strings.")
    if not isinstance(fields["predicate"], dict):
        raise SignatureError(f"{name}: the predicate must be an object.")
    return Statement(subject["name"], digest, fields["predicate"])


def _object(
    value: Any, name: str, what: str, required: Set[str], *, optional: Set[str] = frozenset()
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SignatureError(f"{name}: {what} must be an object.")
    if missing := required - value.keys():
        raise SignatureError(f"{name}: {what} lacks {sorted(missing)}.")
    if unknown := value.keys() - required - optional:
        raise SignatureError(f"{name}: {what} has unknown fields {sorted(unknown)}.")
    return value


def _decode(value: Any, name: str, what: str) -> bytes:
    try:
        decoded = base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise SignatureError(f"{name}: {what} is not base64.") from error
    if base64.b64encode(decoded).decode() != value:
        raise SignatureError(f"{name}: {what} is not in the one canonical base64 form.")
    return decoded
