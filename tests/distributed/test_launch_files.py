"""Whole runs on two processes, started with the launch files that come with securetune."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from securetune.config.packaged import find_launch_file
from securetune.privacy.ledger import read_ledger
from tests.sample_run import STEPS, make_workshop, write_recipe

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def launch(name, recipe, *options):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(find_launch_file(name)),
    ]
    command += ["--main_process_port", "0", *options, str(ROOT / "recipes" / "harden.py"), str(recipe)]
    return subprocess.run(
        command, env=environment, cwd=recipe.parent, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_run_on_two_processes_is_published(workshop, name):
    process = launch(name, write_recipe(workshop, name))
    assert process.returncode == 0, process.stdout + process.stderr
    assert (workshop / name / "published" / "model.sig").is_file()
    assert read_ledger(workshop / name / "ledger.jsonl").steps_charged == STEPS
    assert process.stdout.count("Published") == 1


def test_a_refused_setting_leaves_nothing_behind(workshop):
    process = launch("ddp", write_recipe(workshop, "refused"), "--mixed_precision", "fp16")
    assert process.returncode != 0
    assert "mixed_precision is fp16 (ACCELERATE_MIXED_PRECISION)" in process.stderr
    assert not (workshop / "refused").exists()
