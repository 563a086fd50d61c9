"""User-level sampling: whole users, a cap per user, and no influence of one user on another."""

import copy
import pickle
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from securetune.privacy.accounting import epsilon_of_phases, unit_statement
from securetune.privacy.participation import EpochOrderSampler, ParticipationTracker
from securetune.privacy.sampling import FixedSizeSampler, PoissonSampler, TruncatedPoissonSampler
from securetune.privacy.units import DrawnRecord, UserSampler

KEY = bytes(range(32))
OTHER_KEY = bytes(range(32, 64))


def everyone(user_ids, cap, key=KEY):
    """Take every user at every step, so that only the choice within users is random."""
    return UserSampler(user_ids, PoissonSampler(len(set(user_ids)), 1.0), max_records_per_user=cap, key=key)


def numbers_within(user_ids, drawn, user):
    """Which of a user's own records were drawn, by their number within the user."""
    own = [position for position, user_id in enumerate(user_ids) if user_id == user]
    return [own.index(record.position) for record in drawn if record.unit_id == user]


@given(
    user_ids=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60),
    cap=st.integers(1, 6),
    step=st.integers(0, 1000),
)
def test_drawn_users_come_whole_up_to_the_cap(user_ids, cap, step):
    users = list(dict.fromkeys(user_ids))
    sampler = UserSampler(
        user_ids, PoissonSampler(len(users), 0.5, KEY), max_records_per_user=cap, key=OTHER_KEY
    )
    drawn = sampler.draw(step)
    taken = {users[position] for position in PoissonSampler(len(users), 0.5, KEY).draw(step)}
    assert {record.unit_id for record in drawn} == taken
    for user in taken:
        positions = [record.position for record in drawn if record.unit_id == user]
        assert len(positions) == len(set(positions)) == min(cap, user_ids.count(user))
        assert all(user_ids[position] == user for position in positions)


@given(
    others=st.lists(st.sampled_from("bcd"), max_size=30),
    places=st.lists(st.integers(0, 30), min_size=8, max_size=8),
    step=st.integers(0, 1000),
)
def test_the_choice_within_a_user_does_not_depend_on_other_users(others, places, step):
    alone = ["a"] * 8
    mixed = list(others)
    for place in places:
        mixed.insert(place, "a")
    chosen = numbers_within(alone, everyone(alone, 3).draw(step), "a")
    assert numbers_within(mixed, everyone(mixed, 3).draw(step), "a") == chosen


def test_each_subset_of_a_users_records_is_equally_likely_and_new_at_each_step():
    counts = dict.fromkeys(combinations(range(5), 2), 0)
    sampler = everyone(["a"] * 5, 2)
    for step in range(2000):
        counts[tuple(record.position for record in sampler.draw(step))] += 1
    assert 1e-3 < stats.chisquare(list(counts.values())).pvalue < 1 - 1e-4


def test_two_users_choose_independently():
    user_ids = ["a", "a", "b", "b"]
    pairs = [tuple(record.position for record in everyone(user_ids, 1).draw(step)) for step in range(1000)]
    table = [[sum(pair == (a, b) for pair in pairs) for b in (2, 3)] for a in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_same_step_repeats_and_other_keys_differ():
    user_ids = ["a"] * 300
    sampler = everyone(user_ids, 50, key=None)
    assert sampler.draw(4) == sampler.draw(4)
    assert sampler.draw(4) != everyone(user_ids, 50, key=None).draw(4)


def test_records_of_a_user_come_side_by_side():
    assert everyone(["a", "b", "a"], 5).draw(0) == [
        DrawnRecord(0, "a"),
        DrawnRecord(2, "a"),
        DrawnRecord(1, "b"),
    ]


def test_accounting_is_that_of_the_users():
    user_ids = [str(i % 50) for i in range(1000)]
    sampler = UserSampler(user_ids, PoissonSampler(50, 0.1), max_records_per_user=20)
    assert sampler.phase(1.0, 9) == PoissonSampler(50, 0.1).phase(1.0, 9)
    assert sampler.event(1.0) == PoissonSampler(50, 0.1).event(1.0)
    # a larger cap makes no user's clipped sum longer, so it costs nothing
    single = UserSampler(user_ids, PoissonSampler(50, 0.1), max_records_per_user=1)
    assert epsilon_of_phases([single.phase(1.0, 9)], 1e-5) == epsilon_of_phases([sampler.phase(1.0, 9)], 1e-5)


def test_statement_speaks_of_users():
    sampler = UserSampler(["a", "b", "a"], FixedSizeSampler(2, 1), max_records_per_user=4)
    statement = sampler.describe()
    assert (statement.unit, statement.max_records_per_unit) == ("user", 4)
    assert str(statement) == (
        "fixed size sampling at rate 0.5, at most 1 users a step; replace one user; the number of users is "
        "public (2)"
    )
    assert unit_statement("user").startswith("one user with all records")
    assert unit_statement("record") == "one record; a person with several records is not covered"
    with pytest.raises(ValueError, match="unit must be one of record, user, got 'household'"):
        unit_statement("household")


def test_rows_to_pad_to_count_records():
    user_ids = ["a", "b", "c", "c"]
    truncated = UserSampler(user_ids, TruncatedPoissonSampler(3, 0.5, 2), max_records_per_user=3)
    assert truncated.max_batch_size == 6
    assert UserSampler(user_ids, PoissonSampler(3, 0.5), max_records_per_user=3).max_batch_size is None


def test_fixed_key_anywhere_reports_no_epsilon():
    def reportable(key, user_key):
        return UserSampler(
            ["a"], PoissonSampler(1, 0.5, user_key), max_records_per_user=1, key=key
        ).reportable_epsilon

    assert reportable(None, None)
    assert not reportable(KEY, None)
    assert not reportable(None, KEY)


@pytest.mark.parametrize("copy_it", [pickle.dumps, copy.copy, copy.deepcopy])
def test_sampler_cannot_be_pickled_or_copied_and_hides_its_key(copy_it):
    sampler = UserSampler(["a"], PoissonSampler(1, 0.5), max_records_per_user=1)
    assert repr(sampler).count("<secret>") == 2
    with pytest.raises(TypeError, match="UserSampler cannot be pickled or copied"):
        copy_it(sampler)


def test_a_sampler_of_another_number_of_users_is_refused():
    with pytest.raises(ValueError, match=r"draws from 3 users, but user_ids has 2 .*len\(set\(user_ids\)\)"):
        UserSampler(["a", "b", "a"], PoissonSampler(3, 0.5), max_records_per_user=1)


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="max_records_per_user must be >= 1, got 0"):
        UserSampler(["a"], PoissonSampler(1, 0.5), max_records_per_user=0)


def test_places_of_a_public_number_may_be_empty():
    sampler = UserSampler(["a", "b", "b"], FixedSizeSampler(10, 10), max_records_per_user=5)
    assert [record.position for record in sampler.draw(0)] == [0, 1, 2]
    with pytest.raises(ValueError, match="draws from 10 users, but user_ids has 2"):
        UserSampler(["a", "b", "b"], PoissonSampler(10, 0.5), max_records_per_user=5)
    with pytest.raises(ValueError, match="draws from 1 users, but user_ids has 2"):
        UserSampler(["a", "b", "b"], FixedSizeSampler(1, 1), max_records_per_user=5)


def test_the_cap_is_in_the_statement():
    assert unit_statement("user", max_records_per_unit=4).startswith(
        "one user, with up to 4 records in a step"
    )


@given(
    user_ids=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40),
    batches=st.integers(1, 5),
    steps=st.integers(1, 12),
    cap=st.integers(1, 3),
)
def test_users_in_a_fixed_order_keep_its_pattern_with_all_their_records(user_ids, batches, steps, cap):
    order = EpochOrderSampler(len(set(user_ids)), batches, steps=steps, key=KEY)
    sampler = UserSampler(user_ids, order, max_records_per_user=cap, key=OTHER_KEY)
    assert sampler.participation == order.participation
    tracker = ParticipationTracker(order.participation)
    users = list(dict.fromkeys(user_ids))
    for step in range(steps):
        drawn = sampler.draw(step)
        taken = dict.fromkeys(record.unit_id for record in drawn)
        tracker.admit(step, [users.index(user) for user in taken])
        for user in taken:
            assert sum(record.unit_id == user for record in drawn) == min(cap, user_ids.count(user))
    assert sampler.phase(2.0, 1) == order.phase(2.0, 1)
    assert sampler.describe().unit == "user"
    assert everyone(user_ids, cap).participation is None


@pytest.mark.parametrize("user", [7, ("a", 1), None, float("nan")])
def test_user_that_is_no_string_is_refused_at_once(user):
    with pytest.raises(ValueError, match=r"must be strings, got .* for record 1\. Give \[str\(user\)"):
        everyone(["a", user], 1)
