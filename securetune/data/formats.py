"""Rows of JSONL, CSV and Parquet files, read strictly."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from securetune.errors import ConfigError, DataError
from securetune.files import parse_json

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_MAX_FIELD_CHARACTERS = 1 << 28
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row of a data file.

    Attributes:
        number: Position among the rows, from 1.
        place: Where it stands, such as ``line 7``.
        values: Its columns.
    """

    number: int
    place: str
    values: dict[str, Any]


def read_rows(
    path: Path, file_format: Literal["auto", "jsonl", "csv", "parquet"], *, option: str = "data.private"
) -> list[Row]:
    """Read all rows of a data file.

    Args:
        path: The file.
        file_format: ``auto`` goes by the ending of the name.
        option: Section of the recipe that names the file, for error messages.

    Returns:
        The rows in file order.

    Raises:
        ConfigError: If the format cannot be told from the name.
        DataError: If the file is missing, unreadable, empty, not UTF-8 or not of its format.
    """
    if not path.exists():
        raise DataError(
            f"{option}.path: there is no file {str(path)!r}. A relative path starts at the current folder."
        )
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise DataError(f"{option}.path: {str(path)!r} is {kind}; give one JSONL, CSV or Parquet file.")
    chosen = _FORMATS.get(path.suffix.lower()) if file_format == "auto" else file_format
    if chosen is None:
        raise ConfigError(
            f"{option}.path: the format of {path.name!r} cannot be told from its ending. Known endings:"
            f" {', '.join(_FORMATS)}. Set {option}.format to 'jsonl', 'csv' or 'parquet'."
        )
    readers = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes).")
        return readers[chosen](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or type(error).__name__}.") from error


def text_lines(path: Path) -> Iterator[str]:
    """Read a UTF-8 file line by line, line endings kept.

    Only a line feed ends a line, so a text may hold any other separator. A byte order mark is left out.

    Args:
        path: The file.

    Yields:
        One line.

    Raises:
        DataError: If a line is not valid UTF-8; names file, line and byte.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid UTF-8 at byte {error.start + 1} of the line. Save the"
                    " file as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
                ) from error


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        value = parse_json(line.encode(), f"{path}, {place}:")
        if not isinstance(value, dict):
            hint = " (one JSON object per line is expected, not one array)" if line.lstrip()[0] == "[" else ""
            raise DataError(f"{path}, {place}: a row must be a JSON object{hint}.")
        rows.append(Row(len(rows) + 1, place, value))
    return rows


def _read_csv(path: Path) -> list[Row]:
    previous_limit = csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    try:
        reader = csv.reader(text_lines(path), strict=True)
        return _csv_rows(reader, path)
    finally:
        csv.field_size_limit(previous_limit)


def _csv_rows(reader: Any, path: Path) -> list[Row]:
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        for fields in reader:
            place = f"line {reader.line_num}"
            if not fields:
                continue
            if header is None:
                header = list(fields)
                if len(set(header)) < len(header):
                    raise DataError(f"{path}, {place}: a column name appears twice in the header.")
            elif len(fields) != len(header):
                raise DataError(
                    f"{path}, {place}: {len(fields)} fields, but the header has {len(header)}. Quote fields"
                    " that hold commas or line breaks."
                )
            else:
                rows.append(Row(len(rows) + 1, place, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise DataError(f"{path} is not a valid Parquet file.") from error
    if len(set(table.column_names)) < table.num_columns:
        raise DataError(f"{path}: a column name appears twice.")
    columns = {name: _values(table, name, path) for name in table.column_names}
    names = list(columns)
    return [
        Row(number, f"row {number}", dict(zip(names, values, strict=True)))
        for number, values in enumerate(zip(*columns.values(), strict=True), start=1)
    ]


def _values(table: Any, name: str, path: Path) -> list[Any]:
    column = table.column(name)
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} holds text that is not valid UTF-8.") from error
    except (ValueError, OverflowError) as error:
        # such as times in nanoseconds or before the year 1
        raise DataError(
            f"{path}: column {name!r} of type {column.type} holds values that Python cannot represent. Take "
            "the column out, or store it as text."
        ) from error
