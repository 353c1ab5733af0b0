"""Records out of files of any kind, one at a time, never a whole file in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError
from trimtab.training.data.blocks import read_text_blocks
from trimtab.training.data.files import suffix_of

TEXT_DOCUMENT = 1 << 24  # characters; a longer text file becomes several documents
_MOST_JSON = 1 << 28  # characters; a `.json` file is one array, and read as a whole


@dataclass(frozen=True, slots=True)
class Record:
    """One row of data and where it was found."""

    values: dict[str, Any]
    path: Path
    number: int
    unit: str = "line"

    @property
    def where(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"


class Problems:
    """What is wrong with single records: the first one is an error, or all are skipped and counted.

    Attributes:
        count: records skipped.
        first: what was wrong with the first of them, or None.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.count = 0
        self.first: str | None = None

    def meet(self, problem: str) -> None:
        """Raises ConfigError, or counts where skipping was asked for."""
        if not self.skip:
            raise ConfigError(f"{problem} (or set 'on_error: skip' to leave such records out and count them)")
        self.count += 1
        self.first = self.first or problem


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The values of all records of a file; see `iterate_records`."""
    return (record.values for record in iterate_records(path))


def iterate_records(
    path: Path,
    columns: Sequence[str] = (),
    encoding: str = "utf-8",
    problems: Problems | None = None,
) -> Iterator[Record]:
    """The records of one file.

    A text file is a record `{"text": ...}`, or several where it is longer than `TEXT_DOCUMENT`. `columns`
    saves reading others where the file is a table. Raises ConfigError for a file that is empty, damaged,
    or in another encoding, and through `problems` for single lines that are no JSON objects.
    """
    problems = problems or Problems()
    suffix = suffix_of(path)
    assert suffix is not None, path
    if suffix in (".parquet", ".arrow"):
        from trimtab.training.data.tables import iterate_rows

        found: Iterator[Record] = iterate_rows(path, columns)
    elif suffix.startswith((".txt", ".md")):
        found = _texts(path, encoding)
    elif suffix == ".json":
        found = _json(path, encoding, problems)
    else:
        found = _json_lines(path, read_text_blocks(path, encoding), problems)
    any_record = False
    for record in found:
        any_record = True
        yield record
    if not any_record and not problems.count:
        raise ConfigError(f"{path} is empty; take it out of 'paths' or make it again")


def _json_lines(path: Path, blocks: Iterator[str], problems: Problems) -> Iterator[Record]:
    for number, line in enumerate(_lines(blocks), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            problems.meet(f"{path}, line {number} is no JSON: {error}")
            continue
        if not isinstance(values, dict):
            problems.meet(f"{path}, line {number} is no JSON object but a {type(values).__name__}")
            continue
        yield Record(values, path, number)


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split("\n")
        yield from whole
    yield rest


def _json(path: Path, encoding: str, problems: Problems) -> Iterator[Record]:
    """A `.json` file: one array of objects, or JSON lines."""
    blocks = read_text_blocks(path, encoding)
    first = next(blocks, "")
    if not first.lstrip().startswith("["):
        yield from _json_lines(path, _chain(first, blocks), problems)
        return
    text = first
    for block in blocks:
        text += block
        if len(text) > _MOST_JSON:
            raise ConfigError(
                f"{path} is one JSON array of over {_MOST_JSON >> 20} MB; make it a .jsonl file"
            )
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno} is no JSON: {error.msg}") from None
    for number, values in enumerate(records, 1):
        if isinstance(values, dict):
            yield Record(values, path, number, "record")
        else:
            problems.meet(f"{path}, record {number} is no JSON object but a {type(values).__name__}")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _texts(path: Path, encoding: str) -> Iterator[Record]:
    number, text = 1, ""
    for block in read_text_blocks(path, encoding):
        text += block
        while len(text) >= 2 * TEXT_DOCUMENT:
            # Cut where a line ends, if any does.
            at = text.rfind("\n", 0, TEXT_DOCUMENT) + 1 or TEXT_DOCUMENT
            yield Record({"text": text[:at]}, path, number, "part")
            number, text = number + 1, text[at:]
    if text.strip():
        yield Record({"text": text}, path, number, "part")
