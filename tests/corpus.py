"""A small corpus of awkward files, and what the tests of the data layer share."""

import json
from pathlib import Path

import pytest

from resonance_nn.data import (
    DataError,
    Document,
)

ROOT = Path(__file__).parents[1]
FILES = {
    "a.txt": b"first file\nsecond line\n",
    "b/crlf.txt": b"one\r\ntwo\r\n",
    "b/emoji.md": "😀 naïve 日本\n".encode(),
    "b/latin1.txt": "Stra\xdfe und Fl\xfc\xdfe, lang genug\n".encode("latin-1"),
    "b/special.txt": b"<|endoftext|>not a boundary<|pad|>",
    "c.py": b"def f():\n    return 1\n" * 50,
    "long.txt": b"".join(b"line %d of a long file\n" % i for i in range(12_000)),  # several pieces
}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def names(found: list[Document], root: Path) -> list[str]:
    return [Path(document.name).relative_to(root).as_posix() for document in found]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def raises_one_line(match: str):
    return pytest.raises(DataError, match=rf"\A(?-s:.)*{match}(?-s:.)*\Z")
