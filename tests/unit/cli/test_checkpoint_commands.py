"""``checkpoint keygen``, ``seal``, ``open`` and ``verify``, end to end on small files."""

import json
import stat
import sys

import pytest


@pytest.fixture
def keys(run_cli, tmp_path):
    assert run_cli("checkpoint", "keygen", "keys", "--passphrase").code == 0
    return tmp_path / "keys"


@pytest.fixture
def sealed(run_cli, tmp_path, keys):
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "notes.json").write_text(json.dumps({"a": 1}))
    outcome = run_cli(
        "checkpoint",
        "seal",
        "adapter",
        "sealed",
        "--signing-key",
        keys / "signing.key",
        "--recipient",
        keys / "recipient.key.pub",
        "--passphrase-file",
        keys / "passphrase.txt",
    )
    assert outcome.code == 0, outcome.err
    return tmp_path / "sealed"


def test_keygen_makes_private_files_and_says_what_to_do(run_cli, tmp_path):
    outcome = run_cli("checkpoint", "keygen", "keys", "--passphrase")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys").iterdir()}
    assert modes == {
        "signing.key": 0o600,
        "signing.key.pub": 0o644,
        "recipient.key": 0o600,
        "recipient.key.pub": 0o644,
        "passphrase.txt": 0o600,
    }
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert "  recipients: [keys/recipient.key.pub]\n  signing_key: keys/signing.key" in outcome.out


@pytest.mark.usefixtures("keys")
def test_keygen_never_replaces_a_key(run_cli):
    outcome = run_cli("checkpoint", "keygen", "keys")
    assert outcome.code == 2
    assert "a key is never overwritten" in outcome.err


def test_verify_needs_the_public_key_alone(run_cli, keys, sealed):
    outcome = run_cli("checkpoint", "verify", sealed, "--public-key", keys / "signing.key.pub")
    assert outcome.code == 0, outcome.err
    assert "signatures valid" in outcome.out


@pytest.mark.parametrize("way", ["identity", "passphrase"])
def test_open_returns_what_was_sealed(run_cli, tmp_path, keys, sealed, way):
    key = {"identity": ("--identity", keys / "recipient.key")}.get(
        way, ("--passphrase-file", keys / "passphrase.txt")
    )
    outcome = run_cli("checkpoint", "open", sealed, "opened", "--public-key", keys / "signing.key.pub", *key)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "opened" / "weights" / "notes.json").read_text()) == {"a": 1}
    assert "weights/  notes.json" in outcome.out


def test_a_wrong_passphrase_opens_nothing(run_cli, tmp_path, keys, sealed):
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("wrong\n")
    wrong.chmod(0o600)
    outcome = run_cli(
        "checkpoint",
        "open",
        sealed,
        "opened",
        "--public-key",
        keys / "signing.key.pub",
        "--passphrase-file",
        wrong,
    )
    assert outcome.code == 2
    assert outcome.err.startswith("AccessDenied: ")
    assert not (tmp_path / "opened").exists()


def test_a_changed_byte_is_refused_by_name(run_cli, keys, sealed):
    shard = next((sealed / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    outcome = run_cli("checkpoint", "verify", sealed, "--public-key", keys / "signing.key.pub")
    assert outcome.code == 2
    assert outcome.err.startswith("SignatureError: ")
    assert shard.name in outcome.err


def test_a_pickle_in_the_folder_is_refused(run_cli, keys, sealed):
    (sealed / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    outcome = run_cli("checkpoint", "verify", sealed, "--public-key", keys / "signing.key.pub")
    assert outcome.code == 2
    assert "pytorch_model.bin" in outcome.err


def test_nobody_is_asked_without_a_terminal(run_cli, keys, sealed, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    outcome = run_cli("checkpoint", "open", sealed, "opened", "--public-key", keys / "signing.key.pub")
    assert outcome.code == 2
    assert "give --identity FILE or --passphrase-file FILE" in outcome.err


def test_seal_puts_folders_into_their_compartments(run_cli, tmp_path, keys):
    for name in ("adapter", "evidence"):
        (tmp_path / "files" / name).mkdir(parents=True)
        (tmp_path / "files" / name / "x.json").write_text("{}")
    arguments = ("--signing-key", keys / "signing.key", "--recipient", keys / "recipient.key.pub")
    outcome = run_cli("checkpoint", "seal", "files", "sealed", *arguments)
    assert outcome.code == 0, outcome.err
    assert "(adapter, evidence)" in outcome.out
    (tmp_path / "files" / "other").mkdir()
    outcome = run_cli("checkpoint", "seal", "files", "sealed2", *arguments)
    assert "the only folders sealed are those named" in outcome.err


def test_seal_refuses_a_pickle(run_cli, tmp_path, keys):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.pt").write_bytes(b"\x80\x04.")
    arguments = ("--signing-key", keys / "signing.key", "--recipient", keys / "recipient.key.pub")
    outcome = run_cli("checkpoint", "seal", "files", "sealed", *arguments)
    assert outcome.code == 2
    assert "model.pt" in outcome.err
    assert not (tmp_path / "sealed").exists()
