import hashlib

import pytest

from securetune.data.records import Message, Record
from securetune.errors import DataError


def test_the_id_is_the_digest_of_the_canonical_json():
    expected = hashlib.sha256(b'{"label":1,"text":"caf\xc3\xa9"}').hexdigest()
    assert Record.labelled("café", 1).unit_id == expected


def test_equal_content_has_one_id_wherever_it_stands():
    assert Record.labelled("a", 0, number=3) == Record.labelled("a", 0, number=9)


def test_different_content_has_different_ids():
    records = [
        Record.labelled("a", 0),
        Record.labelled("a", 1),
        Record.labelled("a ", 0),
        Record.completed("a", "b"),
        Record.completed("ab", ""),
        Record.chat((Message("user", "a"),)),
        Record.chat((Message("user", "a"), Message("assistant", "b"))),
        Record.labelled("caf\u00e9", 0),
        Record.labelled("cafe\u0301", 0),
    ]
    assert len({record.unit_id for record in records}) == len(records)


def test_the_split_id_ignores_the_label_only():
    assert Record.labelled("a", 0).split_id == Record.labelled("a", 1).split_id
    assert Record.labelled("a", 0).split_id != Record.labelled("b", 0).split_id
    assert Record.completed("a", "b").split_id != Record.completed("a", "c").split_id


def test_a_repr_shows_no_text():
    assert "secret" not in repr(Record.labelled("secret", 0))


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(DataError, match="surrogate"):
        Record.labelled("a\ud800", 0)


def test_records_of_two_users_differ_and_each_users_share_a_side():
    record = Record.labelled("a", 0)
    ann, bob = record.of_user("ann"), record.of_user("bob")
    assert len({record.unit_id, ann.unit_id, bob.unit_id}) == 3
    assert ann.text_id == bob.text_id == record.text_id
    assert ann.split_id == Record.labelled("b", 1).of_user("ann").split_id == ann.user_id != bob.split_id
    assert "ann" not in (ann.user_id or "")
    assert ann == Record.labelled("a", 0).of_user("ann")
