"""``benchmarks/gpu_check.sh`` without a GPU: its order and limits, and that it needs no more than it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_kernels import OPS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
TOTAL_S = 520  # leaves 20 s for starting and the table
# answers as python does, without starting one: every package is there, and one benchmark fails
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    *"-m benchmarks pgd_step"*) exit 1 ;;
    *"-m benchmarks noisy_step"*) echo "does not fit this machine: too small"; exit 3 ;;
    *"-m benchmarks dp_lora_step"*) echo '{}' >>"${@: -1}" ;;
    *"-c "*) [[ "$*" != *"${MISSING:-nothing}"* ]] ;;
esac
"""
# what a machine may lack: everything that the script's first lines do not ask for
NOT_NEEDED = (
    "deepspeed",
    "opacus",
    "dp_accounting",
    "typer",
    "rich",
    "blake3",
    "jinja2",
    "matplotlib",
    "xdist",
)
OF_THE_ENGINE = ("transformers", "peft", "cryptography", "pydantic", "rfc8785")


def limits():
    text = SCRIPT.read_text()
    steps = re.findall(r"^step (\w+) (\d+)", text, re.MULTILINE) + re.findall(r"\b(\w+):(\d+)", text)
    return {name: int(seconds) for name, seconds in steps}


def dry_run(folder, missing="nothing"):
    stub = folder / "python"
    stub.write_text(PYTHON)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "CALLS": str(folder / "calls"), "MISSING": missing}
    command = ["bash", str(SCRIPT), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done, (folder / "calls").read_text().splitlines()


def without(packages):
    """A line of Python that makes these packages missing."""
    return (
        "import sys, importlib.abc, importlib.util\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name in {packages!r} else real(name, *a)\n"
    )


def run_python(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment,
    )  # fmt: skip


def test_limits_add_up_to_less_than_nine_minutes():
    assert sum(limits().values()) <= TOTAL_S


def test_every_op_and_both_whole_steps_are_measured_the_most_important_first():
    names = [name for name in limits() if name != "pytest_gpu"]
    assert names[:2] == ["dp_lora_step", "dp_full_step"]
    assert set(names[2:]) == set(OPS)
    assert all((SCRIPT.parent / f"bench_{name}.py").exists() for name in names)


def test_failures_are_counted_and_the_next_step_starts(tmp_path):
    done, calls = dry_run(tmp_path)
    steps = [call for call in calls if "-m " in call]
    assert done.returncode == 1, done.stderr
    assert "-m pytest" in steps[0]
    assert "tests/unit/privacy/test_kernels_in_the_step.py" in steps[0]
    assert [call.split()[2] for call in steps[1:-1]] == [name for name in limits() if name != "pytest_gpu"]
    assert "--show" in steps[-1]
    assert re.search(r"bench_pgd_step +\d+ s +FAILED with exit status 1", done.stdout)
    assert re.search(r"bench_noisy_step +\d+ s +skipped: does not fit this machine: too small", done.stdout)


@pytest.mark.parametrize("package", OF_THE_ENGINE)
def test_without_the_engines_packages_the_ops_are_still_tested(package, tmp_path):
    done, calls = dry_run(tmp_path, missing=f"{package}")
    tests = next(call for call in calls if "-m pytest" in call)
    assert "tests/kernels/test_clip_and_accumulate.py" in tests
    assert "tests/unit" not in tests
    assert "tests of the private engine" in done.stdout


def test_files_with_gpu_tests_need_nothing_more_than_the_script_says():
    collect = "import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    listed = subprocess.run(
        ["grep", "-rlE", r"mark\.gpu|kernel_device", "tests", "--include=test_*.py"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout.split()  # fmt: skip
    options = ["--collect-only", "-q", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib"]
    done = run_python(without(NOT_NEEDED) + collect, *options, "-p", "no:cacheprovider", *listed)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    of_the_ops = [name for name in listed if name.startswith("tests/kernels")]
    done = run_python(without((*NOT_NEEDED, *OF_THE_ENGINE)) + collect, *options, *of_the_ops)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_benchmarks_without_a_package_say_so_and_the_others_run():
    code = without((*NOT_NEEDED, *OF_THE_ENGINE)) + (
        "from benchmarks.__main__ import main\n"
        "for name in sys.argv[1:]: print(name, main([name, '--quick', '--device', 'cpu']))"
    )
    done = run_python(code, "dp_lora_step", "dp_full_step", "per_sample_sums")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dp_lora_step 3" in done.stdout
    assert "dp_full_step 3" in done.stdout
    assert "per_sample_sums 0" in done.stdout
