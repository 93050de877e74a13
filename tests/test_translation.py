"""`train --task translation`: what is learned is judged by beam search; bad tables are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoModelForSeq2SeqLM

from resonance_nn.bridges import BRIDGES
from resonance_nn.cli import main
from resonance_nn.loading import load_tokenizer
from resonance_nn.tasks.translation import scores, translate

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Numbers to be said in German, in their order."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines: list[str] = []
    for _ in range(420):
        chosen = rng.choice(list(WORDS), rng.integers(2, 5)).tolist()
        lines.append("\t".join((" ".join(chosen), " ".join(WORDS[word] for word in chosen))))
    (folder / "train.tsv").write_text("\n".join(lines[:400]) + "\n")
    (folder / "test.tsv").write_text("\n".join(lines[400:]) + "\n")
    return folder


@pytest.mark.parametrize("bridge", BRIDGES)
def test_it_learns_to_translate(bridge, data, tmp_path, capsys):
    words = ["train", "--task", "translation", "--data", str(data / "train.tsv"), "--eval-data", str(data / "test.tsv")]
    words += ["--output-dir", str(tmp_path / "m"), "--vocab-size", "300", "--steps", "90", "--batch-size", "32"]
    words += ["--set", "hidden_size=64", "--set", "num_hidden_layers=2", "--set", f"bridge={bridge}", "--lr", "1e-2"]
    assert main([*words, "--precision", "fp32", "--dropout", "0", "--label-smoothing", "0"]) == 0
    summary = json.loads((tmp_path / "m" / "train.json").read_text())["summary"]
    assert summary["eval_bleu"] > 80
    assert summary["eval_rouge_l"] > 0.9
    assert "bleu" in capsys.readouterr().out
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").eval()
    tokenizer = load_tokenizer(tmp_path / "m")
    made = translate(model, tokenizer, ["four five one", "two", ""])
    assert made[0] == "vier fünf eins"
    assert len(made) == 3
    assert translate(model, tokenizer, ["two", "four five one"], num_beams=1)[1] == made[0]
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "m"), "--text", "four five one"]) == 0
    assert "vier fünf eins" in capsys.readouterr().out


def test_scores_are_sacrebleus():
    made, targets = ["the cat sat on the mat .", "a dog"], ["the cat sat on the mat .", "a dog runs"]
    found = scores(made, targets)
    assert 0 < found["eval_bleu"] < 100
    assert scores(targets, targets)["eval_bleu"] == pytest.approx(100)
    assert found["eval_rouge_l"] == pytest.approx((1 + 0.8) / 2)


def test_bad_rows(tmp_path, capsys):
    (tmp_path / "a.tsv").write_text("one\n")
    words = ["train", "--task", "translation", "--data", str(tmp_path / "a.tsv"), "--output-dir", str(tmp_path / "m")]
    assert main(words) == 2
    assert "its first line must name source, target" in capsys.readouterr().err
