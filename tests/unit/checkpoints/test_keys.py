"""Key files: modes, wrong kinds, and files that others can read."""

import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from securetune.checkpoints import keys as key_files
from securetune.errors import ConfigError


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("generate", [key_files.generate_recipient_key, key_files.generate_signing_key])
def test_private_key_is_for_its_owner_only_whatever_the_umask(generate, tmp_path):
    before = os.umask(0)
    try:
        public = generate(tmp_path / "key")
    finally:
        os.umask(before)
    assert public == tmp_path / "key.pub"
    assert (mode(tmp_path / "key"), mode(public)) == (0o600, 0o644)


@pytest.mark.parametrize("existing", ["key", "key.pub"])
def test_existing_key_is_never_overwritten(existing, tmp_path):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match="never overwritten"):
        key_files.generate_signing_key(tmp_path / "key")
    assert [file.name for file in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


def test_loaded_pairs_belong_together(keys):
    assert key_files.load_recipient(keys.recipient_pub) == keys.recipient_public
    assert key_files.load_public_key(keys.owner_pub) == keys.owner_public


@pytest.mark.parametrize("others", [0o640, 0o604, 0o620, 0o666])
@pytest.mark.parametrize("loader", ["load_identity", "load_signing_key", "load_passphrase"])
def test_secret_that_others_can_read_is_refused(loader, others, tmp_path):
    path = tmp_path / "secret"
    path.write_text("x")
    path.chmod(others)
    with pytest.raises(ConfigError, match=f"mode {others:04o}.*chmod 600"):
        getattr(key_files, loader)(path)


def test_missing_key_file_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere does not exist.*keygen"):
        key_files.load_identity(tmp_path / "nowhere")


def test_key_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        key_files.generate_signing_key(tmp_path / "nowhere" / "key")


def test_folder_in_place_of_a_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a regular file"):
        key_files.load_public_key(tmp_path)


@pytest.mark.parametrize(
    ("loader", "file"),
    [
        ("load_identity", "owner"),
        ("load_signing_key", "recipient"),
        ("load_recipient", "owner_pub"),
        ("load_public_key", "recipient_pub"),
    ],
)
def test_key_of_the_other_kind_is_refused(loader, file, keys):
    path = getattr(keys, file) if file.endswith("pub") else keys.folder / file
    with pytest.raises(ConfigError, match="is needed"):
        getattr(key_files, loader)(path)


def test_private_key_in_place_of_a_public_one_is_refused(keys):
    with pytest.raises(ConfigError, match="holds a private key"):
        key_files.load_public_key(keys.folder / "owner")


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()]
)
def test_signing_key_of_another_algorithm_is_refused(key, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="ECDSA P-256"):
        key_files.load_signing_key(path)


def test_key_with_a_password_is_refused(keys, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(
        keys.owner.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"pw"),
        )
    )
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="password"):
        key_files.load_signing_key(path)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_garbage_is_not_a_public_key(content, tmp_path):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match="not a PEM public key"):
        key_files.load_public_key(tmp_path / "key")


@pytest.mark.parametrize(
    ("content", "passphrase"),
    [
        (b"word\n", b"word"),
        (b"word\r\n", b"word"),
        (b"word", b"word"),
        (b"word\n\n", b"word\n"),
        (b" w ", b" w "),
    ],
)
def test_passphrase_file_loses_one_line_break(content, passphrase, tmp_path):
    path = tmp_path / "pass"
    path.write_bytes(content)
    path.chmod(0o600)
    assert key_files.load_passphrase(path) == passphrase


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 5000])
def test_passphrase_of_a_bad_length_is_refused(content, tmp_path):
    path = tmp_path / "pass"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="1 to 4096 bytes"):
        key_files.load_passphrase(path)


def test_repr_shows_no_key(keys):
    secret = keys.recipient.private_bytes_raw()
    assert secret.hex() not in repr(keys.recipient)
