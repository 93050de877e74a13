"""`resonance predict` reads the tables that its tasks train on, judges only what is known, and says what is amiss."""

from __future__ import annotations

import gzip
import json
import struct
import warnings
import wave
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction

from resonance_nn.cli import main
from resonance_nn.prediction import load_predictor, texts
from resonance_nn.prediction.sounds import SoundEvents
from resonance_nn.tasks.audio import AudioEventDetection
from resonance_nn.tasks.translation import scores

SMALL = ["--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--set", "chunk_size=16", "--precision", "fp32"]
SMALL += ["--steps", "1", "--batch-size", "8"]
TEXTS = ["--vocab-size", "300"]
SOUNDS = ["--set", "front_end=log_mel", "--set", "num_mel_bins=16"]
RETRIEVAL = ["--set", 'modalities=["text","image","audio"]']
CASES = {
    "text-classification": ("texts.csv", TEXTS),
    "token-classification": ("words.jsonl", TEXTS),
    "sentence-embedding": ("pairs.jsonl", TEXTS),
    "fill-mask": ("plain.txt", [*TEXTS, "--seq-len", "32"]),
    "translation": ("pairs.tsv", TEXTS),
    "image-classification": ("files/pictures.csv", ["--set", "patch_size=2"]),
    "audio-classification": ("files/sounds.tsv", SOUNDS),
    "audio-event-detection": ("files/events.jsonl", SOUNDS),
    "multimodal-classification": ("files/images.jsonl", TEXTS),
    "multimodal-retrieval": ("files/all.jsonl", [*TEXTS, *SOUNDS, *RETRIEVAL]),
}
Predict = Callable[..., dict[str, Any]]


def write_wave(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 4000, 0, "NONE", ""))
        file.writeframes((samples * 8000).astype("<i2").tobytes())


def write_lines(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tables of 16 rows and two classes; those that name files lie beside them."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "files").mkdir()
    rng, rows = np.random.default_rng(0), range(16)
    labels = [("red", "blue")[i % 2] for i in rows]
    for i in rows:
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / "files" / f"{i}.png")
        write_wave(folder / "files" / f"{i}.wav", rng.normal(0, 0.3, 1600))
    event = {"start": 0.1, "end": 0.3, "label": "beep"}
    everything = [{"text": f"number {i}", "image": f"{i}.png", "audio": f"{i}.wav"} for i in rows]
    objects = {
        "words.jsonl": [{"tokens": ["New York", "is", str(i)], "tags": ["NAME", "WORD", "NUM"]} for i in rows],
        "pairs.jsonl": [{"text": f"{i} of them", "pair": f"they are {i}"} for i in rows],
        "files/events.jsonl": [{"audio": f"{i}.wav", "events": [event][: i % 2]} for i in rows],
        "files/images.jsonl": [{"image": f"{i}.png", "label": labels[i]} for i in rows],
        "files/all.jsonl": everything,
    }
    for name, found in objects.items():
        write_lines(folder / name, *map(json.dumps, found))
    write_lines(folder / "plain.txt", *(f"the number {i}" for i in rows))
    write_lines(folder / "texts.csv", "text,label", *(f"a {labels[i]} thing,{labels[i]}" for i in rows))
    write_lines(folder / "pairs.tsv", *(f"one {i}\teins {i}" for i in rows))
    write_lines(folder / "files/pictures.csv", "label,image", *(f"{labels[i]},{i}.png" for i in rows))
    write_lines(folder / "files/sounds.tsv", *(f"{i}.wav\t{labels[i]}" for i in rows))
    return folder


@pytest.fixture(scope="module")
def models(data, tmp_path_factory):
    """A model of a task, trained for one step when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def model(task: str) -> str:
        if not (folder / task).exists():
            source, extra = CASES[task]
            words = ["train", "--task", task, "--data", str(data / source), "--output-dir", str(folder / task)]
            assert main([*words, *SMALL, *extra]) == 0
        return str(folder / task)

    return model


@pytest.fixture
def predict(models, tmp_path, capsys) -> Predict:
    """What `predict` wrote as --json, and printed, as ``out``."""

    def run(task: str, *words: Any) -> dict[str, Any]:
        model = models(task)
        capsys.readouterr()
        assert main(["predict", model, *map(str, words), "--json", str(tmp_path / "p.json")]) == 0
        printed = capsys.readouterr()
        assert "Warning" not in printed.err
        return {**json.loads((tmp_path / "p.json").read_text()), "out": printed.out}

    return run


@pytest.fixture
def refused(models, capsys) -> Callable[..., str]:
    """The one line that `predict` refuses with."""

    def run(task: str, *words: Any) -> str:
        model = models(task)
        capsys.readouterr()
        assert main(["predict", model, *map(str, words)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ")
        assert "\n" not in error
        return error

    return run


JUDGED = {
    "text-classification": (16, "inputs"),
    "token-classification": (48, "words"),
    "image-classification": (16, "inputs"),
    "audio-classification": (16, "inputs"),
    "multimodal-classification": (16, "inputs"),
}


@pytest.mark.parametrize("task", JUDGED)
def test_classifiers_say_how_often_they_are_right(task, data, predict):
    said = predict(task, data / CASES[task][0])
    assert len(said["found"]) == 16
    number, unit = JUDGED[task]
    assert f"% of the {number} {unit} whose label is known are right" in said["out"]
    right = [one["truth"] == one["label"] for one in said["found"] if "truth" in one]
    metrics = {row["metric"]: row["ours"] for row in said["rows"]}
    if task == "token-classification":
        tags = ("NAME", "WORD", "NUM")
        right = [w["label"] == tag for one in said["found"] for w, tag in zip(one["words"], tags, strict=True)]
        assert [w["word"] for w in said["found"][7]["words"]] == ["New York", "is", "7"]
    else:
        each = [[r for r, one in zip(right, said["found"], strict=True) if one["truth"] == c] for c in ("red", "blue")]
        assert metrics.pop("macro_accuracy") == pytest.approx(sum(sum(r) / len(r) for r in each) / 2)
        assert "in the mean over their 2 labels" in said["out"]
    assert metrics == {"accuracy": pytest.approx(sum(right) / number)}


def test_translations_are_judged_as_in_training(data, predict, monkeypatch):
    made = [f"eins {i if i < 8 else 'more than that'}" for i in range(16)]  # the first half is right
    monkeypatch.setattr(texts, "translate", lambda *_, **__: made)
    said = predict("translation", data / "pairs.tsv")
    expected = {n.removeprefix("eval_"): v for n, v in scores(made, [f"eins {i}" for i in range(16)]).items()}
    assert {row["metric"]: row["ours"] for row in said["rows"]} == pytest.approx(expected)
    assert expected["rouge_l"] == pytest.approx(0.5 + 0.5 * 2 / 6)  # one of two words, of four
    assert 10 < expected["bleu"] < 90
    assert f"BLEU {expected['bleu']:.2f} of the 16 texts whose translation is known" in said["out"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = predict("translation", data / "pairs.tsv")
    assert said["rows"] == []
    assert "needs sacrebleu; pip install 'resonance-nn[translation]'" in said["out"]


def test_events_are_judged_by_frames(data, predict, refused):
    """As if one sound held all frames; those of labels that the model does not have do not count."""
    said = predict("audio-event-detection", data / CASES["audio-event-detection"][0])
    assert [len(one["truth"]) for one in said["found"]] == [0, 1] * 8
    assert [one["frames"]["true"] for one in said["found"]] == [0, 20] * 8  # 0.2 s by steps of 10 ms
    assert {row["metric"] for row in said["rows"]} == {"f1", "precision", "recall"}
    table = data / "files" / "others.jsonl"
    other = {"start": 0.0, "end": 0.4, "label": "boom"}
    write_lines(table, json.dumps({"audio": "0.wav", "events": [other]}), '{"audio": "1.wav"}')
    said = predict("audio-event-detection", table)
    assert [one.get("frames", {}).get("true") for one in said["found"]] == [0, None]
    assert "of the 1 sounds whose events are known" in said["out"]
    for name, text in (("e.csv", "audio,events\n0.wav,\n1.wav,[]\n"), ("e.tsv", "0.wav\tred\n")):
        (data / "files" / name).write_text(text)  # cells cannot say events: inputs alone
        assert predict("audio-event-detection", data / "files" / name)["rows"] == []
    write_lines(table, '{"audio": "1.wav", "events": {"label": "beep"}}')
    assert "row 1: its events are {'label': 'beep'}; they must be a list" in refused("audio-event-detection", table)


def test_frames_are_counted_sound_by_sound(models, data):
    """Of two sounds in a batch, the shorter one padded: what training's figures say of the same logits."""
    predictor = load_predictor(models("audio-event-detection"))
    assert isinstance(predictor, SoundEvents)
    inputs = predictor.files(str(data / "files" / "events.jsonl"))[1:3]  # one with an event, one without
    mask = (torch.arange(1600) < torch.tensor([[1600], [800]])).long()
    frames = [len(predictor.model.frame_times(n)) for n in (1600, 800)]
    logits = torch.full((2, frames[0], 1), -1.0)
    logits[0, 5:20] = 1.0  # the event is from 0.1 to 0.3 s
    logits[1, 3:5] = 1.0
    logits[1, frames[1] :] = 1.0  # padding
    said = predictor.read_off(inputs, {"attention_mask": mask}, SimpleNamespace(logits=logits))
    active = (abs(predictor.model.frame_times(1600).mean(1) - 0.2) < 0.1).astype(float)
    right = int(active[5:20].sum())
    assert 0 < right < 15
    counts = [{"right": right, "said": 15, "true": 20}, {"right": 0, "said": 2, "true": 0}]
    assert [one["frames"] for one in said] == counts
    labels = np.full((2, frames[0], 1), -100.0)
    labels[0, :, 0], labels[1, : frames[1]] = active, 0
    task: Any = AudioEventDetection
    expected = task.metrics(None, EvalPrediction(predictions=logits.numpy(), label_ids=labels))
    assert {figure.metric: figure.value for figure in predictor.figures(said)} == pytest.approx(expected)


@pytest.mark.parametrize("task", ["sentence-embedding", "multimodal-retrieval"])
def test_matches_are_judged_by_their_places(task, data, predict):
    said = predict(task, data / CASES[task][0])
    ranks = [one["rank"] for one in said["found"]]
    assert all(1 <= rank <= 16 for rank in ranks)
    expected = {f"recall@{k}": sum(rank <= k for rank in ranks) / 16 for k in (1, 10)}
    assert {row["metric"]: row["ours"] for row in said["rows"]} == pytest.approx(expected)
    assert "of 16 known matches are among the first ten of 16" in said["out"]


def test_pairs_are_ranked_among_all_pairs(data, predict):
    """By their embeddings; a text without a pair is no query, and its place is not known."""
    table = data / "some-pairs.jsonl"
    rows = [{"text": f"{i} of them", "pair": f"they are {i}"} for i in range(3)] + [{"text": "alone", "pair": None}]
    write_lines(table, *map(json.dumps, rows))
    said = predict("sentence-embedding", table)
    pairs = predict("sentence-embedding", *(w for row in rows[:3] for w in ("--text", row["pair"])))
    query, target = ([np.array(one["embedding"]) for one in side["found"]] for side in (said, pairs))
    similarity = np.array([[a @ b for b in target] for a in query[:3]])
    expected = [int((row > row[i] + 1e-5).sum()) + 1 for i, row in enumerate(similarity)]
    assert [one.get("rank") for one in said["found"]] == [*expected, None]
    assert "of 3 known matches are first of 3" in said["out"]


def test_equal_pairs_are_one_candidate(data, predict):
    """However many inputs there are at a time."""
    table = data / "equal-pairs.jsonl"
    write_lines(table, *(json.dumps({"text": f"{i} is", "pair": "yes" if i % 2 else f"no {i}"}) for i in range(12)))
    one, other = (predict("sentence-embedding", table, "--batch-size", size) for size in (32, 3))
    assert [o["rank"] for o in one["found"]] == [o["rank"] for o in other["found"]]
    assert "of 12 known matches are first of 7" in one["out"]


@pytest.mark.parametrize(("task", "column"), [("sentence-embedding", "pair"), ("translation", "target")])
@pytest.mark.parametrize("value", [["a", "b"], False, {"a": 1}, 5, "\ud800"])
def test_an_answer_that_is_no_text(task, column, value, data, refused):
    table, inputs = data / "bad-answer.jsonl", {"sentence-embedding": "text", "translation": "source"}
    write_lines(table, json.dumps({inputs[task]: "one", column: value}))
    assert f"bad-answer.jsonl: row 1: its {column} " in refused(task, table)


def test_a_translation_is_of_the_source(data, predict):
    assert [one["input"] for one in predict("translation", data / "pairs.tsv")["found"][:2]] == ["one 0", "one 1"]
    (data / "named.csv").write_text("target,source\neins,one\n")
    (data / "text.jsonl").write_text('{"text": "two"}\n')
    said = predict("translation", data / "named.csv", data / "text.jsonl")
    assert [one["input"] for one in said["found"]] == ["one", "two"]


@pytest.mark.parametrize(
    ("task", "column", "suffix"),
    [
        ("image-classification", "image", "png"),
        ("audio-classification", "audio", "wav"),
        ("audio-event-detection", "audio", "wav"),
    ],
)
def test_tables_of_files(task, column, suffix, data, predict, refused):
    """Paths are from where the table lies; labels may be missing, empty or unknown."""
    labels = [{"label": "red"}, {}, {"label": None}, {"label": ""}, {"label": "green"}, {"label": "blue"}]
    table = data / "files" / "some.jsonl"
    write_lines(table, *(json.dumps({column: f"{i}.{suffix}", **label}) for i, label in enumerate(labels)))
    said = predict(task, table)
    assert [one["input"] for one in said["found"]] == [str(data / "files" / f"{i}.{suffix}") for i in range(6)]
    truths = [one.get("truth") for one in said["found"]]
    if task == "audio-event-detection":
        assert not any(truths)
    else:
        assert truths == ["red", None, None, None, None, "blue"]
        assert "of the 2 inputs" in said["out"]
    with gzip.open(data / "files" / "bare.csv.gz", "wt") as file:
        file.write(f"{column}\n3.{suffix}\n")
    (one,) = predict(task, data / "files" / "bare.csv.gz")["found"]
    assert (one["input"], "truth" in one) == (str(data / "files" / f"3.{suffix}"), False)
    bad = data / "files" / "bad.jsonl"
    for value in ("nowhere", "", 5):
        write_lines(bad, json.dumps({column: f"0.{suffix}"}), json.dumps({column: value}))
        error = refused(task, bad)
        assert f"bad.jsonl: row 2: its {column} is {value!r}" in error
        assert "remove" not in error
    write_lines(bad, '{"other": 1}')
    assert f"bad.jsonl:1: has no {column!r}" in refused(task, bad)


def test_pictures_as_mnists(data, predict):
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8), dtype=np.uint8)
    for name, head, values in (
        ("t-images-idx3-ubyte", struct.pack(">4I", 0x803, 3, 8, 8), images),
        ("t-labels-idx1-ubyte", struct.pack(">2I", 0x801, 3), np.arange(3, dtype=np.uint8)),
    ):
        (data / name).write_bytes(head + values.tobytes())
    said = predict("image-classification", data / "t-images-idx3-ubyte", "--picture", data / "p.png")
    assert [Path(one["input"]).name for one in said["found"]] == [f"t-images-idx3-ubyte: image {i}" for i in (1, 2, 3)]
    assert (data / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert said["rows"] == []  # its digits are no labels of this model


def test_tables_of_words(data, predict, refused):
    """Tags may be missing or unknown; words are those that are listed."""
    table = data / "some-words.jsonl"
    rows = [{"tokens": ["a b", 5]}, {"tokens": ["b", "c", "d"], "tags": ["NUM", "?", None]}]
    write_lines(table, *map(json.dumps, [*rows, {"tokens": ["e"], "tags": None}]))
    said = predict("token-classification", table)
    assert [[w["word"] for w in one["words"]] for one in said["found"]] == [["a b", "5"], ["b", "c", "d"], ["e"]]
    assert "of the 1 words" in said["out"]
    (data / "as-text.csv").write_text("text,label\nis it 5,NUM\n")
    (data / "as-text.tsv").write_text("is it 5\tNUM\n")
    said = predict("token-classification", data / "as-text.csv", data / "as-text.tsv")
    assert [[w["word"] for w in one["words"]] for one in said["found"]] == [["is", "it", "5"]] * 2
    assert said["rows"] == []
    for row, message in (
        ({"tokens": "a b"}, "row 1: its tokens are 'a b'; they must be a list of words"),
        ({"tokens": []}, "row 1: its tokens are []"),
        ({"tokens": ["a", ""]}, "row 1: its token 2 is ''"),
        ({"tokens": ["a"], "tags": ["NUM", "NUM"]}, "row 1: its tags are ['NUM', 'NUM']; they must be a list of 1"),
    ):
        write_lines(table, json.dumps(row))
        assert message in refused("token-classification", table)


@pytest.mark.parametrize("task", ["text-classification", "sentence-embedding", "fill-mask", "translation"])
def test_only_labels_of_the_model_are_judged(task, data, predict):
    table = data / "labels.csv"
    write_lines(table, "text,label", "a <|mask|>,red", "b <|mask|>,green", "c <|mask|>,", "d <|mask|>,None")
    said = predict(task, table)
    assert len(said["found"]) == 4
    if task == "text-classification":
        assert [one.get("truth") for one in said["found"]] == ["red", None, None, None]
        assert "of the 1 inputs whose label is known" in said["out"]
    else:
        assert said["rows"] == []
        assert "known" not in said["out"]
        assert not any("truth" in one for one in said["found"])


def test_more_tokens_asked_for_than_there_are(predict):
    (one,) = predict("fill-mask", "--text", "the <|mask|>", "--top", 100_000)["found"]
    scores = [token["score"] for token in one["masks"][0]]
    assert len(scores) < 1000
    assert sum(scores) == pytest.approx(1, abs=1e-3)


def test_a_row_without_the_models_modalities(data, refused):
    table = data / "files" / "mixed.jsonl"
    write_lines(table, '{"image": "0.png"}', '{"text": "only this"}')
    error = refused("multimodal-classification", table)
    assert "mixed.jsonl: row 2: has none of image, which this model reads" in error


def test_the_picture_says_what_is_missing(data, refused):
    table = data / "files" / "lone.jsonl"
    write_lines(table, '{"text": "a"}', '{"text": "b"}')
    assert "no row has image, audio to be found by text" in refused(
        "multimodal-retrieval", table, "--picture", data / "p.png"
    )
    write_lines(table, '{"image": "0.png"}')
    assert "no row has text to find image, audio by" in refused(
        "multimodal-retrieval", table, "--picture", data / "p.png"
    )


def test_short_and_silent_sounds_are_drawn(data, predict):
    """Warnings are errors here, and a sound may be of one sample."""
    (data / "short").mkdir()
    for length in (1, 2, 100, 256, 257):
        write_wave(data / "short" / f"{length:03}.wav", np.linspace(-1, 1, length))
    write_wave(data / "short" / "silent.wav", np.zeros(2000))
    said = predict("audio-event-detection", data / "short", "--picture", data / "p.png")
    assert len(said["found"]) == 6
    assert (data / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_captions_of_any_script_are_drawn(data, predict):
    table = data / "files" / "captions.jsonl"
    captions = ["一只青蛙", "カエルが跳ぶ", "개구리", "a frog"]
    write_lines(table, *(json.dumps({"text": text, "image": f"{i}.png"}) for i, text in enumerate(captions)))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        said = predict("multimodal-retrieval", table, "--picture", data / "p.png")
    assert [one["input"] for one in said["found"]] == captions
    assert not [warning.message for warning in heard if "Glyph" in str(warning.message)]
    assert (data / "p.png").read_bytes()[:4] == b"\x89PNG"
