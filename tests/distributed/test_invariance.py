"""The private result does not depend on how many processes share the work, nor on how they do it."""

import pytest
import torch

from tests.distributed.invariance_worker import train
from tests.distributed.launching import group_of_one, load_result, torchrun

STRATEGIES = ("ddp", "ddp-wrapped", "fsdp2")
CASES = (
    *(f"{strategy}-lora-{accumulation}" for strategy in STRATEGIES for accumulation in (1, 4)),
    *(f"{strategy}-{kind}-{n}" for strategy in ("ddp", "fsdp2") for kind, n in (("full", 1), ("tied", 4))),
    *(f"{strategy}-noise-1" for strategy in STRATEGIES),
)


@pytest.fixture(scope="module")
def alone():
    return {kind: train("single", kind, 1) for kind in ("lora", "full", "tied", "noise")}


def launch(folder, processes):
    if processes == 1:
        with group_of_one():
            return {case: train(*case.rsplit("-", 2)[:2], int(case[-1])) for case in CASES}
    found = torchrun(processes, "-m", "tests.distributed.invariance_worker", str(folder), *CASES)
    assert found.returncode == 0, found.stderr[-4000:]
    return {case: load_result(folder / f"{case}-{processes}.pt") for case in CASES}


@pytest.fixture(
    scope="module",
    params=[1, 2, pytest.param(4, marks=pytest.mark.slow)],
    ids=["one process", "two processes", "four processes"],
)
def results(request, tmp_path_factory):
    return launch(tmp_path_factory.mktemp("invariance"), request.param)


@pytest.mark.parametrize("case", [case for case in CASES if "noise" not in case])
def test_parameters_are_those_of_one_process(results, alone, case):
    expected = alone[case.split("-")[-2]]
    assert list(results[case]) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(results[case][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_noise_is_the_same_bit_for_bit(results, alone, strategy):
    found = results[f"{strategy}-noise-1"]
    assert list(found) == list(alone["noise"])
    for name, value in alone["noise"].items():
        assert value.abs().sum() > 0, name
        assert found[name].equal(value), name


def test_all_strategies_of_one_size_agree(results):
    for name, value in results["ddp-tied-4"].items():
        torch.testing.assert_close(results["fsdp2-tied-4"][name], value, rtol=1e-5, atol=1e-6, msg=name)
