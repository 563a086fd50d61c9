"""Keys, a cheap passphrase cost and a small sealed checkpoint for the tests of this folder."""

import json
import shutil
from types import SimpleNamespace

import pytest

from securetune import checkpoints
from securetune.checkpoints import Argon2Params, Sealer, open_vault

PASSPHRASE = b"correct horse"


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Key files and loaded keys: the owner, another owner, a recipient and a stranger."""
    folder = tmp_path_factory.mktemp("keys")
    made = SimpleNamespace(folder=folder, passphrase=PASSPHRASE)
    for name in ("owner", "other_owner"):
        made.__dict__[f"{name}_pub"] = checkpoints.generate_signing_key(folder / name)
        made.__dict__[name] = checkpoints.load_signing_key(folder / name)
        made.__dict__[f"{name}_public"] = made.__dict__[name].public_key()
    for name in ("recipient", "evaluator", "stranger"):
        made.__dict__[f"{name}_pub"] = checkpoints.generate_recipient_key(folder / name)
        made.__dict__[name] = checkpoints.load_identity(folder / name)
        made.__dict__[f"{name}_public"] = made.__dict__[name].public_key()
    return made


@pytest.fixture(scope="session")
def cheap_argon2():
    return Argon2Params(memory_kib=32, iterations=1, lanes=1)


@pytest.fixture(scope="session")
def tensors():
    """One real safetensors file: a float32 matrix of ones."""
    numpy = pytest.importorskip("numpy")
    return pytest.importorskip("safetensors.numpy").save({"lora_A.weight": numpy.ones((4, 3), numpy.float32)})


@pytest.fixture
def seal_small(keys, cheap_argon2, tensors):
    """Seal a checkpoint of a few files; keyword arguments replace the defaults."""

    def seal(path, **options):
        arguments = {
            "sealed": {
                "adapter": {
                    "adapter_model.safetensors": tensors,
                    "adapter_config.json": json.dumps(
                        {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
                    ).encode(),
                },
                "optimizer": {"state.json": b'{"step": 3}'},
            },
            "public_files": {"README.md": b"# card\n", "ledger.jsonl": b'{"step":1}\n'},
            "metadata": {"base_model": "tiny"},
            "signing_key": keys.owner,
            "recipients": [keys.recipient_public],
            "passphrase": keys.passphrase,
            "argon2": cheap_argon2,
        } | options
        return checkpoints.seal(path, **arguments)

    return seal


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, keys, cheap_argon2, tensors):
    """One sealed checkpoint for the whole module; tests that change it take ``sealed``, a copy."""
    path = tmp_path_factory.mktemp("vault") / "checkpoint"
    with Sealer(
        signing_key=keys.owner,
        recipients=[keys.recipient_public],
        passphrase=keys.passphrase,
        argon2=cheap_argon2,
    ) as sealer:
        sealer.seal(
            path,
            {"adapter": {"adapter_model.safetensors": tensors}, "optimizer": {"state.json": b'{"step":3}'}},
            public_files={"README.md": b"# card\n", "ledger.jsonl": b'{"step":1}\n'},
            metadata={"base_model": "tiny"},
        )
    return path


@pytest.fixture
def sealed(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "checkpoint")


@pytest.fixture
def opened(keys):
    """Open a checkpoint as its recipient."""

    def call(path, **options):
        arguments = {"public_key": keys.owner_public, "identity": keys.recipient} | options
        return open_vault(path, **arguments)

    return call
