"""JSON as a security format: one meaning per document, bounded, no surprises."""

import re
from typing import Any

from securetune.errors import CheckpointError, DataError
from securetune.files import canonical_json, parse_json

_MAX_DEPTH = 16
_MAX_INTEGER = 2**53 - 1
_BAD_TEXT = re.compile("[\0\ud800-\udfff]")


def parse_strict(
    content: bytes, name: str, *, max_bytes: int, floats: bool = False, canonical: bool = False
) -> Any:
    """Parse JSON that another party wrote.

    Guarantees:
        Refused: more than ``max_bytes``, invalid UTF-8, a byte order mark, duplicate keys, NaN and
            infinities, numbers
        beyond +-(2**53 - 1), floats unless allowed, nesting deeper than 16, NUL and lone surrogates in
        strings.

    Args:
        content: The bytes of the document.
        name: What to call the document in an error message.
        max_bytes: The largest size accepted.
        floats: Whether numbers with a fraction or an exponent are allowed.
        canonical: Whether the bytes must be exactly the canonical form (RFC 8785) of their value.

    Returns:
        The parsed value.

    Raises:
        CheckpointError: If the document breaks one of the rules.
    """
    if len(content) > max_bytes:
        raise CheckpointError(f"{name} has {len(content)} bytes; at most {max_bytes} are accepted.")
    try:
        value = parse_json(content, name)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:  # an integer longer than Python converts
        raise CheckpointError(f"{name} holds a number with too many digits.") from error
    _check_value(value, name, floats=floats)
    if canonical and canonical_json(value) != content:
        raise CheckpointError(
            f"{name} is not in canonical form (RFC 8785): it was edited or written by another tool."
        )
    return value


def _check_value(value: Any, name: str, *, floats: bool) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            else:
                _check_scalar(item, name, floats=floats)
        if not below:
            return
        level = below
    raise CheckpointError(f"{name} is nested more than {_MAX_DEPTH} levels deep.")


def _check_scalar(item: object, name: str, *, floats: bool) -> None:
    if isinstance(item, float) and not floats:
        raise CheckpointError(f"{name} holds the number {item!r}; only integers are allowed there.")
    if isinstance(item, int) and abs(item) > _MAX_INTEGER:
        raise CheckpointError(f"{name} holds an integer beyond +-(2**53 - 1).")
    if isinstance(item, str) and _BAD_TEXT.search(item):
        raise CheckpointError(f"{name} holds a string with a NUL or a lone surrogate.")
