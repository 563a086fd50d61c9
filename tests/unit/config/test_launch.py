"""Starting recipes: one process, and no other."""

import sys

import pytest

from securetune.config.launch import launch_command, recipe_arguments, require_single_process
from securetune.errors import ConfigError


@pytest.mark.parametrize(
    "variable", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
)
def test_several_processes_are_refused_with_the_command_for_one(variable, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/harden.py", "my run.yaml", "--resume"])
    with pytest.raises(ConfigError) as caught:
        require_single_process({variable: "2"})
    assert f"2 processes were started ({variable}=2)" in str(caught.value)
    assert "accelerate launch --num_processes 1 recipes/harden.py 'my run.yaml' --resume" in str(caught.value)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}])
def test_one_process_is_fine(environment):
    require_single_process(environment)


def test_command_never_asks_for_a_configuration(tmp_path):
    command = launch_command("harden.py", ["c.yaml"], use_cpu=True, num_threads=3)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[-2:] == ["harden.py", "c.yaml"]
    assert "--cpu" in command
    for option, value in [("--num_processes", "1"), ("--mixed_precision", "no"), ("--dynamo_backend", "no")]:
        assert command[command.index(option) + 1] == value
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "3"
    assert "--cpu" not in launch_command("harden.py", [], use_cpu=False)


def test_threads_follow_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = launch_command("harden.py", [], use_cpu=True)
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "1"


def test_recipe_arguments(tmp_path):
    arguments = recipe_arguments(tmp_path / "c.yaml", ["a.b=1", "c=2"], resume=True)
    assert arguments == [str(tmp_path / "c.yaml"), "--set", "a.b=1", "--set", "c=2", "--resume"]
