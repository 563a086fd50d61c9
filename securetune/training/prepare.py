"""From files to examples: load, remove exact duplicates, split by keyed hash, tokenise."""

import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from securetune.config.schema import Recipe
from securetune.config.size import require_enough_records, require_places, size_warning
from securetune.data.encode import Example, encode_records
from securetune.data.records import Record
from securetune.data.sources import load_public_records, load_records
from securetune.data.splits import Split, deduplicate, drop_conflicting, split_held_out
from securetune.errors import DataError
from securetune.training.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Public sentences of unequal length: checks on them say nothing about a private record.
PROBES = ("Water boils.", "She opened the letter, sat down and began to read.")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedData:
    """The private data of a run.

    Where users are the privacy unit, whole users are held out, and one record of each user, chosen by keyed
    hash, stands for the user in every measurement: so figures count independent units.

    Attributes:
        train: Examples that training may draw.
        held_out: Examples kept out of training that measurements may use, in an order that only this run's
            key decides.
        held_out_records: Their records, same order.
        members: Some of the training examples, chosen by keyed hash, for membership inference.
        num_held_out: Records kept out of training.
        shared: Ids of ``held_out`` whose text another user trained on: no non-members.
        records: Records after exact duplicates were removed.
        duplicates_removed: Exact duplicates removed.
        mean_tokens: Mean length of a training example.
        validation: What early stopping looks at: public examples, or the last of the held-out ones, which
            evaluate no model. Empty without early stopping.
    """

    train: list[Example]
    held_out: list[Example]
    held_out_records: list[Record]
    members: list[Example]
    records: int
    duplicates_removed: int
    mean_tokens: float
    num_held_out: int
    shared: frozenset[str] = frozenset()
    validation: list[Example] = field(default_factory=list)


def prepare_data(recipe: Recipe, run: RunFolder, tokenizer: "PreTrainedTokenizerBase") -> PreparedData:
    """Load the private records and split them; a resumed run gets the same split.

    Args:
        recipe: The recipe.
        run: The run's folder; keeps the secret key of the split.
        tokenizer: The base model's.

    Returns:
        The data.

    Raises:
        DataError: If the records cannot be used with this recipe, or are not those that the run began with.
        ConfigError: If the run has begun and the key of its split is gone.
    """
    data = recipe.data
    loaded = load_records(data, recipe.task, user_field=data.user_field)
    if data.screen == "cross_record":
        loaded = drop_conflicting(loaded)
    unique = deduplicate(loaded, method=data.deduplicate, is_protected=recipe.privacy.enabled)
    key = run.secret("split")
    _refuse_other_records(unique.records, run, key)
    split = split_held_out(
        unique.records, fraction=data.held_out_fraction, key=key, min_held_out=data.min_held_out
    )
    num_training = count_units(recipe, split.train)
    require_enough_records(recipe, num_training)
    require_places(recipe, num_training)
    _require_held_out_users(recipe, split.held_out)
    if warning := size_warning(recipe, num_training):
        _logger.warning("%s", warning)
    held_out_records = _in_secret_order(split.held_out, key)
    train = _encode(split.train, recipe, tokenizer)
    encoded = _encode(held_out_records, recipe, tokenizer)
    held_out = _one_per_user(encoded)
    kept = {example.unit_id for example in held_out}
    members, shared = _apart(split, recipe)
    half = recipe.evaluation.num_membership // 2
    return PreparedData(
        train=train,
        held_out=held_out,
        held_out_records=[record for record in held_out_records if record.unit_id in kept],
        members=_one_per_user(
            sorted(
                (example for example in train if example.unit_id in members),
                key=lambda example: _rank(example.unit_id, key),
            )
        )[:half],
        records=len(unique.records),
        duplicates_removed=unique.num_removed,
        mean_tokens=sum(len(example.input_ids) for example in train) / max(1, len(train)),
        num_held_out=len(encoded),
        shared=shared,
        validation=_validation(recipe, unique.records, held_out, tokenizer),
    )


def _refuse_other_records(records: Sequence[Record], run: RunFolder, key: bytes) -> None:
    ids = "\n".join(sorted(record.unit_id for record in records))
    digest = hmac.new(key, ids.encode(), hashlib.sha256).hexdigest()  # tells nothing without the key
    if not run.has_begun:
        run.save("records", digest)
    elif run.has("records") and run.load("records") != digest:
        raise DataError(
            f"data.private: the {len(records):,} records are not those that the run in {run.root} began "
            "with, so its steps and figures would be about different data. Give the same records, in any "
            "order, or start a new run in another folder."
        )


def count_units(recipe: Recipe, records: Sequence[Record]) -> int:
    """Count the privacy units among records.

    Args:
        recipe: The recipe.
        records: Records without duplicates.

    Returns:
        The number of records, or of their users where users are the privacy unit.
    """
    return len({record.user_id for record in records}) if recipe.privacy.unit == "user" else len(records)


def _require_held_out_users(recipe: Recipe, held_out: Sequence[Record]) -> None:
    found, wanted = count_units(recipe, held_out), recipe.data.min_held_out
    if found < wanted:
        raise DataError(
            f"{found:,} users are held out with data.held_out_fraction = {recipe.data.held_out_fraction}, "
            f"fewer than data.min_held_out = {wanted:,}. Give records of more users, or change one of the "
            "two options."
        )


def _one_per_user(examples: Sequence[Example]) -> list[Example]:
    """Keep the first example of each user, and every example without one."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.user_id or example.unit_id, example)
    return list(first.values())


def _apart(split: Split, recipe: Recipe) -> tuple[set[str], frozenset[str]]:
    """Find the ids of members whose text is on one side only, and of held-out records where it is on both.

    Records are split by their text, so no text is on both sides; users are not.
    """
    if recipe.privacy.unit == "record":
        return {record.unit_id for record in split.train}, frozenset()
    trained, kept_out = ({record.text_id for record in side} for side in split)
    shared = frozenset(record.unit_id for record in split.held_out if record.text_id in trained)
    if shared:
        _logger.warning(
            "%d held-out records have a text that a training user has too; they are left out of membership "
            "inference.",
            len(shared),
        )
    return {record.unit_id for record in split.train if record.text_id not in kept_out}, shared


def _validation(
    recipe: Recipe,
    private: Sequence[Record],
    held_out: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
) -> list[Example]:
    settings, evaluation = recipe.training.early_stopping, recipe.evaluation
    if settings.method == "none":
        return []
    if (public := recipe.data.public_validation) is not None:
        records = load_public_records(public, recipe.data.labels, recipe.task, private=private)
        examples = _encode(records, recipe, tokenizer)
        if not examples:
            raise DataError(
                f"data.public_validation: all {len(records):,} records are longer than data.max_length "
                f"({recipe.data.max_length}). Raise it, or give shorter records."
            )
        return examples
    evaluated = max(evaluation.num_texts, evaluation.num_membership // 2, evaluation.num_attacked)
    if len(held_out) < settings.num_texts + evaluated:
        raise DataError(
            f"only {len(held_out):,} held-out records fit data.max_length, fewer than "
            f"training.early_stopping.num_texts ({settings.num_texts:,}) and the {evaluated:,} others that "
            "evaluate the model. Raise data.held_out_fraction or data.max_length, or set data.on_overlong to "
            "'truncate'."
        )
    return list(held_out[-settings.num_texts :])


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


def probe_examples(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> list[Example]:
    """Encode public sentences of unequal length, to check the model without private data.

    Args:
        recipe: The recipe.
        tokenizer: The base model's.

    Returns:
        Two examples; labels differ where there are labels.
    """
    if recipe.task == "classify":
        records = [Record.labelled(text, label) for label, text in enumerate(PROBES)]
    else:
        records = [Record.completed(text, " " + PROBES[0]) for text in PROBES]
    return encode_records(
        records,
        tokenizer,
        task=recipe.task,
        max_length=recipe.data.max_length,
        prompt=recipe.data.prompt,
        on_overlong="truncate",
    )
