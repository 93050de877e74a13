"""What a task takes where nobody says otherwise: all of it reaches the run, and whatever is said comes first."""

from __future__ import annotations

import importlib.util
import json

import pytest

from resonance_nn.arguments import OPTIMIZERS, TrainArguments
from resonance_nn.cli import main
from resonance_nn.tasks import TASKS
from resonance_nn.tasks.augment import IMAGE_CHANGES

USUAL = [name for name, task in TASKS.items() if task.usual]


def made(task, **given):
    return TASKS[task](TrainArguments(data=["x"], output_dir="run", task=task, **given))


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
    going_on = made(name, init="model").arguments
    assert (going_on.dropout, going_on.label_smoothing, going_on.vocab_size) == (None, None, None)
    assert going_on.epochs == TASKS[name].usual["epochs"]


def test_a_recipe_brings_its_mixers():
    config = made("text-classification", recipe="spectral").initial()
    assert (config.mixers, config.hidden_size) == (("spectral_gate",), 128)


def test_without_kornia_pictures_stay_as_they_are(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "kornia" else find_spec(name))
    task = made("image-classification")
    task.initial()
    assert task.arguments.augment == ()
    assert "pip install 'resonance-nn[images]'" in task.note
    assert made("image-classification", augment=()).note == ""
    task = made("multimodal-classification")
    assert not set(task.arguments.augment) & set(IMAGE_CHANGES)
    assert "drop" in task.arguments.augment
    with pytest.raises(ValueError, match="needs kornia"):
        made("image-classification", augment=("flip",)).initial()


def test_a_run_is_of_what_is_usual(tmp_path):
    """A table, a folder and nothing else: the run's record and the model have the task's settings."""
    rows = [f"the film was {word}\t{label}" for word, label in (("good", "pos"), ("bad", "neg")) for _ in range(8)]
    (tmp_path / "films.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    words = ["train", "--task", "text-classification", "--data", str(tmp_path / "films.tsv")]
    assert main([*words, "--output-dir", str(tmp_path / "run"), "--epochs", "1", "--set", "hidden_size=32"]) == 0
    task = TASKS["text-classification"]
    run = json.loads((tmp_path / "run" / "data" / "run.json").read_text())["settings"]
    assert run["dropout"] == task.usual["dropout"]
    assert tuple(run["augment"]) == task.usual["augment"]
    assert run["lr"] == pytest.approx(OPTIMIZERS["muon"] * task.rate)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["dropout"]) == (2, task.usual["dropout"])
    assert main([*words, "--output-dir", str(tmp_path / "plain"), "--epochs", "1", "--augment", "none"]) == 0
    assert json.loads((tmp_path / "plain" / "data" / "run.json").read_text())["settings"]["augment"] == []
