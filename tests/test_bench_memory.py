"""The memory suite: the peak is the step's own, in a process of its own, and a model that does not fit is a result."""

from __future__ import annotations

import json
import math
import signal
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from resonance_nn.bench import memory
from resonance_nn.bench.child import in_child
from resonance_nn.bench.memory import MemoryOptions, _PeakMemory, peak_memory, run
from resonance_nn.cli import main

SMALL = MemoryOptions(lengths=(64,), tokens_per_batch=128, hidden_size=64, layers=2, vocab_size=300)
FLAGS = ["--lengths", "64", "--tokens-per-batch", "128", "--vocab-size", "300", "--device", "cpu"]


@pytest.fixture
def here(monkeypatch):
    """Without the processes."""
    calls: list[tuple[str, int]] = []

    def call(function, name, options, length):
        calls.append((name, length))
        return function(name, options, length)

    monkeypatch.setattr(memory, "in_child", call)
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be set back")
def test_the_peak_is_of_what_comes_after():
    big = torch.ones(1 << 26)  # 268 MB, gone before
    del big
    peak = _PeakMemory("cpu")
    small = torch.ones(1 << 24)  # 67 MB
    del small
    assert 60e6 < peak.read() - peak.before < 90e6
    assert peak.method == "VmHWM"


def test_a_step_takes_more_on_more_tokens_and_less_with_checkpointing(here):
    options = replace(SMALL, layers=4, tokens_per_batch=1)
    short, long = (peak_memory("ours", options, length)["above"] for length in (512, 4096))
    assert long > 2 * short
    assert peak_memory("ours", replace(options, gradient_checkpointing=True), 4096)["above"] < 0.7 * long


def test_a_prompt_read_in_chunks_takes_no_more_when_it_is_longer(here, monkeypatch):
    monkeypatch.setattr(memory, "prefill", partial(memory.prefill, chunk_size=512))
    options = replace(SMALL, task="prefill", tokens_per_batch=1)
    short, long = (peak_memory("ours", options, length)["above"] for length in (1024, 8192))
    assert long < 1.5 * short + 20e6


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
    def call(function, name, options, length):
        if name == "llama":
            raise ChildProcessError("was killed by signal 9")
        return {"above": 5_000_000, "whole": 9_000_000, "weights": 1, "method": "VmHWM"}

    monkeypatch.setattr(memory, "in_child", call)
    plot = str(tmp_path / "m.png")
    assert main(["bench", "memory", *FLAGS, "--size", "tiny", "--plot", plot]) == 0
    out, _ = capsys.readouterr()
    assert "L=64 B=2: Llama (SDPA) not measured: was killed by signal 9" in out
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_command_measures_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "m.json"
    arguments = ["--hidden-size", "64", "--layers", "1", "--peers", "none", "--gradient-checkpointing"]
    assert main(["bench", "memory", *FLAGS, *arguments, "--set", "chunk_size=16", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "ours" in out
    assert err == ""
    payload = json.loads(path.read_text())
    (row,) = payload["rows"]
    assert payload["options"]["overrides"] == {"chunk_size": 16}
    assert row["ours"] > 0
    assert row["peer"] is row["peer_name"] is row["ratio"] is None


def test_errors_and_ends_of_a_process_of_its_own():
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        in_child(math.sqrt, -1)
    with pytest.raises(ChildProcessError, match="killed by signal 9"):
        in_child(signal.raise_signal, signal.SIGKILL)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lengths", "x"],
        ["--lengths", "1"],
        ["--tokens-per-batch", "0"],
        ["--task", "decode"],
        ["--task", "prefill", "--gradient-checkpointing"],
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
