"""A run that is resumed on another number of processes, or under another strategy, ends in the same place.

So do the weights that early stopping keeps.
"""

import pytest
import torch

from securetune.checkpoints import generate_signing_key
from securetune.training.strategy import Strategy
from tests.distributed.launching import load_result, torchrun
from tests.distributed.resume_worker import train

SHARED = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
# each is saved by one strategy and restored by another
PAIRS = [("zero1", "fsdp2"), ("zero2", "ddp"), ("zero3", "zero2"), ("fsdp2", "zero3"), ("ddp", "zero1")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    generate_signing_key(path / "owner")
    train(path, Strategy(), save_as="single")
    commands = [f"save-{name}" for name in SHARED]
    commands += [f"go-{name}-{saved}" for saved, name in PAIRS]
    commands += ["go-zero3-single", "go-zero1-single"]
    found = torchrun(2, "-m", "tests.distributed.resume_worker", str(path), *commands)
    assert found.returncode == 0, found.stderr[-4000:]
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return train(folder, Strategy())


def compare(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_the_weights_of_the_best_check_are_kept(expected):
    scores = expected["scores"]
    assert (scores[-1] - scores[:-1]).abs().min() > 1e-3
    kept = {name.removeprefix("best "): value for name, value in expected.items() if name.startswith("best ")}
    assert all((expected[name] - value).abs().max() > 1e-3 for name, value in kept.items())


@pytest.mark.parametrize("name", ["single", *SHARED])
def test_weights_of_full_training_are_sealed_as_weights(folder, name):
    parts = {path.name.partition(".")[0] for path in (folder / name / "shards").iterdir()}
    assert parts == {"weights", "optimizer"}


@pytest.mark.parametrize(("saved", "strategy"), [*PAIRS, ("single", "zero3"), ("single", "zero1")])
def test_two_processes_go_on(folder, expected, saved, strategy):
    compare(load_result(folder / f"go-{strategy}-{saved}.pt"), expected)


@pytest.mark.parametrize("saved", ["single", *SHARED])
def test_one_process_goes_on(folder, expected, saved):
    compare(train(folder, Strategy(), go_on=saved), expected)


@pytest.mark.slow
def test_four_processes_go_on(folder, expected):
    found = torchrun(
        4, "-m", "tests.distributed.resume_worker", str(folder), "go-fsdp2-zero3", "go-zero2-ddp"
    )
    assert found.returncode == 0, found.stderr[-4000:]
    for name in ("go-fsdp2-zero3", "go-zero2-ddp"):
        compare(load_result(folder / f"{name}.pt"), expected)
