"""Tables in local files as datasets, read whole and afresh: nothing is cached and nothing is left behind.

The loaders of `datasets` guess: a text such as "2020-01-01" becomes a date, an empty line of one column is dropped, a
short row is filled up and a long one moves the columns. Here a value comes as it stands in the file, or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset

# Only numbers that lose nothing when they are read as such: "007" and identifiers of 20 digits stay texts.
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_REAL = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,2})?")


def read_table(path: str | os.PathLike[str]) -> Dataset:
    """A table from a local file, in memory.

    In .tsv files, as in GLUE's, quotes are characters like any other, unless the whole file is quoted as pandas quotes
    it; .csv files have the usual quotes. Both have a header; blank lines are passed over, and a column in which every
    value is a number holds numbers. A .json file is a list of objects, or one object with such a list in its field
    `data`; a .jsonl file has one object on each line. A field that an object lacks is None. Text is UTF-8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another extension, a table without rows, or a broken file.
    """
    file = Path(path)
    read = _READERS.get(file.suffix.lower())
    if read is None:
        raise ValueError(
            f"table {str(path)!r} has the extension {file.suffix!r}; supported are {', '.join(_READERS)}; "
            "convert or rename the file"
        )
    if not file.is_file():
        raise FileNotFoundError(f"table {str(path)!r} does not exist; give an existing file")
    try:
        table = read(file)
    except Exception as error:  # of ten kinds: csv, json, Unicode, Arrow, the file system
        raise ValueError(
            f"table {str(path)!r} cannot be read as a whole {file.suffix} file ({error}); mend or replace the file"
        ) from error
    if not len(table):
        raise ValueError(f"table {str(path)!r} has 0 rows; at least one is needed; give a file that holds data")
    return table


def _read_delimited(file: Path, delimiter: str) -> Dataset:
    usual = csv.field_size_limit(2**31 - 1)  # a document may be longer than 131,072 characters
    try:
        text = file.read_bytes().decode("utf-8-sig")
        is_plain = delimiter == "\t" and not _is_quoted(text, delimiter)
        dialect: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if is_plain else {}
        lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, **dialect)
        rows = [(lines.line_num, row) for row in lines if any(map(str.strip, row))]
    finally:
        csv.field_size_limit(usual)
    header = rows[0][1] if rows else []
    if len(set(header)) < len(header):
        raise ValueError(f"the header {header} names a column twice")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"line {line} has {len(row)} values, the header {len(header)}")
    columns = zip(*(row for _, row in rows[1:]), strict=True)
    return Dataset.from_dict({name: _numbers(column) for name, column in zip(header, columns, strict=False)})


def _is_quoted(text: str, delimiter: str) -> bool:
    """Whether a table was written with quotes where they are needed, and has some: writing it again gives the same."""
    if '"' not in text:
        return False
    written = io.StringIO(newline="")
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter))
    except csv.Error:
        return False
    csv.writer(written, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return written.getvalue().rstrip("\n") == text.replace("\r\n", "\n").rstrip("\n")


def _numbers(column: tuple[str, ...]) -> list[Any]:
    if all(map(_INTEGER.fullmatch, column)):
        return [int(value) for value in column]
    if all(map(_REAL.fullmatch, column)):
        return [float(value) for value in column]
    return list(column)


def _read_json(file: Path, lines: bool) -> Dataset:
    text = file.read_text(encoding="utf-8-sig")
    # Not splitlines(), which also ends a line at characters that JSON allows within a string.
    try:
        found = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except ValueError as error:
        if not lines and str(error).startswith("Extra data"):
            raise ValueError(f"{error}; with one object on each line it is a .jsonl file: rename it") from error
        raise
    rows = found.get("data") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            "objects are needed, in a list or, in a .jsonl file, one on each line; pandas writes them with "
            'orient="records"'
        )
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


_READERS: dict[str, Callable[[Path], Dataset]] = {
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".csv": partial(_read_delimited, delimiter=","),
    ".json": partial(_read_json, lines=False),
    ".jsonl": partial(_read_json, lines=True),
    ".parquet": lambda file: Dataset(pyarrow.parquet.read_table(file)),
}
