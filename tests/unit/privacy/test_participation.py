"""Participation patterns: the promise, the tracker that enforces it, and the sampler that keeps it."""

import copy
import pickle
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from securetune.errors import PrivacyError
from securetune.privacy.noise import SAMPLING_STREAM, keystream_words
from securetune.privacy.participation import EpochOrderSampler, Participation, ParticipationTracker

KEY = bytes(range(32))


def pattern(steps=10, max_participations=3, min_separation=2):
    return Participation(steps=steps, max_participations=max_participations, min_separation=min_separation)


def sampler(num_records=50, batches_per_epoch=4, steps=10, key=KEY):
    return EpochOrderSampler(num_records, batches_per_epoch, steps=steps, key=key)


@settings(max_examples=40)
@given(steps=st.integers(1, 60), separation=st.integers(1, 70), limit=st.integers(1, 70))
def test_possible_participations_are_what_fits_into_the_run(steps, separation, limit):
    fits = len(range(0, steps, separation))
    assert pattern(steps, limit, separation).possible_participations == min(limit, fits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000000, got 0"),
        ({"max_participations": 0}, "max_participations must be >= 1, got 0"),
        ({"min_separation": 0}, "min_separation must be >= 1, got 0"),
    ],
)
def test_impossible_patterns_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        pattern(**values)


def test_tracker_admits_what_was_promised():
    tracker = ParticipationTracker(pattern())
    for step in (0, 2, 4):
        tracker.admit(step, [7])
    tracker.admit(4, [8])  # another micro-batch of the same step
    tracker.admit(9, [8])


def test_one_participation_too_many_is_refused_by_name():
    tracker = ParticipationTracker(pattern())
    for step in (0, 2, 4):
        tracker.admit(step, [7])
    with pytest.raises(
        PrivacyError, match="unit 7 would take part 4 times by step 6: max_participations is 3"
    ):
        tracker.admit(6, [1, 7])


def test_participation_too_soon_is_refused_by_name():
    tracker = ParticipationTracker(pattern())
    tracker.admit(3, [7])
    with pytest.raises(
        PrivacyError, match="unit 7 would take part at step 4 after step 3: min_separation is 2"
    ):
        tracker.admit(4, [7])


def test_a_unit_twice_in_one_step_is_refused():
    tracker = ParticipationTracker(pattern(min_separation=1))
    with pytest.raises(PrivacyError, match="unit 5 would take part at step 0 after step 0"):
        tracker.admit(0, [5, 5])


def test_a_refused_batch_counts_nobody():
    tracker = ParticipationTracker(pattern(max_participations=1))
    tracker.admit(0, [7])
    with pytest.raises(PrivacyError, match="unit 7"):
        tracker.admit(2, [1, 7])
    tracker.admit(2, [1])


@pytest.mark.parametrize("step", [10, 11])
def test_steps_behind_the_plan_are_refused(step):
    with pytest.raises(PrivacyError, match=f"step {step} was not planned"):
        ParticipationTracker(pattern()).admit(step, [0])
    with pytest.raises(PrivacyError, match=f"step {step} was not planned"):
        sampler().draw(step)


def test_steps_going_back_are_refused():
    tracker = ParticipationTracker(pattern())
    tracker.admit(5, [1])
    with pytest.raises(PrivacyError, match="units of step 4 came after those of step 5"):
        tracker.admit(4, [2])
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        tracker.admit(-1, [2])


@settings(max_examples=40)
@given(
    records=st.integers(1, 40),
    batches=st.integers(1, 9),
    steps=st.integers(1, 30),
    key=st.binary(min_size=32, max_size=32),
)
def test_sampler_keeps_the_pattern_that_it_promises(records, batches, steps, key):
    drawn = sampler(records, batches, steps, key)
    tracker = ParticipationTracker(drawn.participation)
    taken = defaultdict(list)
    for step in range(steps):
        tracker.admit(step, drawn.draw(step))
        for record in drawn.draw(step):
            taken[record].append(step)
    for record in range(records):
        first = taken[record][0] if taken[record] else steps
        assert taken[record] == list(range(first, steps, batches))
        assert first < batches or first == steps  # a run shorter than an epoch leaves records out
    most = max(map(len, taken.values()), default=0)
    assert most <= drawn.participation.possible_participations == -(-steps // batches)


def test_batch_is_the_exact_multiple_of_the_keystream_word():
    words = keystream_words(KEY, stream=SAMPLING_STREAM, step=0, start=0, count=1000)
    expected = [i for i, word in enumerate(words.tolist()) if (word >> 32) * 7 // 2**32 == 3]
    assert sampler(1000, 7).draw(3) == expected


def test_batches_are_uniform():
    sizes = np.array([len(sampler(20_000, 16, 16).draw(step)) for step in range(16)])
    assert sizes.sum() == 20_000
    assert stats.chisquare(sizes).pvalue > 1e-3


def test_another_record_does_not_move_the_others():
    fewer, more = sampler(100), sampler(101)
    for step in range(10):
        assert [record for record in more.draw(step) if record != 100] == fewer.draw(step)


def test_secret_orders_differ_and_report_epsilon():
    assert sampler(1000, key=None).draw(0) != sampler(1000, key=None).draw(0)
    assert sampler(key=None).reportable_epsilon
    assert not sampler().reportable_epsilon


def test_repr_hides_the_key():
    expected = "EpochOrderSampler(num_records=50, batches_per_epoch=4, steps=10, key=<secret>)"
    assert repr(sampler(key=None)) == expected
    assert sampler().num_records == 50


@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy])
def test_sampler_cannot_be_pickled_or_copied(copy_it):
    with pytest.raises(TypeError, match="EpochOrderSampler cannot be pickled or copied"):
        copy_it(sampler())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_records": 0}, "num_records must be >= 1, got 0"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be from 1 to 4294967295, got 0"),
        ({"batches_per_epoch": 2**32}, "batches_per_epoch must be from 1 to 4294967295, got 4294967296"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000000, got 0"),
        ({"key": b"short"}, "key must be 32 bytes, got 5"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        sampler(**values)
