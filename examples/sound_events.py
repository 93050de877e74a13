"""Scenes for `resonance train --task audio-event-detection`: labelled clips placed at random in noise.

    python examples/sound_events.py CLIPS SCENES --train 1500 --held-out 200
    resonance train --task audio-event-detection --data SCENES/train.jsonl --eval-data SCENES/held-out.jsonl \\
        --output-dir runs/events

CLIPS is what `--task audio-classification` takes: a folder with a folder a class, or a table with audio and label. A
tenth of the clips is heard in held-out scenes only; other clips with `--held-out-clips`, say of another speaker.
"""

from __future__ import annotations

import argparse
import json
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from resonance_nn.data import DataError
from resonance_nn.data.audio import read_audio
from resonance_nn.tasks.audio import Sound, common_rate, find_sounds


def scene(
    rng: np.random.Generator, clips: Sequence[Sound], samples: int, rate: int, snr_db: tuple[float, float]
) -> tuple[np.ndarray, list[dict[str, object]]]:
    """White or pink noise of variance 1 (samples), one to five clips in it that do not overlap, each louder than the
    noise by a ratio drawn between the two; and the events in the order of their starts."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    if rng.random() < 0.5:  # pink: power in proportion to 1/f
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    sound = np.fft.irfft(spectrum, samples)
    sound /= sound.std()
    events: list[tuple[int, int, str]] = []
    for _ in range(rng.integers(1, 6)):
        chosen = clips[int(rng.integers(len(clips)))]
        clip = read_audio(chosen.path, rate)
        start = int(rng.integers(samples - len(clip)))
        stop = start + len(clip)
        if any(start < b and a < stop for a, b, _ in events):
            continue
        power = float(np.mean(clip**2)) + 1e-12
        sound[start:stop] += clip * np.sqrt(10 ** (rng.uniform(*snr_db) / 10) / power)
        events.append((start, stop, chosen.label))
    rows = [{"start": round(a / rate, 4), "end": round(b / rate, 4), "label": label} for a, b, label in sorted(events)]
    return sound / np.abs(sound).max() * 0.9, rows


def write_scenes(
    folder: Path, name: str, count: int, clips: Sequence[Sound], rate: int, seconds: float, snr_db: tuple[float, float]
) -> None:
    """``count`` WAV files and the table ``name``.jsonl; the same for the same arguments."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in tqdm(range(count), desc=name, unit=" scenes"):
        rng = np.random.default_rng([i, len(name)])
        sound, events = scene(rng, clips, round(seconds * rate), rate, snr_db)
        file = folder / name / f"{i}.wav"
        with wave.open(str(file), "wb") as out:
            out.setparams((1, 2, rate, 0, "NONE", ""))
            out.writeframes((sound * 32767).astype("<i2").tobytes())
        rows.append({"audio": f"{name}/{i}.wav", "events": events})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", help="folders or tables of labelled clips")
    parser.add_argument("scenes", type=Path, help="folder to write to")
    parser.add_argument("--held-out-clips", nargs="*", default=(), help="heard in held-out scenes only")
    parser.add_argument("--train", type=int, default=1500, help="scenes")
    parser.add_argument("--held-out", type=int, default=200, help="scenes")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--snr", type=float, nargs=2, default=(0.0, 20.0), metavar="DB", help="clips over noise")
    options = parser.parse_args()
    try:
        clips = [sound for path in options.clips for sound in find_sounds(path)]
        held_out = [sound for path in options.held_out_clips for sound in find_sounds(path)]
        if not held_out:
            order = np.random.default_rng(0).permutation(len(clips))
            part = max(1, len(clips) // 10)
            held_out, clips = [clips[i] for i in order[:part]], [clips[i] for i in order[part:]]
        if not clips:
            parser.error("one clip: two or more are needed, one to train on and one held out")
        rate = common_rate([sound.path for sound in clips])
        for sound in (*clips, *held_out):
            if len(read_audio(sound.path, rate)) >= round(options.seconds * rate):
                parser.error(f"{sound.path}: is as long as a scene of {options.seconds:g} s; give more --seconds")
        for name, count, some in (("train", options.train, clips), ("held-out", options.held_out, held_out)):
            write_scenes(options.scenes, name, count, some, rate, options.seconds, tuple(options.snr))
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
