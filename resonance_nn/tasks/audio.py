"""``audio-classification``, a class for a sound, and ``audio-event-detection``, what can be heard in it when."""

from __future__ import annotations

import hashlib
import json
import math
import wave
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, Wav2Vec2FeatureExtractor

from resonance_nn.data.audio import RATES, normalised, read_audio
from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import KINDS, Row, label_of, path_of, read_table
from resonance_nn.models.audio import (
    AudioEmbedding,
    ResonanceForAudioClassification,
    ResonanceForAudioFrameClassification,
)
from resonance_nn.rundir import write_errors
from resonance_nn.tasks.augment import SOUND_CHANGES, batch_changes
from resonance_nn.tasks.base import ExamplesTask, Learning, check_files, label_names, name_labels
from resonance_nn.tasks.images import accuracy
from resonance_nn.tasks.text import ENCODER, IGNORE

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
HIGHEST = 16_000  # samples a second, unless the configuration says otherwise
Event = tuple[float, float, str]  # start, end in seconds, label


@dataclass(frozen=True)
class Sound:
    """A file, and its class or its events."""

    path: str
    label: str = ""
    events: tuple[Event, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of the table, where there is one


def find_sounds(path: str) -> list[Sound]:
    """Of a folder with a folder a class, or of a table (.csv, .tsv, .jsonl) with audio (a path from there) and label.
    Raises DataError."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = [
            Sound(str(file), folder.name)
            for folder in sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise DataError(f"{path}: no sounds in folders of it; there must be one for each class")
        return found
    sounds: list[Sound] = []
    for number, row in enumerate(read_table(place, ("audio", "label")), 1):
        where = f"{path}: row {number}"
        sounds.append(Sound(path_of(row, "audio", where, place.parent), label_of(row["label"], where), row=row))
    return sounds


def find_events(path: str) -> list[Sound]:
    """Of a table (.jsonl) with audio and events, each with start and end in seconds and label. Raises DataError."""
    place = Path(path).expanduser()
    if place.exists() and not place.name.removesuffix(".gz").endswith(KINDS[:1]):
        raise DataError(f"{path}: must be a .jsonl file with audio and events, each with start, end and label")
    sounds: list[Sound] = []
    for number, row in enumerate(read_table(place, ("audio", "events")), 1):
        where = f"{path}: row {number}"
        sounds.append(Sound(path_of(row, "audio", where, place.parent), events=events_of(row, where), row=row))
    return sounds


def events_of(row: Row, where: str) -> tuple[Event, ...]:
    """The events of a row of a table. Raises DataError."""
    given, events = row["events"], list[Event]()
    if not isinstance(given, list):
        raise DataError(f"{where}: its events are {given!r:.60}; they must be a list, [] where nothing is heard")
    for number, event in enumerate(given, 1):
        try:
            start, end, label = float(event["start"]), float(event["end"]), event["label"]
        except (TypeError, KeyError, ValueError, OverflowError):
            raise DataError(
                f"{where}: its event {number} is {event!r:.60}; it must have start, end and label, such as "
                '{"start": 0.5, "end": 1.2, "label": "bark"}'
            ) from None
        if not 0 <= start < end < math.inf:
            raise DataError(
                f"{where}: its event {number} is from {start:g} to {end:g}; it must start at 0 or later and before its "
                "end, in seconds"
            )
        events.append((start, end, label_of(label, f"{where}: event {number}")))
    return tuple(events)


class Sounds(Dataset[Any]):
    """Samples at one rate, as they are, and labels."""

    def __init__(self, sounds: Sequence[Sound], sampling_rate: int, task: AudioClassification) -> None:
        self.sounds, self.sampling_rate, self.task = sounds, sampling_rate, task

    def __len__(self) -> int:
        return len(self.sounds)

    def __getitem__(self, i: int) -> dict[str, Any]:
        samples = read_audio(self.sounds[i].path, self.sampling_rate)
        return {"samples": samples, "labels": self.task.target(self.sounds[i], len(samples))}


class AudioClassification(ExamplesTask):
    """Sounds of any length at one rate: that of most of the training ones, at most 16,000 samples a second, unless
    ``sampling_rate`` is given."""

    name = "audio-classification"
    predicts_classes = True
    data = "a folder with a folder a class, or tables (.csv, .tsv, .jsonl) with audio and label"
    fields = ENCODER
    width_and_depth = {"hidden_size": 96, "num_hidden_layers": 4}  # noqa: RUF012
    usual: ClassVar[Mapping[str, Any]] = {
        "epochs": 48,
        "dropout": 0.15,
        "label_smoothing": 0.1,
        "augment": SOUND_CHANGES,
    }
    rate = 2 / 3
    batch_size = 32
    metric = "eval_accuracy"
    changes = SOUND_CHANGES
    architecture: ClassVar[Any] = ResonanceForAudioClassification

    def find(self, path: str) -> list[Sound]:
        return find_sounds(path)

    def row(self, example: Sound) -> Mapping[str, Any]:
        return example.row

    def write(self, examples: tuple[list[Sound], list[Sound]], folder: Path) -> dict[str, str]:
        a, (train, held_out) = self.arguments, examples
        known = a.init or "sampling_rate" in a.config
        rate = self.start.sampling_rate if known else common_rate([sound.path for sound in train])
        facts = {"labels": self.labels(examples), "sampling_rate": rate}
        check_files((s.path for s in (*train, *held_out)), lambda path: read_audio(path, rate), progress=a.progress)
        with write_errors(folder):
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return self.fingerprints(examples, folder)

    def labels(self, examples: tuple[list[Sound], list[Sound]]) -> list[str]:
        """The classes. Raises DataError."""
        return label_names(*([sound.label for sound in part] for part in examples))

    def fingerprints(self, examples: tuple[list[Sound], list[Sound]], folder: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, part in zip(("train", "eval"), examples, strict=True):
            digest = hashlib.sha256()
            for sound in part:
                digest.update(repr((sound.label, sound.events)).encode())
                digest.update(Path(sound.path).read_bytes())
            found[name] = digest.hexdigest()
        return found

    def learning(self, examples: tuple[list[Sound], list[Sound]], folder: Path) -> Learning:
        a, facts = self.arguments, json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        config = self.model_config(sampling_rate=facts["sampling_rate"], **self.spectra(facts["sampling_rate"]))
        name_labels(config, facts["labels"])
        with torch.device("meta"):
            self.front_end = AudioEmbedding(config)  # for the times of its frames
        self.classes = {name: i for i, name in enumerate(facts["labels"])}
        processor = Wav2Vec2FeatureExtractor(
            sampling_rate=config.sampling_rate, do_normalize=True, return_attention_mask=True
        )
        train_set, eval_set = (Sounds(part, config.sampling_rate, self) for part in examples)
        return Learning(
            self.new_model(config),
            processor,
            train_set,
            eval_set,
            unit="sounds",
            collate=SoundBatch(config.sampling_rate),
            metrics=self.metrics,
            augment=batch_changes(a.augment, sampling_rate=config.sampling_rate),
            text=f"{len(train_set):,} sounds at {config.sampling_rate:,} Hz and {len(eval_set):,} held out",
        )

    def spectra(self, sampling_rate: int) -> dict[str, int]:
        """Fields of a new model's front end: windows of 12 ms, too short to tell a voice's harmonics apart, for what is
        said matters more than who says it."""
        if self.start.front_end != "log_mel":
            return {}
        hop = self.arguments.config.get("hop_size", 1)  # a window is no shorter, or it would miss samples
        return {"window_size": max(hop, round(0.012 * sampling_rate)), "num_mel_bins": 40}

    def target(self, sound: Sound, samples: int) -> Any:
        """What is to be said of a sound of so many samples."""
        return self.classes[sound.label]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of right classes."""
        return accuracy(prediction)


class AudioEventDetection(AudioClassification):
    """Events of several kinds, which may overlap: a frame is in one whose time its middle is in."""

    name = "audio-event-detection"
    predicts_classes = False  # but which of them are heard, each by itself
    data = "tables (.jsonl) with audio and events, each with start, end and label"
    metric = "eval_f1"
    changes = ("noise",)  # the others move events away, or silence them
    usual = {"epochs": 8, "dropout": 0.1, "augment": ("noise",)}  # noqa: RUF012
    architecture = ResonanceForAudioFrameClassification

    def find(self, path: str) -> list[Sound]:
        return find_events(path)

    def labels(self, examples: tuple[list[Sound], list[Sound]]) -> list[str]:
        train, held_out = ({event[2] for sound in part for event in sound.events} for part in examples)
        if not train:
            raise DataError("the training data have no events")
        if new := held_out - train:
            raise DataError(f"the held-out data have events {min(new)!r}, which the training data do not have")
        return sorted(train)

    def spectra(self, sampling_rate: int) -> dict[str, int]:
        return {}

    def target(self, sound: Sound, samples: int) -> Any:
        """(frames, labels), 1 within an event."""
        return active_frames(sound.events, self.front_end.frame_times(samples), self.classes)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Of frames: precision, recall and their harmonic mean, over all events together."""
        labels = np.asarray(prediction.label_ids)
        said, real = np.asarray(prediction.predictions) > 0, labels != IGNORE
        return frame_scores((said & (labels == 1) & real).sum(), (said & real).sum(), (labels == 1).sum())


def active_frames(events: Sequence[Event], times: np.ndarray, classes: Mapping[str, int]) -> np.ndarray:
    """(frames, classes), 1 where the middle of a frame, of ``times`` (frames, 2), is within an event of a class."""
    middle = times.mean(1)
    active = np.zeros((len(middle), len(classes)), np.float32)
    for start, end, label in events:
        active[(middle >= start) & (middle < end), classes[label]] = 1
    return active


def frame_scores(hits: float, said: float, true: float) -> dict[str, float]:
    """Precision, recall and F1, from how many frames are right, said, and true."""
    precision, recall = float(hits) / max(1.0, float(said)), float(hits) / max(1.0, float(true))
    return {
        "f1": 2 * precision * recall / max(1e-9, precision + recall),
        "precision": precision,
        "recall": recall,
    }


class SoundBatch:
    """Sounds of different lengths -> ``input_values`` (B, longest), each of mean 0 and variance 1 as
    `Wav2Vec2FeatureExtractor` makes them, and their mask."""

    def __init__(self, sampling_rate: int) -> None:
        self.sampling_rate = sampling_rate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = [example["labels"] for example in examples]
        if isinstance(labels[0], np.ndarray):
            rows = [torch.from_numpy(label) for label in labels]
            target = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=float(IGNORE))
        else:
            target = torch.tensor(labels)
        return {**normalised([example["samples"] for example in examples]), "labels": target}


def common_rate(paths: Sequence[str]) -> int:
    """The sampling rate that most of some files have, at most 16,000."""
    lowest, highest = RATES
    rates = [rate for path in paths[:: max(1, len(paths) // 200)] if lowest <= (rate := rate_of(path) or 0) <= highest]
    return min(HIGHEST, Counter(rates).most_common(1)[0][0] if rates else HIGHEST)


def rate_of(path: str) -> int | None:
    """The sampling rate that a file's header says; None where it cannot be read, of other files than WAV without
    soundfile too. What is wrong with a file, :func:`read_audio` says."""
    try:
        with wave.open(path) as file:
            return file.getframerate()
    except (OSError, EOFError, wave.Error, RuntimeError):  # RuntimeError: a damaged size
        pass
    try:
        import soundfile

        return soundfile.info(path).samplerate
    except (ImportError, OSError, RuntimeError):  # OSError: without its C library
        return None
