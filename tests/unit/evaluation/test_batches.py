"""Batches hold every example once, and together no more tokens than asked for."""

import threading

import pytest
import torch

from securetune.data.encode import Example
from securetune.evaluation.batches import for_each_batch


def examples(*lengths):
    return [Example(str(n), (1,) * n, (False,) * n, None, (False,) * n) for n in lengths]


@pytest.mark.parametrize("threads", [1, 3])
def test_each_example_comes_once_and_all_batches_at_once_hold_the_tokens_asked_for(threads):
    seen, sizes, calls = [], [], []

    def work(rows, batch):
        seen.extend(rows)
        sizes.append(batch.input_ids.numel())

    def progress(stage, done, total):
        calls.append((threading.current_thread(), stage, done, total))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        device = torch.device("cpu")
        for_each_batch(work, examples(*range(1, 40)), 120, device=device, stage="here", progress=progress)
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == list(range(39))
    assert max(sizes) <= 120 // threads
    assert {call[0] for call in calls} == {threading.current_thread()}
    assert calls[-1][1:] == ("here", 39, 39)
    assert [call[2] for call in calls] == sorted(call[2] for call in calls)
