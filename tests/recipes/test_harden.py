"""The whole way of the data on a tiny model: one run, runs killed and resumed, one that fails its gate."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from securetune.checkpoints import load_identity, load_public_key, open_vault
from securetune.errors import SignatureError
from securetune.privacy.accounting import epsilon_spent
from securetune.privacy.ledger import read_ledger
from tests.sample_run import SECRET, STEPS, make_workshop, write_recipe

ROOT = Path(__file__).resolve().parents[2]

# The process kills itself: one that a test kills goes on until then, and further on a busy machine.
KILLED_AT = """
import os, runpy, signal, sys

class Watched:
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.stream.write(text)
        if any(line.lstrip().startswith(start) for line in text.splitlines()):
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)

start, *sys.argv = sys.argv[1:]
sys.stdout = Watched(sys.stdout)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def command(recipe: Path, *options: str) -> list[str]:
    return [str(ROOT / "recipes" / "harden.py"), str(recipe), *options]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **variables},
        timeout=600,
    )


def harden(recipe: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(*command(recipe, *options), **variables)


def kill(start: str, recipe: Path, *options: str) -> None:
    """Run a recipe until it prints a line that starts so."""
    process = run("-c", KILLED_AT, start, *command(recipe, *options))
    assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr


@pytest.fixture(scope="module")
def finished(workshop):
    recipe = write_recipe(workshop, "finished")
    process = harden(recipe)
    assert process.returncode == 0, process.stdout + process.stderr
    return workshop / "finished", process.stdout


class TestFinishedRun:
    def test_leaves_the_promised_files(self, finished):
        folder, _ = finished
        expected = {"recipe.yaml", "plan.json", "metrics.jsonl", "ledger.jsonl", "checkpoint", "published"}
        expected |= {"report.json", "report.html", "publisher.pub"}
        assert expected <= {path.name for path in folder.iterdir()}
        assert (folder / "published" / "model.sig").is_file()
        assert not (folder / "work" / "plain").exists()  # the unprotected baseline is gone

    def test_secrets_are_for_the_owner_only(self, finished):
        folder, _ = finished
        private = [
            *(folder / "keys").glob("*.key"),
            folder / "keys" / "passphrase.txt",
            folder / "metrics.jsonl",
        ]
        private += list((folder / "work").glob("*.json"))
        assert len(private) > 5
        assert {oct(path.stat().st_mode & 0o777) for path in private} == {"0o600"}

    def test_prints_plan_progress_and_epsilon(self, finished):
        _, output = finished
        assert (
            output.index("Plan of finished")
            < output.index("plain  step 1/5")
            < output.index("hardened  step 1/5")
        )
        assert "one record; a person with several records is not covered" in output
        assert re.search(r"hardened  step 5/5  loss [0-9.]+  [0-9,]+ tokens/s  epsilon [0-9.]+", output)
        assert "same outputs" in output

    def test_stock_verifier_accepts_what_is_published(self, finished):
        pytest.importorskip("model_signing")
        folder, _ = finished
        for name in ("published", "checkpoint"):
            target = folder / name
            options = [
                "--signature",
                str(target / "model.sig"),
                "--public_key",
                str(folder / "publisher.pub"),
            ]
            process = run("-m", "model_signing", "verify", "key", str(target), *options)
            assert process.returncode == 0, process.stdout + process.stderr

    def test_a_changed_byte_is_refused(self, finished, tmp_path):
        import shutil

        folder, _ = finished
        copy = tmp_path / "published"
        shutil.copytree(folder / "published", copy)
        shard = next((copy / "shards").iterdir())
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(SignatureError, match=re.escape(shard.name)):
            open_vault(
                copy,
                public_key=load_public_key(folder / "publisher.pub"),
                identity=load_identity(folder / "keys" / "recipient.key"),
            )

    def test_nothing_private_is_published(self, finished):
        folder, _ = finished
        published = [path for path in (folder / "published").rglob("*") if path.is_file()]
        report = json.loads((folder / "published" / "report.json").read_text())
        assert all(not item["private_statistic"] for item in report["evidence"])
        assert not [item for item in report["evidence"] if item["metric"].startswith("membership")]
        assert not [item for item in report["evidence"] if item["metric"] == "memorisation_gap"]
        internal = json.loads((folder / "report.json").read_text())["evidence"]
        gaps = [item for item in internal if item["metric"] == "memorisation_gap"]
        assert [item["subject"] for item in gaps] == ["base", "plain", "hardened"]
        assert all(item["private_statistic"] and item["interval"] for item in gaps)
        assert not [item for item in report["evidence"] if item["subject"] == "plain"]
        assert report["curves"]["roc"] == []
        assert all(curve["loss"] is None for curve in report["curves"]["training"])
        released = [item for item in report["evidence"] if item["release_epsilon"]]
        assert {item["subject"] for item in released} == {"base", "hardened"}
        for path in published:
            assert SECRET.encode() not in path.read_bytes(), path
            assert b"clipped_fraction" not in path.read_bytes(), path

    def test_internal_statistics_are_marked(self, finished):
        folder, _ = finished
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2 * STEPS
        assert all(line["privacy"] == "not covered by epsilon" for line in lines)
        assert "not covered by epsilon" in (folder / "report.html").read_text()

    def test_ledger_report_and_accountant_agree(self, finished):
        folder, _ = finished
        state = read_ledger(folder / "ledger.jsonl")
        assert state.steps_charged == STEPS
        truth = epsilon_spent(
            state.header.noise_multiplier, state.header.sample_rate, STEPS, state.header.delta
        )
        report = json.loads((folder / "report.json").read_text())
        (epsilon,) = [item["value"] for item in report["evidence"] if item["metric"] == "epsilon"]
        assert epsilon == pytest.approx(truth) == pytest.approx(report["privacy"]["epsilon_spent"])
        assert epsilon <= 8.0

    def test_same_texts_for_every_model_and_every_figure_has_an_interval(self, finished):
        folder, _ = finished
        evidence = json.loads((folder / "report.json").read_text())["evidence"]
        for metric in ("accuracy", "accuracy_pgd", "accuracy_char", "membership_auc"):
            rows = [item for item in evidence if item["metric"] == metric]
            assert {row["subject"] for row in rows} == {"base", "plain", "hardened"}
            assert len({row["n"] for row in rows}) == 1
            assert all(row["interval"]["low"] <= row["value"] <= row["interval"]["high"] for row in rows)
        differences = {
            (item["metric"], item["subject"]) for item in evidence if item["metric"].endswith("_difference")
        }
        assert ("accuracy_difference", "hardened - base") in differences
        assert ("accuracy_pgd_difference", "hardened - plain") in differences

    def test_second_start_without_resume_changes_nothing(self, finished, workshop):
        folder, _ = finished
        before = (folder / "report.json").read_bytes()
        process = harden(workshop / "finished.yaml")
        assert process.returncode == 2
        assert "already holds a run. Add --resume" in process.stderr
        assert (folder / "report.json").read_bytes() == before

    def test_export_equals_the_sealed_model(self, finished, workshop, tmp_path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from securetune.models.adapters import load_adapter

        folder, _ = finished
        process = run("-m", "securetune", "export", str(workshop / "finished.yaml"), str(tmp_path / "plain"))
        assert process.returncode == 0, process.stderr
        assert "not encrypted, not signed" in process.stdout
        ids = AutoTokenizer.from_pretrained(tmp_path / "plain")("it was good", return_tensors="pt")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        base = AutoModelForCausalLM.from_pretrained(workshop / "model").eval()
        with open_vault(
            folder / "published",
            public_key=load_public_key(folder / "publisher.pub"),
            identity=load_identity(folder / "keys" / "recipient.key"),
        ) as vault:
            model = load_adapter(base, {name: vault.read("adapter", name) for name in vault.names("adapter")})
        with torch.no_grad():
            torch.testing.assert_close(exported(**ids).logits, model(**ids).logits, rtol=1e-4, atol=1e-4)

    def test_publish_command_goes_through_the_gate_of_the_run(self, finished, workshop):
        folder, _ = finished
        before = (folder / "published" / "vault.json").read_bytes()
        listed = run("-m", "securetune", "publish", str(workshop / "finished.yaml"), "--dry-run")
        assert listed.returncode == 0, listed.stderr
        assert "model.sig" in listed.stdout
        other_gate = ("--set", "gate.rules=[]")
        refused = run("-m", "securetune", "publish", str(workshop / "finished.yaml"), *other_gate)
        assert refused.returncode == 2
        assert (folder / "published" / "vault.json").read_bytes() == before
        again = run("-m", "securetune", "publish", str(workshop / "finished.yaml"))
        assert again.returncode == 0, again.stderr
        assert "The release gate passed." in again.stdout

    def test_evaluate_command_measures_the_sealed_model_again(self, finished, workshop):
        folder, _ = finished
        process = run("-m", "securetune", "evaluate", str(workshop / "finished.yaml"), "--json")
        assert process.returncode == 0, process.stderr
        again = {item["metric"]: item for item in json.loads(process.stdout[process.stdout.index("[\n") :])}
        evidence = json.loads((folder / "report.json").read_text())["evidence"]
        for metric in ("accuracy", "accuracy_char"):
            (reported,) = [e for e in evidence if (e["metric"], e["subject"]) == (metric, "hardened")]
            assert again[metric]["value"] == reported["value"]
            assert again[metric]["artefact"] == reported["artefact"]


def test_killed_anywhere_a_run_resumes_to_a_valid_result(workshop):
    recipe = write_recipe(workshop, "killed")
    folder = workshop / "killed"
    stops = ("Plan of", "plain  step 3/5", "hardened  step 2/5", "evaluate plain: accuracy")
    for pattern in (*stops, "evaluate hardened: character", "Report:", "Re-opened"):
        kill(pattern, recipe, "--resume")
    charged = read_ledger(folder / "ledger.jsonl").steps_charged
    assert charged == STEPS  # what one kill interrupted was finished by the next start
    final = harden(recipe, "--resume")
    assert final.returncode == 0, final.stdout + final.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["privacy"]["steps_charged"] == STEPS
    assert report["privacy"]["epsilon_spent"] <= 8.0
    assert (folder / "published" / "model.sig").is_file()


def test_a_step_charged_but_lost_shortens_the_run(workshop):
    recipe = write_recipe(workshop, "lost")
    kill("hardened  step 2/5", recipe)
    ledger = workshop / "lost" / "ledger.jsonl"
    charged = read_ledger(ledger).steps_charged
    intact = ledger.read_bytes()
    ledger.unlink()
    refused = harden(recipe, "--resume")
    assert refused.returncode == 2
    assert "the ledger was lost or shortened" in refused.stderr
    ledger.write_text(re.sub('"writer":"[0-9a-f]+"', '"writer":"00"', intact.decode()))
    refused = harden(recipe, "--resume")
    assert refused.returncode == 2
    assert "is the ledger of another run" in refused.stderr
    ledger.write_bytes(intact)
    with ledger.open("a") as file:
        file.write('{"step": 9')  # torn by the kill: its noise may have been released
    final = harden(recipe, "--resume")
    assert final.returncode == 0, final.stdout + final.stderr
    steps_run = len(re.findall(r"^hardened  step", final.stdout, flags=re.MULTILINE))
    assert (charged, steps_run) == (2, STEPS - 2 - 1)
    assert read_ledger(ledger).steps_charged == STEPS


def test_failed_gate_publishes_nothing(workshop):
    recipe = write_recipe(
        workshop,
        "refused",
        task="generate",
        data={"private": {"path": str(workshop / "prompts.jsonl")}, "held_out_fraction": 0.3},
        adversarial={"method": "pgd", "steps": 2, "radius": 0.05},
        gate={"rules": [{"metric": "heldout_loss", "at_most": 0.001}]},
        publish={},
    )
    process = harden(recipe)
    folder = workshop / "refused"
    assert process.returncode == 1, process.stdout + process.stderr
    assert "heldout_loss" in process.stderr
    assert not (folder / "published").exists()
    again = run("-m", "securetune", "publish", str(recipe))
    assert again.returncode == 1
    assert not (folder / "published").exists()
    report = json.loads((folder / "report.json").read_text())
    assert report["gate"]["passed"] is False
    rows = [item for item in report["evidence"] if item["metric"] == "heldout_loss"]
    assert {row["subject"] for row in rows} == {"base", "plain", "hardened"}
    assert all(row["interval"]["low"] <= row["value"] <= row["interval"]["high"] for row in rows)


def test_users_are_the_unit_from_the_recipe_to_the_card(workshop):
    rows = [json.loads(line) for line in (workshop / "labelled.jsonl").read_text().splitlines()]
    path = workshop / "users.jsonl"
    path.write_text("\n".join(json.dumps({**row, "who": n % 170}) for n, row in enumerate(rows)))
    recipe = write_recipe(
        workshop,
        "users",
        data__private={"path": str(path)},
        data__user_field="who",
        privacy__unit="user",
        privacy__max_records_per_user=2,
        privacy__expected_batch_size=20,
        privacy__sample_rate=0.17,
        privacy__sampling="truncated_poisson",
        privacy__max_batch_size=30,
        privacy__num_units=160,
        privacy__clipping={"mode": "adaptive", "per_layer": True},
        evaluation__num_texts=20,
        evaluation__num_attacked=5,
        evaluation__num_membership=40,
    )
    process = harden(recipe)
    folder = workshop / "users"
    assert process.returncode == 0, process.stdout + process.stderr
    header = read_ledger(folder / "ledger.jsonl").header
    unit = "one user, with up to 2 records in a step, of all under that user's id"
    sampling = "truncated Poisson sampling at rate 0.17, at most 30 users a step, up to 2 records of each"
    clipping = "adaptive: each layer's threshold follows the 0.5 quantile of the users' gradient norms"
    card = (folder / "published" / "README.md").read_text()
    published = json.loads((folder / "published" / "report.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    assert header.unit_statement.startswith(unit)
    assert "one user, with up to 2 records in a step" in card
    assert "one user, with up to 2 records" in " ".join(process.stdout.split())
    assert published["privacy"]["unit"].startswith(unit)
    assert published["privacy"]["neighbouring"] == "zero out one user"
    assert published["privacy"]["sampling"].startswith(sampling)
    assert published["privacy"]["clipping"].startswith(clipping)
    assert "N = 160 is public" in card
    assert report["data"]["training_users"] + report["data"]["held_out_users"] == 170
    assert published["data"]["unit"] == "user"
    assert published["data"]["training_users"] is None
    assert "the records of any one user were trained on" in (folder / "report.html").read_text()
    accuracy = [item for item in report["evidence"] if item["metric"] == "accuracy"]
    assert {item["n"] for item in accuracy} == {20}


class TestRefusals:
    def test_one_of_two_processes_without_its_number(self, workshop):
        recipe = write_recipe(workshop, "many")
        process = harden(recipe, WORLD_SIZE="2")
        assert process.returncode == 2
        assert "WORLD_SIZE=2, RANK=unset" in process.stderr
        assert "Start the run with 'accelerate launch --config_file FILE'" in process.stderr
        assert not (workshop / "many").exists()

    def test_missing_gpu(self, workshop):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        process = harden(write_recipe(workshop, "nogpu"), "--set", "model.device=cuda")
        assert process.returncode == 2
        assert "torch sees no GPU" in process.stderr
        assert not (workshop / "nogpu").exists()

    def test_data_smaller_than_the_expected_batch(self, workshop):
        process = harden(
            write_recipe(workshop, "small", privacy__expected_batch_size=400, privacy__sample_rate=0.9)
        )
        assert process.returncode == 2
        assert "fewer than privacy.expected_batch_size = 400" in process.stderr

    def test_unreachable_target(self, workshop):
        process = harden(
            write_recipe(workshop, "unreachable", privacy__target_epsilon=1e-9, privacy__delta=1e-9)
        )
        assert process.returncode == 2
        assert "target_epsilon" in process.stderr or "1e-09" in process.stderr
