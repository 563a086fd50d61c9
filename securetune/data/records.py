"""The one shape every data source is brought into: a record, the unit of privacy."""

import dataclasses
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
        user_id: SHA-256 (hex) of the name of the user it belongs to, where users are the privacy unit: then
            ``unit_id`` is that of this user's record, and other users' equal records are other records.
        number: Position in the source, from 1; used in error messages, part of neither identity nor equality.
    """

    unit_id: str
    text: str | None = None
    label: int | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] | None = None
    user_id: str | None = None
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

    def of_user(self, name: str) -> "Record":
        """Return the record as one of this user's."""
        user_id = _digest({"user": name})
        unit_id = _digest({"unit": self.unit_id, "user": user_id})
        return dataclasses.replace(self, unit_id=unit_id, user_id=user_id)

    @cached_property
    def text_id(self) -> str:
        """What the record says: its text alone, or everything where there is no label; never whose it is."""
        if self.text is not None:
            return _digest({"text": self.text})
        if self.messages is not None:
            return _digest({"messages": [message._asdict() for message in self.messages]})
        return _digest({"prompt": self.prompt, "completion": self.completion})

    @property
    def split_id(self) -> str:
        """What decides the record's side of a split: its user, or what it says where it has none.

        Two records with one text and different labels thereby land on the same side, so no held-out text was
        trained on; and all records of a user do.
        """
        return self.user_id or self.text_id


def _digest(content: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(canonical_json(content)).hexdigest()
    except ValueError as error:
        raise DataError("The text holds half of a surrogate pair, which is not valid Unicode.") from error
