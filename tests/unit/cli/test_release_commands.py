"""``publish`` through the gate, and ``export`` without protection, on real sealed folders."""

import pytest
import torch

from securetune.checkpoints import load_recipient, load_signing_key, seal
from securetune.models.adapters import adapt, adapter_files
from securetune.models.base import load_base
from securetune.models.weights import unfreeze, weight_files
from tests.sample_recipe import recipe_text, sample_recipe
from tests.tiny import tiny_folder

TOKENS = torch.tensor([[3, 4, 5]])


def test_publish_of_a_run_that_is_not_there(run_cli, tmp_path):
    (tmp_path / "run.yaml").write_text(recipe_text())
    outcome = run_cli("publish", "run.yaml")
    assert outcome.code == 2
    assert "report.json" in outcome.err


@pytest.fixture
def trained_run(run_cli, tmp_path):
    """A sealed adapter on a tiny base model, and the logits of the adapted model."""
    assert run_cli("checkpoint", "keygen", "keys", "--passphrase").code == 0
    checkpoint = {
        "recipients": ["keys/recipient.key.pub"],
        "signing_key": "keys/signing.key",
        "passphrase_file": "keys/passphrase.txt",
    }
    options = {
        "model.name": str(tiny_folder(tmp_path / "base")),
        "model.dtype": "float32",
        "checkpoint": checkpoint,
    }
    (tmp_path / "run.yaml").write_text(recipe_text(options))
    recipe = sample_recipe(options)
    base = load_base(recipe.model)
    model = adapt(base.model, recipe.training.lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
        expected = model.eval()(TOKENS).logits
    (tmp_path / "runs" / "run").mkdir(parents=True)
    seal(
        tmp_path / "runs" / "run" / "checkpoint",
        sealed={"adapter": adapter_files(model, base_name=base.name)},
        signing_key=load_signing_key(tmp_path / "keys" / "signing.key"),
        recipients=[load_recipient(tmp_path / "keys" / "recipient.key.pub")],
        metadata={"base": {"name": base.name, "digest": base.digest}},
    )
    return expected


def logits_of(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


KEYS = ("--identity", "keys/recipient.key", "--public-key", "keys/signing.key.pub")


def test_export_writes_a_folder_that_transformers_loads(run_cli, tmp_path, trained_run):
    outcome = run_cli("export", "run.yaml", "plain", *KEYS)
    assert outcome.code == 0, outcome.err
    assert "It is not encrypted, not signed and has passed no gate" in outcome.out
    assert not (tmp_path / "plain" / "adapter_config.json").exists()
    torch.testing.assert_close(logits_of(tmp_path / "plain"), trained_run, atol=1e-4, rtol=1e-4)


@pytest.fixture
def model_trained_in_full(run_cli, tmp_path, trained_run):
    """The same run folder with a sealed model whose weights were all trained, and its logits."""
    base = load_base(sample_recipe({"model.name": str(tmp_path / "base")}).model, float32_weights=True)
    with torch.no_grad():
        for parameter in unfreeze(base.model).parameters():
            parameter.mul_(1.1)
        expected = base.model(TOKENS).logits
    assert not torch.allclose(expected, trained_run)
    seal(
        tmp_path / "runs" / "run" / "checkpoint",
        sealed={"weights": weight_files(base.model, base.folder)},
        signing_key=load_signing_key(tmp_path / "keys" / "signing.key"),
        recipients=[load_recipient(tmp_path / "keys" / "recipient.key.pub")],
        metadata={"base": {"name": base.name, "digest": base.digest}},
    )
    return expected


def test_export_writes_a_model_that_was_trained_in_full(run_cli, tmp_path, model_trained_in_full):
    outcome = run_cli("export", "run.yaml", "plain", *KEYS)
    assert outcome.code == 0, outcome.err
    assert torch.equal(logits_of(tmp_path / "plain"), model_trained_in_full)


def test_an_opened_model_needs_no_base(run_cli, tmp_path, model_trained_in_full):
    (tmp_path / "base").rename(tmp_path / "moved")
    outcome = run_cli("checkpoint", "open", "runs/run/checkpoint", "opened", *KEYS)
    assert outcome.code == 0, outcome.err
    assert "AutoModelForCausalLM.from_pretrained('opened/weights')" in outcome.out
    assert torch.equal(logits_of(tmp_path / "opened" / "weights"), model_trained_in_full)
    assert (tmp_path / "opened" / "weights" / "tokenizer.json").is_file()


@pytest.mark.usefixtures("trained_run")
def test_export_needs_the_key(run_cli, tmp_path):
    signer = ("--public-key", "keys/signing.key.pub")
    outcome = run_cli("export", "run.yaml", "plain", "--passphrase-file", "keys/passphrase.txt", *signer)
    assert outcome.code == 2
    assert outcome.err.startswith("AccessDenied: ")
    assert not (tmp_path / "plain").exists()


def test_an_opened_checkpoint_loads_with_transformers(run_cli, tmp_path, trained_run):
    base = ("--base", tmp_path / "base")
    outcome = run_cli("checkpoint", "open", "runs/run/checkpoint", "opened", *KEYS, *base)
    assert outcome.code == 0, outcome.err
    assert "AutoModelForCausalLM.from_pretrained('opened/adapter')" in outcome.out
    torch.testing.assert_close(logits_of(tmp_path / "opened" / "adapter"), trained_run)


@pytest.mark.usefixtures("trained_run")
def test_open_reads_no_folder_only_because_the_signer_named_it(run_cli, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    outcome = run_cli("checkpoint", "open", "runs/run/checkpoint", "opened", *KEYS)
    assert outcome.code == 0, outcome.err
    assert "open it again with --base" in outcome.out
    assert (
        run_cli(
            "checkpoint", "open", "runs/run/checkpoint", "again", *KEYS, "--base", tmp_path / "moved"
        ).code
        == 0
    )


@pytest.mark.usefixtures("trained_run")
def test_open_refuses_another_base_model(run_cli, tmp_path):
    tiny_folder(tmp_path / "other", seed=1)
    outcome = run_cli(
        "checkpoint", "open", "runs/run/checkpoint", "opened", *KEYS, "--base", tmp_path / "other"
    )
    assert outcome.code == 2
    assert "is not the base model this adapter was trained on" in outcome.err
