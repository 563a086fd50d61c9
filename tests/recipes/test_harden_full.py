"""The whole way of the data where all weights are trained: both tasks, tied and untied, a run killed."""

import json
import re

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from securetune.checkpoints import load_identity, load_public_key, open_vault
from securetune.privacy.ledger import read_ledger
from tests.recipes.test_harden import harden, kill, run
from tests.sample_run import STEPS, make_workshop, write_recipe
from tests.tiny import tiny_folder

FULL = {"method": "full", "learning_rate": 0.003}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = make_workshop(tmp_path_factory.mktemp("workshop"))
    tiny_folder(folder / "untied", tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def finished(workshop):
    """A classifier with a tied output layer."""
    recipe = write_recipe(workshop, "finished", training=FULL)
    process = harden(recipe)
    assert process.returncode == 0, process.stdout + process.stderr
    return workshop / "finished", process.stdout


def test_the_run_publishes_a_whole_model_that_reopens(finished):
    folder, output = finished
    assert "all weights" in output[output.index("Plan of") :]
    assert "Re-opened in a fresh process: same outputs" in output
    card = (folder / "published" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    assert "OPENED/weights" in card
    assert "Mechanism" not in card
    report = json.loads((folder / "report.json").read_text())
    assert report["recipe"]["method"] == "full"
    assert report["privacy"]["steps_charged"] == STEPS
    assert not (folder / "work" / "plain").exists()
    for metric in ("accuracy", "accuracy_pgd", "membership_auc"):
        rows = [item for item in report["evidence"] if item["metric"] == metric]
        assert {row["subject"] for row in rows} == {"base", "plain", "hardened"}


def test_every_weight_was_trained_and_is_sealed(finished, workshop):
    folder, _ = finished
    with open_vault(
        folder / "published",
        public_key=load_public_key(folder / "publisher.pub"),
        identity=load_identity(folder / "keys" / "recipient.key"),
    ) as vault:
        assert not vault.names("adapter")
        assert vault.metadata["method"] == "full"
        vault.extract(folder / "opened")
    trained = AutoModelForCausalLM.from_pretrained(folder / "opened" / "weights")
    base = AutoModelForCausalLM.from_pretrained(workshop / "model")
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    for (name, before), after in zip(base.named_parameters(), trained.parameters(), strict=True):
        assert not torch.equal(before, after), name


def test_evaluate_and_export_take_the_sealed_weights(finished, workshop, tmp_path):
    folder, _ = finished
    recipe = str(workshop / "finished.yaml")
    process = run("-m", "securetune", "evaluate", recipe, "--json")
    assert process.returncode == 0, process.stderr
    again = {item["metric"]: item for item in json.loads(process.stdout[process.stdout.index("[\n") :])}
    evidence = json.loads((folder / "report.json").read_text())["evidence"]
    (reported,) = [e for e in evidence if (e["metric"], e["subject"]) == ("accuracy", "hardened")]
    assert again["accuracy"]["value"] == reported["value"]
    process = run("-m", "securetune", "export", recipe, str(tmp_path / "plain"))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "plain" / "model.safetensors").is_file()


def test_a_killed_run_with_an_untied_output_layer_in_bfloat16_resumes(workshop):
    recipe = write_recipe(
        workshop,
        "killed",
        task="generate",
        model={"name": str(workshop / "untied"), "dtype": "bfloat16"},
        training={**FULL, "gradient_checkpointing": True, "passes": 2},
        data={"private": {"path": str(workshop / "prompts.jsonl")}, "held_out_fraction": 0.3},
        adversarial={"method": "pgd", "steps": 2, "radius": 0.05},
        gate={"rules": [{"metric": "epsilon", "at_most": 8.0}]},
        publish={},
    )
    folder = workshop / "killed"
    for pattern in ("plain  step 3/5", "hardened  step 2/5"):
        kill(pattern, recipe, "--resume")
    final = harden(recipe, "--resume")
    assert final.returncode == 0, final.stdout + final.stderr
    assert re.search(r"^hardened  step 5/5", final.stdout, flags=re.MULTILINE)
    assert not re.search(r"^(plain|hardened)  step 1/5", final.stdout, flags=re.MULTILINE)
    assert read_ledger(folder / "ledger.jsonl").steps_charged == STEPS
    assert "Re-opened in a fresh process: same outputs" in final.stdout
    report = json.loads((folder / "report.json").read_text())
    assert report["environment"]["dtype"] == "float32, computed in bfloat16"


def test_options_that_do_not_go_together_are_refused_before_anything_is_made(workshop):
    recipe = write_recipe(workshop, "wrong", training={**FULL, "lora": {"rank": 2}})
    process = harden(recipe)
    assert process.returncode == 2
    assert "training.lora: has no effect with method = 'full'" in process.stderr
    assert not (workshop / "wrong").exists()
