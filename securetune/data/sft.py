"""Rows in the format of supervised fine-tuning tools to token ids and labels, for any data collator."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from securetune.data.encode import Example, OnOverlong, encode_records
from securetune.data.records import Record
from securetune.data.sources import read_messages
from securetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED_LABEL", "encode_sft"]

IGNORED_LABEL = -100  # what losses leave out
# columns that change what SFTTrainer renders, so that a row without them would be another text
_UNSUPPORTED = ("tools", "chat_template_kwargs", "image", "images")


def encode_sft(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    on_overlong: OnOverlong = "error",
) -> list[dict[str, list[int]]]:
    """Tokenise rows as TRL's ``SFTTrainer`` takes them, one example per row, learning completions only.

    A row holds ``messages`` (every assistant turn is learnt), ``prompt`` and ``completion`` (the completion
    is learnt; both strings, or both lists of messages), or ``text`` (all of it is learnt). Chats are rendered
    with the tokenizer's own template. Each example depends on its own row alone.

    Guarantees:
        Text never yields a special token. Messages of errors hold row numbers and lengths, no text.

    Args:
        rows: The rows; columns that ``SFTTrainer`` does not render are left out.
        tokenizer: The model's fast tokenizer.
        max_length: Most tokens of an example, >= 2.
        on_overlong: ``error``; ``truncate`` cuts the end; ``drop`` leaves the row out.

    Returns:
        One dictionary per example: ``input_ids``, ``attention_mask``, and ``labels``, which are
        ``IGNORED_LABEL`` where nothing is learnt. ``transformers.DataCollatorForSeq2Seq`` pads them.

    Raises:
        DataError: If a row has another shape, is too long, or holds nothing to learn.
    """
    records: list[Record] = []
    turns_before: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        record, turns = _read(row, number)
        records.append(replace(record, unit_id=str(number)))  # so that examples are found again after drops
        turns_before[str(number)] = turns
    examples = encode_records(
        records, tokenizer, task="generate", max_length=max_length, on_overlong=on_overlong
    )
    return [_with_labels(example, turns_before[example.unit_id]) for example in examples]


def _read(row: Mapping[str, Any], number: int) -> tuple[Record, int]:
    """Make a record, and count the assistant turns of its prompt, which are not learnt."""
    unsupported = [name for name in _UNSUPPORTED if row.get(name)]
    if unsupported:
        raise DataError(
            f"row {number} holds {' and '.join(unsupported)}, which SFTTrainer would render and which is not "
            "supported here. Remove the column, or write its content into the messages."
        )
    present = {name for name in ("messages", "prompt", "completion", "text") if row.get(name) is not None}
    if present == {"messages"}:
        return Record.chat(_chat(list(row["messages"]), number), number=number), 0
    if present == {"text"} and isinstance(row["text"], str):
        return Record.completed("", row["text"], number=number), 0
    if present == {"prompt", "completion"}:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Record.completed(prompt, completion, number=number), 0
        if isinstance(prompt, list) and isinstance(completion, list):
            _chat(completion, number)  # an assistant message must be in it
            chat = _chat([*prompt, *completion], number)
            before = sum(message.role == "assistant" for message in chat[: len(prompt)])
            return Record.chat(chat, number=number), before
    raise DataError(
        f"row {number} holds {', '.join(sorted(present)) or 'none of the columns'}, but needs exactly one "
        "of: messages (a list), prompt with completion (both strings or both lists of messages), text (a "
        "string)."
    )


def _chat(value: list[Any], number: int) -> tuple[Any, ...]:
    messages = read_messages(value)
    if isinstance(messages, str):
        raise DataError(f"row {number}: {messages}.")
    return messages


def _with_labels(example: Example, turns_before: int) -> dict[str, list[int]]:
    supervised = list(example.supervised)
    for _ in range(turns_before):  # each assistant turn is one run of supervised tokens
        if not any(supervised):
            break
        first = supervised.index(True)
        while first < len(supervised) and supervised[first]:
            supervised[first] = False
            first += 1
    if not any(supervised):
        raise DataError(
            f"row {example.unit_id} has no token of its completion left to learn. Raise max_length."
        )
    ids = list(example.input_ids)
    labels = [token if learn else IGNORED_LABEL for token, learn in zip(ids, supervised, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
