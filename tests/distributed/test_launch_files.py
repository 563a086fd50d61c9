"""Whole runs on two processes, started with the launch files that come with securetune."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from securetune.config.packaged import find_launch_file
from securetune.privacy.ledger import read_ledger
from tests.sample_run import STEPS, make_workshop, write_recipe

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
STOPPING = {"method": "noisy_test", "epsilon": 2.0, "every": 2, "patience": 3, "num_texts": 30}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def launch(config, recipe, *options):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
    ]
    command += ["--main_process_port", "0", *options, str(ROOT / "recipes" / "harden.py"), str(recipe)]
    return subprocess.run(
        command, env=environment, cwd=recipe.parent, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_run_on_two_processes_is_published(workshop, name):
    process = launch(find_launch_file(name), write_recipe(workshop, name))
    check_published(workshop / name, process)


def check_published(folder, process):
    assert process.returncode == 0, process.stdout + process.stderr
    assert (folder / "published" / "model.sig").is_file()
    assert read_ledger(folder / "ledger.jsonl").steps_charged == STEPS
    assert process.stdout.count("Published") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero2", "zero3"])
def test_a_run_in_full_with_all_that_saves_memory(workshop, name):
    text = find_launch_file(name).read_text()
    offloading = re.sub(r"^( +)# (\w*offload\w*:)", r"\1\2", text, flags=re.MULTILINE)
    assert offloading != text
    config = workshop / f"{name}-offload-launch.yaml"
    config.write_text(offloading)
    recipe = write_recipe(
        workshop,
        f"{name}-offload",
        data__min_held_out=90,
        training={
            "method": "full",
            "learning_rate": 0.003,
            "gradient_checkpointing": True,
            "passes": 2,
            "save_every": 2,
            "early_stopping": STOPPING,
        },
    )
    check_published(workshop / f"{name}-offload", launch(config, recipe))


def test_a_refused_setting_leaves_nothing_behind(workshop):
    process = launch(find_launch_file("ddp"), write_recipe(workshop, "refused"), "--mixed_precision", "fp16")
    assert process.returncode != 0
    assert "mixed_precision is fp16 (ACCELERATE_MIXED_PRECISION)" in process.stderr
    assert not (workshop / "refused").exists()
