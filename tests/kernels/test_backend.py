"""Which implementation runs: by name, by environment, by device."""

import logging
import sys

import pytest
import torch

from securetune_kernels import _backend
from securetune_kernels._backend import resolve_backend

CPU_TENSOR = torch.zeros(1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("SECURETUNE_BACKEND", raising=False)
    _backend._log_choice_once.cache_clear()


def test_auto_is_torch_on_a_cpu_even_with_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("auto", CPU_TENSOR, op="op") == "torch"


def test_environment_decides_for_auto(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SECURETUNE_BACKEND", "triton")
    assert resolve_backend("auto", CPU_TENSOR, op="op") == "triton"


def test_name_given_in_the_call_beats_the_environment(monkeypatch):
    monkeypatch.setenv("SECURETUNE_BACKEND", "triton")
    assert resolve_backend("torch", CPU_TENSOR, op="op") == "torch"


def test_unknown_name_says_where_it_came_from(monkeypatch):
    with pytest.raises(ValueError, match="backend must be 'auto', 'triton' or 'torch', got 'cuda'"):
        resolve_backend("cuda", CPU_TENSOR, op="op")
    monkeypatch.setenv("SECURETUNE_BACKEND", "cuda")
    with pytest.raises(ValueError, match="SECURETUNE_BACKEND must be"):
        resolve_backend("auto", CPU_TENSOR, op="op")


def test_triton_by_name_on_a_cpu_raises_with_the_remedy(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match=r"op: backend='triton' cannot run: the tensor is on cpu. Use backend='torch'"
    ):
        resolve_backend("triton", CPU_TENSOR, op="op")


def test_triton_by_name_without_triton_raises(monkeypatch):
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve_backend("triton", CPU_TENSOR, op="op")


def test_a_forbidden_triton_counts_as_missing(monkeypatch):
    class Forbid:
        def find_spec(self, name, path=None, target=None):
            if name == "triton":
                raise ImportError(name)

    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Forbid(), *sys.meta_path])
    assert resolve_backend("auto", CPU_TENSOR, op="op") == "torch"
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve_backend("triton", CPU_TENSOR, op="op")


def test_choice_is_logged_once_per_op(caplog):
    with caplog.at_level(logging.DEBUG, logger=_backend.__name__):
        for _ in range(3):
            resolve_backend("auto", CPU_TENSOR, op="some_op")
    assert [record.getMessage() for record in caplog.records] == [
        "some_op on cpu tensors runs on the torch backend."
    ]


class OnABlackwell:
    """Looks like a tensor on a chip of compute capability 10."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize(
    ("version", "dtype", "capability", "fails"),
    [
        ((3, 7), torch.bfloat16, (10, 0), True),
        ((3, 8), torch.bfloat16, (10, 0), False),
        ((3, 7), torch.float32, (10, 0), False),
        ((3, 7), torch.bfloat16, (9, 0), False),
    ],
)
def test_products_that_a_compiler_cannot_make_fall_back(monkeypatch, version, dtype, capability, fails):
    monkeypatch.setattr(_backend, "_triton_version", lambda: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    reason = _backend.why_products_cannot_compile(OnABlackwell(dtype))
    assert reason == ("triton 3.7 cannot compile it for this chip, triton 3.8 can" if fails else None)
