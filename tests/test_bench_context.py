"""The context suite and its measure of memory: a known number of bytes is seen, in this process and in its own."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench import context
from resonance_nn.bench.context import ContextOptions, measure, run
from resonance_nn.bench.peak import _child, in_own_process, peak_memory
from resonance_nn.cli import main

MB = 1 << 20
SMALL = ContextOptions(hidden_size=64, layers=3, vocab_size=300, chunk=128, lengths=(256,))


def allocate(megabytes: int) -> float:
    """Holds that much at once, twice, and half as much as its result's origin."""
    for _ in range(2):
        torch.ones(megabytes * MB // 4).sum()
    return torch.ones(megabytes * MB // 8).sum().item()


def allocate_and_tell(megabytes: int, progress) -> tuple[int, float, int]:
    progress(1, 2)
    keep_freed_memory()
    allocate(4 * megabytes)  # an earlier, larger peak, whose pages the allocator keeps
    peak, result = peak_memory(lambda: allocate(megabytes))
    progress(2, 2)
    return peak, result, torch.get_num_threads()


def test_peak_of_a_known_number_of_bytes():
    allocate(200)
    for megabytes in (64, 96):
        peak, result = peak_memory(lambda megabytes=megabytes: allocate(megabytes))
        assert abs(peak - megabytes * MB) < 8 * MB
        assert result == megabytes * MB // 8


def test_what_is_held_before_does_not_count():
    held = torch.ones(64 * MB // 4)
    peak, _ = peak_memory(lambda: held.sum().item())
    assert peak < 8 * MB


def test_own_process_gives_result_progress_and_threads():
    told = []
    peak, result, threads = in_own_process(allocate_and_tell, 64, progress=lambda *a: told.append(a))
    assert abs(peak - 64 * MB) < 8 * MB
    assert result == 64 * MB // 8
    assert told == [(1, 2), (2, 2)]
    assert threads == torch.get_num_threads()


def test_own_process_fails_as_the_function_does():
    ours, theirs = multiprocessing.Pipe(duplex=False)
    _child(theirs, (torch.get_num_threads(), False), math.sqrt, (-1.0,), False)
    assert ours.recv()[0] == "ValueError"
    with pytest.raises(ChildProcessError, match="ended with code 3"):
        in_own_process(os._exit, 3)


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
    payload = run(replace(SMALL, lengths=None), lambda *a: steps.append(a))
    assert calls == [("prefill", 262_144), ("prefill", 1_048_576), ("train", 262_144)]
    assert steps[0] == (131_072, 1_572_864)
    assert steps[-1] == (1_572_864, 1_572_864)
    assert [row["ours"] for row in payload["rows"]] == [131_072, 524_288, 131_072]
    json.dumps(payload, allow_nan=False)


def test_command_writes_table_json_and_plot(tmp_path, capsys):
    arguments = ["--task", "prefill", "--lengths", "256", "--size", "tiny", "--hidden-size", "64", "--layers"]
    arguments += ["1", "--vocab-size", "300", "--mixers", "spectral_gate", "--chunk", "64", "--seed", "1"]
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
        ["--task", "bogus"],
        ["--task", ""],
        ["--lengths", "x"],
        ["--lengths", "1"],
        ["--size", "bogus"],
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
