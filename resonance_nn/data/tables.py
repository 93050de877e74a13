"""Rows of named fields from files: .jsonl, .csv and .tsv, gzipped or not, and lines of parallel texts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resonance_nn.data.documents import DataError

KINDS = (".jsonl", ".csv", ".tsv")
HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which JSON can say alone and UTF-8 cannot
Row = dict[str, Any]


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, gzipped or not, without their ends. Raises DataError."""
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start:,}); save it as UTF-8") from error
    text = text.replace("\r\n", "\n")
    return text.split("\n")[: -1 if text.endswith("\n") else None]  # nowhere else: parallel files have equal lines


def is_table(path: str | os.PathLike[str]) -> bool:
    """By its name."""
    return str(path).removesuffix(".gz").endswith(KINDS)


def read_table(path: str | os.PathLike[str], fields: Sequence[str], optional: Sequence[str] = ()) -> list[Row]:
    """The rows of a table, each with at least ``fields``.

    .jsonl: an object a line. .csv and .tsv: with a first line of names; a .tsv without one may have just as many
    columns as ``fields``, in their order, and of ``optional`` ones after them.

    Raises:
        DataError: not such a file, or a row without one of the fields; it names the line.
    """
    name = str(path)
    if not Path(path).exists():
        raise DataError(f"{name}: no such file")
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in KINDS:
        raise DataError(f"{name}: a table is a {', '.join(KINDS)} file (or one of them with .gz)")
    lines = read_lines(path)
    delimiter = "," if kind == ".csv" else "\t"
    rows = _objects(name, lines) if kind == ".jsonl" else _columns(name, lines, fields, optional, delimiter)
    if not rows:
        raise DataError(f"{name}: is empty")
    for number, row in rows:
        for field in fields:
            if row.get(field) is None:
                raise DataError(f"{name}:{number}: has no {field!r}; a row needs {', '.join(fields)}")
    return [row for _, row in rows]


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or white space alone."""
    return value is None or (isinstance(value, str) and not value.strip())


def text_of(row: Row, name: str, where: str, what: str = "text") -> str:
    """The text in a column of a row that is from ``where``. Raises DataError."""
    value = row.get(name)
    if not isinstance(value, str) or is_missing(value):
        raise DataError(f"{where}: its {name} is {value!r:.60}; it must be a {what}, not empty")
    return _written(value, where, name)


def path_of(row: Row, name: str, where: str, folder: Path) -> str:
    """The path in a column of a row, from the folder that the table lies in. Raises DataError."""
    path = text_of(row, name, where, "path")
    if "\0" in path:
        raise DataError(f"{where}: its {name} is {path!r:.60}; a path has no '\\x00', remove it")
    return str(folder / path)


def label_of(value: Any, where: str, name: str = "label") -> str:
    """The name of a class: a text that is not empty, a number or a boolean. Raises DataError."""
    if is_missing(value) or not isinstance(value, str | int | float) or value != value:  # NaN is not itself
        raise DataError(
            f"{where}: its {name} is {value!r:.60}; it must be a text, not empty, a number, true or false; fill it in "
            "or leave the row out"
        )
    return _written(str(value), where, name)


def _written(text: str, where: str, name: str) -> str:
    """The text, if UTF-8 can say it."""
    if half := HALF.search(text):
        raise DataError(f"{where}: its {name} has {half[0]!r}, half of a character, which is no text; remove it")
    return text


def _objects(name: str, lines: Sequence[str]) -> list[tuple[int, Row]]:
    rows: list[tuple[int, Row]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{number}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f'{name}:{number}: is not a JSON object, such as {{"text": …}}')
        rows.append((number, row))
    return rows


def _columns(
    name: str, lines: Sequence[str], fields: Sequence[str], optional: Sequence[str], delimiter: str
) -> list[tuple[int, Row]]:
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    text = "\n".join(lines)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # Python's own, 131,072 characters, is too few
    try:
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
        cells = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{name}: is not a table ({error})") from error
    if not cells:
        return []
    head = cells[0][1]
    if set(fields) <= set(head):
        cells = cells[1:]
    elif delimiter == "\t" and len(fields) <= len(head) <= len(fields) + len(optional):
        head = [*fields, *optional][: len(head)]
    else:
        missing = next(field for field in fields if field not in head)
        raise DataError(f"{name}:1: has no column {missing!r}; its first line must name {', '.join(fields)}")
    for number, row in cells:
        if len(row) != len(head):
            raise DataError(f"{name}:{number}: has {len(row)} columns, not {len(head)}")
    return [(number, dict(zip(head, row, strict=True))) for number, row in cells]
