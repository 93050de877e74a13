"""Where text comes from: files, folders, globs, JSONL, Python's standard library, the Hugging Face hub.

A `Document` is a recipe for reading bytes, not the bytes: a corpus larger than memory is a list of small objects.
"""

import difflib
import errno
import glob
import json
import logging
import lzma
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

HEAD_BYTES = 1 << 16  # a file is judged by this many bytes before it is read as a whole
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """The user's data cannot be used; the message is one line that says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Document:
    """Bytes [start, stop) of a file's text, or of one field of one line of a JSONL file.

    `line` is 0 for a file; otherwise the JSONL line's number, `offset` where that line begins and `field` its key.
    """

    path: str
    start: int
    stop: int
    modified: int  # st_mtime_ns of the file
    line: int = 0
    offset: int = 0
    field: str = ""
    binary: bool = False

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path

    @property
    def size(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Document":
        """Bytes [start, stop) of this document."""
        return replace(self, start=self.start + start, stop=self.start + min(stop, self.size))

    def chunks(self, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        """The bytes, at most `chunk_size` at a time. Raises DataError if unreadable, or binary further in."""
        cuts = [*range(self.start, self.stop, chunk_size), self.stop]
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset if self.line else self.start)
                text = _json_text(file.readline(), self.name, self.field) if self.line else b""
                for start, stop in pairwise(cuts):
                    chunk = text[start:stop] if self.line else file.read(stop - start)
                    if not self.binary and (problem := _not_text(chunk)):
                        raise DataError(f"{self.name} is not text: {problem}; use --binary to take it as it is")
                    yield chunk
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error

    def read(self) -> bytes:
        """All the bytes at once."""
        return b"".join(self.chunks())


class Documents(list[Document]):
    """A list of documents that remembers how many files were left out, and why."""

    def __init__(self, documents: Iterable[Document] = ()) -> None:
        super().__init__(documents)
        self.left_out: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        return sum(document.size for document in self)

    def summary(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        text = f"{len(self):,} documents, {self.num_bytes / 1e6:.2f} MB"
        return f"{text}; left out: {reasons}" if reasons else text


def find_documents(
    specs: Sequence[str],
    *,
    text_field: str = "text",
    binary: bool = False,
    leave_out: str | os.PathLike[str] | None = None,
) -> Documents:
    """The documents that `specs` name, in the order of `specs`, each sorted by path; the same file only once.

    A spec is a file, a folder (all of it, but for hidden entries and `__pycache__`), a glob (`**` too), `stdlib`, or
    `hub:org/name[:config][:split][[:rows]]`. A `.jsonl` file gives one document a line, its `text_field`. What is not
    text is refused if named itself, and otherwise left out and counted in `.left_out`. The folder `leave_out`, such as
    the run's own in the folder of its data, is passed over.

    Raises DataError, one line each, for anything that is missing, empty, unreadable or not text.
    """
    found = Documents()
    seen: set[str] = set()
    for spec in specs:
        named = False  # is the file named itself?
        if not spec:
            raise DataError("--data '': is empty; name a file, a folder, a glob, stdlib or hub:org/name")
        if spec == "stdlib":
            paths = _walk(Path(sysconfig.get_paths()["stdlib"]), STDLIB_LEFT_OUT, found, suffix=".py")
        elif spec.startswith("hub:"):
            paths, named = [_from_hub(spec, text_field)], True
        else:
            path = Path(os.path.expanduser(spec))
            if os.path.isdir(path):
                paths = _walk(path, {"__pycache__"}, found)
            elif not os.path.exists(path) and glob.has_magic(spec):
                paths = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if os.path.isfile(p))
                if not paths:
                    raise DataError(f"no file matches the pattern {spec}")
            else:
                paths, named = [path], True
        before = len(found)
        for path in paths:
            real = os.path.realpath(path)
            if leave_out is not None and real.startswith(os.path.join(os.path.realpath(leave_out), "")):
                continue
            if real in seen:
                found.left_out["duplicate"] += 1
                continue
            problem = _add_file(path, "text" if spec.startswith("hub:") else text_field, binary, found)
            if problem and named:
                raise DataError(problem)
            if problem:
                logger.info("left out: %s", problem)
            else:
                seen.add(real)
        if len(found) == before and not any(os.path.realpath(path) in seen for path in paths):
            raise DataError(f"there is no text in {spec} ({found.summary()})")
    if not found:
        raise DataError("no data: name a file, a folder, a glob, stdlib or hub:org/name with --data")
    return found


def split_documents(
    documents: Sequence[Document], eval_fraction: float = 0.05
) -> tuple[list[Document], list[Document]]:
    """(train, eval): the last `eval_fraction` of the documents, at least one; of a single one, of its bytes.

    A single document is cut at a line end, or at least at the border of a UTF-8 character.
    """
    if not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction={eval_fraction} must lie between 0 and 1, for example 0.05")
    if not documents:
        raise DataError("there are no documents to split")
    if len(documents) > 1:
        count = max(1, int(len(documents) * eval_fraction))
        return list(documents[:-count]), list(documents[-count:])
    (document,) = documents
    cut = target = int(document.size * (1 - eval_fraction))
    low = max(0, target - min(document.size - target, HEAD_BYTES))  # at most doubles the evaluation part
    window = document.part(low, target + 1).read()  # its last byte stands after the cut
    line_end = window.rfind(b"\n", 0, len(window) - 1)
    if line_end >= 0:
        cut = low + line_end + 1
    else:
        while cut > max(low, target - 3) and window[cut - low] & 0xC0 == 0x80:  # inside a character
            cut -= 1
    if not 0 < cut < document.size:
        raise DataError(f"{document.name} is too small ({document.size} bytes) to hold out a part; name --eval-data")
    return [document.part(0, cut)], [document.part(cut, document.size)]


def read_texts(documents: Sequence[Document], max_bytes: int = 1 << 26) -> Iterator[bytes]:
    """Pieces of the text to train a tokenizer on; if there is more than `max_bytes`, spread evenly over all of it."""
    share = min(1.0, max_bytes / max(1, sum(document.size for document in documents)))
    step = min(HEAD_BYTES // 4, max(256, max_bytes // 64))
    passed = taken = 0
    for document in documents:
        if share == 1.0:
            yield from document.chunks(HEAD_BYTES)
            continue
        for start in range(0, document.size, step):
            piece = document.part(start, start + step)
            passed += piece.size
            if taken + piece.size <= share * passed:
                taken += piece.size
                yield piece.read()


def lzma_bits_per_byte(documents: Iterable[Document]) -> float:
    """Bits per byte of `xz -9e` over the documents joined: the honest baseline of a model's bits per byte."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = compressed = 0
    for document in documents:
        for chunk in document.chunks():
            size += len(chunk)
            compressed += len(compressor.compress(chunk))
    if not size:
        raise DataError("there is no text to compress")
    return 8 * (compressed + len(compressor.flush())) / size


def disk_error(error: OSError, path: Path) -> DataError:
    """One clear line for a file that cannot be written."""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    return DataError(f"cannot write {path}: {'the disk is full' if full else error.strerror}")


def _walk(root: Path, left_out: set[str], found: Documents, suffix: str = "") -> list[Path]:
    """The files under `root` whose name ends in `suffix`, sorted by relative path."""
    paths = []

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    for folder, subfolders, files in os.walk(root, onerror=fail):
        found.left_out["hidden"] += sum(name.startswith(".") for name in (*subfolders, *files))
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in left_out]
        paths += [Path(folder, name) for name in files if name.endswith(suffix) and not name.startswith(".")]
    found.left_out += Counter()  # drops zeros
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def _add_file(path: Path, text_field: str, binary: bool, found: Documents) -> str | None:
    """Adds the documents of one file; where there are none, counts it and returns why not, as one line."""
    try:
        if not path.is_file():
            found.left_out["not a file"] += 1
            return f"{path} is not a regular file" if path.exists() else _missing(path)
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            status = os.fstat(file.fileno())
    except OSError as error:
        found.left_out["unreadable"] += 1
        return f"cannot read {path}: {error.strerror}"
    if not head:
        found.left_out["empty"] += 1
        return f"{path} is empty"
    if not binary and (problem := _not_text(head)):
        found.left_out["binary"] += 1
        return f"{path} is not text: {problem}; use --binary to take it as it is"
    if path.suffix != ".jsonl":
        found.append(Document(str(path), 0, status.st_size, status.st_mtime_ns, binary=binary))
        return None
    before = len(found)
    with open(path, "rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                name = f"{path}:{number}"
                text = _json_text(line, name, text_field)
                if not binary and (problem := _not_text(text)):
                    raise DataError(f"{name}: field {text_field!r} is not text: {problem}; use --binary to take it")
                if text:
                    modified = status.st_mtime_ns
                    found.append(Document(str(path), 0, len(text), modified, number, offset, text_field, binary))
                else:
                    found.left_out["empty"] += 1
            offset += len(line)
    return None if len(found) > before else f"{path} holds no text in field {text_field!r}"


def _not_text(data: bytes) -> str | None:
    """Why these bytes are not text. Latin-1 prose passes: bytes are kept as they are, and few of its are invalid."""
    if 0 in data:
        return "it has NUL bytes"
    try:
        data.decode()
    except UnicodeDecodeError:
        invalid = sum(map(len, re.findall("[\udc80-\udcff]+", data.decode(errors="surrogateescape"))))
        if invalid > 6 + len(data) // 4:  # 6: a character cut at either end
            return f"{invalid / len(data):.0%} of its bytes are not UTF-8"
    return None


def _json_text(line: bytes, name: str, field: str) -> bytes:
    """The text in `field` of one line of JSONL."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{name} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{name} is not a JSON object with a field {field!r} but a {type(row).__name__}")
    return _field_text(row, name, field)


def _field_text(row: dict[str, object], name: str, field: str) -> bytes:
    text = row.get(field)
    if not isinstance(text, str):
        what = f"in field {field!r} is not a string" if field in row else f"has no field {field!r}"
        raise DataError(f"{name} {what}; its fields are {', '.join(row) or 'none'} (choose with --text-field)")
    return text.encode("utf-8", errors="surrogatepass")


def _missing(path: Path) -> str:
    """The message for a path that is not there, with the names nearest to it."""
    parent = path.parent
    if not parent.is_dir():
        return f"{path} does not exist (there is no folder {parent})"
    names = [*(entry.name for entry in parent.iterdir()), "stdlib"]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f"{path} does not exist" + (f"; did you mean {' or '.join(close)}?" if close else "")


def _from_hub(spec: str, text_field: str) -> Path:
    """Streams a hub dataset once into a JSONL file in the cache, and from then on uses that; the only network access.

    Of `hub:org/name:x`, x is a split if it is called train, validation, test, valid or dev, else a config.
    """
    match = re.fullmatch(r"hub:([\w.-]+(?:/[\w.-]+)?)(?::([^:\[\]]*))?(?::([^:\[\]]+))?(?:\[:(\d+)\])?", spec)
    if not match:
        raise DataError(f"{spec} is not of the form hub:org/name[:config][:split], as in hub:org/name:default:train")
    name, config, split, rows = match.groups()
    if split is None and config in ("train", "validation", "test", "valid", "dev"):
        config, split = None, config
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "resonance-nn" / "hub"
    target = cache / (re.sub(r"[^\w.-]+", "--", f"{spec[4:]}--{text_field}") + ".jsonl")
    if target.exists():
        return target
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{spec} needs the datasets library: pip install 'resonance-nn[hub]'") from error
    try:
        stream = iter(datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
    except Exception as error:  # whatever datasets raises for a wrong name, config, split or a missing network
        raise DataError(f"{spec} cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}") from error
    logger.info("reading %s into %s", spec, target)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="ascii") as file:
            for number in range(int(rows) if rows else 1 << 62):
                try:
                    row = next(stream)
                except StopIteration:
                    break
                text = _field_text(row, f"{spec} row {number}", text_field).decode("utf-8", errors="surrogatepass")
                file.write(json.dumps({"text": text}) + "\n")
        os.replace(temporary, target)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
