"""Private records from a file of one's own, or from a packaged data set."""

import contextlib
import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from securetune.data.formats import Row, read_rows
from securetune.data.packaged import read_packaged_rows
from securetune.data.records import Message, Record
from securetune.errors import ConfigError, DataError
from securetune.files import parse_json

_logger = logging.getLogger(__name__)
_ROLES = ("system", "developer", "user", "assistant", "tool")
_LISTED = 5
_SHOWN_CHARACTERS = 40

Task = Literal["classify", "generate"]


class PrivateOptions(Protocol):
    """What the ``data.private`` section of a recipe says."""

    @property
    def source(self) -> str | None:
        """Name of a packaged data set."""
        ...

    @property
    def path(self) -> Path | None:
        """A data file."""
        ...

    @property
    def format(self) -> Literal["auto", "jsonl", "csv", "parquet"]:
        """Format of the data file."""
        ...


class DataOptions(Protocol):
    """What the ``data`` section of a recipe says about its source."""

    @property
    def private(self) -> PrivateOptions:
        """Where the records come from."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """The labels, in the order of their indices."""
        ...


def load_records(data_config: DataOptions, task: Task, *, user_field: str | None = None) -> list[Record]:
    """Read and check the private records.

    Text is taken exactly as it stands: no trimming, no Unicode normalisation.

    Guarantees:
        The order is that of the source. Every problem found is reported with record numbers and lengths,
        never with text.

    Args:
        data_config: The recipe's ``data`` section.
        task: ``classify`` needs ``text`` and ``label``; ``generate`` needs ``prompt`` and ``completion``, or
            ``messages``.
        user_field: Column that names the user of each record, where users are the privacy unit.

    Returns:
        At least one record, numbered from 1.

    Raises:
        ConfigError: If the source, the format or the labels are not usable.
        DataError: If the file is missing, damaged or empty, or a record is not of the right shape.
        MachineError: If the package of a packaged source is not installed.
    """
    return _load(data_config.private, list(data_config.labels), task, user_field, "data.private")


def load_public_records(
    public: PrivateOptions, labels: Sequence[str], task: Task, *, private: Sequence[Record]
) -> list[Record]:
    """Read and check the public records of ``data.public_validation`` as :func:`load_records` does.

    Args:
        public: That section.
        labels: The labels, in the order of their indices.
        task: As for :func:`load_records`.
        private: The private records, none of which may be public too.

    Returns:
        At least one record, numbered from 1; none has a user.

    Raises:
        ConfigError: As :func:`load_records`.
        DataError: The same, or if a record says what a private one says.
        MachineError: As :func:`load_records`.
    """
    records = _load(public, list(labels), task, None, "data.public_validation")
    known = {record.text_id for record in private}
    if shared := sum(record.text_id in known for record in records):
        raise DataError(
            f"data.public_validation: {shared:,} of its {len(records):,} records are private records too, "
            "and epsilon would not cover what they decide. Take them out of one of the two."
        )
    return records


def _load(
    private: PrivateOptions, labels: list[str], task: Task, user_field: str | None, option: str
) -> list[Record]:
    if private.source is not None:
        if task != "classify":
            raise ConfigError(
                f"{option}.source: {private.source!r} holds texts with labels, which suit task"
                f" 'classify', got {task!r}. Give prompts with completions, or chats, in {option}.path."
            )
        name, rows = private.source, read_packaged_rows(private.source, labels)
    elif private.path is not None:
        name, rows = str(private.path), read_rows(Path(private.path), private.format, option=option)
    else:
        raise ConfigError(f"{option}: give either source or path.")
    if not rows:
        raise DataError(f"{name} holds no records.")
    if user_field is not None:
        _check_user_column(rows, user_field, name)
    columns = rows if user_field is None else [_without(row, user_field) for row in rows]
    records = _labelled(columns, labels, name) if task == "classify" else _generations(columns, name)
    if user_field is not None:
        records = _with_users(records, rows, user_field, name)
    _check_labels_used(records, labels)
    return records


def _labelled(rows: Sequence[Row], labels: Sequence[str], name: str) -> list[Record]:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ConfigError(f"data.labels must name at least two different labels, got {list(labels)}.")
    _check_columns(rows, ("text", "label"), name, "task classify needs the columns text and label")
    index = {label: position for position, label in enumerate(labels)}
    problems = _Problems(name)
    unknown: dict[str, list[int]] = {}
    records: list[Record] = []
    for row in rows:
        text, label = row.values["text"], _label_string(row.values["label"])
        if not isinstance(text, str):
            problems.add(row, f"text must be a string, got {_kind(text)}")
        elif not text.strip():
            problems.add(row, "text is empty")
        elif label is None:
            problems.add(row, f"label must be a string or a whole number, got {_kind(row.values['label'])}")
        elif not label:
            problems.add(row, "label is empty")
        elif not _is_unicode(label):
            problems.add(row, "the label holds half of a surrogate pair, which is not valid Unicode")
        elif label not in index:
            unknown.setdefault(label, []).append(row.number)
        else:
            problems.collect(
                records, row, lambda t=text, i=index[label], n=row.number: Record.labelled(t, i, number=n)
            )
    problems.stop()
    if unknown:
        shown = "; ".join(
            f"{_shown(label)} in {len(numbers)} records, the first is record {numbers[0]}"
            for label, numbers in islice(unknown.items(), _LISTED)
        )
        more = f"; and {len(unknown) - _LISTED} more values" if len(unknown) > _LISTED else ""
        raise DataError(
            f"{name} holds labels that are not in data.labels: {shown}{more}. Allowed:"
            f" {', '.join(map(repr, labels))}. Add them to data.labels, or correct the file."
        )
    return records


def _generations(rows: Sequence[Row], name: str) -> list[Record]:
    columns = set(rows[0].values)
    if "messages" in columns and columns & {"prompt", "completion"}:
        raise DataError(
            f"{name} holds both messages and prompt or completion, so it is not clear what to learn. Keep one"
            " of them."
        )
    wanted = ("messages",) if "messages" in columns else ("prompt", "completion")
    _check_columns(rows, wanted, name, "task generate needs the columns prompt and completion, or messages")
    problems = _Problems(name)
    records: list[Record] = []
    for row in rows:
        number = row.number
        if wanted == ("messages",):
            messages = read_messages(_from_csv(row.values["messages"]))
            if isinstance(messages, str):
                problems.add(row, messages)
            else:
                problems.collect(records, row, lambda m=messages, n=number: Record.chat(m, number=n))
            continue
        prompt, completion = row.values["prompt"], row.values["completion"]
        wrong = next((column for column in wanted if not isinstance(row.values[column], str)), None)
        if wrong is not None:
            problems.add(row, f"{wrong} must be a string, got {_kind(row.values[wrong])}")
        elif not completion:
            problems.add(row, "completion is empty, so there is nothing to learn")
        else:
            problems.collect(
                records, row, lambda p=prompt, c=completion, n=number: Record.completed(p, c, number=n)
            )
    problems.stop()
    return records


def _from_csv(value: Any) -> Any:
    """Take a chat out of its JSON text, the only way for a CSV file to hold one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(DataError):
            return parse_json(value.encode("utf-8", "surrogatepass"), "messages")
    return value


def read_messages(value: Any) -> tuple[Message, ...] | str:
    """Check the turns of a chat; a string says what is wrong with them."""
    if not isinstance(value, list) or not value:
        return f"messages must be a list of objects with role and content, got {_kind(value)}"
    messages: list[Message] = []
    for turn, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            return f"message {turn} must be an object with role and content, got {_kind(message)}"
        # Parquet gives every message every field; those without a value say nothing
        extra = sorted(key for key in message.keys() - {"role", "content"} if message[key] is not None)
        if extra:
            return (
                f"message {turn} holds {', '.join(map(_shown, extra))}; only role and content are supported"
            )
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            return f"message {turn} has the role {_shown(role)}; allowed: {', '.join(_ROLES)}"
        if not isinstance(content, str):
            return f"message {turn}: content must be a string, got {_kind(content)}"
        messages.append(Message(role, content))
    if not any(message.role == "assistant" and message.content for message in messages):
        return "there is no assistant message, so there is nothing to learn"
    return tuple(messages)


def _check_columns(rows: Sequence[Row], wanted: Sequence[str], name: str, need: str) -> None:
    for row in rows:
        missing = [column for column in wanted if column not in row.values]
        if missing:
            found = ", ".join(_shown(column) for column in islice(row.values, 20)) or "none"
            raise DataError(
                f"{name}, {row.place}: {' and '.join(missing)} missing; {need}. Columns found: {found}."
                " Rename the columns of the file."
            )
    extra = sorted({column for row in rows for column in row.values} - set(wanted))
    if extra:
        _logger.warning("%s: columns that are not used: %s.", name, ", ".join(map(_shown, extra[:20])))


def _check_user_column(rows: Sequence[Row], user_field: str, name: str) -> None:
    for row in rows:
        if user_field not in row.values:
            found = ", ".join(_shown(column) for column in islice(row.values, 20)) or "none"
            raise DataError(
                f"{name}, {row.place}: column {user_field!r} missing, which data.user_field names as the "
                f"user of each record. Columns found: {found}. Add it to every row, or correct the option."
            )


def _without(row: Row, column: str) -> Row:
    return row._replace(values={name: value for name, value in row.values.items() if name != column})


def _with_users(records: list[Record], rows: Sequence[Row], user_field: str, name: str) -> list[Record]:
    problems = _Problems(name)
    owned: list[Record] = []
    for record, row in zip(records, rows, strict=True):
        value = row.values[user_field]
        user = None if isinstance(value, bool) else _label_string(value)
        if user is None or not user.strip():
            problems.add(
                row,
                f"{user_field} must name the record's user by text or a whole number, got {_kind(value)}; "
                "give each record without a known user a name of its own, or leave it out",
            )
        else:
            problems.collect(owned, row, lambda r=record, u=user: r.of_user(u))
    problems.stop()
    return owned


def _check_labels_used(records: Sequence[Record], labels: Sequence[str]) -> None:
    used = {record.label for record in records}
    for index, label in enumerate(labels):
        if used != {None} and index not in used:
            _logger.warning("No record has the label %r.", label)


def _label_string(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int) else None


def _is_unicode(string: str) -> bool:
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {type(None): "nothing (null)", bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    if isinstance(value, list | str) and not value:
        return f"{names[type(value)]} without content"
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    """Show a short value; a long one may be private text that slid into the wrong column."""
    if isinstance(value, str) and len(value) <= _SHOWN_CHARACTERS:
        return repr(value)
    return f"a value of {len(value)} characters" if isinstance(value, str) else _kind(value)


class _Problems:
    """Collects what is wrong with single records, and stops once with all of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._found: list[str] = []

    def add(self, row: Row, problem: str) -> None:
        self._found.append(f"record {row.number} ({row.place}): {problem}")

    def collect(self, records: list[Record], row: Row, make: Any) -> None:
        try:
            records.append(make())
        except DataError as error:
            self.add(row, str(error))

    def stop(self) -> None:
        if self._found:
            more = len(self._found) - _LISTED
            lines = [*self._found[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
            raise DataError(
                f"{len(self._found)} records of {self._name} cannot be used:\n  " + "\n  ".join(lines)
            )
