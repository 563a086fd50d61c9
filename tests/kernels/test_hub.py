"""The build for the Hugging Face kernel hub: its layout, and a copy next to the installed package."""

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import securetune_kernels

PROJECT = Path(__file__).resolve().parents[2] / "kernels"
BACKENDS = ("cpu", "cuda", "rocm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, str(PROJECT / "hub" / "build.py"), str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [Path(line).name for line in answer.splitlines()] == [f"torch-{backend}" for backend in BACKENDS]
    return folder


def metadata_of(variant):
    return json.loads((variant / "metadata.json").read_text())


@pytest.fixture(scope="module")
def loaded(folder):
    """Load the CPU's variant as the hub's loader does."""
    variant = folder / "build" / "torch-cpu"
    name = metadata_of(variant)["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for key in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[key]


def run_ops(ops, backend):
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 70, generator=generator)
    summed = torch.zeros(70)
    norms = ops.clip_and_accumulate(grads, summed, 1.0, backend=backend)
    key, step = torch.arange(8, dtype=torch.int32), torch.tensor(5)
    noise = ops.gaussian_noise(torch.zeros(70), key=key, step=step, stddev=1.5, backend=backend)
    a, g = torch.randn(2, 5, 7, generator=generator), torch.randn(2, 5, 3, generator=generator)
    return [summed, norms, noise, ops.linear_grad_norms(a, g, backend=backend).squared]


def test_metadata_lists_every_file_with_its_digest(folder):
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        metadata = metadata_of(variant)
        files = {path for path in variant.rglob("*") if path.is_file()} - {variant / "metadata.json"}
        assert metadata["backend"] == {"type": backend}
        assert metadata["digest"]["files"] == {
            path.relative_to(variant).as_posix(): base64.b64encode(
                hashlib.sha256(path.read_bytes()).digest()
            ).decode()
            for path in files
        }
        assert {path.relative_to(variant).as_posix() for path in files} >= {"__init__.py", "py.typed"}


def test_a_second_build_replaces_the_first(folder, tmp_path):
    build = [sys.executable, str(PROJECT / "hub" / "build.py"), str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True)
    leftover = tmp_path / "build" / "torch-cpu" / "removed_op" / "__init__.py"
    leftover.parent.mkdir()
    leftover.write_text("")
    subprocess.run(build, check=True, capture_output=True)
    assert not leftover.exists()
    here, there = (metadata_of(base / "build" / "torch-cpu") for base in (tmp_path, folder))
    assert here == there


def test_the_identifier_is_a_module_name_of_its_own(folder):
    names = [metadata_of(folder / "build" / f"torch-{backend}")["id"] for backend in BACKENDS]
    assert all(name.isidentifier() for name in names)
    assert len({*names, "securetune_kernels"}) == len(BACKENDS) + 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_loaded_copy_agrees_with_the_installed_package(loaded, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    if backend == "triton":
        pytest.importorskip("triton")
    # in turns: a copy that took over the other's op would show in the second call
    for ops in (securetune_kernels, loaded, securetune_kernels):
        for ours, theirs in zip(run_ops(ops, backend), run_ops(securetune_kernels, backend), strict=True):
            assert torch.equal(ours, theirs)


def test_a_loaded_copy_registers_its_op_under_its_own_name(loaded):
    assert hasattr(getattr(torch.ops, loaded.__name__), "gaussian_noise")
    assert hasattr(torch.ops.securetune_kernels, "gaussian_noise")
    assert loaded.gaussian_noise is not securetune_kernels.gaussian_noise


def test_the_hubs_own_loader_takes_the_build(folder):
    load = pytest.importorskip("kernels.load", reason="needs Hugging Face's package kernels")
    ops = load.get_local_kernel(folder, backend="cpu")
    assert Path(ops.__file__).parent == folder / "build" / "torch-cpu"
    for ours, theirs in zip(run_ops(ops, "torch"), run_ops(securetune_kernels, "torch"), strict=True):
        assert torch.equal(ours, theirs)


def test_the_hubs_own_parser_takes_the_configuration():
    rust = pytest.importorskip("kernels._rust", reason="needs Hugging Face's package kernels")
    backends = rust.Build.open(PROJECT).general.backends
    assert [str(backend).rpartition(".")[2].lower() for backend in backends] == list(BACKENDS)
