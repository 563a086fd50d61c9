"""What the processes of a run share, and what happens when one of them fails or does not come."""

import json
import pickle

import pytest

from securetune.privacy.ledger import read_ledger
from securetune.privacy.noise import NoiseSource, SecretKey
from tests.distributed.launching import torchrun
from tests.distributed.processes_worker import SCENARIOS, SHORT

SIZE = 3


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    names = [scenario.__name__ for scenario in SCENARIOS]
    found = torchrun(SIZE, "-m", "tests.distributed.processes_worker", str(folder), *names)
    assert found.returncode == 0, found.stderr[-4000:]

    def run(scenario):
        texts = [folder / f"{scenario}-{rank}.json" for rank in range(SIZE)]
        return [json.loads(path.read_text()) for path in texts if path.exists()]

    run.folder = folder
    return run


def test_all_processes_agree(launch):
    found = launch("agree")
    assert len({one["key"] for one in found}) == 1
    assert found[0]["key"] != found[0]["other_key"]
    for one in found:
        assert one["reportable"]
        assert "<secret>" in one["repr"]
        assert one["most"] == 20
        assert one["shared"] == {"from": 0, "text": "ü"}
        assert one["first"] == [0]
        assert one["counts"] == [0 + 1 + 2, 3]
        # 0, 1, 2, 3, 4 and three processes that added their number: uneven parts, put together again
        assert one["gathered"] == [3 * value + 3 for value in range(5)]


def test_failure_of_the_first_ends_all_alike(launch):
    found = launch("fail")
    assert found[0]["error"] == "the budget is spent."
    assert [one["error"] for one in found[1:]] == ["process 0: the budget is spent."] * (SIZE - 1)


def test_one_ledger_charges_each_step_once_for_all(launch):
    found = launch("ledger")
    assert all(one["counts"] == [1, 2, 3] for one in found)
    assert all("all 3 planned steps are charged" in one["refused"] for one in found)
    assert all(one["releases"] == [0.5] and one["left"] == 0 for one in found)
    state = read_ledger(launch.folder / "ledger.jsonl")
    assert state.steps_charged == 3
    assert state.release_epsilons == (0.5,)


def test_a_process_that_does_not_come_is_named(launch):
    found = launch("late")
    assert f"rank {SIZE - 1}" in found[0]["error"].lower() or f"ranks {SIZE - 1}" in found[0]["error"].lower()
    for one in found[:-1]:
        assert "before a step is charged" in one["error"]
        assert "--resume" in one["error"]
        assert one["seconds"] < 2 * SHORT.total_seconds()


def test_the_first_may_work_for_longer_than_the_longest_wait(launch):
    assert launch("slow") == [{"first": [0], "after": SIZE - 1}] * SIZE


def test_a_first_that_hangs_ends_the_others_in_time(launch):
    first, *others = launch("stopped")
    assert first["error"] is not None
    assert len(others) == SIZE - 1
    for one in others:
        assert "lost another process while sharing" in one["error"]
        assert "--resume" in one["error"]
        assert one["seconds"] < 2 * SHORT.total_seconds()


def test_a_first_that_is_gone_ends_the_others_at_once(launch):
    others = launch("gone")
    assert len(others) == SIZE - 1
    for one in others:
        assert "lost another process while sharing" in one["error"]
        assert one["seconds"] < 30


class TestSecretKey:
    def test_is_no_test_key_and_stays_in_memory(self):
        key = SecretKey(bytes(range(32)))
        assert NoiseSource(key).reportable_epsilon
        assert not NoiseSource(bytes(range(32))).reportable_epsilon
        assert "<secret>" in repr(key)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(key)

    def test_has_the_right_length(self):
        with pytest.raises(ValueError, match="32 bytes, got 3"):
            SecretKey(b"abc")

    def test_gives_the_noise_of_its_bytes(self):
        secret = bytes(range(32))
        found, expected = (
            NoiseSource(key).normal(step=1, count=9, stddev=1.0) for key in (SecretKey(secret), secret)
        )
        assert found.equal(expected)
