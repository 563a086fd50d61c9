"""Batches run at once hold every example once, and leave the threads as they were."""

import threading

import pytest
import torch

from securetune.data.encode import Example
from securetune.evaluation.batches import for_each_batch

CPU = torch.device("cpu")


def examples(*lengths):
    return [Example(str(n), (1,) * n, (False,) * n, None, (False,) * n) for n in lengths]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_each_example_comes_once_and_all_batches_together_hold_the_tokens_asked_for(three_threads):
    seen, sizes = [], []

    def work(rows, batch):
        seen.extend(rows)
        sizes.append(batch.input_ids.numel())

    for_each_batch(work, examples(*range(1, 40)), 120, device=CPU)
    assert sorted(seen) == list(range(39))
    assert max(sizes) <= 40


def test_threads_share_the_cores_and_get_them_back(three_threads):
    inside, names = set(), set()

    def work(rows, batch):
        inside.add(torch.get_num_threads())
        names.add(threading.current_thread().name)

    for_each_batch(work, examples(*[4] * 30), 12, device=CPU)
    assert inside == {1}
    assert threading.current_thread().name not in names
    assert torch.get_num_threads() == 3


def test_one_batch_and_one_thread_stay_in_the_callers_thread(three_threads):
    names = []

    def work(rows, batch):
        names.append(threading.current_thread().name)

    for_each_batch(work, examples(4, 4), 1000, device=CPU)
    torch.set_num_threads(1)
    for_each_batch(work, examples(*[4] * 6), 8, device=CPU)
    assert names == [threading.current_thread().name] * 4


def test_an_error_in_a_batch_reaches_the_caller(three_threads):
    def work(rows, batch):
        raise ValueError(f"batch of {len(rows)}")

    with pytest.raises(ValueError, match="batch of 1"):
        for_each_batch(work, examples(*[4] * 9), 12, device=CPU)
    assert torch.get_num_threads() == 3


def test_progress_comes_from_the_callers_thread_and_ends_with_all(three_threads):
    calls = []

    def progress(stage, done, total):
        calls.append((threading.current_thread().name, stage, done, total))

    for_each_batch(lambda *_: None, examples(*[4] * 9), 24, device=CPU, stage="here", progress=progress)
    assert {call[0] for call in calls} == {threading.current_thread().name}
    assert calls[-1][1:] == ("here", 9, 9)
    assert [call[2] for call in calls] == sorted(call[2] for call in calls)
