"""The loop of recipes gives one result for any number of processes: attacks, samples, clipping, losses."""

import pytest
import torch

from securetune.training.loop import share_of
from securetune.training.strategy import Strategy
from tests.distributed.launching import load_result, torchrun
from tests.distributed.trainer_worker import train
from tests.unit.training.tiny_head import make_examples

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
KINDS = (
    *("adversarial", "full"),  # with one micro-batch and with several; the others with several
    *("plain", "users", "few", "adaptive", "per_layer", "gpt2", "qwen3", "mixtral"),
)
# what changes memory and time, not the result: each with the kind that it must agree with
SAVINGS = {
    "checkpointed": "full",
    "adapters_checkpointed": "adversarial",
    "twice": "full",
    "offloaded": "full",
}
CASES = [
    *(f"{name}-{kind}-40" for name in STRATEGIES for kind in (*KINDS, *SAVINGS)),
    *(f"{name}-{kind}-1000" for name in STRATEGIES for kind in KINDS[:2]),
]
CASES.remove("ddp-offloaded-40")
BFLOAT16 = [f"{name}-bfloat16-40" for name in STRATEGIES]
MANY = [case for case in CASES if case.split("-")[1] in ("adversarial", "full", "users", "few")]


@pytest.fixture(scope="module")
def alone():
    return {kind: train(Strategy(), kind, 1000) for kind in (*KINDS, "bfloat16")}


def launch(out, processes, cases):
    found = torchrun(processes, "-m", "tests.distributed.trainer_worker", str(out), *cases)
    assert found.returncode == 0, found.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("loop"), 2, [*CASES, *BFLOAT16])


def check(folder, alone, case):
    kind = case.split("-")[1]
    found, expected = load_result(folder / f"{case}.pt"), alone[SAVINGS.get(kind, kind)]
    assert list(found) == list(expected)
    assert len(set(expected["samples"].tolist())) > 1  # some samples do not divide by the processes
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_that_of_one_process(folder, alone, case):
    check(folder, alone, case)


@pytest.mark.slow
def test_the_run_of_four_processes_is_that_of_one(tmp_path, alone):
    launch(tmp_path, 4, MANY)
    for case in MANY:
        check(tmp_path, alone, case)


@pytest.mark.parametrize("case", BFLOAT16)
def test_adapters_of_a_bfloat16_model_are_those_of_one_process(folder, alone, case):
    found, expected = load_result(folder / f"{case}.pt"), alone["bfloat16"]
    # ZeRO-3 has linear layers of its own, which round elsewhere
    tolerance = 5e-2 if case.startswith("zero3") else 1e-2
    for name, value in expected.items():
        if "lora" in name:  # rounded to eight bits on the way, in batches of other shapes
            assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("by_user", [False, True])
def test_parts_hold_every_example_once(size, by_user):
    import dataclasses

    examples = [
        dataclasses.replace(example, user_id=f"user {index % 5}")
        for index, example in enumerate(make_examples(23))
    ]
    parts = [share_of(examples, rank, size, by_user=by_user) for rank in range(size)]
    ids = [example.unit_id for part in parts for example in part]
    assert sorted(ids) == sorted(example.unit_id for example in examples)
    units = [{example.user_id if by_user else example.unit_id for example in part} for part in parts]
    assert max(map(len, units)) - min(map(len, units)) <= 1
    assert sum(map(len, units)) == (5 if by_user else 23)  # no user in two parts
