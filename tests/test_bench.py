"""The speed suite: what it compares is comparable, what it writes is complete, and a leaking model is not measured."""

from __future__ import annotations

import json

import pytest
import torch

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.bench import common
from resonance_nn.bench.speed import SpeedOptions, build, check_causal, count, run
from resonance_nn.cli import main
from resonance_nn.mixers import MIXERS

SMALL = SpeedOptions(lengths=(32, 64), hidden_size=64, layers=2, vocab_size=300, repeats=2, tokens_per_batch=128)


@pytest.mark.parametrize("mixers", [("spectral_gate",), ("resonance",), ("attention",)])
@pytest.mark.parametrize("width", [64, 512])
def test_both_models_are_of_one_size(mixers, width):
    options = SpeedOptions(hidden_size=width, layers=2, vocab_size=1000, mixers=mixers, device="meta")
    ours, peer = build(options)
    assert abs(count(peer) / count(ours) - 1) < 0.02
    assert peer.config._attn_implementation == "sdpa"
    for model in (ours, peer):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (width, 2, 1000)
        assert model.training


def test_run_measures_every_length_in_turns():
    steps = []
    payload = run(SMALL, lambda done, total: steps.append((done, total)))
    assert steps == [(i, 12) for i in range(1, 13)]
    assert set(payload) == {"suite", "machine", "versions", "options", "parameters", "keeps_freed_memory", "rows"}
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
    run(SpeedOptions(**{**vars(SMALL), "lengths": (32,), "repeats": 1}))
    assert len(calls) == 4
    run(SpeedOptions(**{**vars(SMALL), "lengths": (32,), "repeats": 1, "forward_only": True}))
    assert len(calls) == 4


def test_a_leaking_model_is_not_measured():
    class Leaking(ResonanceForCausalLM):
        def forward(self, input_ids, **kwargs):
            out = super().forward(input_ids, **kwargs)
            out.logits += out.logits.roll(-1, dims=1)
            return out

    model = Leaking(ResonanceConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(RuntimeError, match="not causal"):
        check_causal(model, 50)


def test_interleaved_calls_in_turns():
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = common.interleaved(functions, repeats=3)
    assert calls == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]


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
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "speed", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_mixers_suite_covers_every_causal_mixer(tmp_path):
    arguments = ["bench", "mixers", "--length", "32", "--hidden-size", "128", "--layers", "1", "--repeats", "1"]
    assert main([*arguments, "--tokens-per-batch", "32", "--device", "cpu", "--json", str(tmp_path / "m.json")]) == 0
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert {row["case"] for row in rows} >= {name for name, mixer in MIXERS.items() if mixer.causal}
    base = next(row for row in rows if row["case"] == "spectral_gate")
    assert base["ratio"] == base["decode_ratio"] == 1
    assert all(min(row["ours"], row["decode_ms"], row["state_bytes"]) > 0 for row in rows)
