"""Tables of examples: what they may hold, how they are named when they are none, and how they are split."""

from __future__ import annotations

import gzip
import json

import pytest

from resonance_nn.arguments import TrainArguments
from resonance_nn.cli import main
from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import read_lines, read_table
from resonance_nn.tasks import TASKS
from resonance_nn.tasks.base import ExamplesTask, label_names, split_examples


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "one two three\n", "its first line must name text, label"),
        ("a.tsv", "good\tpos\nbad\n", "a.tsv:2: has 1 columns, not 2"),
        ("a.csv", "text,class\ngood,pos\n", "has no column 'label'"),
        ("a.csv", 'text,label\n"good,pos\n', "is not a table"),
        ("a.jsonl", '{"text": "good"}\n', "a.jsonl:1: has no 'label'"),
        ("a.jsonl", "good\n", "a.jsonl:1: is not JSON"),
        ("a.jsonl", "[1]\n", "is not a JSON object"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: is not JSON"),
        ("a.tsv", "", "is empty"),
        ("a.tsv", "good\tpos\n  \tneg\n", "row 2: its text is"),
        ("a.tsv", "good\tpos\nbad\tpos\n", "the training data have one label, 'pos'"),
        ("a.tsv", b"\xff\xfe\tpos\n", "is not UTF-8 text"),
        ("a.txt", "good\n", "a table is a .jsonl, .csv, .tsv file"),
        (None, "", "nowhere.txt: no such file"),
    ],
)
def test_tables_that_are_none(name, content, message, tmp_path, capsys):
    path = tmp_path / (name or "nowhere.txt")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["train", "--task", "text-classification", "--data", str(path), "--output-dir", str(tmp_path / "run")]
    assert main([*words, "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_read_table(tmp_path):
    (tmp_path / "a.csv").write_text('label,text\n1,"two, with\ta comma"\n')
    assert read_table(tmp_path / "a.csv", ("text", "label")) == [{"label": "1", "text": "two, with\ta comma"}]
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'a "quote\tx\n'))
    assert read_table(tmp_path / "a.tsv.gz", ("text", "label")) == [{"text": 'a "quote', "label": "x"}]
    (tmp_path / "a.tsv").write_text("a\nb\n")
    assert read_table(tmp_path / "a.tsv", ("text",), ("label",)) == [{"text": "a"}, {"text": "b"}]
    for head in ("", "text\tlabel\n"):
        (tmp_path / "a.tsv").write_text(f"{head}a\tx\n")
        assert read_table(tmp_path / "a.tsv", ("text",), ("label",)) == [{"text": "a", "label": "x"}]
    (tmp_path / "a.tsv").write_text("from\ttext\nx\ta\n")
    assert read_table(tmp_path / "a.tsv", ("text",), ("label",)) == [{"from": "x", "text": "a"}]
    (tmp_path / "a.tsv").write_text("a\tx\ty\n")
    with pytest.raises(DataError, match="has no column 'text'"):
        read_table(tmp_path / "a.tsv", ("text",), ("label",))
    (tmp_path / "lines").write_bytes("a\u2028c\r\nb\r\n".encode())
    assert read_lines(tmp_path / "lines") == ["a\u2028c", "b"]
    (tmp_path / "lines").write_bytes("a\x0b b\u2028c\nd\n\ne".encode())
    assert read_lines(tmp_path / "lines") == ["a\x0b b\u2028c", "d", "", "e"]


def test_cells_have_any_length(tmp_path):
    long = "word " * 30_000  # Python's own limit is 131,072 characters
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",x\n')
    (tmp_path / "a.tsv").write_text(f"{long}\tx\n")
    for name in ("a.csv", "a.tsv"):
        assert read_table(tmp_path / name, ("text", "label")) == [{"text": long, "label": "x"}]


def test_splits_and_labels():
    train, held_out = split_examples(list(range(100)), 0.1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(100))
    assert split_examples(list(range(100)), 0.1) == (train, held_out)
    with pytest.raises(DataError, match="1 example"):
        split_examples([1])
    assert label_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert label_names(["b", "a", "10"]) == ["10", "a", "b"]


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("text-classification", {"text": "a", "label": "x"}),
        ("image-classification", {"image": "a.png", "label": "x"}),
        ("audio-classification", {"audio": "a.wav", "label": "x"}),
        ("audio-event-detection", {"audio": "a.wav", "events": []}),
        ("multimodal-classification", {"text": "a", "label": "x"}),
        ("multimodal-retrieval", {"text": "a", "image": "a.png"}),
    ],
)
def test_rows_of_one_value_are_held_out(task, row, tmp_path):
    rows = [{**row, "fold": fold} for fold in (10, 9, 10, 8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = TASKS[task](TrainArguments(data=[str(tmp_path / "a.jsonl")], output_dir="x", hold_out="fold=10"))
    assert isinstance(made, ExamplesTask)
    assert made.values("fold") == ["8", "9", "10"]
    train, held_out = ([made.row(example)["fold"] for example in part] for part in made.read())
    assert (train, held_out) == ([9, 8], [10, 10])
    made.arguments.hold_out = "fold=7"
    with pytest.raises(DataError, match="hold_out = 'fold=7': no example has this value"):
        made.read()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("who", "hold_out = 'who': must be COLUMN=VALUE of the rows to hold out, such as speaker=ann"),
        ("who=cyd", "hold_out = 'who=cyd': no example has this value"),
        ("whom=ann", "hold_out = 'whom': no column of example 1 of the data; it has text, label, who"),
    ],
)
def test_train_names_what_cannot_be_held_out(value, message, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label,who\na,x,ann\nb,y,bob\n")
    words = ["train", "--task", "text-classification", "--data", str(tmp_path / "a.csv"), "--hold-out", value]
    assert main([*words, "--output-dir", str(tmp_path / "m")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
