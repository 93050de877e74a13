"""`bench ablation`: equal sizes, the same batches, differences seed by seed, resumed runs kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from resonance_nn.bench import ablation
from resonance_nn.bench.models import sized
from resonance_nn.bench.peers import count
from resonance_nn.bench.text import HELD_OUT, TextTask, text_task
from resonance_nn.cli import main
from resonance_nn.data import find_documents
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.progress import TrainingInterrupted

COMMON = ablation._common(ablation.AblationOptions(hidden_size=64, layers=2, vocab_size=300, seq_len=64))


@pytest.mark.parametrize("name", ablation.ABLATIONS)
def test_variants_have_the_parameters_of_their_base_and_train(name: str):
    question = ablation.ABLATIONS[name]
    common = ablation._common(ablation.AblationOptions())
    with torch.device("meta"):
        sizes = {
            label: count(ResonanceForCausalLM(sized(common, {**question.base, **fields}, question.base)))
            for label, fields in {"base": {}, **question.variants}.items()
        }
    assert all(abs(size / sizes["base"] - 1) < 0.01 for size in sizes.values()), sizes
    for fields in question.variants.values():
        config = sized(COMMON, {**question.base, **fields}, question.base)
        ids = torch.randint(300, (1, 40))
        ResonanceForCausalLM(config).train()(ids, labels=ids).loss.backward()


def test_seeds_meet_other_batches_and_variants_the_same(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"line {i} of many, each a little different\n" * 40)
    monkeypatch.setitem(ablation.ABLATIONS, "slim", ablation.Ablation(ablation.REAL, {"relu2": {"mlp": "relu2"}}))
    met = {}

    def learn(folder, task, build, plan, settings, **_):
        met[folder.parent.name, plan.seed] = task.training_batch(np.random.default_rng(0), 64, 0).input_ids
        return {"cells": {HELD_OUT: {"loss": 1.0}}, "parameters": 1, "seconds": 1.0}

    monkeypatch.setattr(ablation, "learn", learn)
    options = ablation.AblationOptions(names=("slim",), output_dir=tmp_path / "runs", data=(str(tmp_path),), seeds=2)
    ablation.run(replace(options, hidden_size=32, layers=1, vocab_size=300, seq_len=64))
    assert torch.equal(met["base", 0], met["relu2", 0])
    assert not torch.equal(met["base", 0], met["base", 1])


def test_run_compares_with_the_base_and_resumes(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"line {i} of many, each a little different\n" * 40)
    monkeypatch.setitem(
        ablation.ABLATIONS,
        "spectral_gate",
        ablation.Ablation(ablation.REAL, {"complex": {"rotation": "step"}}),
    )
    arguments = ["bench", "ablation", "--ablations", "spectral_gate", "--data", str(text), "--tokens", "20000"]
    arguments += ["--seeds", "2", "--hidden-size", "32", "--layers", "1", "--vocab-size", "300", "--seq-len", "64"]
    arguments += ["--output-dir", str(tmp_path / "runs"), "--json", str(tmp_path / "a.json")]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "a.json").read_text())
    base, turning = first["rows"]
    assert base["difference"] == 0
    assert math.isclose(turning["difference"], turning["ours"] - base["ours"], abs_tol=1e-9)
    assert len(turning["losses"]) == 2
    assert turning["interval"] > 0
    assert turning["ours"] < math.log(300)
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == first["rows"]


def test_held_out_loss_is_the_mean_cross_entropy(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"line {i} of many\n" * 50)
    options = ablation.AblationOptions(data=(str(text),), output_dir=tmp_path / "runs", vocab_size=300, seq_len=32)
    task = text_task(find_documents([str(text)]), options.output_dir / "data", 32, 300, eval_tokens=64)
    model = ResonanceForCausalLM(sized(COMMON, {}, {})).eval()
    batch = task.training_batch(np.random.default_rng(0), 320, 0)
    assert batch.input_ids.shape == (10, 32)
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
    windows = task._windows(task.held_out, np.arange(2) * 32)
    with torch.no_grad():
        logits = model(windows.input_ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), windows.targets.flatten())
    measured = task.measure(model, HELD_OUT, np.random.default_rng(0), 1)["loss"]
    assert abs(measured - float(expected)) < 1e-5


def test_wrong_input_is_one_line(capsys):
    assert main(["bench", "ablation", "--ablations", "nothing"]) == 2
    assert "must be one or more of spectral_gate" in capsys.readouterr().err
    assert main(["bench", "ablation", "--ablations", "prime_bump,prime_bump"]) == 2
    assert "each once" in capsys.readouterr().err


def test_runs_are_not_overwritten_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ablation.ABLATIONS, "spectral_gate", ablation.Ablation({"mixers": ("spectral_gate",)}, {}))
    (tmp_path / "a.txt").write_text("some text\n" * 400)
    (tmp_path / "b.txt").write_text("other text\n" * 400)
    arguments = ["bench", "ablation", "--ablations", "spectral_gate", "--data", str(tmp_path), "--tokens", "4096"]
    arguments += ["--seeds", "1", "--hidden-size", "32", "--layers", "1", "--vocab-size", "300", "--seq-len", "64"]
    arguments += ["--output-dir", str(tmp_path / "runs")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--resume keeps what is finished" in capsys.readouterr().err
    for wrong in (["--lr", "0"], ["--data", str(tmp_path / "nothing")]):  # nothing is deleted for a wrong argument
        assert main([*arguments, *wrong, "--overwrite"]) == 2
        assert list(tmp_path.glob("runs/**/result.json"))
    assert main([*arguments, "--resume", "--lr", "1e-3"]) == 2
    assert "lr was 0.003 and is 0.001" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--lr", "1e-3"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(TextTask, "measure", lambda *_: {"loss": math.nan, "bits_per_byte": math.nan})
    assert main([*arguments, "--overwrite"]) == 0
    assert "diverged" in capsys.readouterr().out


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise TrainingInterrupted(7, 12)

    monkeypatch.setattr(ablation, "learn", interrupted)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text\n" * 400)
    arguments = ["bench", "ablation", "--ablations", "prime_bump", "--data", str(tmp_path), "--vocab-size", "300"]
    arguments += ["--seq-len", "64", "--output-dir", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", ["resonance", *arguments])
    assert main(arguments) == 130
    assert f"--output-dir {tmp_path / 'runs'} --resume" in capsys.readouterr().err
