"""The suites that train: what is written says what was measured, wrong arguments are one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract import assert_causal, small_model
from torch import nn
from torch.nn import functional as F

from resonance_nn.bench.contestants import CONTESTANTS, Shape, state_bytes
from resonance_nn.bench.learning import learn
from resonance_nn.bench.models import count
from resonance_nn.bench.runs import Plan
from resonance_nn.bench.sweep import Case, Sweep
from resonance_nn.bench.tasks import accuracy, recall_task, tracking_task
from resonance_nn.cli import main
from resonance_nn.progress import TrainingInterrupted

QUICK = ["--vocab-size", "32", "--lengths", "16,32", "--pairs", "2,4", "--watch", "32/4", "--hidden-size", "64"]
QUICK += ["--layers", "1", "--tokens-per-batch", "64", "--state-sizes", "16", "--lrs", "1e-3", "--eval-every", "1"]


class Stub(nn.Module):
    """Answers as ``function`` says: hidden states are the answers, one-hot."""

    def __init__(self, function, vocab_size: int) -> None:
        super().__init__()
        self.function, self.vocab_size, self.lm_head, self.device = function, vocab_size, nn.Identity(), "cpu"

    def base_model(self, input_ids, use_cache):
        hidden = F.one_hot(self.function(input_ids), self.vocab_size).float()
        return SimpleNamespace(last_hidden_state=hidden)


def first_value(ids):
    """After the first occurrence of each token stands the answer."""
    answers = ids.clone()
    for row, line in enumerate(ids.tolist()):
        for t, token in enumerate(line):
            answers[row, t] = line[min(line.index(token) + 1, t)]
    return answers


def test_who_reads_the_sequence_answers_all():
    for cell, draw in recall_task(64, (64, 128), (4, 16), (64, 16), fillers="any").cells.items():
        assert accuracy(Stub(first_value, 64), draw, np.random.default_rng(0), 20) == {"accuracy": 1.0}, cell
        wrong = accuracy(Stub(lambda ids: ids, 64), draw, np.random.default_rng(0), 20)
        assert wrong["accuracy"] == 0


def test_accuracy_by_position():
    """Right up to token 64 only: a share 64/128 of all, nothing of the last quarter."""
    parity = Stub(lambda ids: (ids.cumsum(1) + (torch.arange(ids.shape[1]) >= 64)) % 2, 2)
    cells = tracking_task("parity", (64,), (64, 128)).cells
    rng = np.random.default_rng(0)
    assert accuracy(parity, cells["parity 64"], rng, 50) == {"accuracy": 1.0, "last_quarter": 1.0}
    assert accuracy(parity, cells["parity 128"], rng, 50, tokens=300) == {"accuracy": 0.5, "last_quarter": 0.0}


def test_auxiliary_losses_are_minimised_but_not_reported():
    model = small_model(("spectral_gate",), entropy_weight=1.0).train()
    task = recall_task(60, (32,), (4,), (32, 4))
    batch = task.training_batch(np.random.default_rng(0), 256)
    objective, loss = task.loss(model, batch)
    expected = model(input_ids=batch.input_ids, labels=batch.labels)
    assert objective.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert (objective - loss).item() == pytest.approx(expected.aux_loss.item(), rel=1e-4)
    assert loss < objective


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants(name):
    """Every one builds and is causal; those with a state keep K reals a channel beside the convolution's tail."""
    shape = Shape(hidden_size=64, layers=2, vocab_size=50, state_size=16, length=64, num_heads=2)
    model = CONTESTANTS[name].build(shape)
    assert model.config.vocab_size == 50
    if not CONTESTANTS[name].has_state_size:
        assert state_bytes(model, 64) in (2 * 2 * 64 * 64 * 4, 2 * 2 * 64 * 64 * 4 + 2 * 8)  # ours counts the length
        return
    assert_causal(model)
    tail = 0
    for block in model.model.backbone.blocks:
        _, state = block.mixer(torch.randn(1, 4, 64, dtype=torch.float64), return_state=True)
        tail += state["conv"].numel() * 4
    assert state_bytes(model.float(), 64) - tail == 2 * 16 * 64 * 4


def test_llama_is_of_equal_size():
    for V in (512, 8192):
        shape = Shape(vocab_size=V)
        ours, llama = (CONTESTANTS[name].build(shape) for name in ("spectral_gate", "llama"))
        assert abs(count(llama) / count(ours) - 1) < 0.02
        assert llama.config._attn_implementation == "sdpa"
        assert llama.model.embed_tokens.weight.std().item() == pytest.approx(shape.initializer_range, rel=0.02)


def test_a_sweep_has_each_run_once():
    sweep = Sweep(("llama", "holographic"), (16, 32), (1e-3, 3e-3), (0, 1))
    cases = list(sweep.cases(("recall",)))
    assert len(cases) == len(set(cases)) == 2 * 2 * (1 + 2)
    assert len({case.folder for case in cases}) == len(cases)
    assert cases[0] == Case("recall", "llama", None, 1e-3, 0)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict]:
    """What the command leaves behind."""
    folder = tmp_path_factory.mktemp("recall")
    files = ["--json", str(folder / "r.json"), "--plot", str(folder / "r.png"), "--output-dir", str(folder / "runs")]
    assert main(["bench", "recall", "--models", "llama,resonance", "--steps", "2", *QUICK, *files]) == 0
    return folder, json.loads((folder / "r.json").read_text())


def test_recall_writes_json_and_plot(written):
    folder, payload = written
    assert set(payload) == {"suite", "machine", "versions", "options", "rows", "runs"}
    assert payload["suite"] == "recall"
    assert payload["options"]["vocab_size"] == 32
    llama, ours = payload["rows"]
    assert {"case", "metric", "ours", "peer", "peer_name", "ratio"} < set(ours)
    assert ours["metric"] == "accuracy at 32/4"
    assert ours["peer"] == llama["ours"] == payload["runs"][0]["cells"]["32/4"]["accuracy"]
    assert set(ours["cells"]) == {"16/2", "16/4", "32/2", "32/4"}
    assert (ours["state_size"], ours["lr"], ours["steps"], ours["stopped"]) == (16, 1e-3, 2, "budget")
    assert ours["state_bytes"] == 64 * 16 * 4 + 3 * 64 * 4
    assert llama["state_bytes"] == 2 * 64 * 32 * 4
    assert [line["step"] for line in payload["runs"][1]["curve"]] == [1, 2]
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")


def test_recall_keeps_what_is_finished(written, tmp_path, capsys):
    folder, payload = written
    command = ["bench", "recall", "--steps", "2", *QUICK, "--output-dir", str(folder / "runs")]
    assert main([*command, "--models", "llama,resonance"]) == 2
    assert "--resume" in capsys.readouterr().err
    before = (folder / "runs" / "recall-llama-lr0.001-seed0" / "result.json").stat().st_mtime_ns
    again = ["--models", "llama,resonance,holographic", "--resume", "--json", str(tmp_path / "r.json")]
    assert main([*command, *again]) == 0
    out = capsys.readouterr().out
    assert "holographic" in out
    assert "as it comes" in out
    assert "…" not in out
    assert (folder / "runs" / "recall-llama-lr0.001-seed0" / "result.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "r.json").read_text())["runs"][:2] == payload["runs"]
    assert main([*command[:3], "3", *command[4:], "--models", "llama", "--resume"]) == 2
    assert "steps was 2 and is 3" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise TrainingInterrupted(7, 12)

    monkeypatch.setattr("resonance_nn.bench.sweep.learn", interrupted)
    arguments = ["bench", "recall", "--models", "resonance", *QUICK, "--output-dir", str(tmp_path), "--overwrite"]
    monkeypatch.setattr("sys.argv", ["resonance", *arguments])
    assert main(arguments) == 130
    err = capsys.readouterr().err
    assert "after step 7" in err
    command = err.split("Go on with: ")[1]
    assert command.startswith("resonance bench recall --models resonance")
    assert "--resume" in command
    assert "--overwrite" not in command


def test_tracking_writes_json_and_plot(tmp_path, capsys):
    files = ["--json", "-", "--plot", str(tmp_path / "t.png"), "--output-dir", str(tmp_path / "runs")]
    lengths = ["--train-lengths", "16", "--lengths", "16,32", *QUICK[:2], *QUICK[4:]]
    command = ["bench", "tracking", "--tasks", "parity,both", "--models", "spectral_gate_token", "--steps", "1"]
    assert (
        main([*command, "--init-std", "0.1", "--shortest-context", "8", "--weight-decay", "0", *lengths, *files]) == 0
    )
    payload = json.loads(capsys.readouterr().out)
    shape, plan = (payload["runs"][0]["settings"][name] for name in ("shape", "plan"))
    assert (shape["initializer_range"], shape["initial_context"], plan["weight_decay"]) == (0.1, 32, 0)
    assert shape["shortest_context"] == 8
    assert [row["cell"] for row in payload["rows"]] == ["parity 32", "32/4", "parity 32"]
    assert set(payload["runs"][0]["cells"]) == {"parity 16", "parity 32"}
    assert set(payload["runs"][0]["cells"]["parity 32"]) == {"accuracy", "last_quarter"}
    assert {"16/2", "32/4", "parity 32"} < set(payload["runs"][1]["cells"])
    assert payload["rows"][0]["peer"] is None
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_copying_and_recall_beyond_training(tmp_path, capsys):
    files = ["--json", "-", "--plot", str(tmp_path / "t.png"), "--output-dir", str(tmp_path / "runs")]
    sizes = ["--hidden-size", "64", "--layers", "1", "--tokens-per-batch", "64", "--lrs", "1e-3", "--steps", "1"]
    tracking = ["bench", "tracking", "--tasks", "copy", "--train-lengths", "16", "--lengths", "16,64"]
    assert main([*tracking, "--models", "holographic", *sizes, *files]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert {cell: list(figures) for cell, figures in run["cells"].items()} == {
        "copy 16": ["accuracy"],
        "copy 64": ["accuracy"],
    }
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    further = ["bench", "recall", "--models", "holographic", "--test-lengths", "64", "--steps", "1", *QUICK, *files]
    assert main(further) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert {"64/2", "64/4"} < set(run["cells"])
    assert run["settings"]["shape"]["initial_context"] == 32  # of the longest trained on


@pytest.mark.parametrize(
    "arguments",
    [
        ["recall", "--models", "bogus"],
        ["recall", "--models", "llama,llama"],
        ["recall", "--lrs", "x"],
        ["recall", "--lrs", "0"],
        ["recall", "--lrs", "nan"],
        ["recall", "--seeds", "-1"],
        ["recall", "--state-sizes", "7"],
        ["recall", "--state-sizes", ""],
        ["recall", "--steps", "0"],
        ["recall", "--minutes", "0"],
        ["recall", "--lengths", "100", "--pairs", "26"],
        ["recall", "--watch", "256"],
        ["recall", "--watch", "256/128"],
        ["recall", "--vocab-size", "100"],
        ["recall", "--fillers", "none"],
        ["recall", "--dtype", "int8"],
        ["recall", "--threads", "0"],
        ["recall", "--models", "llama", "--init-std", "0"],
        ["recall", "--shortest-context", "0"],
        ["recall", "--weight-decay", "-1"],
        ["recall", "--weight-decay", "nan"],
        ["recall", "--cooldown", "1.5"],
        ["recall", "--cooldown", "0"],
        ["recall", "--hidden-size", "4"],
        ["recall", "--resume", "--overwrite"],
        ["recall", "--plot", "/no/such/folder/plot.png"],
        ["recall", "--device", "nonsense"],
        ["tracking", "--tasks", "bogus"],
        ["tracking", "--tasks", "parity,parity"],
        ["tracking", "--lengths", "3"],
        ["tracking", "--train-lengths", ""],
    ],
)
def test_wrong_arguments(arguments, tmp_path, capsys):
    folder = tmp_path / "runs"
    assert main(["bench", *arguments, "--output-dir", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not folder.exists()


@pytest.mark.slow
def test_attention_learns_to_recall(tmp_path):
    task = recall_task(64, (64,), (4, 8), (64, 8))
    plan = Plan(lr=1e-3, steps=800, target=0.98)
    shape = Shape(vocab_size=64, length=64, initializer_range=0.02)
    result = learn(tmp_path, task, lambda: CONTESTANTS["attention"].build(shape), plan, {})
    assert result["stopped"] == "reached"
    assert result["cells"]["64/8"]["accuracy"] > 0.97
