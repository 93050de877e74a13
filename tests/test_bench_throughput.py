"""The throughput suite: every batch size in training and forward, in turns."""

from __future__ import annotations

import json

import pytest
import torch

from resonance_nn.bench.throughput import ThroughputOptions, run
from resonance_nn.cli import main

SMALL = ["--hidden-size", "64", "--layers", "1", "--vocab-size", "300", "--device", "cpu"]


def test_every_batch_is_trained_and_read(monkeypatch):
    calls, steps = [], []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: calls.append(1) or backward(self))
    options = ThroughputOptions(batches=(4, 1), length=32, hidden_size=64, layers=1, vocab_size=300, repeats=2)
    payload = run(options, lambda done, total: steps.append((done, total)))
    assert len(calls) == 2 * 2 * 3  # batches, models, one step to warm up and two that count
    assert steps == [(i, 40) for i in range(1, 41)]
    rows = payload["rows"]
    assert [(r["metric"].split()[0], r["batch"]) for r in rows] == [
        ("training", 1),
        ("training", 4),
        ("forward", 1),
        ("forward", 4),
    ]
    for row in rows:
        assert row["ours"] == pytest.approx(row["batch"] * 32 / (sum(row["seconds"]["ours"]) / 2))
        assert row["over_matmuls"] > 0
        assert row["operations"] > 0
    train, forward = rows[1], rows[3]
    assert train["operations"] > 2 * forward["operations"]
    json.dumps(payload, allow_nan=False)


def test_command(tmp_path, capsys):
    files = ["--json", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")]
    arguments = ["--batches", "1,2", "--length", "16", "--repeats", "1", "--no-floor", "--dtype", "fp32"]
    assert main(["bench", "throughput", *SMALL, *arguments, *files]) == 0
    out, err = capsys.readouterr()
    assert "training L=16 B=2" in out
    assert "forward L=16 B=1" in out
    assert err == ""
    payload = json.loads((tmp_path / "t.json").read_text())
    assert payload["suite"] == "throughput"
    assert payload["rows"][0]["over_matmuls"] is None
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batches", "x"],
        ["--batches", "0"],
        ["--length", "1"],
        ["--repeats", "0"],
        ["--peers", "gpt"],
        ["--size", "x"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "throughput", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
