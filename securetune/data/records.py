"""The one shape every data source is brought into: a record, the unit of privacy."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from securetune.errors import DataError
from securetune.files import canonical_json


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One private record: exactly one of a labelled text, a prompt with its completion, or a chat.

    The fields that are set decide what the record is; build it with :meth:`labelled`, :meth:`completed` or
    :meth:`chat`.

    Attributes:
        unit_id: SHA-256 (hex) of the canonical JSON of the record's own content: equal content, equal id.
        text: The text to classify, or ``None``.
        label: Index of the text's label in the recipe's ``data.labels``, or ``None``.
        prompt: What comes before the completion, possibly empty, or ``None``.
        completion: What the model must learn to write, or ``None``.
        messages: The turns of a chat, or ``None``.
        number: Position in the source, from 1; used in error messages, part of neither identity nor equality.
    """

    unit_id: str
    text: str | None = None
    label: int | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] | None = None
    number: int = field(default=0, compare=False)

    def __repr__(self) -> str:
        """Show the id only: a record is private, and reprs end up in logs."""
        return f"Record(unit_id={self.unit_id[:12]!r}...)"

    @classmethod
    def labelled(cls, text: str, label: int, *, number: int = 0) -> "Record":
        """Make a record of a text and the index of its label."""
        return cls(_digest({"text": text, "label": label}), text=text, label=label, number=number)

    @classmethod
    def completed(cls, prompt: str, completion: str, *, number: int = 0) -> "Record":
        """Make a record of a prompt and its completion."""
        unit_id = _digest({"prompt": prompt, "completion": completion})
        return cls(unit_id, prompt=prompt, completion=completion, number=number)

    @classmethod
    def chat(cls, messages: tuple[Message, ...], *, number: int = 0) -> "Record":
        """Make a record of a chat."""
        unit_id = _digest({"messages": [message._asdict() for message in messages]})
        return cls(unit_id, messages=messages, number=number)

    @cached_property
    def split_id(self) -> str:
        """What decides the record's side of a split: its text alone, or everything where there is no label.

        Two records with one text and different labels thereby land on the same side, so no held-out text was
        trained on.
        """
        return self.unit_id if self.text is None else _digest({"text": self.text})


def _digest(content: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(canonical_json(content)).hexdigest()
    except ValueError as error:
        raise DataError("The text holds half of a surrogate pair, which is not valid Unicode.") from error
