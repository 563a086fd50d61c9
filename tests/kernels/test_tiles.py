"""Which tile a kernel runs with: counted, or swept on the chip; and the sweep."""

import importlib

import pytest
import torch

from benchmarks import sweep
from securetune_kernels import _tiles, linear_grad_norms
from securetune_kernels._tiles import Tile, architecture_of, key_of, tile_of
from tests.layer_factors import factors

pytest.importorskip("triton")
COUNTED, OTHER = Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)


@pytest.fixture
def swept(monkeypatch):
    entries = {}
    monkeypatch.setattr(_tiles, "SWEPT", entries)
    monkeypatch.setattr(sweep, "SWEPT", entries)
    return entries


def test_counted_tile_holds_where_nothing_was_swept(swept):
    swept["sm_90"] = {"gram half": OTHER}
    assert tile_of("gram", torch.bfloat16, "sm_80", COUNTED) == COUNTED
    assert tile_of("gram", torch.float32, "sm_90", COUNTED) == COUNTED
    assert tile_of("gram", torch.float16, "sm_90", COUNTED) == OTHER


@pytest.mark.parametrize("kernel", ["gram", "direct"])
def test_swept_tile_is_launched_and_gives_the_same_result(kernel, swept, monkeypatch, kernel_device):
    module = importlib.import_module("securetune_kernels.linear_grad_norms.triton_kernels")
    tokens, d = {"gram": (70, 90), "direct": (70, 20)}[kernel]
    a, g = factors(2, tokens, d=d, p=d, device=kernel_device)
    expected = linear_grad_norms(a, g, backend="triton").squared
    name = f"_{kernel}_kernel"
    launched, launch = [], getattr(module, name)

    class Recorded:
        def __getitem__(self, grid):
            def run(*args, **options):
                launched.append(options["BLOCK_T"] if kernel == "gram" else options["BLOCK_P"])
                return launch[grid](*args, **options)

            return run

    monkeypatch.setattr(module, name, Recorded())
    swept[architecture_of(kernel_device)] = {key_of(kernel, torch.float32): OTHER}
    found = linear_grad_norms(a, g, backend="triton").squared
    assert launched == [32]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_interpreter_is_an_architecture_of_its_own():
    assert architecture_of(torch.device("cpu")) == "cpu"


def test_swept_tiles_are_of_chips_that_are_compiled_for():
    resources = importlib.import_module("tests.kernels.resources")
    assert set(_tiles.SWEPT) <= set(resources.TARGETS)


def test_candidates_fit_a_chip():
    for dtype in (torch.bfloat16, torch.float32):
        tiles = list(sweep.candidates(dtype))
        assert len(tiles) == len(set(tiles)) > 20
        assert Tile(128, 128, 32, 8, 2) in tiles


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
def test_sweep_prints_the_lines_to_keep(swept, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "time_paired", lambda arms, *_, **__: {name: Fixed(name) for name in arms})
    sweep.main(["gram", "adapter", "--quick"])
    printed = capsys.readouterr().out
    assert "gram float: (32, 32, 32, 4, 2): 0.500 of the time" in printed
    assert (
        '"cpu": {\n    "gram float": Tile(rows=32, cols=32, depth=32, num_warps=4, num_stages=2),' in printed
    )
    assert swept == {"cpu": {}}


class Fixed:
    """A timing that is half of the tile in use."""

    def __init__(self, name):
        self.name = name

    def ratio_to(self, other):
        from benchmarks._harness import Quantiles

        return Quantiles(0.5, 0.5, 0.5)
