"""OMS signatures: the stock tool and ours accept each other, and ours refuses more than the stock one."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from securetune.checkpoints import dsse, sign_folder, signing, verify_folder
from securetune.errors import CheckpointError, SignatureError
from securetune.files import canonical_json

VECTORS = Path(__file__).resolve().parents[3].parent / "shared" / "vectors" / "model_signing"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason=f"the official vectors are not in {VECTORS}")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    (made / "sub" / "deeper").mkdir(parents=True)
    (made / "a.json").write_text("{}")
    (made / "B.txt").write_text("b")
    (made / "empty").touch()
    (made / "sub" / "deeper" / "weights.safetensors").write_bytes(bytes(100_000))
    return made


@pytest.fixture
def signed(folder, keys):
    sign_folder(folder, keys.owner)
    return folder


def resign(
    folder, key, change, *, statement_change=lambda statement: None, bundle_change=lambda bundle: None
):
    """Apply changes to ``model.sig`` and sign the result again, as the holder of ``key`` could."""
    path = folder / "model.sig"
    bundle = json.loads(path.read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement["predicate"])
    statement_change(statement)
    payload = json.dumps(statement).encode()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    signature = key.sign(dsse._pre_authentication(payload), ec.ECDSA(SHA256()))
    bundle["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(signature).decode(), "keyid": ""}]
    bundle_change(bundle)
    path.write_text(json.dumps(bundle))


def fix_root(statement):
    digests = {entry["name"]: entry["digest"] for entry in statement["predicate"]["resources"]}
    statement["subject"][0]["digest"]["sha256"] = signing.root_digest(digests)


def test_signed_folder_verifies(signed, keys):
    assert set(verify_folder(signed, keys.owner_public)) == {
        "B.txt", "a.json", "empty", "sub/deeper/weights.safetensors",
    }  # fmt: skip


def test_signature_is_made_by_the_same_rules_after_a_rename(signed, keys, tmp_path):
    moved = signed.rename(tmp_path / "other")
    verify_folder(moved, keys.owner_public)


def stock_verify(folder, public):
    return subprocess.run(
        [
            sys.executable, "-m", "model_signing", "verify", "key", str(folder),
            "--signature", str(folder / "model.sig"), "--public_key", str(public),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_stock_command_accepts_our_signature_and_refuses_a_changed_file(signed, keys):
    pytest.importorskip("model_signing")
    result = stock_verify(signed, keys.owner_pub)
    assert result.returncode == 0, result.stdout + result.stderr
    (signed / "a.json").write_text("[]")
    assert stock_verify(signed, keys.owner_pub).returncode != 0


def test_we_accept_the_stock_signature(folder, keys):
    stock = pytest.importorskip("model_signing.signing")
    stock.Config().use_elliptic_key_signer(private_key=keys.folder / "owner").sign(
        folder, folder / "model.sig"
    )
    assert "a.json" in verify_folder(folder, keys.owner_public)


def test_stock_library_accepts_our_signature_with_an_ignored_folder(folder, keys):
    stock = pytest.importorskip("model_signing.verifying")
    (folder / "attestations").mkdir()
    (folder / "attestations" / "x.sigstore.json").write_text("{}")
    sign_folder(folder, keys.owner, ignore=["attestations"])
    stock.Config().use_elliptic_key_verifier(public_key=keys.owner_pub).verify(folder, folder / "model.sig")
    verify_folder(folder, keys.owner_public, ignore=["attestations"])
    with pytest.raises(SignatureError, match=r"x\.sigstore\.json is not covered"):
        verify_folder(folder, keys.owner_public)


def test_published_folder_with_a_signed_checkpoint_inside_verifies(folder, keys):
    stock = pytest.importorskip("model_signing.verifying")
    sign_folder(folder / "sub", keys.owner)
    sign_folder(folder, keys.owner)
    stock.Config().use_elliptic_key_verifier(public_key=keys.owner_pub).verify(folder, folder / "model.sig")
    assert "sub/model.sig" in verify_folder(folder, keys.owner_public)


def test_ignoring_more_than_was_signed_does_not_help(signed, keys):
    (signed / "evil").mkdir()
    (signed / "evil" / "weights.safetensors").touch()
    with pytest.raises(SignatureError, match="not covered"):
        verify_folder(signed, keys.owner_public, ignore=["evil"])


@needs_vectors
def test_our_bundle_fits_the_official_schemas(signed):
    jsonschema = pytest.importorskip("jsonschema")
    registry = pytest.importorskip("referencing")
    schemas = {
        path.name.split(".")[0]: json.loads(path.read_text())
        for path in (VECTORS / "schemas" / "v1.0").glob("*.schema.json")
    }
    resources = registry.Registry().with_resources(
        (schema["$id"], registry.Resource.from_contents(schema)) for schema in schemas.values()
    )
    bundle = json.loads((signed / "model.sig").read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    jsonschema.Draft202012Validator(schemas["bundle"], registry=resources).validate(bundle)
    jsonschema.Draft202012Validator(schemas["statement"], registry=resources).validate(statement)


@needs_vectors
@pytest.mark.parametrize("kind", ["valid", "invalid", "invalid-payload"])
def test_official_bundles_of_other_signers_are_refused(kind, folder, keys):
    # the vectors come without the public keys that made them: a valid one must fail at the key, not before
    for path in (VECTORS / "test-vectors" / "v1.0" / kind).glob("*.json"):
        (folder / "model.sig").write_bytes(path.read_bytes())
        expected = "signed by another key" if path.name == "key.bundle.json" else None
        with pytest.raises(SignatureError, match=expected):
            verify_folder(folder, keys.owner_public)


@needs_vectors
def test_payload_of_the_official_key_bundle_is_understood(keys, tmp_path):
    bundle = json.loads((VECTORS / "test-vectors/v1.0/valid/key.bundle.json").read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    digests = signing._read_resources(statement["predicate"]["resources"], tmp_path)
    assert signing.root_digest(digests) == statement["subject"][0]["digest"]["sha256"]
    assert "model.sig" not in signing._read_serialization(statement["predicate"]["serialization"], tmp_path)


@pytest.mark.parametrize("name", ["a.json", "sub/deeper/weights.safetensors", "empty"])
def test_changed_file_is_named(name, signed, keys):
    with (signed / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(SignatureError, match=f"{name} does not match"):
        verify_folder(signed, keys.owner_public)


def test_missing_file_is_named(signed, keys):
    (signed / "B.txt").unlink()
    with pytest.raises(SignatureError, match=r"B\.txt is missing"):
        verify_folder(signed, keys.owner_public)


@pytest.mark.parametrize(
    "name",
    ["new.txt", ".git/config", ".github/x.py", ".gitattributes", "attestations/x.json", "sub/model.sig"],
)
def test_planted_file_is_refused(name, signed, keys):
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).touch()
    with pytest.raises(SignatureError, match=f"{name} is not covered"):
        verify_folder(signed, keys.owner_public)


def test_folder_without_a_signature_is_refused(folder, keys):
    with pytest.raises(SignatureError, match=r"has no model\.sig"):
        verify_folder(folder, keys.owner_public)


def test_signature_of_another_owner_is_refused(signed, keys):
    with pytest.raises(SignatureError, match="signed by another key"):
        verify_folder(signed, keys.other_owner_public)


def test_signature_made_by_another_key_under_our_hint_is_refused(signed, keys):
    resign(signed, keys.other_owner, lambda predicate: None)
    with pytest.raises(SignatureError, match="signature does not match"):
        verify_folder(signed, keys.owner_public)


@pytest.mark.parametrize("name", [".gitattributes", ".git/config", ".github/workflow.yml"])
def test_git_files_cannot_be_signed(name, folder, keys):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(CheckpointError, match="stock verifier ignores git files"):
        sign_folder(folder, keys.owner)


@pytest.mark.parametrize("name", ["x.", "x ", "CON", "a\\b", "cafe\u0301", "A.JSON", "SUB/x"])
def test_unsafe_or_colliding_name_cannot_be_signed(name, folder, keys):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(CheckpointError):
        sign_folder(folder, keys.owner)


def rename_resource(name):
    def change(predicate):
        predicate["resources"][0]["name"] = name
        predicate["resources"].sort(key=lambda entry: entry["name"])

    return change


BAD_PREDICATES = {
    "unsorted": lambda p: p["resources"].reverse(),
    "name twice": lambda p: p["resources"].insert(0, dict(p["resources"][0])),
    "name twice, other digest": lambda p: p["resources"].insert(1, p["resources"][0] | {"digest": "0" * 64}),
    "outside": rename_resource("../secret.txt"),
    "absolute": rename_resource("/etc/passwd"),
    "double slash": rename_resource("a//b"),
    "dot": rename_resource("a/./b"),
    "drive": rename_resource("C:\\x"),
    "trailing dot": rename_resource("x."),
    "device": rename_resource("CON"),
    "not NFC": rename_resource("cafe\u0301"),
    "case collision": rename_resource("A.json"),
    "other hash": lambda p: p["resources"][0].update(algorithm="blake3"),
    "short digest": lambda p: p["resources"][0].update(digest="00"),
    "extra resource field": lambda p: p["resources"][0].update(size=1),
    "shards": lambda p: p["serialization"].update(method="shards", shard_size=1000),
    "symlinks": lambda p: p["serialization"].update(allow_symlinks=True),
    "symlinks as a number": lambda p: p["serialization"].update(allow_symlinks=0),
    "extra predicate field": lambda p: p.update(more=1),
    "ignore paths not a list": lambda p: p["serialization"].update(ignore_paths="a.json"),
}


@pytest.mark.parametrize("change", BAD_PREDICATES.values(), ids=BAD_PREDICATES.keys())
def test_bad_predicate_is_refused_although_the_owner_signed_it(change, signed, keys):
    resign(signed, keys.owner, change, statement_change=fix_root)
    with pytest.raises(SignatureError):
        verify_folder(signed, keys.owner_public)


def test_ignored_weights_are_refused(signed, keys):
    # the stock verifier accepts whatever lies under a signed ignore path
    def change(predicate):
        predicate["serialization"]["ignore_paths"] = ["sub", "model.sig"]
        predicate["resources"] = [r for r in predicate["resources"] if not r["name"].startswith("sub/")]

    resign(signed, keys.owner, change, statement_change=fix_root)
    with pytest.raises(SignatureError, match="not covered"):
        verify_folder(signed, keys.owner_public)


BAD_STATEMENTS = {
    "root digest": lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
    "other predicate type": lambda s: s.update(predicateType="https://slsa.dev/provenance/v1"),
    "legacy predicate": lambda s: s.update(predicateType="https://model_signing/Digests/v0.1"),
    "statement type": lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"),
    "two subjects": lambda s: s["subject"].append(s["subject"][0]),
    "no subject": lambda s: s.update(subject=[]),
    "extra field": lambda s: s.update(more=1),
    "predicate a list": lambda s: s.update(predicate=[]),
}


@pytest.mark.parametrize("change", BAD_STATEMENTS.values(), ids=BAD_STATEMENTS.keys())
def test_bad_statement_is_refused_although_the_owner_signed_it(change, signed, keys):
    resign(signed, keys.owner, lambda predicate: None, statement_change=change)
    with pytest.raises(SignatureError):
        verify_folder(signed, keys.owner_public)


def signature_of(bundle):
    return base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"])


def set_signature(bundle, raw):
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(raw).decode()


def make_raw_signature(bundle):
    r, s = decode_dss_signature(signature_of(bundle))
    set_signature(bundle, r.to_bytes(32, "big") + s.to_bytes(32, "big"))


BAD_BUNDLES = {
    "no signature": lambda b: b["dsseEnvelope"].update(signatures=[]),
    "two signatures": lambda b: b["dsseEnvelope"]["signatures"].append(b["dsseEnvelope"]["signatures"][0]),
    "garbage first": lambda b: b["dsseEnvelope"]["signatures"].insert(0, {"sig": "AAAA"}),
    "keyid": lambda b: b["dsseEnvelope"]["signatures"][0].update(keyid="someone"),
    "payload type": lambda b: b["dsseEnvelope"].update(payloadType="application/json"),
    "media type": lambda b: b.update(mediaType="application/vnd.dev.sigstore.bundle+json;version=0.2"),
    "no hint": lambda b: b["verificationMaterial"].update(publicKey={}),
    "empty hint": lambda b: b["verificationMaterial"]["publicKey"].update(hint=""),
    "raw key": lambda b: b["verificationMaterial"].update(publicKey={"rawBytes": "AAAA"}),
    "certificate": lambda b: b["verificationMaterial"].update(certificate={"rawBytes": "AAAA"}),
    "key location": lambda b: b["verificationMaterial"]["publicKey"].update(jku="file:///tmp/evil.pem"),
    "log entries": lambda b: b["verificationMaterial"].update(tlogEntries=[{}]),
    "extra field": lambda b: b.update(more=1),
    "signature not DER": make_raw_signature,
    "bytes after the signature": lambda b: set_signature(b, signature_of(b) + b"\0"),
    "payload not base64": lambda b: b["dsseEnvelope"].update(payload="***"),
    "payload base64 with a line break": lambda b: b["dsseEnvelope"].update(
        payload=b["dsseEnvelope"]["payload"] + "\n"
    ),
    "payload changed": lambda b: b["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode()),
    "envelope a list": lambda b: b.update(dsseEnvelope=[]),
}


@pytest.mark.parametrize("change", BAD_BUNDLES.values(), ids=BAD_BUNDLES.keys())
def test_bad_bundle_is_refused(change, signed, keys):
    resign(signed, keys.owner, lambda predicate: None, bundle_change=change)
    with pytest.raises(SignatureError):
        verify_folder(signed, keys.owner_public)


@pytest.mark.parametrize("target", ["bundle", "payload"])
def test_duplicate_json_key_is_refused(target, signed, keys):
    path = signed / "model.sig"
    if target == "bundle":
        path.write_bytes(b'{"mediaType":"x",' + path.read_bytes()[1:])
    else:
        bundle = json.loads(path.read_bytes())
        payload = b'{"_type":"x",' + base64.b64decode(bundle["dsseEnvelope"]["payload"])[1:]
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
        set_signature(bundle, keys.owner.sign(dsse._pre_authentication(payload), ec.ECDSA(SHA256())))
        path.write_bytes(canonical_json(bundle))
    with pytest.raises(SignatureError, match="twice"):
        verify_folder(signed, keys.owner_public)


def test_old_encoding_of_the_signed_bytes_is_refused(signed, keys):
    # releases before 1.0 signed a string with escapes in it; the stock verifier still accepts that
    path = signed / "model.sig"
    bundle = json.loads(path.read_bytes())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    old = f"DSSEV1 {len(dsse._PAYLOAD_TYPE)} {dsse._PAYLOAD_TYPE} {len(payload)} {payload!r}".encode()
    set_signature(bundle, keys.owner.sign(old, ec.ECDSA(SHA256())))
    path.write_bytes(canonical_json(bundle))
    with pytest.raises(SignatureError, match="signature does not match"):
        verify_folder(signed, keys.owner_public)


def test_symbolic_link_is_refused(signed, keys):
    (signed / "a.json").rename(signed.parent / "moved")
    (signed / "a.json").symlink_to(signed.parent / "moved")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify_folder(signed, keys.owner_public)
