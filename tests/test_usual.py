"""What a task takes where nobody says otherwise: all of it reaches the run, and whatever is said comes first."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest

from resonance_nn import ResonanceConfig
from resonance_nn.arguments import OPTIMIZERS, TrainArguments
from resonance_nn.cli import main
from resonance_nn.models.encoder import ResonanceForMaskedLM
from resonance_nn.tasks import TASKS

USUAL = [name for name, task in TASKS.items() if task.usual]


def made(task, **given):
    return TASKS[task](TrainArguments(data=["x"], output_dir="run", task=task, **given))


def model_of(*modalities):
    return SimpleNamespace(config=ResonanceConfig(**({"modalities": modalities} if modalities else {})))


@pytest.mark.parametrize("name", TASKS)
def test_what_is_usual_can_be_used(name):
    task = made(name)
    task.arguments.check()
    config = task.initial()
    for field, value in {**task.fields, **task.width_and_depth}.items():
        assert getattr(config, field) == value
    for field, value in task.usual.items():
        assert getattr(task.arguments, field) == value
    assert config.dropout == task.usual.get("dropout", 0)
    assert config.label_smoothing == task.usual.get("label_smoothing", 0)


@pytest.mark.parametrize("name", USUAL)
def test_what_is_said_comes_first(name):
    said = {"dropout": 0.05, "label_smoothing": 0.02, "vocab_size": 400, "augment": (), "epochs": 3}
    task = made(name, **said, config={"hidden_size": 48})
    for field, value in said.items():
        assert getattr(task.arguments, field) == value
    config = task.initial()
    assert (config.hidden_size, config.dropout, config.label_smoothing) == (48, 0.05, 0.02)
    for budget in ({"steps": 5}, {"tokens": 5}):
        assert made(name, **budget).arguments.epochs is None
    assert made(name, size="small").initial().hidden_size == 512
    assert made(name, config={"label_smoothing": 0.3}).initial().label_smoothing == 0.3
    assert made(name, tokenizer="folder").arguments.vocab_size is None


def test_going_on_from_a_model(tmp_path):
    """Of another task's model the task's dropout, which was none of its own; of this task's model its own."""
    task = TASKS["text-classification"]
    for kind in (ResonanceForMaskedLM, task.architecture):
        config = made("text-classification", config={"hidden_size": 32}, dropout=0.05, vocab_size=300).initial()
        kind(config).save_pretrained(tmp_path / kind.__name__)
        taken = made("text-classification", init=str(tmp_path / kind.__name__)).arguments
        assert taken.dropout == (task.usual["dropout"] if kind is ResonanceForMaskedLM else None)
        assert (taken.vocab_size, taken.epochs) == (None, task.usual["epochs"])


def test_a_window_misses_no_samples():
    for given, expected in (({}, (96, 40)), ({"hop_size": 160}, (160, 40))):
        task = made("audio-classification", config=given)
        task.initial()
        assert task.model_config(**task.spectra(8000)).window_size == expected[0]
        assert task.model_config(**task.spectra(8000)).num_mel_bins == expected[1]
    own = made("audio-classification", config={"window_size": 200, "num_mel_bins": 64})
    own.initial()
    config = own.model_config(**own.spectra(8000))
    assert (config.window_size, config.num_mel_bins) == (200, 64)
    samples = made("audio-classification", config={"front_end": "waveform"})
    samples.initial()
    assert samples.spectra(8000) == {}


def test_a_recipe_brings_its_mixers():
    config = made("text-classification", recipe="spectral").initial()
    assert (config.mixers, config.hidden_size) == (("spectral_gate",), 128)


def test_without_kornia_pictures_stay_as_they_are(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kornia" else find_spec(name))
    task = made("image-classification")
    task.initial()
    assert task.arguments.augment == ()
    assert task.note(model_of()) == " (not by flip, crop, zoom: pip install 'resonance-nn[images]')"
    assert made("image-classification", augment=()).note(model_of()) == ""
    task = made("multimodal-classification")
    assert task.arguments.augment == ("drop",)
    assert "pip install" in task.note(model_of())
    assert task.note(model_of("text", "audio")) == ", changed by drop"
    assert task.note(model_of("audio")) == ""
    with pytest.raises(ValueError, match="needs kornia"):
        made("image-classification", augment=("flip",)).initial()


def test_a_run_is_of_what_is_usual(tmp_path, capsys, monkeypatch):
    """A table, a folder and nothing else: the run's record and the model have the task's settings."""
    rows = [f"the film was {word}\t{label}" for word, label in (("good", "pos"), ("bad", "neg")) for _ in range(8)]
    (tmp_path / "films.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    words = ["train", "--task", "text-classification", "--data", str(tmp_path / "films.tsv"), "--epochs", "1"]
    first = [*words, "--output-dir", str(tmp_path / "run"), "--set", "hidden_size=32"]
    assert main(first) == 0
    assert ", changed by split, drop" in capsys.readouterr().err
    task = TASKS["text-classification"]
    run = json.loads((tmp_path / "run" / "data" / "run.json").read_text())["settings"]
    assert run["dropout"] == task.usual["dropout"]
    assert tuple(run["augment"]) == task.usual["augment"]
    assert (run["batch_size"], run["fields"]["num_hidden_layers"]) == (task.batch_size, 2)
    assert run["lr"] == pytest.approx(OPTIMIZERS["muon"] * task.rate)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dropout"]) == (2, task.usual["dropout"])
    with monkeypatch.context() as other_version:
        other_version.setattr(task, "batch_size", 16)
        assert main([*first, "--resume"]) == 2
        assert "batch_size was 32 and is 16" in capsys.readouterr().err
    assert main([*first, "--resume"]) == 0
    assert main([*words, "--output-dir", str(tmp_path / "plain"), "--augment", "none"]) == 0
    assert json.loads((tmp_path / "plain" / "data" / "run.json").read_text())["settings"]["augment"] == []
