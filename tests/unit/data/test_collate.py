import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from securetune.data.collate import collate, length_buckets
from securetune.data.encode import Example


def example(length, *, label=None, start=10):
    ids = tuple(range(start, start + length))
    flags = tuple(position % 2 == 1 for position in range(length))
    return Example(f"unit{length}", ids, flags, label, flags)


def test_rows_are_padded_on_the_right():
    batch = collate([example(3, label=1), example(1, label=0)], pad_id=7)
    assert batch.input_ids.tolist() == [[10, 11, 12], [10, 7, 7]]
    assert batch.lengths.tolist() == [3, 1]
    assert batch.labels.tolist() == [1, 0]
    assert batch.attack_mask.tolist() == [[False, True, False], [False, False, False]]
    assert torch.equal(batch.attack_mask, batch.supervised)
    assert batch.unit_ids == ("unit3", "unit1")
    assert batch.input_ids.dtype == batch.lengths.dtype == batch.labels.dtype == torch.int64


def test_examples_without_labels_give_none():
    assert collate([example(2)]).labels is None


def test_selected_rows_are_as_long_as_the_longest_of_them():
    batch = collate([example(3, label=1), example(5, label=0), example(2, label=1)])
    chosen = batch.select(torch.tensor([2, 0]))
    alone = collate([example(2, label=1), example(3, label=1)])
    for field in dataclasses.fields(alone):
        actual, expected = getattr(chosen, field.name), getattr(alone, field.name)
        assert torch.equal(actual, expected) if isinstance(expected, torch.Tensor) else actual == expected


def test_no_example_and_mixed_labels_are_refused():
    with pytest.raises(ValueError, match="at least one example"):
        collate([])
    with pytest.raises(ValueError, match="1 of 2 examples carry a label"):
        collate([example(2, label=0), example(2)])


def test_moving_a_batch_moves_every_tensor():
    moved = collate([example(2, label=0)]).to("meta")
    tensors = (moved.input_ids, moved.lengths, moved.labels, moved.attack_mask, moved.supervised)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@given(lengths=st.lists(st.integers(1, 60), max_size=40), max_tokens=st.integers(1, 200))
def test_buckets_hold_every_example_once_within_the_budget(lengths, max_tokens):
    buckets = length_buckets([example(length) for length in lengths], max_tokens)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        longest = max(lengths[index] for index in bucket)
        assert len(bucket) == 1 or len(bucket) * longest <= max_tokens


def test_buckets_group_similar_lengths_with_the_longest_first():
    assert length_buckets([example(length) for length in (2, 8, 3, 8)], 16) == [[1, 3], [2, 0]]


def test_a_budget_of_zero_is_refused():
    with pytest.raises(ValueError, match="max_tokens must be > 0, got 0"):
        length_buckets([], 0)


@given(
    rows=st.lists(st.tuples(st.integers(1, 60), st.sampled_from("abcde")), max_size=40),
    max_tokens=st.integers(1, 400),
)
def test_a_users_examples_stay_in_one_bucket(rows, max_tokens):
    examples = [dataclasses.replace(example(length), user_id=user) for length, user in rows]
    buckets = length_buckets(examples, max_tokens, by_user=True)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(rows)))
    owners = [{rows[index][1] for index in bucket} for bucket in buckets]
    assert sum(map(len, owners)) == len(set().union(*owners))
    for bucket, users in zip(buckets, owners, strict=True):
        longest = max(rows[index][0] for index in bucket)
        assert len(users) == 1 or len(bucket) * longest <= max_tokens
