"""Opening sealed checkpoints: verified first, decrypted second, and every change refused by name."""

import base64
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from securetune.checkpoints import Recipient, Sealer, dsse, open_vault, verify
from securetune.checkpoints import vault as vault_module
from securetune.checkpoints.signing import build_signature
from securetune.errors import AccessDenied, CheckpointError, ConfigError, SignatureError
from securetune.files import canonical_json


def resign(path, key, change):
    """Change the signed manifest and sign everything again, as the holder of ``key`` could."""
    bundle = json.loads((path / "vault.json").read_bytes())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement["predicate"])
    payload = canonical_json(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    signature = key.sign(dsse._pre_authentication(payload), ec.ECDSA(SHA256()))
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    (path / "vault.json").write_bytes(canonical_json(bundle))
    resign_folder(path, key)


def resign_folder(path, key):
    (path / "model.sig").unlink()
    digests = {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }
    (path / "model.sig").write_bytes(build_signature(digests, key, name="checkpoint"))


def test_recipient_reads_everything_back(pristine, opened, tensors):
    with opened(pristine) as vault:
        assert vault.compartments == ("adapter", "optimizer")
        assert vault.names("adapter") == ("adapter_model.safetensors",)
        assert vault.read("adapter", "adapter_model.safetensors") == tensors
        assert vault.read("optimizer", "state.json") == b'{"step":3}'
        assert vault.read_range("adapter", "adapter_model.safetensors", 10, 20) == tensors[10:30]
        assert vault.read_public("ledger.jsonl") == b'{"step":1}\n'
        assert vault.metadata == {"base_model": "tiny"}


def test_passphrase_opens_too(pristine, keys):
    with open_vault(pristine, public_key=keys.owner_public, passphrase=keys.passphrase) as vault:
        assert vault.read("optimizer", "state.json") == b'{"step":3}'


def test_manifest_tells_what_was_sealed(pristine, keys):
    manifest = verify(pristine, keys.owner_public)
    assert (manifest.generation, manifest.epoch) == (1, 1)
    assert manifest.compartments == ("adapter", "optimizer")
    lengths = {entry.name: entry.length for entry in manifest.files if entry.compartment == "optimizer"}
    assert lengths == {"state.json": 10}
    assert len(manifest.digest) == 64


def test_stock_tool_accepts_the_checkpoint(pristine, keys):
    pytest.importorskip("model_signing")
    result = subprocess.run(
        [
            sys.executable, "-m", "model_signing", "verify", "key", str(pristine),
            "--signature", str(pristine / "model.sig"), "--public_key", str(keys.owner_pub),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_sealed_content_does_not_lie_in_clear(pristine, tensors):
    for file in pristine.rglob("*.c256"):
        content = file.read_bytes()
        assert b"lora_A" not in content
        assert b"base_model" not in content
        assert tensors[-40:] not in content


def test_wrong_key_and_wrong_passphrase_are_refused_with_one_message(pristine, opened, keys):
    messages = set()
    for credentials in ({"identity": keys.stranger}, {"identity": None, "passphrase": b"wrong"}):
        with pytest.raises(AccessDenied, match="no key slot could be opened") as caught:
            opened(pristine, **credentials)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_opening_without_any_credential_is_refused(pristine, opened):
    with pytest.raises(ConfigError, match=r"identity .* or a passphrase"):
        opened(pristine, identity=None)


def test_another_owners_key_is_refused_before_anything_is_unwrapped(pristine, opened, keys, monkeypatch):
    monkeypatch.setattr(vault_module, "open_keyring", lambda *_, **__: pytest.fail("unwrapped first"))
    with pytest.raises(SignatureError, match="signed by another key"):
        opened(pristine, public_key=keys.other_owner_public)


def test_key_inside_the_checkpoint_is_never_used(sealed, opened, keys):
    # an attacker signs everything with a key of their own and puts that key beside it
    shutil.copy(keys.other_owner_pub, sealed / "owner.pub")
    resign(sealed, keys.other_owner, lambda predicate: None)
    with pytest.raises(SignatureError, match=r"signed by another key|signature does not match"):
        opened(sealed)


def test_changed_byte_anywhere_is_refused_and_the_file_named(pristine, tmp_path, keys):
    for file in sorted(path for path in pristine.rglob("*") if path.is_file()):
        name = file.relative_to(pristine).as_posix()
        content = file.read_bytes()
        for position in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            copy = shutil.copytree(pristine, tmp_path / f"{file.name}-{position}")
            changed = bytearray(content)
            changed[position] ^= 0x01
            (copy / name).write_bytes(changed)
            with pytest.raises(SignatureError, match=re.escape(name)):
                verify(copy, keys.owner_public)


@pytest.mark.parametrize("name", ["vault.json", "model.sig"])
def test_every_byte_of_a_signature_file_matters(name, pristine, keys):
    content = (pristine / name).read_bytes()
    bundle = json.loads(content)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 0x01
        with pytest.raises(SignatureError):
            dsse.verify_statement(
                bytes(changed), keys.owner_public, predicate_type=statement["predicateType"], name=name
            )


@pytest.mark.parametrize("change", ["append", "cut", "remove"])
def test_file_of_another_length_is_refused(change, pristine, tmp_path, keys):
    for file in sorted(path for path in pristine.rglob("*") if path.is_file()):
        name = file.relative_to(pristine).as_posix()
        copy = shutil.copytree(pristine, tmp_path / file.name)
        if change == "remove":
            (copy / name).unlink()
        else:
            content = file.read_bytes()
            (copy / name).write_bytes(content + b"x" if change == "append" else content[:-1])
        with pytest.raises(CheckpointError, match=re.escape(name)):
            verify(copy, keys.owner_public)


@pytest.mark.parametrize(
    "name", ["notes.txt", "shards/adapter.extra.json.c256", ".git/config", "attestations/a.json", "x/y"]
)
def test_planted_file_is_refused(name, sealed, keys):
    (sealed / name).parent.mkdir(exist_ok=True)
    (sealed / name).write_text("x")
    with pytest.raises(SignatureError, match=f"{re.escape(name)} is not covered"):
        verify(sealed, keys.owner_public)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "rng_state.pth", "shards/x.pt", "a.pkl"])
def test_folder_with_a_pickle_is_refused(name, sealed, keys):
    (sealed / name).write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is in a format that can hold a pickle"):
        verify(sealed, keys.owner_public)


def test_plain_safetensors_folder_is_refused_with_the_reason(tmp_path, keys, tensors, opened):
    (tmp_path / "model.safetensors").write_bytes(tensors)
    for call in (lambda: verify(tmp_path, keys.owner_public), lambda: opened(tmp_path)):
        with pytest.raises(
            CheckpointError,
            match=r"no vault\.json \(found: model\.safetensors\).*Plain files are not accepted",
        ):
            call()


def test_plain_file_in_place_of_a_sealed_one_is_refused(sealed, keys, tensors):
    # even the owner cannot make a reader accept an unsealed file under a sealed name
    shard = sealed / "shards" / "adapter.adapter_model.safetensors.c256"
    shard.write_bytes(tensors)

    def declare(predicate):
        entry = next(entry for entry in predicate["files"] if entry["comp"] == "adapter")
        entry.update(clen=len(tensors), c_sha256=hashlib.sha256(tensors).hexdigest())

    resign(sealed, keys.owner, declare)
    with pytest.raises(CheckpointError):
        verify(sealed, keys.owner_public)


def test_plain_weights_among_the_public_files_are_refused(sealed, keys, tensors):
    (sealed / "model.safetensors").write_bytes(tensors)

    def declare(predicate):
        predicate["public"].append(
            {
                "name": "model.safetensors",
                "len": len(tensors),
                "sha256": hashlib.sha256(tensors).hexdigest(),
            }
        )

    resign(sealed, keys.owner, declare)
    with pytest.raises(CheckpointError):
        verify(sealed, keys.owner_public)


@pytest.mark.parametrize("path", ["missing", "a-file"])
def test_path_that_is_no_folder_is_refused(path, tmp_path, keys):
    (tmp_path / "a-file").touch()
    with pytest.raises(CheckpointError, match="not a folder"):
        verify(tmp_path / path, keys.owner_public)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.update(v="securetune.vault/2"),
            r"format 'securetune.vault/2'.*reads 'securetune.vault/1' only",
        ),
        (lambda p: p.update(v="securetune.vault/0"), "format"),
        (lambda p: p.pop("v"), "format None"),
        (lambda p: p.update(suite="aes-cbc"), "suite"),
        (lambda p: p.update(expires="2030-01-01T00:00:00Z"), "expires"),
        (lambda p: p["files"][0].update(role="x"), "role"),
        (lambda p: p["files"][0].update(comp="other"), "comp"),
        (lambda p: p["files"][0].update(name="../x"), "not allowed"),
        (lambda p: p["files"][0].update(clen=-1), "clen"),
        (lambda p: p["files"][0].update(clen=57), "57 bytes"),
        (lambda p: p["files"][0].update(clen=1.0), "1 bytes"),
        (lambda p: p["public"][0].update(name="model.sig"), "reserved"),
        (lambda p: p["public"][0].update(name="policy.json"), "reserved"),
        (lambda p: p["public"].append(p["public"][0]), "twice"),
        (lambda p: p["files"].append(p["files"][0]), "twice"),
        (lambda p: p.update(files=[f for f in p["files"] if f["comp"] != "meta"]), "metadata"),
        (lambda p: p["keyring"].update(name="other.json"), "keyring"),
        (lambda p: p.update(generation=0), "generation"),
        (lambda p: p.update(ckpt="x"), "ckpt"),
        (lambda p: p.update(ckpt="0" * 8 + p["ckpt"][8:]), "subject"),
        (lambda p: p["public"][0].update(sha256="0" * 64), "subject"),
    ],
)
def test_manifest_is_refused_although_the_owner_signed_it(change, message, sealed, keys):
    resign(sealed, keys.owner, change)
    with pytest.raises(CheckpointError, match=message):
        verify(sealed, keys.owner_public)


def test_file_that_only_model_sig_lists_is_refused(sealed, keys):
    (sealed / "extra.txt").write_text("x")
    resign_folder(sealed, keys.owner)
    with pytest.raises(SignatureError, match=r"do not list the same files: \['extra.txt'\]"):
        verify(sealed, keys.owner_public)


def test_statement_of_another_kind_is_no_vault(sealed, keys):
    shutil.copy(sealed / "model.sig", sealed / "vault.json")
    with pytest.raises(SignatureError, match="must state"):
        verify(sealed, keys.owner_public)


def test_vault_with_other_spacing_is_refused(sealed, keys):
    document = json.loads((sealed / "vault.json").read_bytes())
    (sealed / "vault.json").write_text(json.dumps(document))
    with pytest.raises(SignatureError, match="canonical"):
        verify(sealed, keys.owner_public)


def test_shard_of_another_checkpoint_does_not_open(sealed, seal_small, opened, tmp_path, keys):
    # the same name, length and owner, and even a signature over the mix: the key of another save does not fit
    seal_small(tmp_path / "other", sealed={"optimizer": {"state.json": b'{"step":9}'}})
    shard = "shards/optimizer.state.json.c256"
    shutil.copy(tmp_path / "other" / shard, sealed / shard)
    with pytest.raises(SignatureError, match=re.escape(shard)):
        opened(sealed)


@pytest.mark.parametrize(
    ("field", "value"),
    [("checkpoint_id", "0" * 36), ("epoch", 2), ("compartment", "rng"), ("name", "other"), ("length", 11)],
)
def test_every_part_of_the_context_is_bound(field, value, pristine, opened):
    parts = ["checkpoint_id", "epoch", "compartment", "name", "length"]
    with opened(pristine) as vault:
        entry = vault._entry("optimizer", "state.json")
        right = [vault.manifest.checkpoint_id, vault.manifest.epoch, "optimizer", "state.json", 10]
        message = (pristine / entry.path).read_bytes()
        assert vault_module.file_context(*right) == vault._context(entry)
        right[parts.index(field)] = value
        with pytest.raises(CheckpointError):
            vault_module.decrypt_stream(
                io.BytesIO(message),
                io.BytesIO(),
                key=vault._keys["optimizer"],
                context=vault_module.file_context(*right),
            )


def test_keyring_from_another_save_is_refused(sealed, seal_small, tmp_path, keys):
    seal_small(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "keyring.json", sealed / "keyring.json")
    with pytest.raises(SignatureError, match=r"keyring\.json"):
        verify(sealed, keys.owner_public)


def test_evaluator_reads_only_the_granted_compartment(seal_small, tmp_path, keys, opened):
    seal_small(
        tmp_path / "checkpoint",
        recipients=[keys.recipient_public, Recipient(keys.evaluator_public, frozenset({"adapter"}))],
    )
    with opened(tmp_path / "checkpoint", identity=keys.evaluator) as vault:
        assert vault.compartments == ("adapter",)
        assert vault.read("adapter", "adapter_model.safetensors")
        with pytest.raises(AccessDenied, match="optimizer were not opened"):
            vault.read("optimizer", "state.json")
    with pytest.raises(AccessDenied, match="no key slot could be opened"):
        opened(tmp_path / "checkpoint", identity=keys.evaluator, compartments=["optimizer"])


def test_unknown_compartment_is_refused(pristine, opened):
    with pytest.raises(ConfigError, match=r"unknown compartments \['wieghts'\]"):
        opened(pristine, compartments=["wieghts"])


def test_missing_file_name_lists_what_there_is(pristine, opened):
    with (
        opened(pristine) as vault,
        pytest.raises(CheckpointError, match=r"no file 'x'.*It has: state\.json"),
    ):
        vault.read("optimizer", "x")


def test_file_changed_after_verification_is_refused(sealed, opened):
    with opened(sealed) as vault:
        for name in ("shards/optimizer.state.json.c256", "README.md"):
            content = bytearray((sealed / name).read_bytes())
            content[-1] ^= 1
            with (sealed / name).open("r+b") as file:
                file.write(content)
        with pytest.raises(CheckpointError, match=r"optimizer\.state\.json\.c256"):
            vault.read("optimizer", "state.json")
        with pytest.raises(CheckpointError, match=r"optimizer\.state\.json\.c256|chunk|message"):
            vault.read_range("optimizer", "state.json", 0, 5)
        with pytest.raises(SignatureError, match=r"README\.md"):
            vault.read_public("README.md")


def test_file_swapped_after_verification_is_not_read(sealed, opened):
    shard = sealed / "shards" / "optimizer.state.json.c256"
    with opened(sealed) as vault:
        shard.unlink()
        shard.write_bytes(b"evil")
        assert vault.read("optimizer", "state.json") == b'{"step":3}'


def test_checkpoint_stays_readable_while_it_is_replaced(sealed, seal_small, opened):
    with opened(sealed) as vault:
        seal_small(sealed, sealed={"optimizer": {"state.json": b"new"}})
        assert vault.read("optimizer", "state.json") == b'{"step":3}'
    with opened(sealed) as vault:
        assert vault.read("optimizer", "state.json") == b"new"


def test_readers_see_whole_checkpoints_while_a_writer_saves(tmp_path, keys, opened):
    path = tmp_path / "checkpoint"
    errors = []
    with Sealer(signing_key=keys.owner, recipients=[keys.recipient_public]) as sealer:
        sealer.seal(path, {"optimizer": {"a.json": b"0", "b.json": b"0"}})
        done = threading.Event()

        def read():
            try:
                while not done.is_set():
                    with opened(path) as vault:
                        assert vault.read("optimizer", "a.json") == vault.read("optimizer", "b.json")
            except Exception as error:
                errors.append(error)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for number in range(1, 15):
            content = str(number).encode()
            sealer.seal(path, {"optimizer": {"a.json": content, "b.json": content}})
        done.set()
        for reader in readers:
            reader.join()
    assert errors == []


def test_symbolic_link_in_a_checkpoint_is_refused(sealed, keys):
    (sealed / "README.md").rename(sealed.parent / "README.md")
    (sealed / "README.md").symlink_to(sealed.parent / "README.md")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(sealed, keys.owner_public)


def test_huge_sparse_file_is_refused_without_reading_it(sealed, keys):
    os.truncate(sealed / "shards" / "optimizer.state.json.c256", 1 << 40)
    with pytest.raises(SignatureError, match=r"optimizer\.state\.json\.c256"):
        verify(sealed, keys.owner_public)


def test_repr_and_pickle_give_no_key_away(pristine, opened):
    with opened(pristine) as vault:
        secrets = [bytes(key).hex() for key in vault._keys.values()]
        assert not any(secret in repr(vault) for secret in secrets)
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(vault)


def test_close_overwrites_the_keys(pristine, opened):
    vault = opened(pristine)
    held = list(vault._keys.values())
    vault.close()
    assert all(not any(key) for key in held)
    with pytest.raises(AccessDenied):
        vault.read("optimizer", "state.json")
