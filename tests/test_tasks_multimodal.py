"""`resonance train --task multimodal-…`: tables of texts, pictures and sounds, any of them missing."""

from __future__ import annotations

import json
import wave
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from resonance_nn import ResonanceForMultimodalClassification
from resonance_nn.cli import main
from resonance_nn.loading import load_config
from resonance_nn.processor import ResonanceProcessor

SMALL = ["--set", "hidden_size=32", "--set", "num_hidden_layers=1", "--set", "chunk_size=16", "--set", "patch_size=2"]
SMALL += ["--set", "num_mel_bins=8", "--precision", "fp32", "--lr", "1e-2", "--vocab-size", "300", "--batch-size", "16"]
SMALL += ["--dropout", "0", "--augment", "none"]
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A colour, said, shown and sounded; in a third of the rows one of the three is missing."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(90):
        name, shade = list(COLOURS)[i % 3], int(rng.integers(100))
        pixels = np.clip(np.array(COLOURS[name]) + rng.integers(-60, 60, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        t = np.arange(400) / 2000
        samples = np.sin(2 * np.pi * (100 + 300 * (i % 3)) * t) + rng.normal(0, 0.2, len(t))
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 2000, 0, "NONE", ""))
            file.writeframes((samples * 8000).astype("<i2").tobytes())
        row = {"text": f"a {name} thing, {shade}", "image": f"{i}.png", "audio": f"{i}.wav", "label": name}
        if i % 9 < 3:
            row[("text", "image", "audio")[i % 9]] = None
        rows.append(row)
    for name, part in (("train", rows[:72]), ("test", rows[72:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    return folder


def words_of(task: str, data: Any, output: Any, *more: str) -> list[str]:
    words = ["train", "--task", task, "--data", str(data / "train.jsonl"), "--eval-data", str(data / "test.jsonl")]
    return [*words, "--output-dir", str(output), *SMALL, *more]


@pytest.mark.parametrize("fusion", ["holographic", "spectral"])
def test_classification_learns_and_any_subset_works(fusion, data, tmp_path):
    words = words_of("multimodal-classification", data, tmp_path / "m", "--steps", "30", "--set", f"fusion={fusion}")
    assert main([*words, "--set", "modality_dropout=0.3"]) == 0
    summary = json.loads((tmp_path / "m" / "train.json").read_text())["summary"]
    assert summary["eval_accuracy"] > 0.9
    assert summary["eval_macro_accuracy"] > 0.9
    model = ResonanceForMultimodalClassification.from_pretrained(tmp_path / "m").eval()
    processor: Any = ResonanceProcessor.from_pretrained(tmp_path / "m")
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    for name, key, given in (("text", "text", "text"), ("image", "images", "image"), ("audio", "audio", "audio")):
        some = [row for row in rows if row[given]]
        values = [row[given] if name == "text" else str(data / row[given]) for row in some]
        with torch.no_grad():
            logits = model(**processor(**{key: values}, size=model.config.image_size)).logits
        right = [model.config.id2label[int(i)] == row["label"] for i, row in zip(logits.argmax(-1), some, strict=True)]
        assert sum(right) / len(right) > 0.6, name


def test_retrieval_learns(data, tmp_path):
    words = words_of("multimodal-retrieval", data, tmp_path / "m", "--steps", "40")
    assert main([*words, "--set", 'modalities=["text","image"]']) == 0
    summary = json.loads((tmp_path / "m" / "train.json").read_text())["summary"]
    assert summary["eval_candidates"] == 14  # of 18, without those that lack a side
    assert summary["eval_recall@10"] > 0.75
    assert summary["eval_loss"] < 1.6  # the colour is known; which thing of the colour is not


def test_predict_classes(data, tmp_path, capsys):
    """Of rows that lack any; what they say of the answer is judged."""
    assert main(words_of("multimodal-classification", data, tmp_path / "m", "--steps", "30")) == 0
    capsys.readouterr()
    words = ["predict", str(tmp_path / "m")]
    more = ["--batch-size", "7", "--top", "2", "--json", str(tmp_path / "p.json")]
    assert main([*words, str(data / "test.jsonl"), *more]) == 0
    out, payload = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "of the 18 inputs whose label is known are right" in out
    assert payload["rows"][0]["ours"] > 0.9
    first = payload["found"][0]
    assert first["name"] == f"{data / 'test.jsonl'}: row 1"
    assert first["input"] == "72.png · 72.wav"  # its text is missing
    assert first["text"] is None
    assert len(first["scores"]) == 2
    (tmp_path / "some.csv").write_text(f"text,image\na blue thing,\n,{data / '5.png'}\n")
    assert main([*words, str(tmp_path / "some.csv"), "--json", str(tmp_path / "p.json")]) == 0
    assert "is known" not in capsys.readouterr().out
    assert [one["label"] for one in json.loads((tmp_path / "p.json").read_text())["found"]] == ["blue", "blue"]
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    for given, message in (
        (["--text", "red"], "this model gives labels of tables; name files"),
        ([str(data / "test.jsonl"), "--picture", str(tmp_path / "p.png")], "this model gives labels of tables; --json"),
        ([str(tmp_path / "none.jsonl")], "none.jsonl: row 1: has none of text, image, audio"),
        ([str(tmp_path / "nowhere.csv")], "nowhere.csv: no such file"),
        ([str(data)], "a table is a .jsonl, .csv, .tsv file"),
    ):
        assert main([*words, *given]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error


@pytest.mark.parametrize("modalities", [["text", "image"], ["image", "text", "audio"], ["audio", "text"]])
def test_predict_matches(modalities, data, tmp_path, capsys):
    """The best matches of each row's query among all rows, those of other rows too, and a sheet of them."""
    words = words_of("multimodal-retrieval", data, tmp_path / "m", "--steps", "20")
    assert main([*words, "--set", f"modalities={json.dumps(modalities)}"]) == 0
    capsys.readouterr()
    words = ["predict", str(tmp_path / "m"), str(data / "test.jsonl"), "--picture", str(tmp_path / "p.png")]
    assert main([*words, "--batch-size", "7", "--json", str(tmp_path / "p.json")]) == 0
    assert "best matches" in capsys.readouterr().out
    found = json.loads((tmp_path / "p.json").read_text())["found"]
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    asked, *others = modalities
    answers = sum(any(row[name] for name in others) for row in rows)
    for one, row in zip(found, rows, strict=True):
        if not row[asked]:
            assert (one["matches"], one["rank"], one["label"]) == ([], None, f"no {asked}")
            continue
        scores = [match["score"] for match in one["matches"]]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
        assert all(-1.001 <= score <= 1.001 for score in scores)
        assert one["input"] == row[asked]
        assert one["label"] == one["matches"][0]["input"]
        names = [match["name"] for match in one["matches"]]
        assert [match["right"] for match in one["matches"]] == [name == one["name"] for name in names]
        if any(row[name] for name in others):
            assert 1 <= one["rank"] <= answers
            assert one["rank"] > 5 or names[one["rank"] - 1] == one["name"]
        else:
            assert one["rank"] is None
    (data / "silent.jsonl").write_text(json.dumps({others[0]: rows[5][others[0]]}))
    assert main([*words[:2], str(data / "silent.jsonl"), *words[3:]]) == 2
    assert f"no row has {asked} to find {', '.join(others)} by" in capsys.readouterr().err
    assert main([*words, "--top", "2", "--json", str(tmp_path / "p.json")]) == 0
    again = json.loads((tmp_path / "p.json").read_text())["found"]
    for one, before in zip(again, found, strict=True):
        assert [match["name"] for match in one["matches"]] == [match["name"] for match in before["matches"][:2]]


def test_going_on_keeps_what_makes_the_inputs(data, tmp_path):
    """The tokenizer above all: ids of another would mean other words."""
    assert main(words_of("multimodal-classification", data, tmp_path / "first", "--steps", "3")) == 0
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"text": f"another {row['label']} word altogether", "audio": None}
        row["image"] = row["image"] and str(data / row["image"])
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ["train", "--data", str(tmp_path / "train.jsonl"), "--steps", "1", "--lr", "1e-9", "--precision", "fp32"]
    words += ["--init", str(tmp_path / "first")]
    for task in ("multimodal-classification", "multimodal-retrieval"):
        assert main([*words, "--task", task, "--output-dir", str(tmp_path / task)]) == 0
        for name in ("tokenizer.json", "processor_config.json"):
            assert (tmp_path / task / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
        old, new = (load_config(str(tmp_path / name)) for name in ("first", task))
        for field in ("modalities", "vocab_size", "image_size", "num_channels", "sampling_rate"):
            assert getattr(old, field) == getattr(new, field)
        weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", task)]
        for name in set(weights[0]) & set(weights[1]):
            assert torch.allclose(weights[0][name], weights[1][name], atol=1e-6), name


def test_modalities_asked_for(data, tmp_path, capsys):
    words = words_of("multimodal-classification", data, tmp_path / "m", "--steps", "1")
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    (data / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row["text"]) + "\n")
    for flag in ("--data", "--eval-data"):
        words[words.index(flag) + 1] = str(data / "texts.jsonl")
    assert main([*words, "--set", "modalities=text"]) == 0
    assert load_config(str(tmp_path / "m")).modalities == ("text",)
    capsys.readouterr()
    for more, message in (
        (["modalities=5"], "modalities = 5: must be names, such as"),
        (["modalities=letters"], "must be one or more of text, image, audio"),
        (["modalities=image"], ": has none of image"),
        (["modalities=text", "--task", "multimodal-retrieval"], "one is to find another, so two or more are needed"),
    ):
        words[words.index("--output-dir") + 1] = str(tmp_path / "run")
        assert main([*words, "--set", *more]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
        assert not (tmp_path / "run").exists()


def test_resume_is_bit_equal(data, tmp_path):
    more = ("--steps", "6", "--save-every", "3", "--keep", "9", "--set", "modality_dropout=0.5")
    assert main(words_of("multimodal-classification", data, tmp_path / "m", *more)) == 0
    whole = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "checkpoint-6").rename(tmp_path / "aside")
    for name in ("train.json", "model.safetensors"):
        (tmp_path / "m" / name).unlink()
    assert main([*words_of("multimodal-classification", data, tmp_path / "m", *more), "--resume"]) == 0
    again = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "x"}, "has none of text, image, audio"),
        ({"text": "", "image": None, "label": "x"}, "has none of text, image, audio"),
        ({"text": 5, "label": "x"}, "its text is 5"),
        ({"text": "a"}, "has no 'label'"),
        ({"image": "nowhere.png", "label": "x"}, "nowhere.png: no such file"),
        ({"audio": "nowhere.wav", "label": "x"}, "nowhere.wav"),
    ],
)
def test_rows_that_are_none(row, message, data, tmp_path, capsys):
    (data / "bad.jsonl").write_text(
        f"{json.dumps(row)}\n{json.dumps({**row, 'label': 'y'}) if 'label' in row else ''}\n"
    )
    words = words_of("multimodal-classification", data, tmp_path / "run", "--steps", "1")
    words[words.index(str(data / "train.jsonl"))] = words[words.index(str(data / "test.jsonl"))] = str(
        data / "bad.jsonl"
    )
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


def test_retrieval_needs_pairs(tmp_path, capsys):
    alone = [json.dumps({"text": "red"}), json.dumps({"image": "red.png"})] * 4
    pairs = [json.dumps({"text": "red", "image": "red.png"})] * 4
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    for train, held_out, which in ((alone, pairs, "training"), (pairs, alone, "held-out")):
        (tmp_path / "train.jsonl").write_text("\n".join(train))
        (tmp_path / "test.jsonl").write_text("\n".join(held_out))
        words = ["train", "--task", "multimodal-retrieval", "--data", str(tmp_path / "train.jsonl"), "--steps", "1"]
        words += ["--eval-data", str(tmp_path / "test.jsonl"), "--output-dir", str(tmp_path / "run")]
        assert main(words) == 2
        error = capsys.readouterr().err.strip()
        assert error == f"error: the {which} data have no row with text and image, to find it by"


def test_processor_says_what_is_there(data, tmp_path):
    assert main(words_of("multimodal-classification", data, tmp_path / "m", "--steps", "1")) == 0
    processor: Any = ResonanceProcessor.from_pretrained(tmp_path / "m")
    made = processor(text=["red", None], audio=[None, str(data / "5.wav")], modalities=("text", "image", "audio"))
    assert made["present"].tolist() == [[True, False, False], [False, False, True]]
    assert "pixel_values" not in made
    assert made["attention_mask"].shape == made["input_ids"].shape
    made = processor(images=[None, str(data / "5.png"), None], modalities=("image",))
    alone = processor.image_processor(str(data / "5.png"))["pixel_values"]
    assert torch.equal(made["pixel_values"], torch.cat([0 * alone, alone, 0 * alone]))
    with pytest.raises(ValueError, match="images of 8 × 8, 9 × 9 pixels in one batch"):
        processor(images=[str(data / "5.png"), np.zeros((9, 9, 3), np.uint8)], modalities=("image",))
    for arguments in ({}, {"text": ["a"], "images": [None, None]}):
        with pytest.raises(ValueError, match="give texts, images or audio, as many of each"):
            processor(**arguments)
