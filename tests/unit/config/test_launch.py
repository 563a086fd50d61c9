"""Starting recipes in one process."""

import sys

from securetune.config.launch import launch_command, recipe_arguments


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
