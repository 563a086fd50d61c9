"""Shared by all tests: fixed seeds, Triton's interpreter without a GPU, markers, watched kernel memory.

Hypothesis draws the same examples in every run. ``--hypothesis-profile=fresh`` draws new ones.
"""

import functools
import importlib
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.memory_watch import watch_memory

# must be set before the first `import triton`
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# triton 3.10 changes the default; results must repeat from one version to the next
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# a busy machine is slow, and no test fails for that
settings.register_profile("fresh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", settings.get_profile("fresh"), derandomize=True)
settings.load_profile("fixed")

KERNEL_MODULES = (
    "securetune_kernels.clip_and_accumulate.triton_kernels",
    "securetune_kernels.pgd_step.triton_kernels",
    "securetune_kernels.linear_grad_norms.triton_kernels",
    "securetune_kernels.clipped_linear_grad.triton_kernels",
    "securetune_kernels.lora_per_sample_grads.triton_kernels",
    "securetune_kernels.embedding_grad_norms.triton_kernels",
    "securetune_kernels._linear.triton_kernels",
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, so that the tests also run without the project's configuration file."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped elsewhere")
    config.addinivalue_line("markers", "xdist_group(name): run by one of pytest-xdist's workers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed the shared generators, so that no test depends on what ran before it in its process.

    A private run seeds torch's with fresh randomness, and its test leaves it so.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class PoisonedTorch:
    """Stands for the module ``torch``, but ``empty`` and ``empty_like`` return NaN."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def empty(self, *size: object, **options: object) -> torch.Tensor:
        """Allocate like ``torch.empty`` and fill with NaN."""
        return poison(torch.empty(*size, **options))  # type: ignore[call-overload]

    def empty_like(self, tensor: torch.Tensor, **options: object) -> torch.Tensor:
        """Allocate like ``torch.empty_like`` and fill with NaN."""
        return poison(torch.empty_like(tensor, **options))  # type: ignore[call-overload]


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill floating-point memory with NaN, and integer memory with its largest number."""
    value = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    return tensor.fill_(value)


@pytest.fixture(scope="session")
def poisoned_memory() -> Iterator[None]:
    """Make every output a launcher allocates NaN, and interpreted kernels keep to their arguments."""
    pytest.importorskip("triton")
    patch = pytest.MonkeyPatch()
    for module in KERNEL_MODULES:
        # by object: the attribute clip_and_accumulate of the package is the function, not the folder
        patch.setattr(importlib.import_module(module), "torch", PoisonedTorch())
    if os.environ.get("TRITON_INTERPRET") == "1":
        watch_memory(patch)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def calibrated_once() -> Iterator[None]:
    """Calibrate each plan once: a module asks for the same one again and again, about a second each."""
    from securetune.privacy.accounting import plan_privacy

    patch = pytest.MonkeyPatch()
    patch.setattr("securetune.privacy.private.plan_privacy", functools.cache(plan_privacy))
    yield
    patch.undo()


# The interpreter is off where there is a GPU, so kernels are tested in one place or the other.
KERNEL_DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="session", params=KERNEL_DEVICES)
def kernel_device(request: pytest.FixtureRequest, poisoned_memory: None) -> torch.device:
    """Where Triton kernels are tested: compiled on a GPU, else in the interpreter on a CPU."""
    return torch.device(request.param)
