import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from securetune.data.records import Message, Record
from securetune.data.splits import coin_flip, deduplicate, deduplicate_exact, split_held_out
from securetune.errors import DataError, PrivacyError

KEY = bytes(range(32))
pairs = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2)), max_size=20)


def labelled(items):
    return [Record.labelled(text, label) for text, label in items]


def many(count):
    return labelled((f"text {number}", number % 2) for number in range(count))


def test_the_first_of_equal_records_is_kept_in_order():
    result = deduplicate_exact(labelled([("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 0)]))
    assert [(record.text, record.label) for record in result.records] == [("b", 0), ("a", 0), ("a", 1)]
    assert (result.num_removed, result.num_conflicting) == (2, 2)


def test_white_space_case_and_unicode_form_make_a_record_different():
    records = labelled([("a", 0), ("a ", 0), ("A", 0), ("caf\u00e9", 0), ("cafe\u0301", 0)])
    assert deduplicate_exact(records).num_removed == 0


@given(
    items=pairs, new=st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 2)), position=st.integers(0, 20)
)
def test_one_more_record_adds_at_most_one_and_removes_none(items, new, position):
    without = {record.unit_id for record in deduplicate_exact(labelled(items)).records}
    with_new = labelled([*items[:position], new, *items[position:]])
    added = {record.unit_id for record in deduplicate_exact(with_new).records}
    assert without <= added
    assert len(added) <= len(without) + 1


def test_fuzzy_duplicates_of_private_records_are_refused():
    with pytest.raises(PrivacyError, match=r"'fuzzy' compares private records with each other.*Use 'exact'"):
        deduplicate(many(3), method="fuzzy", is_protected=True)


def test_fuzzy_duplicates_elsewhere_ignore_case_punctuation_and_space():
    records = labelled([("Good film!", 1), ("good  film", 1), ("good film", 0), ("!!", 1), ("??", 1)])
    result = deduplicate(records, method="fuzzy", is_protected=False)
    assert [record.text for record in result.records] == ["Good film!", "good film", "!!", "??"]
    chats = [Record.chat((Message("user", text), Message("assistant", "yes"))) for text in ("Why?", "why")]
    assert deduplicate(chats, method="fuzzy", is_protected=False).num_removed == 1


def test_exact_is_what_protected_records_get():
    assert deduplicate(labelled([("a", 0), ("a", 0)]), is_protected=True).num_removed == 1


@given(order=st.permutations(range(30)), count=st.integers(2, 30))
def test_a_side_depends_on_the_record_alone(order, count):
    records = many(30)
    whole = split_held_out(records, fraction=0.5, key=KEY)
    held_out = {record.unit_id for record in whole.held_out}
    some = [records[index] for index in order[:count]]
    coins = coin_flip(some, key=KEY)
    try:
        part = split_held_out(some, fraction=0.5, key=KEY)
    except DataError:
        return
    assert {record.unit_id for record in part.held_out} == held_out & {record.unit_id for record in some}
    assert not {record.unit_id for record in part.train} & held_out
    assert len(coins.members) + len(coins.non_members) == count


def test_the_hash_is_the_documented_one():
    records = many(200)
    out = {record.unit_id for record in split_held_out(records, fraction=0.3, key=KEY).held_out}
    for record in records:
        message = b"securetune held-out split v1\0" + record.split_id.encode()
        code = hmac.new(KEY, message, hashlib.sha256).digest()
        assert (record.unit_id in out) == (int.from_bytes(code[:8], "big") / 2**64 < 0.3)


def test_about_the_asked_share_is_held_out():
    split = split_held_out(many(5000), fraction=0.2, key=KEY)
    # five standard deviations
    assert abs(len(split.held_out) - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5


def test_one_text_with_two_labels_lands_on_one_side():
    split = split_held_out(labelled((f"t{n // 2}", n % 2) for n in range(100)), fraction=0.5, key=KEY)
    assert not {record.text for record in split.train} & {record.text for record in split.held_out}


def test_another_key_gives_another_split_and_the_coin_is_independent_of_the_split():
    records = many(2000)
    out = {record.unit_id for record in split_held_out(records, fraction=0.5, key=KEY).held_out}
    other = {record.unit_id for record in split_held_out(records, fraction=0.5, key=KEY[::-1]).held_out}
    heads = {record.unit_id for record in coin_flip(records, key=KEY).members}
    for second in (other, heads):
        assert abs(len(out & second) - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_too_few_held_out_records_are_an_error_with_the_numbers():
    with pytest.raises(
        DataError, match=r"\d+ of 20 records are held out .* 0.2, fewer than data.min_held_out = 1000"
    ):
        split_held_out(many(20), fraction=0.2, key=KEY, min_held_out=1000)
    with pytest.raises(DataError, match="0 of 0 records"):
        split_held_out([], fraction=0.2, key=KEY)
    with pytest.raises(DataError, match="none is left to train on"):
        split_held_out(many(1), fraction=1 - 1e-12, key=KEY)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        split_held_out(many(3), fraction=fraction, key=KEY)


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="at least 16 bytes, got 3"):
        coin_flip(many(3), key=b"key")


def test_the_same_text_of_two_users_is_kept_and_whole_users_are_held_out():
    records = [Record.labelled(f"t{n}", 0).of_user(f"user{u}") for u in range(60) for n in range(3)]
    kept = deduplicate_exact([*records, records[0]])
    assert (kept.records, kept.num_removed) == (records, 1)
    split = split_held_out(records, fraction=0.3, key=bytes(16))
    assert not {record.user_id for record in split.train} & {record.user_id for record in split.held_out}
