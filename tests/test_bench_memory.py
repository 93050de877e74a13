"""The memory suite: the peak is the step's own, in a process of its own, and a model that does not fit is a result."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from resonance_nn.bench import memory
from resonance_nn.bench.memory import MemoryOptions, measure, run
from resonance_nn.cli import main

SMALL = MemoryOptions(lengths=(64,), tokens_per_batch=128, hidden_size=64, layers=2, vocab_size=300)
FLAGS = ["--lengths", "64", "--tokens-per-batch", "128", "--vocab-size", "300", "--device", "cpu"]


@pytest.fixture
def here(monkeypatch):
    """Without the processes."""
    calls: list[tuple[str, int]] = []

    def call(function, name, options, length, keep):
        assert not keep
        calls.append((name, length))
        return function(name, options, length)

    monkeypatch.setattr(memory, "in_own_process", call)
    return calls


def test_a_step_takes_more_on_more_tokens_and_less_with_checkpointing(here):
    options = replace(SMALL, layers=4, tokens_per_batch=1)
    short, long = (measure("ours", options, length)["above"] for length in (512, 4096))
    assert long > 2 * short
    assert measure("ours", replace(options, gradient_checkpointing=True), 4096)["above"] < 0.7 * long


def test_run_has_a_row_a_length_and_peer(here):
    options = replace(SMALL, lengths=(128, 64), peers=("llama", "mamba"))
    steps = []
    payload = run(options, lambda done, total: steps.append((done, total)))
    assert here == [(name, length) for length in (64, 128) for name in ("ours", "llama", "mamba")]
    assert steps == [(i, 6) for i in range(1, 7)]
    assert [(r["length"], r["batch"], r["peer_name"]) for r in payload["rows"]] == [
        (64, 2, "Llama (SDPA)"),
        (64, 2, "Mamba"),
        (128, 1, "Llama (SDPA)"),
        (128, 1, "Mamba"),
    ]
    for row in payload["rows"]:
        assert row["ours"] < row["whole"]
        assert abs(row["weights"] / row["peer_weights"] - 1) < 0.02
    json.dumps(payload, allow_nan=False)


def test_a_model_that_does_not_fit_is_told(monkeypatch, capsys, tmp_path):
    def call(function, name, options, length, keep):
        if name == "llama":
            raise ChildProcessError("was killed by signal 9")
        return {"above": 5_000_000, "whole": 9_000_000, "weights": 1}

    monkeypatch.setattr(memory, "in_own_process", call)
    plot = str(tmp_path / "m.png")
    assert main(["bench", "memory", *FLAGS, "--size", "tiny", "--plot", plot]) == 0
    out, _ = capsys.readouterr()
    assert "L=64 B=2: Llama (SDPA) not measured: was killed by signal 9" in out
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_command_measures_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "m.json"
    arguments = ["--hidden-size", "64", "--layers", "1", "--peers", "none", "--gradient-checkpointing"]
    arguments += ["--set", "chunk_size=16", "--seed", "1", "--json", str(path)]
    assert main(["bench", "memory", *FLAGS, *arguments]) == 0
    out, err = capsys.readouterr()
    assert "ours" in out
    assert err == ""
    payload = json.loads(path.read_text())
    (row,) = payload["rows"]
    assert payload["options"]["overrides"] == {"chunk_size": 16}
    assert row["ours"] > 0
    assert row["peer"] is row["peer_name"] is row["ratio"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lengths", "x"],
        ["--lengths", "1"],
        ["--tokens-per-batch", "0"],
        ["--size", "tiny", "--layers", "2"],
        ["--peers", "gpt"],
        ["--set", "chunk_size"],
        ["--json", "/no/such/folder/m.json"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "memory", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
