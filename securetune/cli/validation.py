"""What ``securetune validate`` looks at in the data."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from securetune.config.schema import Recipe
from securetune.config.size import require_enough_records, require_places, size_warning
from securetune.errors import DataError

if TYPE_CHECKING:
    from securetune.data.records import Record


def check_data(recipe: Recipe, *, with_lengths: bool = True) -> Iterator[str]:
    """Load the private records and report on them, one line each.

    The lines hold counts of private records: for whoever holds the data, not for publishing.

    Args:
        recipe: A valid recipe.
        with_lengths: Load the tokenizer and check every record's length.

    Yields:
        Lines to print.

    Raises:
        DataError: If the records cannot be used with this recipe.
    """
    from securetune.data.sources import load_public_records, load_records
    from securetune.data.splits import deduplicate, drop_conflicting

    loaded = load_records(recipe.data, recipe.task, user_field=recipe.data.user_field)
    screened = drop_conflicting(loaded) if recipe.data.screen == "cross_record" else loaded
    kept = deduplicate(screened, method=recipe.data.deduplicate, is_protected=recipe.privacy.enabled)
    records = kept.records
    num_dropped = len(loaded) - len(screened)
    contradicting = f"{num_dropped:,} with contradicting labels dropped, " if num_dropped else ""
    yield (
        f"records   {len(loaded):,} read, {contradicting}{kept.num_removed:,} duplicates removed, "
        f"{len(records):,} left"
    )
    if not records:
        raise DataError(
            "no record is left: each text appears with several labels. Set data.screen to 'none', or repair "
            "the labels."
        )
    if kept.num_conflicting:
        yield f"warning   {kept.num_conflicting:,} records share their text with a record of another label"
    if recipe.task == "classify":
        yield f"labels    {_balance(records, recipe.data.labels)}"
    num_units = len(records)
    if recipe.privacy.unit == "user":
        counts = Counter(record.user_id for record in records)
        num_units = len(counts)
        yield _users(recipe, sorted(counts.values()))
    num_held_out = round(num_units * recipe.data.held_out_fraction)
    num_training = num_units - num_held_out
    unit = "" if recipe.privacy.unit == "record" else " users"
    yield f"split     about {num_training:,}{unit} for training and {num_held_out:,} held out"
    if num_held_out < recipe.data.min_held_out:
        yield (
            f"warning   data.min_held_out = {recipe.data.min_held_out:,} will hardly be reached: "
            "raise data.held_out_fraction"
        )
    require_enough_records(recipe, num_training)
    require_places(recipe, num_training)
    if warning := size_warning(recipe, num_training):
        yield f"warning   {warning}"
    public: list[Record] = []
    if recipe.data.public_validation is not None:
        public = load_public_records(
            recipe.data.public_validation, recipe.data.labels, recipe.task, private=records
        )
        yield f"public    {len(public):,} validation records read, none of them private too"
    if with_lengths:
        yield f"lengths   {_check_lengths(recipe, records)}"
        if public:
            yield f"public    {_check_lengths(recipe, public, option='data.public_validation')}"


def _users(recipe: Recipe, counts: Sequence[int]) -> str:
    most = recipe.privacy.max_records_per_user or 1
    above = sum(count > most for count in counts)
    return (
        f"users     {len(counts):,}, with {counts[0]:,} to {counts[-1]:,} records (median "
        f"{counts[len(counts) // 2]:,}); {above:,} have more than the {most:,} of a step"
    )


def _balance(records: "Sequence[Record]", labels: Sequence[str]) -> str:
    counts = Counter(record.label for record in records)
    return ", ".join(
        f"{label} {counts[index]:,} ({counts[index] / len(records):.0%})"
        for index, label in enumerate(labels)
    )


def _check_lengths(recipe: Recipe, records: "Sequence[Record]", *, option: str = "data.private") -> str:
    from transformers import AutoTokenizer

    from securetune.data.encode import encode_records, label_token_ids
    from securetune.models.base import local_folder, resolve_base

    tokenizer = AutoTokenizer.from_pretrained(
        local_folder(resolve_base(recipe.model)), local_files_only=True, trust_remote_code=False
    )
    data = recipe.data
    examples = encode_records(
        records,
        tokenizer,
        task=recipe.task,
        max_length=data.max_length,
        prompt=data.prompt,
        on_overlong=data.on_overlong,
    )
    if recipe.task == "classify":
        label_token_ids(tokenizer, data.words, prompt=data.prompt)
    if not examples:
        raise DataError(
            f"{option}: all {len(records):,} records are longer than data.max_length ({data.max_length}). "
            "Raise it, or give shorter records."
        )
    lengths = sorted(len(example.input_ids) for example in examples)
    num_truncated = sum(example.is_truncated for example in examples)
    return (
        f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]} of {data.max_length} tokens; "
        f"{num_truncated:,} truncated, {len(records) - len(examples):,} dropped"
    )
