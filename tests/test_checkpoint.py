"""The checkpoint that comes with the package: found by name, small, offline, and no stranger to English and Python."""

from __future__ import annotations

import io
import json
import math
import re
import socket

import pytest
import torch

from resonance_nn import ResonanceForCausalLM
from resonance_nn.bundled import DEFAULT_MODEL, bundled_models
from resonance_nn.cli import main
from resonance_nn.data import encode_bytes, encode_text
from resonance_nn.infilling import infill_prompt
from resonance_nn.loading import load_model

ENGLISH = (  # Abraham Lincoln, 1863; not in the training text
    "Four score and seven years ago our fathers brought forth, upon this continent, a new nation, conceived in "
    "liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil "
    "war, testing whether that nation, or any nation so conceived, and so dedicated, can long endure."
)
PYTHON = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of a file, without the newlines at their ends."""
    with open(path, encoding=encoding) as file:
        return [line.rstrip("\\n") for line in file]


class Counter:
    def __init__(self, items=()):
        self.counts = {}
        for item in items:
            self.counts[item] = self.counts.get(item, 0) + 1
'''


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def bits_per_byte(model, tokenizer, text: str) -> float:
    ids = torch.tensor([[0, *encode_bytes(tokenizer, text.encode())]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    return loss * (ids.shape[1] - 1) / math.log(2) / len(text.encode())


def test_it_is_found_by_name_and_small(offline):
    folder = bundled_models()[DEFAULT_MODEL]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 20_000_000
    assert {path.name for path in folder.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    model = ResonanceForCausalLM.from_pretrained(DEFAULT_MODEL)
    assert model.config.to_dict() == load_model(DEFAULT_MODEL)[0].config.to_dict()
    assert "attention" not in " ".join(model.config.mixers)


@pytest.mark.parametrize(("text", "limit"), [(ENGLISH, 1.8), (PYTHON, 1.2)])
def test_it_has_learned(offline, text, limit):
    """A uniform guess takes 8 bits a byte, letters by their frequency about 4.2."""
    model, tokenizer = load_model(DEFAULT_MODEL, dtype=torch.float32)
    assert bits_per_byte(model, tokenizer, text) < limit


def test_it_fills_holes(offline, capsys, tmp_path):
    """A line is likelier where it was taken out than in another text, and something is written there; which token is
    the likeliest, rounding may decide."""
    model, tokenizer = load_model(DEFAULT_MODEL, dtype=torch.float32)
    line = "self.counts[item] = self.counts"
    before, after = PYTHON.split(line)
    middle, losses = encode_text(tokenizer, line), []
    for left, right in ((before, after), (ENGLISH[:200], ENGLISH[200:])):
        prompt = infill_prompt(model, tokenizer, left.encode(), right.encode())
        ids = torch.tensor([[*prompt, *middle]])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
        with torch.no_grad():
            losses.append(float(model(ids, labels=labels).loss) * len(middle))
    assert losses[0] < losses[1] - 10, losses
    file = tmp_path / "file.py"
    file.write_text(f"{before}<|fill|>{after}\n\nprint(Counter('aab'))\n")
    assert main(["generate", "--infill", str(file), "--greedy", "--middle-only", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out


def test_generate_and_chat_take_it_when_no_model_is_named(offline, capsys, monkeypatch):
    assert main(["generate", "--prompt", "The people of the United States", "--greedy", "--max-new-tokens", "40"]) == 0
    words = re.findall(r"[A-Za-z]+", capsys.readouterr().out)
    assert len(words) >= 15
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Good morning.\n"), encoding="utf-8"))
    assert main(["chat", "--max-new-tokens", "8", "--seed", "0"]) == 0
    assert capsys.readouterr().out.strip()


def test_the_card_says_what_it_is():
    card = (bundled_models()[DEFAULT_MODEL] / "README.md").read_text(encoding="utf-8")
    for part in ("## Data", "## Recipe", "## Figures", "## Limits", "license:"):
        assert part in card
    config = json.loads((bundled_models()[DEFAULT_MODEL] / "config.json").read_text())
    assert config["mixers"] == ["holographic"]
