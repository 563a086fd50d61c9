"""Strict JSON: one meaning per document."""

import pytest

from securetune.checkpoints._json import parse_strict
from securetune.errors import CheckpointError
from securetune.files import canonical_json


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":1,"a":2}', b'{"x":{"a":1,"a":1}}', b"[NaN]", b"[Infinity]", b"[-Infinity]", b"[1e999]",
        b"[1.5]",
        b"[1.0]",
        b"[9007199254740992]", b"[-9007199254740992]", b"[" + b"9" * 5000 + b"]", b"\xef\xbb\xbf{}",
        b'"\xff"',
        b'["\\u0000"]',
        b'{"\\u0000":1}', b'["\\ud800"]', b"[" * 17 + b"]" * 17, b"[" * 100_000,
        b'{"a":' * 17 + b"1" + b"}" * 17, b"",
        b"{} {}",
        b"{'a':1}", b"[1,]", b"[01]",
    ],
    ids=lambda content: repr(content[:24]),
)  # fmt: skip
def test_ambiguous_or_dangerous_json_is_refused(content):
    with pytest.raises(CheckpointError, match=r"doc\.json"):
        parse_strict(content, "doc.json", max_bytes=1 << 20)


def test_document_over_the_limit_is_refused():
    with pytest.raises(CheckpointError, match="has 12 bytes; at most 11"):
        parse_strict(b'["12345678"]', "doc.json", max_bytes=11)


def test_ordinary_document_is_parsed():
    value = {"a": [1, -2, True, None, "text ü"], "b": {"c": 9007199254740991}}
    assert parse_strict(canonical_json(value), "doc.json", max_bytes=1000, canonical=True) == value


def test_floats_are_parsed_where_they_are_allowed():
    assert parse_strict(b"[1.5]", "doc.json", max_bytes=10, floats=True) == [1.5]


@pytest.mark.parametrize("content", [b'{"b":1,"a":2}', b'{"a": 1}', b'{"a":1}\n', b'["\\u0041"]', b"[1E2]"])
def test_other_spelling_of_a_value_is_refused_where_canonical_form_is_asked(content):
    with pytest.raises(CheckpointError):
        parse_strict(content, "doc.json", max_bytes=100, canonical=True)
