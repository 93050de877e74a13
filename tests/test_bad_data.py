"""What a user's tables, sounds and models may have wrong: each is one line that names file, row and value."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import small_config
from test_audio_data import write_wave
from transformers import Wav2Vec2FeatureExtractor

import resonance_nn
from resonance_nn import ResonanceImageProcessor
from resonance_nn.arguments import TrainArguments
from resonance_nn.cli import main
from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import read_table
from resonance_nn.processor import ResonanceProcessor
from resonance_nn.tasks import TASKS
from resonance_nn.tasks.audio import common_rate, rate_of
from resonance_nn.tasks.base import ExamplesTask
from resonance_nn.tasks.multimodal import read_rows

TEXT, IMAGE, SOUND = "text-classification", "image-classification", "audio-classification"
EVENTS, WORDS, ROWS = "audio-event-detection", "token-classification", "multimodal-classification"
GOOD: dict[str, dict[str, Any]] = {
    TEXT: {"text": "a", "label": "x"},
    IMAGE: {"image": "a.png", "label": "x"},
    SOUND: {"audio": "a.wav", "label": "x"},
    EVENTS: {"audio": "a.wav", "events": [{"start": 0, "end": 1, "label": "x"}]},
    WORDS: {"tokens": ["a"], "tags": ["x"]},
    ROWS: {"text": "a", "label": "x"},
    "multimodal-retrieval": {"text": "a"},
    "translation": {"source": "a", "target": "b"},
}
LABELLED = (TEXT, IMAGE, SOUND, ROWS)


def found(task: str, path: Path) -> list[Any]:
    made = TASKS[task](TrainArguments(data=[str(path)], output_dir="x", task=task))
    assert isinstance(made, ExamplesTask)
    return made.find(str(path))


def table(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def event(**fields: Any) -> dict[str, Any]:
    return {"events": [{"start": 0, "end": 1, "label": "x"}, {"start": 0, "end": 1, "label": "x", **fields}]}


BAD: list[tuple[str, dict[str, Any], str]] = [
    (IMAGE, {"image": 5}, "its image is 5; it must be a path, not empty"),
    (IMAGE, {"image": ""}, "its image is ''; it must be a path, not empty"),
    (SOUND, {"audio": 5}, "its audio is 5; it must be a path, not empty"),
    (SOUND, {"audio": " "}, "its audio is ' '; it must be a path, not empty"),
    (SOUND, {"audio": "a\0b"}, r"its audio is 'a\x00b'; a path has no '\x00', remove it"),
    (ROWS, {"audio": "a\0b"}, r"its audio is 'a\x00b'; a path has no '\x00', remove it"),
    (ROWS, {"image": 5}, "its image is 5; it must be a path, not empty"),
    (ROWS, {"text": False}, "its text is False; it must be a text, not empty"),
    (EVENTS, {"audio": 7}, "its audio is 7; it must be a path, not empty"),
    (EVENTS, {"events": 7}, "its events are 7; they must be a list"),
    (EVENTS, {"events": {}}, "its events are {}; they must be a list"),
    (EVENTS, {"events": ["x"]}, "its event 1 is 'x'; it must have start, end and label"),
    (EVENTS, event(start=None), "its event 2 is {'start': None, 'end': 1, 'label': 'x'}; it must have"),
    (EVENTS, event(end=10**400), "its event 2 is {'start': 0, 'end': 1000"),
    (EVENTS, event(end=float("inf")), "its event 2 is from 0 to inf; it must start at 0 or later and before its end"),
    (EVENTS, event(start=float("nan")), "its event 2 is from nan to 1; it must start"),
    (EVENTS, event(label=None), "event 2: its label is None; it must be a text, not empty, a number, true or false"),
    (WORDS, {"tags": [None]}, "its tag 1 is None; it must be a text"),
    (WORDS, {"tokens": [None]}, "its token 1 is None; it must be a text"),
    (WORDS, {"tokens": [{"q": 1}]}, "its token 1 is {'q': 1}; it must be a text"),
    (WORDS, {"tokens": ["\ud800"]}, r"its token 1 has '\ud800', half of a character"),
    (TEXT, {"text": "a\ud800"}, r"its text has '\ud800', half of a character, which is no text; remove it"),
    (ROWS, {"text": "a\ud800"}, r"its text has '\ud800', half of a character"),
    (IMAGE, {"image": "a\ud800"}, r"its image has '\ud800', half of a character"),
    ("translation", {"target": "\udfffa"}, r"its target has '\udfff', half of a character"),
    ("multimodal-retrieval", {"text": [1]}, "its text is [1]; it must be a text"),
    *((task, {"label": value}, f"its label is {value!r}; it must be a text, not empty, a number, true or false")
      for task in LABELLED for value in ("", " ", ["p"], {"p": 1}, float("nan"))),
    *((task, {"label": "\ud800"}, r"its label has '\ud800', half of a character") for task in LABELLED),
]  # fmt: skip


@pytest.mark.parametrize(("task", "fields", "message"), BAD)
def test_values_that_are_none(task, fields, message, tmp_path):
    path = table(tmp_path / "a.jsonl", GOOD[task], {**GOOD[task], **fields})
    with pytest.raises(DataError) as caught:
        found(task, path)
    error = str(caught.value)
    assert error.startswith(f"{path}: row 2: ")
    assert message in error
    assert "\n" not in error
    assert len(error) < len(str(path)) + 250, "however long the value"


@pytest.mark.parametrize("task", LABELLED)
def test_a_missing_label_is_no_class(task, tmp_path, capsys):
    column = next(iter(GOOD[task]))
    (tmp_path / "a.csv").write_text(f"{column},label\ngood,x\nfine,y\nbad,\n")
    words = ["train", "--task", task, "--data", str(tmp_path / "a.csv"), "--output-dir", str(tmp_path / "m")]
    assert main([*words, "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {tmp_path / 'a.csv'}: row 3: its label is ''; it must be a text, not empty")
    assert "\n" not in error
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("task", LABELLED)
def test_texts_numbers_and_booleans_are_labels(task, tmp_path):
    values = ["a", "0", 0, 1.5, True, False]
    path = table(tmp_path / "a.jsonl", *({**GOOD[task], "label": value} for value in values))
    named = [one["label"] if isinstance(one, dict) else one.label for one in found(task, path)]
    assert list(map(str, named)) == ["a", "0", "0", "1.5", "True", "False"]


def test_rows_to_predict_need_no_label(tmp_path):
    path = table(tmp_path / "a.jsonl", {"text": "a", "label": None}, {"text": "b", "label": ""}, {"text": "c"})
    assert [row["text"] for row in read_rows(str(path))] == ["a", "b", "c"]
    assert len(read_table(path, ("text",), optional=("label",))) == 3


def test_white_space_is_no_text_of_a_row(tmp_path):
    path = table(tmp_path / "a.jsonl", {"text": " \n", "image": "a.png", "audio": "  "}, {"text": " a "})
    first, second = read_rows(str(path))
    assert (first["text"], first["image"], first["audio"]) == (None, str(tmp_path / "a.png"), None)
    assert (second["text"], second["image"], second["audio"]) == (" a ", None, None)
    with pytest.raises(DataError, match=r"row 1: has none of text, image, audio$"):
        read_rows(str(table(tmp_path / "a.jsonl", {"text": "  "})))


# --- the sampling rate of sounds


def test_the_common_rate_is_that_of_files_of_all_kinds(tmp_path, monkeypatch):
    import soundfile

    samples = np.zeros(100)
    for name, subtype in (("a.flac", "PCM_16"), ("b.ogg", "VORBIS"), ("c.wav", "FLOAT"), ("d.wav", "PCM_16")):
        soundfile.write(tmp_path / name, samples, 8000, subtype=subtype)
        assert rate_of(str(tmp_path / name)) == 8000
        assert common_rate([str(tmp_path / name)]) == 8000
    (tmp_path / "text.flac").write_text("no sound")
    for name in ("text.flac", "nowhere.wav", "."):
        assert rate_of(str(tmp_path / name)) is None
    assert common_rate([str(tmp_path / "text.flac")]) == 16_000
    write_wave(tmp_path / "slow.wav", samples, 1)
    assert common_rate([str(tmp_path / "slow.wav")]) == 16_000, "that of a damaged header counts for nothing"
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert rate_of(str(tmp_path / "a.flac")) is None
    assert rate_of(str(tmp_path / "d.wav")) == 8000


def test_a_wave_with_a_damaged_size_is_named(tmp_path, capsys):
    for i, label in enumerate("xyxy"):
        (tmp_path / "sounds" / label).mkdir(parents=True, exist_ok=True)
        write_wave(tmp_path / "sounds" / label / f"{i}.wav", np.zeros(500))
    bad = tmp_path / "sounds" / "x" / "0.wav"
    raw = bad.read_bytes()
    bad.write_bytes(raw[:16] + (1 << 31).to_bytes(4, "little") + raw[20:])
    words = ["train", "--task", SOUND, "--data", str(tmp_path / "sounds"), "--output-dir", str(tmp_path / "m")]
    assert main([*words, "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{bad}: is damaged" in error
    assert "\n" not in error
    assert not (tmp_path / "m").exists()


# --- models of other inputs to go on from

MODELS = {
    "images": "ResonanceForImageClassification",
    "sounds": "ResonanceForAudioClassification",
    "texts": "ResonanceForMaskedLM",
    "texts and their translations": "ResonanceForConditionalGeneration",
    "rows of several modalities": "ResonanceForMultimodalClassification",
}
READ = {
    IMAGE: "images",
    SOUND: "sounds",
    EVENTS: "sounds",
    TEXT: "texts",
    "fill-mask": "texts",
    "text-generation": "texts",
    "translation": "texts and their translations",
    ROWS: "rows of several modalities",
    "multimodal-retrieval": "rows of several modalities",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """A model of each kind of inputs, beside it what makes them."""
    folder = tmp_path_factory.mktemp("saved")
    config: dict[str, Any] = dict(image_size=(4, 4), patch_size=2, vocab_size=400)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=16_000, return_attention_mask=True)
    makers = {
        "images": ResonanceImageProcessor(),
        "sounds": extractor,
        "texts": tokenizer,
        "texts and their translations": tokenizer,
        "rows of several modalities": ResonanceProcessor(tokenizer, ResonanceImageProcessor(), extractor),
    }
    for inputs, name in MODELS.items():
        kind = getattr(resonance_nn, name)
        kind(small_config(**config)).save_pretrained(folder / inputs)
        makers[inputs].save_pretrained(folder / inputs)
    return folder


@pytest.mark.parametrize("inputs", MODELS)
@pytest.mark.parametrize("task", READ)
def test_init_is_of_the_same_inputs(task, inputs, saved, tmp_path, capsys):
    init = str(saved / inputs)
    words = ["train", "--task", task, "--data", str(tmp_path / "nowhere.csv"), "--output-dir", str(tmp_path / "m")]
    assert main([*words, "--steps", "1", "--init", init]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    if READ[task] == inputs:
        assert f"init = {init!r}: is a" not in error
    else:
        assert error == f"error: init = {init!r}: is a {MODELS[inputs]}; go on from a model of {READ[task]}"


@pytest.mark.parametrize("name", ["load_mamba2_layer", "audio", "Stranger"])
def test_init_of_a_class_that_is_none(name, saved, tmp_path, capsys):
    """Whatever config.json says, it is one line."""
    config = json.loads((saved / "texts" / "config.json").read_text())
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    words = ["train", "--task", "fill-mask", "--data", str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "run")]
    assert main([*words, "--steps", "1", "--init", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
