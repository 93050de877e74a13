"""Training from Python: budgets, groups, accumulation, and resumption bit for bit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from resonance_nn import RECIPES, ResonanceConfig, ResonanceForCausalLM
from resonance_nn import training as training_module
from resonance_nn.arguments import OPTIMIZERS
from resonance_nn.loading import load_model
from resonance_nn.progress import ProgressCallback
from resonance_nn.rundir import RunFolder
from resonance_nn.training import TrainArguments, TrainingInterrupted, train

SOURCE = Path(__file__).parent.parent / "resonance_nn"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "chunk_size": 16}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Source text of a fixed size, whatever becomes of these files: runs over it have a fixed number of steps."""
    folder = tmp_path_factory.mktemp("corpus")
    source = b"".join((SOURCE / name).read_bytes() for name in ("config.py", "backbone.py", "cache.py", "layers.py"))
    for i in range(4):
        (folder / f"{i}.py").write_bytes(source[6000 * i : 6000 * (i + 1)])
    return str(folder)


@pytest.fixture
def arguments(text, tmp_path):
    """A run of 12 steps over two and a half epochs, with dropout and accumulation."""
    return TrainArguments(
        data=[text], output_dir=tmp_path / "run", config=SMALL, vocab_size=300, dropout=0.1, seq_len=512, batch_size=3,
        accumulate=3, steps=12, save_every=3, eval_every=4, keep=10, precision="fp32", progress=False,
    )  # fmt: skip


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def interrupt_at(monkeypatch, step):
    """Send SIGINT in the middle of the step after `step`, once."""
    original = ProgressCallback.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            monkeypatch.setattr(ProgressCallback, "on_step_begin", original)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressCallback, "on_step_begin", on_step_begin)


def test_a_run_learns_and_leaves_everything(arguments):
    result = train(replace(arguments, steps=60, lr=1e-2, save_every=None, eval_every=None, keep=1))
    folder = Path(arguments.output_dir)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] > 5.5
    assert result["summary"]["loss"] < losses[0] - 1.5
    assert result["summary"]["eval_loss"] < losses[0] - 1.5
    assert json.loads((folder / "train.json").read_text()) == result
    assert set(result) == {"suite", "machine", "versions", "rows", "summary"}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in RunFolder(folder).checkpoints()] == ["checkpoint-60"]
    assert not list(folder.rglob("training_args.bin"))
    assert not (folder / ".partial").exists()
    model, tokenizer = load_model(str(folder))
    assert model.config.use_cache
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "muon"), ("bf16", "muon"), ("fp32", "adamw")])
def test_resume_is_bit_equal(arguments, tmp_path, precision, optimizer, monkeypatch):
    cut = replace(arguments, precision=precision, optimizer=optimizer)
    whole = replace(cut, output_dir=tmp_path / "whole")
    whole_result = train(whole)
    for step in (4, 7):  # in the first and in the second epoch, off the rhythm of saving
        interrupt_at(monkeypatch, step)
        with pytest.raises(TrainingInterrupted, match=f"step {step + 1} of 12"):
            train(replace(cut, resume=step > 4))
    result = train(replace(cut, resume=True))
    assert_same_weights(whole.output_dir, cut.output_dir)
    assert result["summary"]["eval_loss"] == whole_result["summary"]["eval_loss"]
    assert train(replace(cut, resume=True)) == result  # finished: nothing to do


def test_resume_from_every_checkpoint(arguments, tmp_path):
    """As after a kill: what is newer than a checkpoint is gone. One of them stands at an epoch's end."""
    train(arguments)
    folder = Path(arguments.output_dir)
    whole = weights(folder)
    ends = [json.loads((p / "trainer_state.json").read_text())["epoch"] for p in RunFolder(folder).checkpoints()]
    assert any(end == int(end) for end in ends[:-1]), ends
    for checkpoint in reversed(RunFolder(folder).checkpoints()):
        for file in folder.iterdir():
            if file.is_file():
                file.unlink()
        train(replace(arguments, resume=True))
        again = weights(folder)
        assert all(torch.equal(whole[name], again[name]) for name in whole), checkpoint.name
        for later in RunFolder(folder).checkpoints():
            if int(later.name.split("-")[1]) >= int(checkpoint.name.split("-")[1]):
                for file in later.iterdir():
                    file.unlink()
                later.rmdir()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_only_on_linear_maps_and_embeddings(arguments, monkeypatch, optimizer):
    seen = {}

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {p: name for name, p in model.named_parameters()}
            for group in optimizer.param_groups:
                seen.update({names[p]: group["weight_decay"] for p in group["params"]})
            seen["betas"] = next(group["betas"] for group in optimizer.param_groups if "betas" in group)

    original = training_module.ResonanceTrainer.run
    monkeypatch.setattr(
        training_module.ResonanceTrainer, "run", lambda self, path: (self.add_callback(Spy()), original(self, path))
    )
    mixers, config = ("spectral_gate", "resonance", "attention"), {**SMALL, "num_hidden_layers": 3}
    train(replace(arguments, steps=1, mixers=mixers, config=config, optimizer=optimizer))
    assert seen.pop("betas") == (0.9, 0.95)
    model, _ = load_model(str(arguments.output_dir))
    matrices = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)} - {
        "lm_head.weight"
    }
    assert seen.keys() == dict(model.named_parameters()).keys()
    assert {name for name, decay in seen.items() if decay} == matrices
    assert len(matrices) < len(seen)


def test_accumulation_equals_a_bigger_batch(arguments, tmp_path):
    """Also where the last group of an epoch is smaller. Adam's ε would amplify rounding, so compare loosely."""
    common = replace(arguments, dropout=None, steps=8, lr=1e-3)
    one = train(replace(common, output_dir=tmp_path / "one", batch_size=4, accumulate=1))
    four = train(replace(common, output_dir=tmp_path / "four", batch_size=1, accumulate=4))
    assert one["summary"]["loss"] == pytest.approx(four["summary"]["loss"], abs=1e-4)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0)
    model = ResonanceForCausalLM(ResonanceConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1))
    trainer = training_module.ResonanceTrainer(
        model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to="none")
    )
    assert trainer.model_accepts_loss_kwargs
    assert trainer._loss_shifts_labels


def test_budgets(arguments, tmp_path):
    def steps(**budget):
        budget = {"steps": None, "epochs": None, "tokens": None, **budget}
        name = "-".join(f"{k}{v}" for k, v in budget.items() if v)
        return train(replace(arguments, output_dir=tmp_path / (name or "none"), **budget))["summary"]["steps"]

    whole = steps()  # one epoch
    assert whole == steps(epochs=1.0) == (steps(epochs=2.0) + 1) // 2
    assert steps(epochs=0.2) == -(-whole // 5)
    assert steps(tokens=2 * 9 * 512 - 5) == 2
    assert steps(steps=3) == 3


def test_init_goes_on_with_a_model(arguments, tmp_path):
    first = train(replace(arguments, steps=20, lr=5e-3))["summary"]
    second = replace(
        arguments, init=str(arguments.output_dir), output_dir=tmp_path / "second", vocab_size=None, config={},
        steps=2, dropout=0.2, z_loss=1e-4,
    )  # fmt: skip
    result = train(second)["summary"]
    assert result["eval_loss"] < first["eval_loss"] + 0.2
    model, tokenizer = load_model(str(second.output_dir))
    old, old_tokenizer = load_model(str(arguments.output_dir))
    assert model.config.dropout == 0.2
    assert model.model.backbone.blocks[0].dropout == 0.2
    assert model.config.hidden_size == old.config.hidden_size
    assert tokenizer.get_vocab() == old_tokenizer.get_vocab()
    for conflict in (
        {"size": "tiny"},
        {"recipe": "memory"},
        {"mixers": ("attention",)},
        {"vocab_size": 300},
        {"config": {"conv_size": 2}},
    ):
        with pytest.raises(ValueError, match=f"init and {next(iter(conflict))}"):
            train(replace(second, output_dir=tmp_path / "third", **conflict))
    with pytest.raises(ValueError, match=r"dropout = 1\.5"):
        train(replace(second, output_dir=tmp_path / "third", dropout=1.5))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 6e-3), ("adamw", 3e-3)])
def test_a_rate_of_its_own_for_each_optimizer(arguments, optimizer, rate):
    made = [
        training_module._trainer_arguments(
            replace(arguments, **change),
            "cpu",
            "fp32",
            ResonanceConfig(hidden_size=D),
            8,
            SimpleNamespace(rate=of_task, last_rate=0.1),
        )
        for of_task in (1.0, 0.5)
        for change in ({"optimizer": optimizer}, {"optimizer": optimizer, "init": "model"}, {"lr": 0.5})
        for D in (64, 256, 512)
    ]
    expected = [rate, rate, rate / 2, rate / 10, rate / 10, rate / 20, 0.5, 0.5, 0.5]
    expected += [rate / 2, rate / 2, rate / 4, rate / 10, rate / 10, rate / 20, 0.5, 0.5, 0.5]
    assert [one.learning_rate for one in made] == pytest.approx(expected)


def test_a_recipe_is_trained_as_named(arguments):
    train(replace(arguments, steps=1, recipe="memory"))
    config = load_model(str(arguments.output_dir))[0].config
    assert {name: getattr(config, name) for name in RECIPES["memory"]} == RECIPES["memory"]


def test_given_tokenizer_checkpointing_and_tensorboard(arguments, tmp_path):
    train(replace(arguments, steps=2))
    second = replace(
        arguments, output_dir=tmp_path / "second", vocab_size=None, tokenizer=str(arguments.output_dir), steps=2,
        gradient_checkpointing=True, log_to="tensorboard",
    )  # fmt: skip
    train(second)
    assert list((tmp_path / "second" / "runs").rglob("events.*"))
    for name in ("tokenizer.json",):
        assert (tmp_path / "second" / name).read_bytes() == (arguments.output_dir / name).read_bytes()
    a, b = weights(arguments.output_dir), weights(second.output_dir)
    assert all(torch.equal(a[name], b[name]) for name in a)  # recomputed, dropout and all


def test_resume_refuses_other_settings_and_data(arguments, text, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 3)
    with pytest.raises(TrainingInterrupted):
        train(arguments)
    resumed = replace(arguments, resume=True)
    with pytest.raises(ValueError, match=r"seq_len was 512 and is 256; batch_size was 3 and is 4"):
        train(replace(resumed, seq_len=256, batch_size=4))
    with pytest.raises(ValueError, match="training data is not what the run began with"):
        train(replace(resumed, data=[str(SOURCE / "layers.py")]))
    with pytest.raises(ValueError, match="already holds an unfinished run; --resume"):
        train(arguments)
    with pytest.raises(ValueError, match="no run to resume"):
        train(replace(resumed, output_dir=tmp_path / "other"))
    assert train(replace(arguments, overwrite=True, steps=2))["summary"]["steps"] == 2


def test_a_run_begun_before_an_argument_existed_had_its_default(arguments, monkeypatch):
    interrupt_at(monkeypatch, 3)
    with pytest.raises(TrainingInterrupted):
        train(arguments)
    file = arguments.output_dir / "data" / "run.json"
    run = json.loads(file.read_text())
    for name in ("augment", "fim", "recipe", "task"):
        del run["settings"][name]
    file.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"resume: fim was 0\.0 and is 0\.5: give the arguments"):
        train(replace(arguments, resume=True, fim=0.5))
    assert train(replace(arguments, resume=True))["summary"]["steps"] == arguments.steps


def test_full_disk_leaves_the_last_whole_checkpoint(arguments, monkeypatch):
    original = torch.save

    def save(state, path):
        if "checkpoint-6" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        original(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(ValueError, match=r"cannot write to .*No space left.*resume"):
        train(arguments)
    monkeypatch.undo()
    folder = Path(arguments.output_dir)
    assert [p.name for p in RunFolder(folder).checkpoints()] == ["checkpoint-3"]
    assert not (folder / ".partial").exists()
    train(replace(arguments, resume=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixers": ("nonsense",)}, "'nonsense' is unknown"),
        ({"config": {"hidden_size": 100, "num_heads": 7}}, "num_heads = 7: must divide"),
        ({"config": {"no_such_field": 1}}, "no_such_field"),
        ({"config": {"vocab_size": 1}}, "vocab_size has an argument of its own"),
        ({"config": {"conv_size": "wide"}}, "conv_size"),
        ({"size": "huge"}, "size = 'huge'"),
        ({"recipe": "best"}, "recipe = 'best': must be one of default"),
        ({"vocab_size": 100}, "vocab_size = 100"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"data": [""]}, "is empty"),
        ({"init": "", "vocab_size": None, "config": {}}, "init = '': must be a name"),
        ({"steps": None, "epochs": 1e300}, "epochs = 1e.300: must be ≤ 1,000,000"),
        ({"z_loss": float("inf")}, "z_loss_weight = inf"),
        ({"config": {"conv_size": True}}, "conv_size = True: must be an integer"),
        ({"config": {"model_type": "llama"}}, "'model_type' is not a field that can be set"),
        ({"data": ["missing.txt"]}, "missing.txt does not exist"),
        ({"seq_len": 1}, "seq_len = 1"),
        ({"seq_len": 100_000}, "fewer than one window"),
        ({"steps": 3, "tokens": 5}, "only one of steps, epochs and tokens"),
        ({"steps": 0}, "steps = 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"fim": 1.5}, "fim = 1.5: must be a share"),
        ({"fim": float("nan")}, "fim = nan: must be a share"),
        ({"fim": 0.5, "seq_len": 32}, "seq_len = 32: must be ≥ 64 with fim"),
        ({"fim": 0.5, "task": "fill-mask"}, "fim = 0.5: is for text-generation, not fill-mask"),
        ({"config": {"fim_rate": 0.5}}, "'fim_rate' is not a field that can be set"),
        ({"precision": "fp16", "device": "cpu"}, "not on a CPU"),
        ({"log_to": "nowhere"}, "log_to = 'nowhere'"),
        ({"tokenizer": "missing", "vocab_size": None}, "missing"),
        ({"init": "mistyped", "vocab_size": None, "config": {}}, "mistyped"),
        ({"resume": True, "overwrite": True}, "give one"),
    ],
)
def test_wrong_input_writes_nothing(arguments, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(arguments, output_dir=tmp_path / "deep" / "run", **change))
    assert list(tmp_path.iterdir()) == []


def test_output_folders_that_cannot_be(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="output_dir = '': must be a name"):
        train(replace(arguments, output_dir=""))
    with pytest.raises(ValueError, match="'file' is a file"):
        train(replace(arguments, output_dir="file/below"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_run_in_the_folder_of_its_data_does_not_read_itself(arguments, tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    for k in range(4):
        (folder / f"{k}.txt").write_text("\n".join(f"line {n} of file {k}" for n in range(400)))
    own = replace(arguments, data=[str(folder)], output_dir=folder / "run", steps=2, save_every=1, eval_every=1)
    train(own)
    train(replace(own, resume=True))


def test_folders_of_others_are_left_alone(arguments):
    folder = Path(arguments.output_dir)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for change in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"'config\.json' that is not of a training run"):
            train(replace(arguments, **change))
    (folder / "config.json").unlink()
    (folder / "notes.txt").write_text("mine")
    train(replace(arguments, steps=1))
    train(replace(arguments, steps=1, overwrite=True))
    assert (folder / "notes.txt").read_text() == "mine"


def test_missing_logger(arguments, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'resonance-nn\[track\]'"):
        train(replace(arguments, log_to="wandb"))
