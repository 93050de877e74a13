"""The speed suite: what it compares is comparable, what it writes is complete, and a leaking model is not measured."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from resonance_nn.allocator import is_freed_memory_kept, keep_freed_memory
from resonance_nn.bench import common, speed, timing
from resonance_nn.bench.models import ModelOptions, build_beside, build_ours, count
from resonance_nn.bench.peers import PEER
from resonance_nn.bench.speed import SpeedOptions, run
from resonance_nn.cli import main
from resonance_nn.mixers import MIXERS

SMALL = SpeedOptions(lengths=(32, 64), hidden_size=64, layers=2, vocab_size=300, repeats=2, tokens_per_batch=128)


@pytest.mark.parametrize("mixers", [("spectral_gate",), ("resonance",), ("attention",)])
@pytest.mark.parametrize("width", [64, 512])
def test_both_models_are_of_one_size(mixers, width):
    ours = build_ours(ModelOptions(hidden_size=width, layers=2, vocab_size=1000, mixers=mixers, device="meta"))
    peer = build_beside(ours, ("llama",), 8192)[0][PEER]
    assert abs(count(peer) / count(ours) - 1) < 0.02
    assert peer.config._attn_implementation == "sdpa"
    for model in (ours, peer):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (width, 2, 1000)
        assert model.training


def test_run_measures_every_length_in_turns():
    steps = []
    payload = run(replace(SMALL, floor=False), lambda done, total: steps.append((done, total)))
    assert steps == [(i, 12) for i in range(1, 13)]
    assert set(payload) == {
        *("suite", "machine", "versions", "options", "parameters", "peers", "keeps_freed_memory", "rows")
    }
    assert [(row["length"], row["batch"]) for row in payload["rows"]] == [(32, 4), (64, 2)]
    for row in payload["rows"]:
        seconds = row["seconds"]
        ratios = [p / o for o, p in zip(seconds["ours"], seconds["peer"], strict=True)]
        assert len(ratios) == 2
        assert row["ratio"] == pytest.approx(sum(ratios) / 2)
        assert row["ours"] == pytest.approx(128 / (sum(seconds["ours"]) / 2))
    json.dumps(payload, allow_nan=False)


def test_training_step_has_a_gradient_and_forward_only_has_none(monkeypatch):
    calls = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: calls.append(1) or backward(self))
    run(replace(SMALL, lengths=(32,), repeats=1))
    assert len(calls) == 4
    run(replace(SMALL, lengths=(32,), repeats=1, forward_only=True))
    assert len(calls) == 4


def test_each_model_is_timed_over_its_own_matmuls():
    payload = run(replace(SMALL, lengths=(64,), peers=("llama", "mamba2")))
    assert [row["peer_name"] for row in payload["rows"]] == ["Llama (SDPA)", "Mamba-2"]
    assert {name: abs(n / payload["parameters"]["ours"] - 1) < 0.02 for name, n in payload["parameters"].items()} == {
        "ours": True,
        "Llama (SDPA)": True,
        "Mamba-2": True,
    }
    ours, llama = payload["rows"][0]["operations"], payload["rows"][0]["peer_operations"]
    assert 0.5 < llama / ours < 2
    for row in payload["rows"]:
        assert row["over_matmuls"] > 1
        assert row["peer_over_matmuls"] > 1


def test_lengths_go_from_short_to_long_whatever_the_order():
    payload = run(replace(SMALL, lengths=(64, 32, 64), peers=(), floor=False))
    assert [row["length"] for row in payload["rows"]] == [32, 64]
    assert all(row["peer"] is row["peer_name"] is row["ratio"] is row["reason"] is None for row in payload["rows"])


def test_a_slow_peer_is_left_out_and_the_row_says_so(tmp_path, capsys):
    steps = []
    payload = run(replace(SMALL, max_seconds=1e-9), lambda done, total: steps.append((done, total)))
    assert steps[-1] == (20, 20)
    assert [row["length"] for row in payload["rows"]] == [32, 64]
    for row in payload["rows"]:
        assert row["peer"] is row["ratio"] is None
        assert "a step at L=32 B=4 took" in row["reason"]
        assert row["ours"] > 0
    arguments = ["--lengths", "32", "--hidden-size", "64", "--layers", "1", "--vocab-size", "300", "--repeats", "1"]
    files = ["--json", str(tmp_path / "speed.json"), "--plot", str(tmp_path / "speed.png")]
    assert main(["bench", "speed", *arguments, "--device", "cpu", "--max-seconds", "1e-9", *files]) == 0
    out, _ = capsys.readouterr()
    assert "Llama (SDPA) not timed: a step at" in out


@pytest.mark.parametrize("failure", ["slow", "memory"])
def test_a_peer_is_not_run_on_what_it_cannot_do(failure, monkeypatch):
    """Neither where the time of a shorter one says that it would take too long, nor where a shorter one did not fit."""
    ran: list[tuple[str, int]] = []

    def first_step(name, model, ids, options, forward_only):
        ran.append((name, ids.numel()))
        if failure == "memory" and name != "ours":
            raise torch.OutOfMemoryError
        return timing._First(lambda: time.sleep(1e-5 * ids.numel()), 0.0, None)

    monkeypatch.setattr(timing, "_first_step", first_step)
    options = replace(SMALL, lengths=(32, 3200, 6400), tokens_per_batch=1, repeats=1, floor=False, max_seconds=0.03)
    rows = run(options)["rows"]
    timed = [32] if failure == "slow" else []
    assert [row["length"] for row in rows if row["peer"] is not None] == timed
    assert [tokens for name, tokens in ran if name != "ours"] == [32]
    assert [tokens for name, tokens in ran if name == "ours"] == [32, 3200, 6400]
    told = "a step at L=3200 B=1 would take" if failure == "slow" else "out of memory at L=32 B=1"
    assert all(told in row["reason"] for row in rows[len(timed) :])


@pytest.mark.parametrize("growth", [1, 2])
def test_a_peer_is_given_up_before_its_steps_become_too_long(growth, monkeypatch):
    """A step of quadratic time is given up from short sequences; one of linear time, with a fixed cost, is timed."""
    ran: list[tuple[str, int]] = []

    def training_step(model, ids, options, *, forward_only=False):
        llama = "Llama" in type(model).__name__

        def step():
            ran.append((type(model).__name__, ids.shape[1]))
            if llama:
                time.sleep(0.01 + (1e-5 * ids.shape[1] if growth == 1 else 1e-6 * ids.shape[1] ** 2))

        return step

    monkeypatch.setattr(timing, "training_step", training_step)
    options = replace(SMALL, lengths=(2048,), tokens_per_batch=1, repeats=1, floor=False, max_seconds=0.3)
    (row,) = run(options)["rows"]
    longest = max(length for name, length in ran if "Llama" in name)
    if growth == 1:
        assert row["reason"] is None
        assert longest == 2048
    else:
        assert "a step at L=2048 B=1 would take" in row["reason"]
        assert longest < 2048


def test_the_default_allocator_is_measured_although_this_process_keeps_memory():
    keep_freed_memory()
    steps = []
    options = replace(SMALL, lengths=(32,), repeats=1, floor=False, peers=(), allocator="default")
    payload = run(options, lambda done, total: steps.append((done, total)))
    assert payload["machine"]["freed_memory_kept"] is payload["keeps_freed_memory"] is False
    assert payload["machine"]["threads"] == torch.get_num_threads()
    assert steps == [(1, 2), (2, 2)]
    assert is_freed_memory_kept() is keep_freed_memory()


def test_compiled_models_are_timed_and_recorded_eagerly(monkeypatch):
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(model) or model)
    payload = run(replace(SMALL, compile=True))
    assert [type(model).__name__ for model in compiled] == ["ResonanceForCausalLM", "LlamaForCausalLM"] * 2
    assert all(row["operations"] > 0 for row in payload["rows"])


def test_what_does_not_compile_is_one_line(monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    def compile(model, dynamic):
        def fail(**kwargs):
            raise TorchDynamoException("No working C++ compiler found\nand a traceback")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    arguments = ["--lengths", "32", "--hidden-size", "64", "--layers", "1", "--vocab-size", "300"]
    assert main(["bench", "speed", *arguments, "--compile", "--device", "cpu"]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("error: compile = True: ours does not compile (No working C++ compiler found)")
    assert err.count("\n") == 1


def test_interleaved_calls_in_turns():
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = common.interleaved(functions, repeats=3)
    assert calls == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]
    common.interleaved(functions, repeats=1, warm_up=False)
    assert calls == ["a", "b"] * 5


def test_ratio_is_the_median_of_the_rounds():
    row = common.rate_row("c", "tokens/s", 100, [1.0, 2.0, 4.0], [2.0, 2.0, 2.0], "peer")
    assert (row["ours"], row["peer"], row["ratio"], row["ratio_min"], row["ratio_max"]) == (50, 50, 1.0, 0.5, 2.0)


def test_command_writes_table_json_and_plot(tmp_path, capsys):
    arguments = ["--lengths", "32", "--hidden-size", "64", "--layers", "1", "--vocab-size", "300", "--repeats", "1"]
    files = ["--json", str(tmp_path / "speed.json"), "--plot", str(tmp_path / "speed.png")]
    assert main(["bench", "speed", *arguments, "--tokens-per-batch", "64", "--dtype", "fp32", *files]) == 0
    out, err = capsys.readouterr()
    assert "L=32 B=2" in out
    assert "Llama (SDPA)" in out
    assert err == ""
    assert json.loads((tmp_path / "speed.json").read_text())["suite"] == "speed"
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_options_of_the_command_reach_the_measurement(monkeypatch, capsys):
    given = []

    def fake(options, progress):
        given.append(options)
        raise ValueError("seen")

    monkeypatch.setattr(speed, "run", fake)
    arguments = [
        "--size",
        "tiny",
        "--set",
        "chunk_size=32",
        "--set",
        "rotation=none",
        "--peers",
        "mamba,rwkv",
        "--full",
    ]
    more = ["--allocator", "default", "--max-seconds", "7", "--seed", "3", "--no-floor", "--compile", "--forward-only"]
    more += ["--dtype", "bf16"]
    assert main(["bench", "speed", *arguments, *more, "--mixers", "spectral_gate, attention", "--device", "cpu"]) == 2
    assert given == [
        SpeedOptions(
            lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
            hidden_size=256,
            layers=6,
            overrides={"chunk_size": 32, "rotation": "none"},
            peers=("mamba", "rwkv"),
            mixers=("spectral_gate", "attention"),
            allocator="default",
            max_seconds=7,
            seed=3,
            floor=False,
            compile=True,
            forward_only=True,
        )
    ]


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_without_dtype_it_is_what_the_device_computes_in(bf16, expected, monkeypatch):
    given = []

    def fake(options, progress):
        given.append(options.dtype)
        raise ValueError("seen")

    monkeypatch.setattr("resonance_nn.evaluation.computes_in_bf16", lambda device: bf16)
    monkeypatch.setattr(speed, "run", fake)
    assert main(["bench", "speed", "--size", "tiny", "--device", "cpu"]) == 2
    assert given == [expected]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lengths", "x"],
        ["--lengths", ""],
        ["--lengths", "1"],
        ["--repeats", "0"],
        ["--layers", "0"],
        ["--hidden-size", "4"],
        ["--mixers", "bogus"],
        ["--dtype", "int8"],
        ["--dtype", "auto"],
        ["--device", "nonsense"],
        ["--plot", "/no/such/folder/plot.png"],
        ["--full", "--lengths", "32"],
        ["--size", "huge"],
        ["--size", "tiny", "--hidden-size", "64"],
        ["--peers", "gpt"],
        ["--set", "no_such_field=1"],
        ["--set", "hidden_size=64"],
        ["--allocator", "other"],
        ["--max-seconds", "0"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "speed", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_mixers_suite_covers_every_causal_mixer(tmp_path):
    files = ["--json", str(tmp_path / "m.json"), "--plot", str(tmp_path / "m.png")]
    arguments = ["bench", "mixers", "--length", "32", "--hidden-size", "128", "--layers", "1", "--repeats", "1"]
    assert main([*arguments, "--tokens-per-batch", "32", "--device", "cpu", *files]) == 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert {row["case"] for row in rows} >= {name for name, mixer in MIXERS.items() if mixer.causal}
    base = next(row for row in rows if row["case"] == "spectral_gate")
    assert base["ratio"] == base["decode_ratio"] == 1
    assert all(min(row["ours"], row["decode_ms"], row["state_bytes"]) > 0 for row in rows)
