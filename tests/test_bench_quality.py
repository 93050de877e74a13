"""`bench quality`: equal sizes, the same batches, every token once an epoch, peers that are transformers' own."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import relative
from transformers import PreTrainedModel

from resonance_nn.bench import quality, text
from resonance_nn.bench.accelerated import accelerate, accelerated_delta_rule
from resonance_nn.bench.peers import TOLERANCE, build_peer, count
from resonance_nn.bench.quality import crossing
from resonance_nn.bench.quality_options import BUDGETS, MODELS, OURS, Budget, Case, QualityOptions
from resonance_nn.cli import main
from resonance_nn.config import ResonanceConfig
from resonance_nn.data import encode_bytes, find_documents
from resonance_nn.data.synthetic import Batch
from resonance_nn.minimal_pairs import read_pairs, score_pairs
from resonance_nn.models import ResonanceForCausalLM

TINY = Budget(hidden_size=64, layers=2, vocab_size=300, tokens=8192, lengths=(64,), seeds=2, tokens_per_batch=512)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"line {i} of many, each a little different\n" * 40)
    return tmp_path


@pytest.mark.parametrize("budget", BUDGETS)
def test_all_models_of_a_budget_have_equal_parameters(budget: str):
    options = QualityOptions(budget=BUDGETS[budget])
    with torch.device("meta"):
        sizes = {model: count(ResonanceForCausalLM(options.config(model))) for model in OURS}
    ours = options.config("default")
    for name in ("llama", "mamba2", "gated_delta"):
        sizes[name] = count(build_peer(name, ours, sizes["default"], 512)[0])
    assert all(abs(size / sizes["default"] - 1) <= TOLERANCE for size in sizes.values()), sizes


@pytest.mark.parametrize("name", ["mamba2", "gated_delta"])
def test_accelerated_peers_are_transformers_own(name: str):
    """The same logits, gradients of the embedding, and parameters."""
    ours = ResonanceConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2)
    with torch.device("meta"):
        parameters = count(ResonanceForCausalLM(ours))
    torch.manual_seed(0)
    model: PreTrainedModel = build_peer(name, ours, parameters, 128)[0]
    ids = torch.randint(50, (2, 100))

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(ids, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), model.get_input_embeddings().weight)
        return logits, gradient

    exact, size = outputs(), count(model)
    with accelerated_delta_rule():
        model = accelerate(model)
        fast = outputs()
    assert count(model) == size
    for a, b in zip(fast, exact, strict=True):
        assert relative(a, b) < 1e-4
    again = outputs()  # and after it
    assert relative(again[0], exact[0]) < 1e-4


def test_every_token_is_a_target_once_an_epoch(folder):
    documents = find_documents([str(folder / "text")])
    task = text.text_task(documents, folder / "data", 32, 300)
    windows = (task.train.num_tokens - 1) // 32 - 1
    starts = []
    for step in range(math.ceil(2 * windows / 4)):
        batch = task.training_batch(np.random.default_rng(0), 128, step)
        assert batch.input_ids.shape == (4, 32)
        assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
        starts += batch.input_ids.tolist()
    stream = task.train.tokens
    for epoch in range(2):
        seen = starts[epoch * windows : (epoch + 1) * windows]
        offset = next(
            o
            for o in range(32)
            if sorted(seen) == sorted(stream[o + 32 * i : o + 32 * i + 32].tolist() for i in range(windows))
        )
        assert offset < 32
    assert starts[:windows] != starts[windows : 2 * windows]
    other = replace(task, order=1).training_batch(np.random.default_rng(0), 128, 0)
    assert not torch.equal(other.input_ids, task.training_batch(np.random.default_rng(5), 128, 0).input_ids)
    with pytest.raises(ValueError, match="fewer than two windows"):
        replace(task, seq_len=10**6).training_batch(np.random.default_rng(0), 128, 0)


def test_our_loss_is_the_plain_one():
    torch.manual_seed(0)
    model = ResonanceForCausalLM(ResonanceConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    ids = torch.randint(50, (2, 33))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    plain, fast = text.answer_loss(model, batch), text.next_token_loss(model, batch)
    for a, b in zip(fast, plain, strict=True):
        assert relative(a, b) < 1e-6
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(fast[0], weights), torch.autograd.grad(plain[0], weights), strict=True):
        assert relative(a, b) < 1e-4


def curve(*losses: float) -> dict:
    lines = [
        {"step": 10 * (i + 1), "training_seconds": 4.0 * (i + 1), "cells": {text.HELD_OUT: {"loss": loss}}}
        for i, loss in enumerate(losses)
    ]
    return {
        "curve": lines,
        "steps": 10 * len(losses),
        "training_seconds": 4.0 * len(losses),
        "stopped": "budget",
        "cells": {text.HELD_OUT: {"loss": losses[-1], "bits_per_byte": 1.0}},
    }


def test_crossing():
    peer = curve(5.0, 4.0, 3.5, 3.0)
    assert crossing([curve(4.0, 2.0, 1.5, 1.0)], [peer]) == (pytest.approx(15 / 40), pytest.approx(6 / 16))
    assert crossing([curve(2.5, 2.0, 1.5, 1.0)], [peer]) == (0.25, 0.25)
    assert crossing([curve(5.0, 4.0, 3.5, 3.01)], [peer]) == (None, None)
    assert crossing([peer], [peer]) == (1.0, 1.0)


def test_run_tunes_each_model_compares_and_resumes(folder, monkeypatch, capsys):
    monkeypatch.setitem(BUDGETS, "XS", TINY)
    arguments = ["bench", "quality", "--budget", "XS", "--models", "default,llama", "--data", str(folder / "text")]
    arguments += [
        "--lengths",
        "32,64",
        "--lrs",
        "1e-4,3e-3",
        "--tokens-per-batch",
        "512",
        "--output-dir",
        str(folder / "runs"),
    ]
    arguments += ["--json", str(folder / "q.json"), "--plot", str(folder / "q.png")]
    assert main(arguments) == 0
    payload = json.loads((folder / "q.json").read_text())
    assert len(payload["rows"]) == 4
    ours, llama, longer, _ = payload["rows"]
    assert (ours["lr"], llama["lr"]) == (3e-3, 3e-3)
    tried = {(run["length"], run["lr"], run["seed"]) for run in payload["runs"] if run["model"] == "default"}
    assert tried == {(32, 1e-4, 0), *((length, 3e-3, seed) for length in (32, 64) for seed in (0, 1))}
    assert len(payload["runs"]) == 2 * len(tried)
    assert (longer["length"], longer["lr"], len(longer["values"])) == (64, 3e-3, 2)
    assert ours["ours"] < math.log(300)
    assert ours["difference"] == pytest.approx(ours["ours"] - llama["ours"])
    assert llama["difference"] == 0
    assert llama["share_of_tokens"] == pytest.approx(1.0)
    assert abs(ours["parameters"] / llama["parameters"] - 1) <= TOLERANCE
    assert ours["bits_per_byte"] > 0
    assert len(ours["values"]) == 2
    assert (folder / "q.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((folder / "q.json").read_text())["rows"] == payload["rows"]
    assert main(arguments) == 2
    assert "--resume keeps what is finished" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--optimizer", "muon"]) == 2
    assert "optimizer was 'adamw' and is 'muon'" in capsys.readouterr().err
    peer = [*arguments[:4], "--models", "llama", *arguments[6:], "--resume", "--set", "num_heads=2"]
    assert main(peer) == 2  # a peer's size is that of ours
    assert "intermediate_size was" in capsys.readouterr().err


def test_finished_models_are_judged_elsewhere(folder, capsys, monkeypatch):
    """Bits per byte of a text are those of the saved weights in windows; what is known is not measured again."""
    monkeypatch.setitem(BUDGETS, "XS", TINY)
    (folder / "other.txt").write_text("line 3 of few, each rather different\n" * 20)
    sentences = [f"line {i} of many, each {word}" for i, word in enumerate("abcdefgh")]
    pairs = [{"sentence_good": a, "sentence_bad": b} for a in sentences[:4] for b in sentences[4:]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    runs = folder / "runs"
    arguments = ["bench", "quality", "--budget", "XS", "--models", "default,llama,mamba2", "--seeds", "1"]
    arguments += ["--data", str(folder / "text"), "--lrs", "3e-3", "--output-dir", str(runs), "--dtype", "bf16"]
    assert main(arguments) == 0
    arguments += ["--resume", "--json", str(folder / "q.json"), "--text", str(folder / "other.txt")]
    capsys.readouterr()
    assert main([*arguments, "--pairs", str(folder / "pairs.jsonl")]) == 0
    metric = f"bits per byte, {folder / 'other.txt'}"
    assert "bits per byte" in capsys.readouterr().out
    rows = json.loads((folder / "q.json").read_text())["rows"]
    found = {(row["model"], row["metric"]): row["ours"] for row in rows}
    assert len(found) == len(rows) == 9
    budget = replace(TINY, seeds=1, tokens_per_batch=4096)
    options = QualityOptions(budget=budget, data=(str(folder / "text"),), output_dir=runs, lrs=(3e-3,))
    model = ResonanceForCausalLM.from_pretrained(runs / Case(64, "default", 3e-3, 0).folder / "model").eval()
    tokenizer = text.text_tokenizer(find_documents([str(folder / "text")]), 300)
    ids = [0, *encode_bytes(tokenizer, (folder / "other.txt").read_bytes()), 0]  # a document and its end
    windows = (len(ids) - 1) // 64
    at = torch.arange(windows)[:, None] * 64 + torch.arange(65)
    batch = torch.tensor(ids)[at]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        nats = text.next_token_loss(model, Batch(batch[:, :-1], batch[:, 1:]))[1].item()
    a_byte = nats / math.log(2) * len(ids) / (folder / "other.txt").stat().st_size
    assert found["default", metric] == pytest.approx(a_byte, rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = score_pairs(model, tokenizer, read_pairs([str(folder / "pairs.jsonl")]))["accuracy"]
    assert 0 < scored < 1
    assert found["default", "accuracy on minimal pairs"] == scored

    short = folder / "short.txt"
    short.write_text("too short")
    assert main([*arguments, "--text", str(short)]) == 2
    assert "give more text, or shorter lengths" in capsys.readouterr().err

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "build", fail)
    assert main([*arguments, "--pairs", str(folder / "pairs.jsonl")]) == 0
    (folder / "other.txt").write_text("another text altogether, of some length\n" * 20)
    with pytest.raises(AssertionError, match="measured again"):
        quality.run(replace(options, models=("default",), texts=(str(folder / "other.txt"),)), resume=True)


def test_a_given_rate_is_not_tuned(folder, capsys):
    options = QualityOptions(
        models=("default", "llama"),
        budget=TINY,
        data=(str(folder / "text"),),
        output_dir=folder / "runs",
        lrs=(1e-3, 3e-3),
    )
    given = replace(options, rates={"llama": 2e-3}, budget=replace(TINY, seeds=1))
    payload = quality.run(given)
    assert [(run["model"], run["lr"]) for run in payload["runs"]] == [
        ("default", 1e-3),
        ("llama", 2e-3),
        ("default", 3e-3),
    ]
    assert {row["model"]: row["lr"] for row in payload["rows"]}["llama"] == 2e-3
    with pytest.raises(ValueError, match="rates: 'mamba2' is not one of the models"):
        replace(options, rates={"mamba2": 1e-3}).check()
    with pytest.raises(ValueError, match=r"rates: llama = -1\.0: must be > 0"):
        replace(options, rates={"llama": -1.0}).check()
    assert main(["bench", "quality", "--rate", "llama"]) == 2
    assert "--rate 'llama': must be MODEL=RATE" in capsys.readouterr().err


def test_muon_and_other_recipes_train(folder):
    options = QualityOptions(
        models=tuple(OURS),
        budget=replace(TINY, seeds=1),
        data=(str(folder / "text"),),
        output_dir=folder / "runs",
        lrs=(3e-3,),
        plan=replace(QualityOptions().plan, optimizer="muon"),
    )
    payload = quality.run(options)
    assert [row["model"] for row in payload["rows"]] == list(OURS)
    assert all(row["ours"] < math.log(300) for row in payload["rows"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ("default", "gpt")}, "models: 'gpt' is unknown"),
        ({"models": ()}, "models = "),
        ({"lrs": (1e-3, 1e-3)}, "lrs = "),
        ({"lrs": (0.0,)}, "lr = 0.0: must be > 0"),
        ({"budget": replace(TINY, seeds=0)}, "seeds = 0: must be ≥ 1"),
        ({"budget": replace(TINY, lengths=())}, "lengths = "),
        ({"budget": replace(TINY, lengths=(64, 32))}, "must be ascending"),
        ({"plan": replace(QualityOptions().plan, optimizer="sgd")}, "optimizer = 'sgd'"),
    ],
)
def test_wrong_options(change: dict, said: str):
    with pytest.raises(ValueError, match=said):
        replace(QualityOptions(), **change).check()


def test_titles_and_folders():
    case = Case(2048, "llama", 1e-3, 2)
    assert case.folder == "2048/llama/lr-0.001-seed-2"
    assert case.title == "llama, 2,048 tokens, rate 0.001, seed 2"
    assert set(MODELS) >= {"default", "llama", "mamba2", "gated_delta"}


def test_a_field_that_a_recipe_would_overrule_is_refused():
    with pytest.raises(ValueError, match="fields: memory has a decay of its own"):
        QualityOptions(models=("default", "memory"), fields={"decay": "head"}).check()
    QualityOptions(models=("default", "memory"), fields={"conv_size": 8}).check()
