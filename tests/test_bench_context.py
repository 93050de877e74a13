"""The context suite: memory that a longer context must not take, and every case in a process of its own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from resonance_nn.bench import context
from resonance_nn.bench.context import ContextOptions, measure, run
from resonance_nn.cli import main

MB = 1 << 20
SMALL = ContextOptions(hidden_size=64, layers=3, vocab_size=300, chunk=128, prefill=(256,), train=())


def test_prefill_takes_no_more_memory_and_state_for_a_longer_context():
    told = []
    short = measure("prefill", 512, SMALL, lambda *a: told.append(a))
    assert told == [(128, 512), (256, 512), (384, 512), (512, 512)]
    long = measure("prefill", 8192, SMALL, lambda *a: None)
    assert long["state_bytes"] == short["state_bytes"] > 0
    assert long["peak_bytes"] < short["peak_bytes"] + 4 * MB
    whole = measure("prefill", 8192, replace(SMALL, chunk=8192), lambda *a: None)
    assert whole["peak_bytes"] > 4 * long["peak_bytes"]


def test_gradient_checkpointing_saves_memory():
    told = []
    deep = replace(SMALL, layers=6)
    with_it = measure("train", 4096, deep, lambda *a: told.append(a))
    assert told == [(i, 12) for i in range(12)]
    without = measure("train", 4096, replace(deep, gradient_checkpointing=False), lambda *a: None)
    assert with_it["peak_bytes"] < 0.7 * without["peak_bytes"]
    assert with_it["parameters"] == without["parameters"]
    assert with_it["state_bytes"] is None


def test_run_covers_every_task_and_length(monkeypatch):
    calls, steps = [], []

    def in_own_process(function, task, length, options, progress):
        calls.append((task, length))
        progress(1, 2)
        return {"seconds": 2.0, "peak_bytes": 1, "weight_bytes": 1, "parameters": 1, "state_bytes": None}

    monkeypatch.setattr(context, "in_own_process", in_own_process)
    payload = run(ContextOptions(), lambda *a: steps.append(a))
    assert calls == [("prefill", 262_144), ("prefill", 1_048_576), ("train", 262_144)]
    assert steps[0] == (131_072, 1_572_864)
    assert steps[-1] == (1_572_864, 1_572_864)
    assert [row["ours"] for row in payload["rows"]] == [131_072, 524_288, 131_072]
    json.dumps(payload, allow_nan=False)


def test_command_writes_table_json_and_plot(tmp_path, capsys):
    arguments = ["--prefill", "256", "--train", "none", "--hidden-size", "64", "--layers", "1", "--set"]
    arguments += ["chunk_size=16", "--vocab-size", "300", "--mixers", "spectral_gate", "--chunk", "64", "--seed", "1"]
    arguments += ["--no-gradient-checkpointing", "--dtype", "bf16", "--device", "cpu"]
    files = ["--json", str(tmp_path / "context.json"), "--plot", str(tmp_path / "context.png")]
    assert main(["bench", "context", *arguments, *files]) == 0
    out, err = capsys.readouterr()
    assert "peak above weights" in out
    assert err == ""
    payload = json.loads((tmp_path / "context.json").read_text())
    assert payload["suite"] == "context"
    assert [row["case"] for row in payload["rows"]] == ["prefill L=256"]
    assert all(row["peak_bytes"] > 0 for row in payload["rows"])
    assert payload["options"]["gradient_checkpointing"] is False
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prefill", "none", "--train", "none"],
        ["--prefill", ""],
        ["--prefill", "x"],
        ["--train", "1"],
        ["--size", "bogus"],
        ["--size", "tiny", "--hidden-size", "64"],
        ["--hidden-size", "7"],
        ["--layers", "0"],
        ["--chunk", "0"],
        ["--mixers", "bogus"],
        ["--dtype", "auto"],
        ["--plot", "/no/such/folder/plot.png"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "context", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
