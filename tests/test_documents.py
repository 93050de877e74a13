"""Documents: every byte arrives, every wrong input gets one clear line."""

import lzma
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from corpus import FILES, jsonl, names, raises_one_line, write

from resonance_nn.data import (
    documents,
    find_documents,
    lzma_bits_per_byte,
    read_texts,
    split_documents,
)

# --- documents


def test_folder_is_read_whole_and_sorted(folder):
    write(folder, {".hidden": b"x", ".git/config": b"x", "__pycache__/x.py": b"x", "bin": b"a\0b", "void.txt": b""})
    found = find_documents([str(folder)])
    assert names(found, folder) == sorted(FILES)
    assert [document.read() for document in found] == [FILES[name] for name in sorted(FILES)]
    assert [document.size for document in found] == [len(FILES[name]) for name in sorted(FILES)]
    assert found.left_out == {"hidden": 2, "binary": 1, "empty": 1}
    assert "left out: 1 binary, 1 empty, 2 hidden" in found.summary()
    assert len(find_documents([str(folder)], binary=True)) == len(FILES) + 1


def test_globs_duplicates_and_order_of_specs(folder):
    assert names(find_documents([f"{folder}/**/*.txt"]), folder) == sorted(n for n in FILES if n.endswith(".txt"))
    (folder / "link.txt").symlink_to(folder / "a.txt")
    (folder / "broken.md").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "fifo")
    found = find_documents([f"{folder}/c.py", str(folder), f"{folder}/*.txt"])
    assert names(found, folder) == ["c.py", *sorted(set(FILES) - {"c.py"})]
    assert found.left_out["duplicate"] == 5  # c.py; the link; then a.txt, the link and long.txt by the glob
    assert found.left_out["not a file"] == 2  # and no wait for the fifo
    write(folder, {"odd[1].txt": b"brackets in a name that exists"})
    assert len(find_documents([f"{folder}/odd[1].txt"])) == 1


def test_chunks_and_parts(folder):
    (document,) = find_documents([f"{folder}/long.txt"])
    data = FILES["long.txt"]
    assert b"".join(document.chunks(1000)) == data
    assert max(map(len, document.chunks(1000))) == 1000
    assert document.part(10, 500).part(5, 10_000).read() == data[15:500]


def test_stdlib():
    found = find_documents(["stdlib"])
    paths = [document.path for document in found]
    assert paths == sorted(paths)
    assert all(path.endswith(".py") for path in paths)
    parts = {part for path in paths for part in Path(path).relative_to(Path(os.__file__).parent).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert {"argparse.py", "json", "asyncio", "email"} <= parts
    assert 8e6 < found.num_bytes < 20e6
    train, held_out = split_documents(found)
    assert len(held_out) == len(found) // 20
    assert train + held_out == found


def test_jsonl(tmp_path):
    path = jsonl(
        tmp_path / "d.jsonl", {"text": "één\n"}, "", {"id": 1, "text": "two 😀"}, {"text": ""}, {"text": "\ud800"}
    )
    found = find_documents([str(path)])
    assert [d.read() for d in found] == ["één\n".encode(), "two 😀".encode(), b"\xed\xa0\x80"]
    assert [d.size for d in found] == [6, 8, 3]
    assert found[1].name == f"{path}:3"
    assert found[1].part(4, 8).read() == "😀".encode()
    assert find_documents([str(tmp_path)]) == found
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    assert find_documents([f"{tmp_path}/other.jsonl"], text_field="body")[0].read() == b"x"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"d\.jsonl:2 is not JSON"),
        (
            '{"body": "x", "id": 3}',
            r"d\.jsonl:2 has no field 'text'; its fields are body, id \(choose with --text-field",
        ),
        ('{"text": 5}', r"d\.jsonl:2 in field 'text' is not a string"),
        ("[1]", r"d\.jsonl:2 is not a JSON object .* list"),
        ('{"text": "a\\u0000"}', r"d\.jsonl:2: field 'text' is not text: it has NUL"),
    ],
)
def test_bad_jsonl(tmp_path, line, message):
    path = jsonl(tmp_path / "d.jsonl", {"text": "fine"}, line)
    with raises_one_line(message):
        find_documents([str(path)])


def test_wrong_paths(tmp_path, folder, monkeypatch):
    with raises_one_line(r"lang\.txt does not exist; did you mean long\.txt"):
        find_documents([f"{folder}/lang.txt"])
    with raises_one_line("no folder .*nowhere"):
        find_documents([f"{tmp_path}/nowhere/x.txt"])
    monkeypatch.chdir(tmp_path)
    with raises_one_line("did you mean stdlib"):
        find_documents(["stdlb"])
    with raises_one_line(r"no file matches the pattern .*\*\.rst"):
        find_documents([f"{folder}/*.rst"])
    with raises_one_line("void is empty"):
        find_documents([str(write(tmp_path, {"void": b""}) / "void")])
    with raises_one_line("not a regular file"):
        find_documents(["/dev/null"])
    with raises_one_line("no data"):
        find_documents([])
    write(tmp_path / "nothing", {"x.bin": b"\0", ".secret": b"text"})
    with raises_one_line("there is no text in .*nothing .*1 binary, 1 hidden"):
        find_documents(["nothing"])


def test_binary_files(tmp_path):
    random_bytes = bytes(random.Random(0).randrange(1, 256) for _ in range(5000))
    late = b"text\n" * 20_000 + b"\0"
    write(
        tmp_path, {"nul": b"text\0text", "noise": random_bytes, "late": late, "late2": b"a" * 70_000 + b"\xff" * 70_000}
    )
    for name, reason in (("nul", "NUL bytes"), ("noise", r"\d\d% of its bytes are not UTF-8")):
        with raises_one_line(f"{name} is not text: .*{reason}; use --binary"):
            find_documents([f"{tmp_path}/{name}"])
        (document,) = find_documents([f"{tmp_path}/{name}"], binary=True)
        assert document.read() == (tmp_path / name).read_bytes()
    for name in ("late", "late2"):  # noticed while reading
        (document,) = find_documents([f"{tmp_path}/{name}"])
        with raises_one_line(f"{name} is not text.*--binary"):
            document.read()


def test_unreadable_files(folder, monkeypatch):
    def deny(path, *args, **kwargs):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **kwargs)

    (readable,) = find_documents([f"{folder}/a.txt"])
    monkeypatch.setattr(documents, "open", deny, raising=False)
    with raises_one_line(r"cannot read .*a\.txt: Permission denied"):
        find_documents([f"{folder}/a.txt"])
    with raises_one_line(r"cannot read .*a\.txt: Permission denied"):
        readable.read()
    found = find_documents([str(folder)])
    assert (len(found), found.left_out) == (len(FILES) - 1, {"unreadable": 1})


def test_split(folder, tmp_path):
    found = find_documents([str(folder)])
    train, held_out = split_documents(found)
    assert (train, held_out) == (found[:-1], found[-1:])
    assert len(split_documents(found, 0.5)[1]) == 3
    for data in (FILES["long.txt"], b"header\n" + "é日😀".encode() * 3000, b"\x80" * 3 + b"ab" * 9):
        (document,) = find_documents([str(write(tmp_path, {"one": data}) / "one")])
        (train,), (held_out,) = split_documents([document])
        assert train.read() + held_out.read() == data
        assert 0.02 * len(data) < held_out.size < 0.2 * len(data)
        if b"\n" in data[-1000:]:
            assert train.read().endswith(b"\n")
        elif len(data) > 100:
            held_out.read().decode()
    with pytest.raises(ValueError, match=r"eval_fraction=1.*between 0 and 1"):
        split_documents(found, 1)
    with raises_one_line("too small"):
        split_documents(find_documents([str(write(tmp_path, {"one": b"x"}) / "one")]))
    (line,) = find_documents([str(jsonl(tmp_path / "d.jsonl", {"text": "ab\n" * 100}))])
    (train,), (held_out,) = split_documents([line])
    assert (train.read() + held_out.read(), train.size % 3) == (b"ab\n" * 100, 0)


def test_read_texts_samples_evenly(folder):
    found = find_documents([str(folder)])
    assert b"".join(read_texts(found)) == b"".join(FILES[name] for name in sorted(FILES))
    some = list(read_texts(found, 40_000))
    assert some == list(read_texts(found, 40_000))
    assert 35_000 < sum(map(len, some)) <= 40_000
    where = [FILES["long.txt"].find(piece) / len(FILES["long.txt"]) for piece in some]
    inside = [w for w in where if w >= 0]
    assert min(inside) < 0.05
    assert max(inside) > 0.95
    assert max(np.diff(inside)) < 0.1


def test_lzma(folder):
    found = find_documents([str(folder)])
    data = b"".join(document.read() for document in found)
    assert lzma_bits_per_byte(found) == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    with raises_one_line("no text"):
        lzma_bits_per_byte([])


# --- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import datasets

    calls = []

    def load_dataset(name, config=None, *, split, streaming):
        assert streaming
        calls.append((name, config, split))
        if name == "org/absent":
            raise FileNotFoundError("Dataset 'org/absent' doesn't exist\non the Hub")
        return ({"text": f"row {i} é\n", "id": i} for i in range(100))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_hub(hub, tmp_path):
    found = find_documents(["hub:org/name"])
    assert [d.read().decode() for d in found] == [f"row {i} é\n" for i in range(100)]
    assert find_documents(["hub:org/name"]) == found  # from the cache
    assert hub == [("org/name", None, "train")]
    assert len(find_documents(["hub:org/name:validation[:7]"])) == 7
    find_documents(["hub:org/name:config"])
    find_documents(["hub:org/name:config:test"])
    assert hub[1:] == [
        ("org/name", None, "validation"),
        ("org/name", "config", "train"),
        ("org/name", "config", "test"),
    ]
    with raises_one_line(r"hub:org/other row 0 has no field 'body'; its fields are text, id"):
        find_documents(["hub:org/other"], text_field="body")
    with raises_one_line("hub:org/absent cannot be loaded: Dataset 'org/absent' doesn't exist"):
        find_documents(["hub:org/absent"])
    with raises_one_line("not of the form hub:"):
        find_documents(["hub:a/b/c:d:e:f"])
    assert all(
        path.suffix == ".jsonl" for path in (tmp_path / "cache/resonance-nn/hub").iterdir()
    )  # nothing half-written
    assert len(list((tmp_path / "cache/resonance-nn/hub").iterdir())) == 4


def test_hub_without_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises_one_line(r"resonance-nn\[hub\]"):
        find_documents(["hub:org/name"])
