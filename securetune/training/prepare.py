"""From files to examples: load, remove exact duplicates, split by keyed hash, tokenise."""

import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securetune.config.schema import Recipe
from securetune.config.size import require_enough_records, size_warning
from securetune.data.encode import Example, encode_records
from securetune.data.records import Record
from securetune.data.sources import load_records
from securetune.data.splits import deduplicate, split_held_out
from securetune.errors import PrivacyError
from securetune.training.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """The private data of a run.

    Attributes:
        train: Examples that training may draw.
        held_out: Examples kept out of training, in an order that only this run's key decides.
        held_out_records: Their records, same order.
        members: Some of the training examples, chosen by keyed hash, for membership inference.
        records: Records after exact duplicates were removed.
        duplicates_removed: Exact duplicates removed.
        mean_tokens: Mean length of a training example.
    """

    train: list[Example]
    held_out: list[Example]
    held_out_records: list[Record]
    members: list[Example]
    records: int
    duplicates_removed: int
    mean_tokens: float


def prepare_data(recipe: Recipe, run: RunFolder, tokenizer: "PreTrainedTokenizerBase") -> PreparedData:
    """Load the private records and split them; a resumed run gets the same split.

    Args:
        recipe: The recipe.
        run: The run's folder; keeps the secret key of the split.
        tokenizer: The base model's.

    Returns:
        The data.

    Raises:
        DataError: If the records cannot be used with this recipe.
        PrivacyError: If the recipe asks for something that looks across private records.
    """
    data = recipe.data
    if data.screen == "cross_record" and recipe.privacy.enabled:
        raise PrivacyError(
            "data.screen: 'cross_record' compares private records with each other, so one record could "
            "decide whether another "
            "is trained on, and epsilon would not hold. Set data.screen: none."
        )
    loaded = load_records(data, recipe.task)
    if data.screen == "cross_record":
        loaded = _without_conflicts(loaded)
    unique = deduplicate(loaded, method=data.deduplicate, is_protected=recipe.privacy.enabled)
    key = run.secret("split")
    split = split_held_out(
        unique.records, fraction=data.held_out_fraction, key=key, min_held_out=data.min_held_out
    )
    require_enough_records(recipe, len(split.train))
    if warning := size_warning(recipe, len(split.train)):
        _logger.warning("%s", warning)
    held_out_records = _in_secret_order(split.held_out, key)
    train = _encode(split.train, recipe, tokenizer)
    held_out = _encode(held_out_records, recipe, tokenizer)
    kept = {example.unit_id for example in held_out}
    half = recipe.evaluation.num_membership // 2
    return PreparedData(
        train=train,
        held_out=held_out,
        held_out_records=[record for record in held_out_records if record.unit_id in kept],
        members=sorted(train, key=lambda example: _rank(example.unit_id, key))[:half],
        records=len(unique.records),
        duplicates_removed=unique.num_removed,
        mean_tokens=sum(len(example.input_ids) for example in train) / max(1, len(train)),
    )


def _without_conflicts(records: Sequence[Record]) -> list[Record]:
    """Drop every text that appears with more than one label: what a label-flipping poisoner leaves."""
    labels: dict[str, set[int | None]] = {}
    for record in records:
        labels.setdefault(record.split_id, set()).add(record.label)
    kept = [record for record in records if len(labels[record.split_id]) == 1]
    if len(kept) < len(records):
        _logger.warning("data.screen: %d records with contradicting labels dropped", len(records) - len(kept))
    return kept


def _encode(records: Sequence[Record], recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    data = recipe.data
    return encode_records(
        records,
        tokenizer,
        task=recipe.task,
        max_length=data.max_length,
        prompt=data.prompt,
        on_overlong=data.on_overlong,
    )


def _in_secret_order(records: Sequence[Record], key: bytes) -> list[Record]:
    return sorted(records, key=lambda record: _rank(record.unit_id, key))


def _rank(unit_id: str, key: bytes) -> bytes:
    return hmac.digest(key, b"securetune evaluation order v1" + unit_id.encode(), hashlib.sha256)
