"""Sounds: their class, and what can be heard in them when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import Wav2Vec2FeatureExtractor

from resonance_nn.data.audio import detect_events, normalised, read_audio
from resonance_nn.data.tables import Row
from resonance_nn.models.audio import ResonanceForAudioClassification, ResonanceForAudioFrameClassification
from resonance_nn.plots import plot_events
from resonance_nn.prediction.base import Batch, Figure, FilePredictor, Found, OneClass, any_script
from resonance_nn.tasks.audio import SUFFIXES, active_frames, events_of, frame_scores

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
    """Events: stretches in which a label is likelier than not, at least 50 ms long, gaps of up to 50 ms closed.

    They are judged frame by frame, as in training, before any is closed or left out; labels that the model does not
    have are not judged.
    """

    kind = "events"
    answer = "events"
    architecture = ResonanceForAudioFrameClassification
    can_draw = True

    def answer_of(self, row: Row, where: str) -> Any:
        known = not isinstance(row.get("events"), str | None)  # a cell of a .csv or .tsv file cannot say them
        return events_of(row, where) if known else None

    def truth(self, answer: Any) -> Found:
        if answer is None:
            return {}
        known = [event for event in answer if event[2] in self.model.config.label2id]
        return {"truth": [{"label": name, "start": start, "end": end} for start, end, name in known]}

    def figures(self, found: Sequence[Found]) -> list[Figure]:
        judged = [one["frames"] for one in found if "frames" in one]
        if not judged:
            return []
        hits, said, true = (sum(one[name] for one in judged) for name in ("right", "said", "true"))
        scores = frame_scores(hits, said, true)
        sentence = (
            f"F1 of frames {scores['f1']:.3f}: precision {scores['precision']:.1%}, recall {scores['recall']:.1%}, "
            f"of the {len(judged):,} sounds whose events are known"
        )
        return [Figure(name, value, sentence if name == "f1" else "") for name, value in scores.items()]

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        names, said = self.model.config.id2label, []
        samples = batch["attention_mask"].sum(1).tolist()
        for one, n, probabilities in zip(inputs, samples, out.logits.float().sigmoid().cpu(), strict=True):
            times = self.model.frame_times(n)
            found = detect_events(probabilities[: len(times)].numpy(), times, min_seconds=0.05, merge_gap_seconds=0.05)
            events = [{"label": names[i], "start": a, "end": b, "score": score} for i, a, b, score in found]
            line = ", ".join(f"{e['label']} {e['start']:.2f}–{e['end']:.2f} s" for e in events)
            said.append({"label": line or "none", "events": events})
            if "truth" in one:
                known = [(event["start"], event["end"], event["label"]) for event in one["truth"]]
                true = active_frames(known, times, self.model.config.label2id) == 1
                heard = probabilities[: len(times)].numpy() > 0.5
                counts = {"right": (heard & true).sum(), "said": heard.sum(), "true": true.sum()}
                said[-1]["frames"] = {name: int(count) for name, count in counts.items()}
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
