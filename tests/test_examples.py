"""The examples, on data small enough for a test: what they write is what the tasks read."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from resonance_nn.cli import main
from resonance_nn.data.audio import read_audio

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two kinds of tone, twelve clips each."""
    rng = np.random.default_rng(0)
    for label, frequency in (("low", 300), ("high", 1200)):
        (tmp_path / "clips" / label).mkdir(parents=True)
        for i in range(12):
            n = int(rng.integers(800, 2400))
            tone = 0.5 * np.sin(2 * np.pi * frequency * rng.uniform(0.9, 1.1) * np.arange(n) / 4000)
            with wave.open(str(tmp_path / "clips" / label / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, 4000, 0, "NONE", ""))
                file.writeframes((tone * 32767).astype("<i2").tobytes())
    return tmp_path / "clips"


def scenes(clips: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples/sound_events.py"), str(clips), str(folder), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_scenes_of_sounds(clips: Path, tmp_path: Path):
    out = scenes(clips, tmp_path / "scenes", "--train", "12", "--held-out", "4", "--seconds", "2", "--snr", "20", "20")
    assert out.returncode == 0, out.stderr
    for name, count in (("train", 12), ("held-out", 4)):
        rows = [json.loads(line) for line in (tmp_path / "scenes" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            sound = read_audio(tmp_path / "scenes" / row["audio"], 4000)
            assert len(sound) == 8000
            inside = np.zeros(8000, bool)
            for event in row["events"]:
                span = slice(round(event["start"] * 4000), round(event["end"] * 4000))
                assert not inside[span].any(), "events do not overlap"
                inside[span] = True
                # 20 dB over the noise, at the frequency that its label says
                power = np.abs(np.fft.rfft(sound[span] * np.hanning(span.stop - span.start))) ** 2
                peak = np.argmax(power) * 4000 / (span.stop - span.start)
                assert (peak < 600) == (event["label"] == "low")
            assert inside.any()
            assert np.mean(sound[inside] ** 2) > 20 * np.mean(sound[~inside] ** 2)
    again = scenes(clips, tmp_path / "again", "--train", "12", "--held-out", "4", "--seconds", "2", "--snr", "20", "20")
    assert again.returncode == 0
    assert (tmp_path / "again/train/7.wav").read_bytes() == (tmp_path / "scenes/train/7.wav").read_bytes()


def test_scenes_of_no_sounds(tmp_path: Path):
    out = scenes(tmp_path / "nowhere", tmp_path / "scenes")
    assert out.returncode == 2
    assert "nowhere" in out.stderr.splitlines()[-1]
    assert "Traceback" not in out.stderr


@pytest.mark.slow
def test_scenes_are_learned(clips: Path, tmp_path: Path):
    folder = tmp_path / "scenes"
    flags = ("--train", "300", "--held-out", "30", "--seconds", "1", "--snr", "20", "20")
    assert scenes(clips, folder, *flags).returncode == 0
    code = main(
        [
            *("train", "--task", "audio-event-detection", "--data", f"{folder}/train.jsonl"),
            *("--eval-data", f"{folder}/held-out.jsonl", "--output-dir", str(tmp_path / "run"), "--epochs", "8"),
            *("--set", "hidden_size=32", "--set", "num_hidden_layers=2", "--json", str(tmp_path / "run.json")),
        ]
    )
    assert code == 0
    assert json.loads((tmp_path / "run.json").read_text())["summary"]["eval_f1"] > 0.8


def test_clips_that_make_no_scenes(clips: Path, tmp_path: Path):
    out = scenes(clips, tmp_path / "scenes", "--seconds", "0.4")
    assert out.returncode == 2
    assert ".wav: is as long as a scene of 0.4 s; give more --seconds" in out.stderr
    (tmp_path / "one" / "low").mkdir(parents=True)
    (clips / "low" / "0.wav").rename(tmp_path / "one" / "low" / "0.wav")
    out = scenes(tmp_path / "one", tmp_path / "scenes")
    assert out.returncode == 2
    assert "one clip: two or more are needed" in out.stderr


def test_long_documents(tmp_path: Path):
    table, out = tmp_path / "sentences.tsv", tmp_path / "long.tsv"
    texts = {"good": [f"good{i}" for i in range(5)], "bad": [f"bad{i}" for i in range(7)]}
    table.write_text("".join(f"{text}\t{label}\n" for label, part in texts.items() for text in part))
    command = [sys.executable, str(ROOT / "examples/long_documents.py"), str(table), str(out), "--sentences", "50"]
    made = subprocess.run([*command, "--documents", "8", "--share", "0.7"], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    rows = [line.split("\t") for line in out.read_text().splitlines()]
    assert rows[0] == ["text", "label"]
    assert [label for _, label in rows[1:]] == ["bad", "good"] * 4
    for text, label in rows[1:]:
        words = text.split()
        own = [word in texts[label] for word in words]
        assert len(words) == 50
        assert sum(own) == 35
        assert not all(own[:35])
    table.write_text("good0\tgood\n")
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert "has 1 label; it must have two or more" in failed.stderr


def test_seconds_of_translation():
    command = [sys.executable, str(ROOT / "examples/translation_time.py"), "--width", "32", "--layers", "1"]
    out = subprocess.run(
        [*command, "--lengths", "4,16,64", "--repeats", "1", "--beams", "2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr
    for name in ("ours: ", "Marian: "):
        line = next(line for line in out.stdout.splitlines() if line.startswith(name))
        assert "ms · n" in line
        assert float(line.split(" ms · m")[0].split()[-1]) > 0, "each token of the target takes time"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "4,8"], "must be three or more lengths"),
        (["--lengths", "4,8,20000"], "must be three or more lengths of 1 to 16,383"),
        (["--lengths", "a,b"], "--lengths a,b: must be"),
        (["--repeats", "0"], "must be ≥ 1"),
    ],
)
def test_seconds_of_what_cannot_be(flags: list[str], message: str, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["translation_time.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples/translation_time.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
