"""Removing duplicates and splitting records, one record at a time, so that privacy accounting stays true."""

import hashlib
import hmac
import logging
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

from securetune.data.records import Record
from securetune.errors import DataError, PrivacyError

_logger = logging.getLogger(__name__)
_MINIMUM_KEY_BYTES = 16


class Deduplicated(NamedTuple):
    """Records after removing repetitions.

    Attributes:
        records: What is kept, in the order given.
        num_removed: How many were removed.
        num_conflicting: How many of those kept share their text with a kept record of another label.
    """

    records: list[Record]
    num_removed: int
    num_conflicting: int


class Split(NamedTuple):
    """Two disjoint parts of the records, each in the order given."""

    train: list[Record]
    held_out: list[Record]


class CoinFlip(NamedTuple):
    """Two disjoint parts of the records, each record's side tossed by itself."""

    members: list[Record]
    non_members: list[Record]


def deduplicate(
    records: Sequence[Record], *, method: Literal["exact", "fuzzy"] = "exact", is_protected: bool
) -> Deduplicated:
    """Remove repeated records.

    Args:
        records: What to reduce.
        method: See :func:`deduplicate_exact` and :func:`deduplicate_fuzzy`.
        is_protected: Whether the records are private records under differential privacy.

    Returns:
        The kept records and counts.

    Raises:
        PrivacyError: If ``fuzzy`` is asked for on protected records.
    """
    if method == "exact":
        return deduplicate_exact(records)
    if is_protected:
        raise PrivacyError(
            "data.deduplicate: 'fuzzy' compares private records with each other, so adding one record could"
            " change which others are trained on, and the promised epsilon would not hold. Use 'exact', or"
            " clean the file before the run and name that step as not covered by epsilon."
        )
    return deduplicate_fuzzy(records)


def deduplicate_exact(records: Sequence[Record]) -> Deduplicated:
    """Keep the first of every group of records with equal content.

    Equal means: the same canonical JSON of all fields, code point by code point, label included. Texts that
    differ in white space, case or Unicode normal form are different records. A text that appears with two
    labels is kept with both: removing it would let one record change another's fate.

    Guarantees:
        Adding one record to ``records`` adds at most one to the result and removes none, so the privacy loss
        of what follows is that of one record. Records of different users are different, so adding a user
        leaves the other users' records as they were.

    Args:
        records: What to reduce.

    Returns:
        The kept records and counts.
    """
    return _keep_first(records, [record.unit_id for record in records])


def deduplicate_fuzzy(records: Sequence[Record]) -> Deduplicated:
    """Keep the first of every group of records with the same letters and digits.

    Case, punctuation, white space and compatible Unicode forms (NFKC) make no difference; labels do.
    Which member of a group survives depends on the others, so this is for records outside differential
    privacy.

    Args:
        records: What to reduce.

    Returns:
        The kept records and counts.
    """
    return _keep_first(records, [_skeleton(record) for record in records])


def drop_conflicting(records: Sequence[Record]) -> list[Record]:
    """Drop every text that appears with more than one label, which is what a label-flipping poisoner leaves.

    It compares records with each other, so it is for records outside differential privacy.

    Args:
        records: What to screen.

    Returns:
        The records whose text has one label only, in the order given.
    """
    labels: dict[str, set[int | None]] = {}
    for record in records:
        labels.setdefault(record.text_id, set()).add(record.label)
    kept = [record for record in records if len(labels[record.text_id]) == 1]
    if len(kept) < len(records):
        _logger.warning("%d records with contradicting labels were dropped.", len(records) - len(kept))
    return kept


def split_held_out(records: Sequence[Record], *, fraction: float, key: bytes, min_held_out: int = 1) -> Split:
    """Hold out records by a keyed hash of each.

    Guarantees:
        A record's side depends on itself and the key alone: never on the other records, their order or their
        number. Records with one text land on one side, whatever their labels; where records have users, all
        records of a user do.

    Args:
        records: Without duplicates.
        fraction: Expected share held out, in (0, 1).
        key: At least 16 random bytes. Who does not know it cannot tell a record's side.
        min_held_out: Fewest records that must be held out, >= 1.

    Returns:
        The two parts.

    Raises:
        ValueError: If ``fraction`` or ``key`` is out of range.
        DataError: If fewer than ``min_held_out`` records are held out, or none is left to train on.
    """
    chosen = _tossed(records, fraction, key, purpose=b"securetune held-out split v1")
    split = Split(
        train=[record for record, is_out in zip(records, chosen, strict=True) if not is_out],
        held_out=[record for record, is_out in zip(records, chosen, strict=True) if is_out],
    )
    if len(split.held_out) < min_held_out:
        raise DataError(
            f"{len(split.held_out)} of {len(records)} records are held out with data.held_out_fraction ="
            f" {fraction}, fewer than data.min_held_out = {min_held_out}. Give more records, or change one of"
            " the two options."
        )
    if not split.train:
        raise DataError(
            f"All {len(records)} records are held out with data.held_out_fraction = {fraction}, so none is"
            " left to train on. Give more records, or a smaller fraction."
        )
    return split


def coin_flip(records: Sequence[Record], *, key: bytes, probability: float = 0.5) -> CoinFlip:
    """Toss a coin per record, for sets that differ in nothing but the toss.

    Guarantees:
        As :func:`split_held_out`, and independent of its sides even with the same key.

    Args:
        records: Without duplicates.
        key: At least 16 random bytes.
        probability: Chance of each record to become a member, in (0, 1).

    Returns:
        The two parts; either may be empty.

    Raises:
        ValueError: If ``probability`` or ``key`` is out of range.
    """
    heads = _tossed(records, probability, key, purpose=b"securetune coin flip v1")
    return CoinFlip(
        members=[record for record, is_head in zip(records, heads, strict=True) if is_head],
        non_members=[record for record, is_head in zip(records, heads, strict=True) if not is_head],
    )


def _tossed(records: Sequence[Record], probability: float, key: bytes, *, purpose: bytes) -> list[bool]:
    if not 0 < probability < 1:
        raise ValueError(f"a fraction must be above 0 and below 1, got {probability}.")
    if len(key) < _MINIMUM_KEY_BYTES:
        raise ValueError(f"the key must have at least {_MINIMUM_KEY_BYTES} bytes, got {len(key)}.")
    threshold = int(probability * 2**64)
    tosses: list[bool] = []
    for record in records:
        code = hmac.digest(key, purpose + b"\0" + record.split_id.encode(), hashlib.sha256)
        tosses.append(int.from_bytes(code[:8], "big") < threshold)
    return tosses


def _keep_first(records: Sequence[Record], identities: Sequence[object]) -> Deduplicated:
    first: dict[object, Record] = {}
    for record, identity in zip(records, identities, strict=True):
        first.setdefault(identity, record)
    kept = list(first.values())
    labels: dict[str, set[int | None]] = {}
    for record in kept:
        labels.setdefault(record.text_id, set()).add(record.label)
    num_conflicting = sum(len(labels[record.text_id]) > 1 for record in kept)
    if num_conflicting:
        _logger.warning(
            "%d records share their text with a record of another label; all are kept.", num_conflicting
        )
    return Deduplicated(kept, len(records) - len(kept), num_conflicting)


def _skeleton(record: Record) -> object:
    def reduce(text: str | None) -> str | None:
        if text is None:
            return None
        folded = unicodedata.normalize("NFKC", text).casefold()
        # a text of punctuation alone would otherwise equal every other such text
        return "".join(filter(str.isalnum, folded)) or folded

    messages = record.messages and tuple((turn.role, reduce(turn.content)) for turn in record.messages)
    return reduce(record.text), record.label, reduce(record.prompt), reduce(record.completion), messages
