"""``publish`` through the gate, and ``export`` without protection, on real sealed folders."""

import pytest
import torch

from securetune.checkpoints import load_recipient, load_signing_key, seal
from securetune.models.adapters import adapt, adapter_files
from securetune.models.base import load_base
from securetune.report.summary import report_json
from tests.sample_recipe import recipe_text, sample_recipe
from tests.sample_report import sample_report
from tests.tiny import tiny_folder

TOKENS = torch.tensor([[3, 4, 5]])

PASSES = [{"metric": "epsilon", "at_most": 8.0}]
FAILS = [{"metric": "accuracy", "at_least": 0.999}]


@pytest.fixture
def finished_run(run_cli, tmp_path):
    """A run folder as training leaves it, and the recipe that points to it."""

    def make(rules):
        assert run_cli("checkpoint", "keygen", "keys", "--passphrase").code == 0
        keys = tmp_path / "keys"
        run = tmp_path / "runs" / "run"
        run.mkdir(parents=True)
        seal(
            run / "checkpoint",
            sealed={"adapter": {"adapter.json": b"{}"}},
            signing_key=load_signing_key(keys / "signing.key"),
            recipients=[load_recipient(keys / "recipient.key.pub")],
            public_files={"ledger.jsonl": b'{"unit": "record"}\n'},
        )
        (run / "report.json").write_bytes(_as_bytes(report_json(sample_report())))
        (run / "publisher.pub").write_bytes((keys / "signing.key.pub").read_bytes())
        checkpoint = {"recipients": ["keys/recipient.key.pub"], "signing_key": "keys/signing.key"}
        (tmp_path / "run.yaml").write_text(recipe_text({"checkpoint": checkpoint, "gate.rules": rules}))
        return run

    return make


def _as_bytes(content):
    return content if isinstance(content, bytes) else content.encode()


def test_publish_through_the_gate(run_cli, finished_run):
    run = finished_run(PASSES)
    outcome = run_cli("publish", "run.yaml")
    assert outcome.code == 0, outcome.err
    assert "The release gate passed." in outcome.out
    verified = run_cli("checkpoint", "verify", run / "published", "--public-key", run / "publisher.pub")
    assert verified.code == 0, verified.err


def test_a_failed_gate_publishes_nothing_and_exits_with_1(run_cli, finished_run):
    run = finished_run(FAILS)
    outcome = run_cli("publish", "run.yaml")
    assert outcome.code == 1
    assert "accuracy (hardened)" in outcome.err
    assert not (run / "published").exists()


def test_dry_run_lists_and_writes_nothing(run_cli, finished_run):
    run = finished_run(PASSES)
    outcome = run_cli("publish", "run.yaml", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "model.sig" in outcome.out
    assert "report.html" in outcome.out
    assert not (run / "published").exists()


def test_publish_of_a_run_that_is_not_there(run_cli, tmp_path):
    (tmp_path / "run.yaml").write_text(recipe_text())
    outcome = run_cli("publish", "run.yaml")
    assert outcome.code == 2
    assert "report.json" in outcome.err


def test_export_needs_the_key(run_cli, finished_run, tmp_path):
    finished_run(PASSES)
    outcome = run_cli("export", "run.yaml", "plain", "--passphrase-file", "keys/passphrase.txt")
    assert outcome.code == 2
    assert outcome.err.startswith("AccessDenied: ")
    assert not (tmp_path / "plain").exists()


@pytest.fixture
def trained_run(run_cli, tmp_path):
    """A sealed adapter on a tiny base model, and the logits of the adapted model."""
    assert run_cli("checkpoint", "keygen", "keys").code == 0
    checkpoint = {"recipients": ["keys/recipient.key.pub"], "signing_key": "keys/signing.key"}
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


def test_an_opened_checkpoint_loads_with_transformers(run_cli, tmp_path, trained_run):
    outcome = run_cli("checkpoint", "open", "runs/run/checkpoint", "opened", *KEYS)
    assert outcome.code == 0, outcome.err
    assert "AutoModelForCausalLM.from_pretrained('opened/adapter')" in outcome.out
    torch.testing.assert_close(logits_of(tmp_path / "opened" / "adapter"), trained_run)


@pytest.mark.usefixtures("trained_run")
def test_open_says_when_the_base_model_is_elsewhere(run_cli, tmp_path):
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
