"""Work at once uses other threads, shares torch's threads among them, and gives them back."""

import threading

import pytest
import torch

from securetune.models.concurrent import num_at_once, run_at_once


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_every_result_comes_once(three_threads):
    assert sorted(run_at_once(lambda item: item * item, range(20), 3)) == [n * n for n in range(20)]


def test_threads_share_the_cores_and_get_them_back(three_threads):
    def where(_):
        return threading.current_thread(), torch.get_num_threads()

    found = list(run_at_once(where, range(30), 3))
    assert {threads for _, threads in found} == {1}
    assert threading.current_thread() not in {thread for thread, _ in found}
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("items", "at_once"), [(range(1), 3), (range(5), 1), (range(0), 3)])
def test_nothing_to_share_stays_in_the_callers_thread(three_threads, items, at_once):
    found = list(run_at_once(lambda _: threading.current_thread(), items, at_once))
    assert found == [threading.current_thread()] * len(items)


def test_an_error_reaches_the_caller_and_the_threads_come_back(three_threads):
    def work(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        list(run_at_once(work, range(9), 3))
    assert torch.get_num_threads() == 3


def test_a_gpu_takes_one_at_a_time_and_a_cpu_no_more_than_it_has_threads(three_threads):
    assert num_at_once(torch.device("cuda")) == 1
    assert num_at_once(torch.device("cpu")) == 3
    torch.set_num_threads(1)
    assert num_at_once(torch.device("cpu")) == 1
