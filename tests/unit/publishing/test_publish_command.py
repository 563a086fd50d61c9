"""``securetune publish`` checks the gate that the run was made for, and no other."""

import sys

import pytest

from securetune.checkpoints import (
    generate_recipient_key,
    generate_signing_key,
    load_recipient,
    load_signing_key,
    seal,
)
from securetune.cli.app import main
from securetune.config import parse_recipe, recipe_digest
from securetune.report.summary import RecipeStatement, report_json
from tests.sample_recipe import recipe_text
from tests.sample_report import report_about, sample_ledger

FAILS = [{"metric": "accuracy", "at_least": 0.999}]
PASSES = [{"metric": "epsilon", "at_most": 8.0}]


@pytest.fixture
def publish(monkeypatch, capsys, tmp_path):
    """Make a run with these rules, then call ``securetune publish`` on it; returns exit status and stderr."""

    def make(rules, *arguments):
        monkeypatch.chdir(tmp_path)
        public_key = generate_signing_key(tmp_path / "signing.key")
        recipient = generate_recipient_key(tmp_path / "recipient.key")
        checkpoint = {
            "recipients": [str(recipient)],
            "signing_key": "signing.key",
            "passphrase_file": "passphrase.txt",
        }
        text = recipe_text({"checkpoint": checkpoint, "gate.rules": rules})
        (tmp_path / "run.yaml").write_text(text)
        recipe = parse_recipe(text, "run.yaml")
        run = tmp_path / "runs" / "run"
        run.mkdir(parents=True)
        (run / "publisher.pub").write_bytes(public_key.read_bytes())
        manifest = seal(
            run / "checkpoint",
            sealed={"adapter": {"adapter.json": b"{}"}},
            signing_key=load_signing_key(tmp_path / "signing.key"),
            recipients=[load_recipient(recipient)],
            public_files={"ledger.jsonl": sample_ledger()},
        )
        statement = RecipeStatement(name="run", digest=recipe_digest(recipe), task="classify", seed=0)
        (run / "report.json").write_text(report_json(report_about(manifest.digest, recipe=statement)))
        monkeypatch.setattr(sys, "argv", ["securetune", "publish", "run.yaml", *arguments])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        return code, capsys.readouterr().err, run / "published"

    return make


def test_the_recipe_of_the_run_is_published(publish):
    code, error, published = publish(PASSES)
    assert code == 0, error
    assert (published / "model.sig").is_file()


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize("change", ["gate.rules=[]", "publish.release_epsilon=1.0", "seed=7"])
def test_overrides_cannot_get_round_the_gate(publish, change, dry_run):
    code, error, published = publish(FAILS, "--set", change, *dry_run)
    assert code == 2
    assert "report.json" in error
    assert "--set" in error
    assert not published.exists()


def test_without_overrides_the_gate_holds(publish):
    code, error, published = publish(FAILS)
    assert code == 1
    assert "accuracy (hardened)" in error
    assert not published.exists()
