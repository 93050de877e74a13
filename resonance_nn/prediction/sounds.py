"""Sounds: their class, and what can be heard in them when."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import Wav2Vec2FeatureExtractor

from resonance_nn.data.audio import detect_events, normalised, read_audio
from resonance_nn.models.audio import ResonanceForAudioClassification, ResonanceForAudioFrameClassification
from resonance_nn.plots import plot_events
from resonance_nn.prediction.base import Batch, FilePredictor, Found, OneClass, any_script
from resonance_nn.tasks.audio import SUFFIXES

LEAST = 257  # samples of a spectrogram: a window and one more
FAINT = 1e-6  # far below the steps of 16 bits


class SoundPredictor(FilePredictor):
    """Sounds of any length and rate."""

    what, suffixes, column = "sounds", SUFFIXES, "audio"
    processor_class = Wav2Vec2FeatureExtractor

    def batch(self, inputs: list[Found]) -> Batch:
        return normalised([read_audio(one["input"], self.model.config.sampling_rate) for one in inputs])


class SoundClasses(OneClass, SoundPredictor):
    architecture = ResonanceForAudioClassification


class SoundEvents(SoundPredictor):
    """Events: stretches in which a label is likelier than not, at least 50 ms long, gaps of up to 50 ms closed."""

    kind = "events"
    architecture = ResonanceForAudioFrameClassification
    can_draw = True

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        names, said = self.model.config.id2label, []
        samples = batch["attention_mask"].sum(1).tolist()
        for n, probabilities in zip(samples, out.logits.float().sigmoid().cpu(), strict=True):
            times = self.model.frame_times(n)
            found = detect_events(probabilities[: len(times)].numpy(), times, min_seconds=0.05, merge_gap_seconds=0.05)
            events = [{"label": names[i], "start": a, "end": b, "score": score} for i, a, b, score in found]
            line = ", ".join(f"{e['label']} {e['start']:.2f}–{e['end']:.2f} s" for e in events)
            said.append({"label": line or "none", "events": events})
        return said

    @any_script()
    def draw(self, found: list[Found], path: str) -> None:
        """Spectrograms of the first six sounds with their events; a very short one has silence after it."""
        rate = self.model.config.sampling_rate
        sounds = [(one["name"], drawable(read_audio(one["input"], rate)), one["events"]) for one in found[:6]]
        plot_events(sounds, rate, path)


def drawable(samples: np.ndarray) -> np.ndarray:
    """Long enough for a spectrogram, with faint noise, because silence has no decibels."""
    longer = np.pad(samples, (0, max(0, LEAST - len(samples))))
    return longer + FAINT * np.random.default_rng(0).standard_normal(len(longer))
