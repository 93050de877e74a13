"""Sounds: their class, and what can be heard in them when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Wav2Vec2FeatureExtractor

from resonance_nn.data.audio import detect_events, read_audio
from resonance_nn.data.documents import DataError
from resonance_nn.models.audio import ResonanceForAudioClassification, ResonanceForAudioFrameClassification
from resonance_nn.plots import plot_events
from resonance_nn.prediction.base import Found, Predictor
from resonance_nn.tasks.audio import SUFFIXES, normalised


class SoundClasses(Predictor):
    """Sounds of any length and rate."""

    kind = "labels"
    architecture = ResonanceForAudioClassification
    takes_text = False

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        if not (folder / "preprocessor_config.json").is_file():
            raise ValueError(f"model {str(folder)!r}: has no preprocessor_config.json; save its processor beside it")
        return Wav2Vec2FeatureExtractor.from_pretrained(str(folder), local_files_only=True)

    def files(self, path: str) -> list[Found]:
        place = Path(path)
        if not place.exists():
            raise DataError(f"{path}: no such file or folder")
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        files = [file for file in files if place.is_file() or file.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(f"{path}: no sounds in it ({', '.join(SUFFIXES)})")
        return [{"name": str(file), "input": str(file), **self.truth(place, file)} for file in files]

    def truth(self, place: Path, file: Path) -> Found:
        """The class that a folder is named after, if it is one."""
        labels = set(self.model.config.id2label.values())
        return {"truth": file.parent.name} if place.is_dir() and file.parent.name in labels else {}

    def batch(self, inputs: list[Found]) -> dict[str, torch.Tensor]:
        sounds = [read_audio(one["input"], self.model.config.sampling_rate) for one in inputs]
        self.samples = [len(samples) for samples in sounds]
        return normalised(sounds)

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        return self.scores(out.logits)


class SoundEvents(SoundClasses):
    """Events: stretches in which a label is likelier than not, at least 50 ms long, gaps of up to 50 ms closed."""

    kind = "events"
    architecture = ResonanceForAudioFrameClassification
    can_draw = True

    def truth(self, place: Path, file: Path) -> Found:
        return {}

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        names, said = self.model.config.id2label, []
        for samples, logits in zip(self.samples, out.logits.float().sigmoid().cpu(), strict=True):
            times = self.model.frame_times(samples)
            found = detect_events(logits[: len(times)].numpy(), times, min_seconds=0.05, merge_gap_seconds=0.05)
            events = [{"label": names[i], "start": a, "end": b, "score": score} for i, a, b, score in found]
            line = ", ".join(f"{e['label']} {e['start']:.2f}–{e['end']:.2f} s" for e in events)
            said.append({"label": line or "none", "events": events})
        return said

    def draw(self, found: list[Found], path: str) -> None:
        """Spectrograms of the first six sounds with their events."""
        rate = self.model.config.sampling_rate
        plot_events([(one["name"], read_audio(one["input"], rate), one["events"]) for one in found[:6]], rate, path)
