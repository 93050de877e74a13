"""`resonance train --task`: tables and pictures in, models that have learned them out; resumed bit for bit."""

from __future__ import annotations

import json
import shutil
import wave
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, pipeline

from resonance_nn.cli import main
from resonance_nn.data import encode_text
from resonance_nn.loading import load_config, load_tokenizer
from resonance_nn.tasks import TASKS
from resonance_nn.tasks.masked import mask_tokens
from resonance_nn.tasks.text import retrieval

SMALL = ["--set", "hidden_size=32", "--set", "num_hidden_layers=2", "--set", "chunk_size=16"]
SMALL += ["--precision", "fp32", "--lr", "1e-2", "--dropout", "0", "--label-smoothing", "0"]
COLOURS = ("red", "blue")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts whose class is whether they say good or bad, words whose class is whether they are numbers, and pictures
    that are light above or below."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["the", "a", "film", "plot", "actor", "is", "was", "very", "so", "quite"]
    lines, tagged = [], []
    for i in range(200):
        around = [str(w) for w in rng.choice(words, rng.integers(3, 9))]
        around.insert(int(rng.integers(len(around))), ("good", "bad")[i % 2])
        lines.append("\t".join((" ".join(around), ("pos", "neg")[i % 2])))
        tokens = [str(rng.integers(1000)) if rng.random() < 0.3 else str(rng.choice(words)) for _ in range(6)]
        tagged.append(json.dumps({"tokens": tokens, "tags": ["NUM" if t.isdigit() else "WORD" for t in tokens]}))
    pairs = [json.dumps({"text": f"{i} of them", "pair": f"so they are {i}"}) for i in rng.permutation(300)]
    (folder / "pairs.jsonl").write_text("\n".join(pairs[:200]) + "\n")
    (folder / "plain.txt").write_text("\n".join(line.split("\t")[0] for line in lines) + "\n")
    (folder / "texts.tsv").write_text("\n".join(lines) + "\n")
    (folder / "words.jsonl").write_text("\n".join(tagged) + "\n")
    for name in COLOURS:
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 60, (8, 8), dtype=np.uint8)
            pixels[: 4 if name == "red" else 8, :][-4:] += 120
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
    for name, pitch in (("low", 200), ("high", 1200)):
        (folder / "sounds" / name).mkdir(parents=True)
        for i in range(20):
            t = np.arange(int(rng.integers(1200, 2400))) / 4000
            write_wave(
                folder / "sounds" / name / f"{i}.wav", np.sin(2 * np.pi * pitch * t) + rng.normal(0, 0.3, len(t))
            )
    rows = []
    for i in range(40):
        samples, start = rng.normal(0, 0.3, 4000), float(rng.uniform(0.1, 0.6))
        t = np.arange(round(4000 * start), round(4000 * (start + 0.3)))
        samples[t] += np.sin(2 * np.pi * 600 * t / 4000)
        write_wave(folder / f"beep{i}.wav", samples)
        rows.append({"audio": f"beep{i}.wav", "events": [{"start": start, "end": start + 0.3, "label": "beep"}]})
    (folder / "beeps.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def write_wave(path: Any, samples: np.ndarray, rate: int = 4000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes((samples / 4 * 32767).clip(-32768, 32767).astype("<i2").tobytes())


SOUND = ["--set", "front_end=log_mel", "--set", "num_mel_bins=16"]
CASES = {
    "text-classification": ("texts.tsv", ["--vocab-size", "300", "--augment", "drop"], 60),
    "token-classification": ("words.jsonl", ["--vocab-size", "300"], 60),
    "sentence-embedding": ("pairs.jsonl", ["--vocab-size", "300"], 80),
    "fill-mask": ("plain.txt", ["--vocab-size", "300", "--seq-len", "32"], 60),
    "image-classification": ("pictures", ["--set", "patch_size=2", "--augment", "crop,erase"], 40),
    "audio-classification": ("sounds", [*SOUND, "--augment", "speed,tempo,shift,mask,filter,noise"], 25),
    "audio-event-detection": ("beeps.jsonl", [*SOUND, "--augment", "noise"], 40),
}


GOALS = {"sentence-embedding": ("eval_recall@1", 0.5), "fill-mask": ("eval_loss", -3.0)}  # at least, or at most
GOALS["audio-event-detection"] = ("eval_f1", 0.7)


def words_of(task: str, data: Any, output: Any, steps: int, *more: str) -> list[str]:
    source, extra, _ = CASES[task]
    words = ["train", "--task", task, "--data", str(data / source), "--output-dir", str(output), "--batch-size", "16"]
    return [*words, "--steps", str(steps), *SMALL, *extra, *more]


@pytest.mark.parametrize("task", CASES)
def test_it_learns(task, data, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(words_of(task, data, output, CASES[task][2], "--json", str(tmp_path / "r.json"))) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["summary"]["task"] == task
    figure, least = GOALS.get(task, ("eval_accuracy", 0.85))
    assert result["summary"][figure] * np.sign(least) > least
    assert figure.removeprefix("eval_") in capsys.readouterr().out
    rows = {row["metric"]: row["ours"] for row in result["rows"]}
    assert rows[figure] == result["summary"][figure]
    assert {p.name for p in output.iterdir()} >= {"config.json", "model.safetensors", "train.json", "loss.png"}


def test_the_models_work_in_pipelines(data, tmp_path):
    for task, checks in (
        ("text-classification", [("the film is so good", "pos"), ("a plot was quite bad", "neg")]),
        ("image-classification", [(str(data / "pictures" / name / "3.png"), name) for name in COLOURS]),
    ):
        assert main(words_of(task, data, tmp_path / task, CASES[task][2])) == 0
        run = pipeline(task, model=str(tmp_path / task))
        for given, label in checks:
            assert run(given)[0]["label"] == label
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text-classification")
    assert tokenizer.pad_token_id is not None
    for text in ("the film is so good", "", " und übrigens\n"):  # what pipelines feed is what it was trained on
        assert encode_text(tokenizer, text) == tokenizer(text)["input_ids"]


RESUMED = ["text-classification", "fill-mask", "image-classification", "audio-classification"]


@pytest.mark.parametrize("task", RESUMED)
def test_resume_is_bit_equal(task, data, tmp_path):
    assert main(words_of(task, data, tmp_path / "whole", 12, "--save-every", "6", "--keep", "9")) == 0
    parts = words_of(task, data, tmp_path / "parts", 12, "--save-every", "6", "--keep", "9")
    assert main(parts) == 0
    for name in ("checkpoint-12", "train.json", "model.safetensors"):
        path = tmp_path / "parts" / name
        if path.is_dir():
            path.rename(tmp_path / "aside")
        else:
            path.unlink()
    assert main([*parts, "--resume"]) == 0
    a, b = (load_file(tmp_path / which / "model.safetensors") for which in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("task", ["image-classification", "audio-classification", "text-classification"])
def test_an_unfinished_run_predicts_from_its_checkpoint(task, data, tmp_path, capsys):
    assert main(words_of(task, data, tmp_path / "m", 4, "--save-every", "2")) == 0
    for path in (tmp_path / "m").iterdir():
        if path.is_file():
            path.unlink()
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "m"), str(data / CASES[task][0])]) == 0
    assert "inputs whose label is known are right" in capsys.readouterr().out


@pytest.mark.parametrize("task", CASES)
def test_predict(task, data, tmp_path, capsys):
    """Right about what it has learned, in a table, as JSON and as a picture."""
    assert main(words_of(task, data, tmp_path / "m", CASES[task][2])) == 0
    capsys.readouterr()
    words = ["predict", str(tmp_path / "m"), "--json", str(tmp_path / "p.json")]
    given = {
        "text-classification": [str(data / "texts.tsv")],
        "token-classification": ["--text", "the film 42 is 7"],
        "fill-mask": ["--text", "the film<|mask|> so good", "--top", "5"],
        "sentence-embedding": [str(data / "pairs.jsonl"), "--top", "2"],
        "audio-classification": [str(data / "sounds")],
        "audio-event-detection": [str(data / "beep0.wav"), "--picture", str(tmp_path / "p.png")],
        "image-classification": [str(data / "pictures"), "--picture", str(tmp_path / "p.png"), "--batch-size", "7"],
    }[task]
    assert main([*words, *given]) == 0
    out = capsys.readouterr().out
    payload = json.loads((tmp_path / "p.json").read_text())
    found = payload["found"]
    if task in ("text-classification", "image-classification", "audio-classification"):
        assert payload["rows"][0]["ours"] > 0.9
        assert "whose label is known are right" in out
        assert sum(one["score"] for one in found[0]["scores"]) == pytest.approx(1, abs=1e-3)
    if task == "token-classification":
        assert [tag["label"] for tag in found[0]["words"]] == ["WORD", "WORD", "NUM", "WORD", "NUM"]
        assert "42/NUM" in out
    if task == "fill-mask":
        assert len(found[0]["masks"]) == 1
        assert len(found[0]["masks"][0]) == 5
    if task == "sentence-embedding":
        assert len(found) == 200
        assert np.linalg.norm(found[0]["embedding"]) == pytest.approx(1, abs=1e-3)
        assert [one["score"] for one in found[0]["nearest"]] == sorted(
            (one["score"] for one in found[0]["nearest"]), reverse=True
        )
    if task == "image-classification":
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
        assert "… and 40 more" in out
    if task == "audio-event-detection":
        (event,) = found[0]["events"]
        told = json.loads((data / "beeps.jsonl").read_text().splitlines()[0])["events"][0]
        assert abs(event["start"] - told["start"]) < 0.05
        assert abs(event["end"] - told["end"]) < 0.05
        assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    bad = {
        "text-classification": (["--picture", str(tmp_path / "p.png")], "of texts"),
        "token-classification": ([], "nothing to predict"),
        "fill-mask": (["--text", "nothing hidden"], "has no <|mask|>"),
        "sentence-embedding": ([str(tmp_path / "none.txt")], "no such file"),
        "audio-classification": ([str(data / "pictures")], "no sounds in it"),
        "audio-event-detection": ([str(data / "texts.tsv")], "texts.tsv"),
        "image-classification": (["--text", "red"], "name files or folders"),
    }[task]
    assert main([*words[:2], *bad[0]]) == 2
    error = capsys.readouterr().err.strip()
    assert bad[1] in error
    assert "\n" not in error


def test_predict_refuses_other_models(tmp_path, capsys):
    assert main(["predict", "resonance-tiny", "--text", "x"]) == 2
    assert "is a ResonanceForCausalLM; this takes ResonanceForSequenceClassification" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["text-classification", "fill-mask", "image-classification"])
def test_accumulated_batches_are_one_batch(task, data, tmp_path):
    """The loss of a step is a mean over what it asks, however it is cut, and of the size of the held-out one."""
    losses = []
    for pieces in (1, 4):
        words = words_of(task, data, tmp_path / str(pieces), 1, "--accumulate", str(pieces))
        words[words.index("--batch-size") + 1] = str(16 // pieces)
        words = [word for word in words if word not in ("--augment", "crop,erase", "drop")]
        assert main([*words, "--augment", "none"]) == 0
        summary = json.loads((tmp_path / str(pieces) / "train.json").read_text())["summary"]
        losses.append(summary["loss"])
        assert summary["loss"] == pytest.approx(summary["eval_loss"], rel=0.2)
    assert losses[1] == pytest.approx(losses[0], rel=0.05 if task == "fill-mask" else 1e-4)


def test_resume_refuses_other_data(data, tmp_path, capsys):
    table = tmp_path / "texts.tsv"
    table.write_text((data / "texts.tsv").read_text())
    words = [w if w != str(data / "texts.tsv") else str(table) for w in
             words_of("text-classification", data, tmp_path / "run", 4, "--save-every", "2")]  # fmt: skip
    assert main(words) == 0
    (tmp_path / "run" / "train.json").unlink()
    table.write_text(table.read_text().replace("good", "great"))
    assert main([*words, "--resume"]) == 2
    assert "the training data is not what the run began with" in capsys.readouterr().err


def test_going_on_from_a_model_of_the_same_kind(data, tmp_path):
    assert main(words_of("text-classification", data, tmp_path / "first", 40)) == 0
    words = ["train", "--task", "text-classification", "--data", str(data / "texts.tsv"), "--precision", "fp32"]
    words += ["--steps", "1", "--batch-size", "16", "--lr", "1e-9", "--init", str(tmp_path / "first")]
    assert main([*words, "--output-dir", str(tmp_path / "second")]) == 0
    result = json.loads((tmp_path / "second" / "train.json").read_text())
    assert result["summary"]["eval_accuracy"] > 0.85


def test_going_on_from_a_model_of_another_kind(data, tmp_path, monkeypatch):
    """Its tokenizer and all weights but those of the heads come over; its configuration is read once."""
    read: list[str] = []
    monkeypatch.setattr("resonance_nn.tasks.base.load_config", lambda name: read.append(name) or load_config(name))
    assert main(words_of("fill-mask", data, tmp_path / "first", 5)) == 0
    words = ["train", "--task", "text-classification", "--data", str(data / "texts.tsv"), "--precision", "fp32"]
    words += ["--steps", "1", "--batch-size", "16", "--lr", "1e-9", "--init", str(tmp_path / "first")]
    assert main([*words, "--dropout", "0.1", "--output-dir", str(tmp_path / "second")]) == 0
    assert read == [str(tmp_path / "first")]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert set(second) - set(first) == {"classifier.weight", "classifier.bias"}
    common = set(second) & set(first)
    assert {name.split(".")[1] for name in common} == {"embed", "backbone"}
    for name in common:
        assert torch.allclose(first[name], second[name], atol=1e-6), name
    assert load_config(str(tmp_path / "second")).dropout == 0.1
    assert load_config(str(tmp_path / "second")).label2id == {"neg": 0, "pos": 1}
    ids = [encode_text(load_tokenizer(tmp_path / name), "the film is so good") for name in ("first", "second")]
    assert ids[0] == ids[1]


def test_going_on_keeps_what_makes_the_inputs(data, tmp_path, capsys):
    """The channels, mean and deviation of pictures, and the rate of sounds, are those of the model."""
    for i in range(8):  # in colour and lighter, and at twice the rate
        for name in ("dark", "light"):
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            pixels = np.full((9, 9, 3), 200, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
            (tmp_path / "sounds" / name).mkdir(parents=True, exist_ok=True)
            write_wave(tmp_path / "sounds" / name / f"{i}.wav", np.sin(np.arange(3000) / 9), rate=8000)
    for task in ("image-classification", "audio-classification"):
        first, second, source = tmp_path / f"{task}-1", tmp_path / f"{task}-2", CASES[task][0]
        assert main(words_of(task, data, first, 1)) == 0
        words = ["train", "--task", task, "--data", str(tmp_path / source), "--steps", "1", "--precision", "fp32"]
        assert main([*words, "--init", str(first), "--output-dir", str(second)]) == 0
        made = [(folder / "preprocessor_config.json").read_text() for folder in (first, second)]
        assert made[0] == made[1]
        old, new = (load_config(str(folder)) for folder in (first, second))
        for field in ("image_size", "num_channels", "sampling_rate"):
            assert getattr(old, field) == getattr(new, field)
    capsys.readouterr()
    words = ["train", "--task", "image-classification", "--data", str(tmp_path / "pictures"), "--steps", "1"]
    assert main([*words, "--init", "resonance-tiny", "--output-dir", str(tmp_path / "run")]) == 2
    assert "is a ResonanceForCausalLM; go on from a model of images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_bad_data(data, tmp_path, capsys):
    held_out = tmp_path / "e.tsv"
    held_out.write_text("good\tother\n")
    words = words_of("text-classification", data, tmp_path / "run", 1, "--eval-data", str(held_out))
    assert main(words) == 2
    assert "the held-out data have the label 'other'" in capsys.readouterr().err
    assert main(["train", "--task", "mind-reading", "--data", "x", "--output-dir", str(tmp_path / "run")]) == 2
    assert f"must be one of {', '.join(TASKS)}" in capsys.readouterr().err
    assert main(words_of("image-classification", data, tmp_path / "run", 1, "--set", "image_size=9")) == 2
    assert "multiples of patch_size" in capsys.readouterr().err
    assert (
        main(["train", "--task", "audio-event-detection", "--data", "no.csv", "--output-dir", str(tmp_path / "run")])
        == 2
    )
    assert "no.csv: no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_picture_is_read_before_anything_is_trained(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("resonance_nn.tasks.images.SAMPLED", 1)
    shutil.copytree(data / "pictures", tmp_path / "pictures")
    broken = tmp_path / "pictures" / "red" / "39.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert main(words_of("image-classification", tmp_path, tmp_path / "run", 1)) == 2
    error = capsys.readouterr().err.strip()
    assert f"{broken}: cannot be read as a picture" in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"audio": "beep0.wav", "events": [{"start": 1, "end": 1, "label": "x"}]},
            "must start at 0 or later and before",
        ),
        ({"audio": "beep0.wav", "events": [{"start": 1, "label": "x"}]}, "must have start, end and label"),
        ({"audio": "beep0.wav", "events": []}, "have no events"),
        ({"audio": "none.wav", "events": [{"start": 0, "end": 1, "label": "x"}]}, "cannot read"),
        ({"audio": "texts.tsv", "events": [{"start": 0, "end": 1, "label": "x"}]}, "texts.tsv"),
    ],
)
def test_sounds_that_are_none(row, message, data, tmp_path, capsys):
    table = data / "bad.jsonl"
    table.write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    words = ["train", "--task", "audio-event-detection", "--data", str(table), "--output-dir", str(tmp_path / "run")]
    assert main([*words, *SMALL, "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()
    assert main([*words, *SMALL, "--steps", "1", "--augment", "speed"]) == 2
    assert "augment = 'speed': audio-event-detection has no such change; must be of noise" in (capsys.readouterr().err)


def test_what_is_hidden():
    ids = torch.arange(20_000).view(10, 2000) % 90 + 10
    hidden, labels = mask_tokens(ids, 9, 100, torch.Generator().manual_seed(0))
    asked = labels != -100
    assert torch.equal(labels[asked], ids[asked])
    assert torch.equal(hidden[~asked], ids[~asked])
    assert float(asked.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((hidden[asked] == 9).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((hidden[asked] == ids[asked]).float().mean()) == pytest.approx(0.1, abs=0.02)
    assert (mask_tokens(ids[:1, :2], 9, 100)[1] != -100).any()


def test_retrieval():
    similarity = torch.tensor([[3.0, 1, 0], [2, 1, 0], [0, 1, 2]])
    assert retrieval(similarity) == pytest.approx({"recall@1": 2 / 3, "recall@10": 1.0})
