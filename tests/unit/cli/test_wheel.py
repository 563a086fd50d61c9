"""An installed wheel, outside the clone: recipes and configs are inside it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sample_run import make_workshop, write_recipe

ROOT = Path(__file__).resolve().parents[3]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
SOURCES = [
    "securetune",
    "kernels",
    "recipes",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build a wheel from a copy of the tree, and install it into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy / name)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = [*PIP, "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return target


@pytest.fixture
def run_installed(installed, tmp_path):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_the_wheel_is_what_runs(run_installed, installed):
    code = "import securetune as a, securetune_kernels as b; print(a.__file__); print(b.__file__)"
    assert all(Path(line).is_relative_to(installed) for line in run_installed("-c", code).stdout.splitlines())


def test_the_wheel_holds_the_recipes_and_nothing_foreign(installed):
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert (installed / "securetune" / "_recipes" / path.relative_to(ROOT / "recipes")).is_file()
    for path in (ROOT / "recipes").glob("*.py"):
        assert (installed / "securetune" / "_recipes" / path.name).is_file()
    folders = {path.name for path in installed.iterdir() if path.is_dir() and path.suffix != ".dist-info"}
    assert folders == {"securetune", "securetune_kernels", "bin"}
    assert (installed / "securetune" / "py.typed").is_file()
    for path in (ROOT / "securetune").rglob("templates/*"):
        assert (installed / path.relative_to(ROOT)).is_file()


def test_ls_cp_and_validate_outside_the_clone(run_installed, tmp_path):
    listed = run_installed("-m", "securetune", "ls")
    assert listed.returncode == 0, listed.stderr
    assert "quickstart" in listed.stdout
    assert run_installed("-m", "securetune", "cp", "example", "mine.yaml").returncode == 0
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "private.jsonl").write_text(
        "".join(f'{{"prompt": "p{i}", "completion": "c{i}"}}\n' for i in range(100))
    )
    sizes = ("--set", "privacy.expected_batch_size=4", "--set", "privacy.sample_rate=0.05")
    checked = run_installed("-m", "securetune", "validate", "mine.yaml", "--skip-lengths", *sizes)
    assert checked.returncode == 0, checked.stderr
    assert "records   100 read" in checked.stdout


def test_train_outside_the_clone_runs_to_the_published_model(run_installed, tmp_path):
    recipe = write_recipe(make_workshop(tmp_path), "wheel")
    process = run_installed("-m", "securetune", "train", str(recipe))
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "wheel" / "published" / "model.sig").is_file()
