"""``doctor --launch``: what ``accelerate launch`` would make of a file, checked before it starts."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from securetune.cli import launch_checks
from securetune.cli.launch_checks import batch_arithmetic, check_launch, plan_launch
from securetune.config.launch import STRATEGIES, read_launch
from securetune.config.packaged import find_launch_file
from tests.sample_recipe import recipe_text, sample_recipe

FILES = {"cpu": "single", **{name: name for name in STRATEGIES if name != "single"}}
PROBE = """
import dataclasses, json, os, sys
from securetune.config.launch import read_launch
with open(f"{sys.argv[1]}/rank{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(dataclasses.asdict(read_launch()), file)
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "WORLD_SIZE", "RANK", "LOCAL_")):
            monkeypatch.delenv(name)


def by_name(checks):
    return {check.name: check for check in checks}


def changed_file(tmp_path, name, changes):
    """Write a launch file with dotted options set; ``...`` removes one."""
    values = yaml.safe_load(find_launch_file(name).read_text())
    for dotted, value in changes.items():
        *sections, option = dotted.split(".")
        section = values
        for key in sections:
            section = section.setdefault(key, {})
        if value is ...:
            del section[option]
        else:
            section[option] = value
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "launch.yaml"


@pytest.mark.parametrize("name", FILES)
def test_accelerate_makes_the_strategy_of_each_packaged_file(name):
    planned = plan_launch(find_launch_file(name))
    launch = read_launch(planned.environment)
    assert launch.strategy == FILES[name]
    assert launch.world_size == planned.num_processes == (1 if name == "cpu" else 2)
    assert launch.mixed_precision == "no"
    assert not launch.offload_optimizer
    assert not planned.ignored


@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero2", "zero3"])
def test_the_offload_lines_can_be_switched_on(name, tmp_path):
    text = find_launch_file(name).read_text()
    (tmp_path / "launch.yaml").write_text(
        text.replace("# fsdp_offload", "fsdp_offload").replace("# off", "off")
    )
    launch = read_launch(plan_launch(tmp_path / "launch.yaml").environment)
    assert launch.offload_optimizer
    assert launch.offload_parameters == (name in ("fsdp2", "zero3"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "cpu"])
def test_the_plan_is_what_accelerate_launch_starts(name, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    file = find_launch_file(name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    command += ["--main_process_port", "0", str(tmp_path / "probe.py"), str(tmp_path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    planned = read_launch(plan_launch(file).environment)
    assert (
        [launch.pop("rank") for launch in found] == [launch.pop("local_rank") for launch in found] == [0, 1]
    )
    assert found[0] == found[1]
    assert all(getattr(planned, key) == value for key, value in found[0].items())


def test_doctor_passes_a_packaged_file(run_cli):
    outcome = run_cli("doctor", "--launch", "ddp")
    assert outcome.code == 0, outcome.out
    assert "ddp, 2 processes" in outcome.out
    assert "gloo" in outcome.out


def test_doctor_fails_with_every_refused_setting(run_cli, tmp_path):
    changed_file(tmp_path, "zero2", {"deepspeed_config.gradient_clipping": 1.0, "mixed_precision": "fp16"})
    outcome = run_cli("doctor", "--launch", "launch.yaml")
    assert outcome.code == 1
    assert "fail  setting        deepspeed_config.gradient_clipping is 1.0" in outcome.out
    assert "fail  setting        mixed_precision is fp16" in outcome.out


def test_doctor_checks_the_batches_of_a_recipe(run_cli, tmp_path):
    (tmp_path / "run.yaml").write_text(recipe_text())
    outcome = run_cli("doctor", "run.yaml", "--launch", "ddp")
    assert "about 16.0 records of privacy.expected_batch_size = 32 for each of 2 processes" in outcome.out


def test_an_unknown_file(run_cli):
    outcome = run_cli("doctor", "--launch", "zero4")
    assert outcome.code == 2
    assert "zero4: no such file, and no launch file that comes with securetune: accelerate/cpu" in outcome.err


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("a: 1", "distributed_type"),
        ("distributed_type: 'NO'\nnum_procesess: 2", "num_procesess"),
        ("", "None"),
    ],
)
def test_a_file_that_accelerate_cannot_use(tmp_path, content, found):
    (tmp_path / "launch.yaml").write_text(content)
    (check,) = check_launch(tmp_path / "launch.yaml")
    assert check.status == "fail"
    assert found in check.detail


def test_processes_that_accelerate_would_not_start(tmp_path):
    file = changed_file(tmp_path, "ddp", {"distributed_type": "MULTI_CPU", "use_cpu": True})
    check = by_name(check_launch(file))["processes"]
    assert (check.status, check.detail[:18]) == ("fail", "num_processes is 2")
    assert "MULTI_GPU" in check.remedy


def test_processes_that_do_not_divide_among_machines(tmp_path):
    changes = {"num_machines": 2, "num_processes": 3, "main_process_ip": "10.0.0.1", "main_process_port": 0}
    check = by_name(check_launch(changed_file(tmp_path, "ddp", changes)))["processes"]
    assert "3 processes do not divide among 2 machines" in check.detail


def test_second_machine_has_its_ranks(tmp_path):
    changes = {"num_machines": 2, "machine_rank": 1, "num_processes": 8}
    changes |= {"main_process_ip": "10.0.0.1", "main_process_port": 29400}
    launch = read_launch(plan_launch(changed_file(tmp_path, "zero3", changes)).environment)
    assert (launch.world_size, launch.rank, launch.local_world_size) == (8, 4, 4)


def test_a_launcher_that_writes_the_environment_to_a_file(tmp_path):
    changes = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 0}
    changes["deepspeed_config.deepspeed_multinode_launcher"] = ...
    check = by_name(check_launch(changed_file(tmp_path, "zero2", changes)))["launcher"]
    assert check.status == "warn"
    assert ".deepspeed_env" in check.detail


def test_options_that_accelerate_drops(tmp_path):
    file = changed_file(tmp_path, "fsdp2", {"fsdp_config.fsdp_reduce_dtype": "bf16"})
    check = by_name(check_launch(file))["setting"]
    assert check.detail == "accelerate does not know fsdp_config.fsdp_reduce_dtype and drops it"


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check = by_name(check_launch(find_launch_file("ddp")))["devices"]
    assert check.status == "fail"
    assert "2 processes on this machine, which has 1 GPUs" in check.detail
    on_cpu = sample_recipe({"model.device": "cpu"})
    assert by_name(check_launch(find_launch_file("ddp"), on_cpu))["devices"].status != "fail"


def test_a_missing_backend(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    check = by_name(check_launch(find_launch_file("ddp")))["backend"]
    assert check[:3] == ("fail", "backend", "this torch has no gloo")


def test_a_missing_or_old_deepspeed(monkeypatch):
    def missing(name):
        raise launch_checks.PackageNotFoundError(name)

    monkeypatch.setattr(launch_checks, "version", missing)
    check = by_name(check_launch(find_launch_file("zero2")))["deepspeed"]
    assert check.status == "fail"
    assert "pip install 'securetune[deepspeed]'" in check.remedy
    monkeypatch.setattr(launch_checks, "version", lambda name: "0.1.0")
    assert by_name(check_launch(find_launch_file("zero2")))["deepspeed"].detail.startswith("0.1.0, needs")


def test_fewer_records_than_processes():
    recipe = sample_recipe({"privacy.expected_batch_size": 2, "privacy.sample_rate": 0.5})
    checks = by_name(batch_arithmetic(recipe, 8))
    assert checks["batch"].status == "warn"
    assert "some processes have none and wait" in checks["batch"].detail
    assert checks["records"].detail == "about 4 training records for 8 processes"


def test_micro_batches_by_hand():
    # 64 records over 4 processes: 16 each; 256 tokens hold 2 records of 128: 8 micro-batches
    changes = {"privacy.expected_batch_size": 64, "training.micro_batch_tokens": 256, "data.max_length": 128}
    (check,) = batch_arithmetic(sample_recipe(changes), 4)
    assert check.status == "ok"
    assert "at most about 8 micro-batches of 2 records" in check.detail
