"""Starting recipes in one process."""

from securetune.config.launch import one_process_environment, recipe_arguments


def test_no_configuration_of_accelerate_decides(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    environment = one_process_environment(use_cpu=True, num_threads=3)
    assert environment["ACCELERATE_USE_CPU"] == "True"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert one_process_environment(use_cpu=False)["ACCELERATE_USE_CPU"] == "False"


def test_threads_follow_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert one_process_environment(use_cpu=True)["OMP_NUM_THREADS"] == "1"


def test_recipe_arguments(tmp_path):
    arguments = recipe_arguments(tmp_path / "c.yaml", ["a.b=1", "c=2"], resume=True)
    assert arguments == [str(tmp_path / "c.yaml"), "--set", "a.b=1", "--set", "c=2", "--resume"]
