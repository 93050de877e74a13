"""Sound files of all kinds and what is wrong with some, variants of sounds, and events from probabilities."""

from __future__ import annotations

import math
import sys
import wave
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from resonance_nn.data.audio import augment, detect_events, normalised, read_audio, resample, stretched


def write_wave(path: Path, values: np.ndarray, rate: int = 8000, width: int = 2) -> Path:
    """Values −1 … 1, (n) or (n, channels), as integers of so many bytes."""
    values = values[:, None] if values.ndim == 1 else values
    integers = np.round(values * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        integers += 128
    data = b"".join(int(v).to_bytes(width, "little", signed=width > 1) for v in integers.flatten())
    with wave.open(str(path), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_reads_waves_of_all_widths(width: int, tmp_path: Path):
    x = np.random.default_rng(0).uniform(-1, 1, 500)
    y = read_audio(write_wave(tmp_path / "a.wav", x, width=width), 8000)
    assert y.dtype == np.float32
    assert y.shape == (500,)
    assert np.abs(y - x).max() < 2.0 ** (2 - 8 * width) + 1e-6
    stereo = write_wave(tmp_path / "b.wav", np.stack((x, -x / 2), axis=1), width=width)
    assert np.abs(read_audio(str(stereo), 8000) - x / 4).max() < 2.0 ** (2 - 8 * width) + 1e-6


@pytest.mark.parametrize(("rate", "new"), [(8000, 16000), (44100, 16000), (16000, 8000), (11025, 8000)])
def test_resamples(rate: int, new: int, tmp_path: Path):
    tone = 0.8 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    y = read_audio(write_wave(tmp_path / "tone.wav", tone, rate), new)
    assert len(y) == new
    inside = slice(new // 20, -new // 20)
    assert np.abs(y - 0.8 * np.sin(2 * np.pi * 440 * np.arange(new) / new))[inside].max() < 3e-3
    high = np.sin(2 * np.pi * 0.45 * np.arange(rate))  # above what the lower rate can hold
    assert new > rate or np.abs(resample(high, rate, new)[inside]).max() < 0.02


def test_arrays():
    x = np.random.default_rng(0).uniform(-1, 1, (300, 2))
    assert np.allclose(read_audio(x, 8000), x.mean(1), atol=1e-6)
    assert len(read_audio(x[:, 0], 8000, rate=16000)) == 150
    assert read_audio(np.array([-32768, 16384], np.int16), 8000).tolist() == [-1.0, 0.5]
    assert read_audio(np.array([0, 128, 192], np.uint8), 8000).tolist() == [-1.0, 0.0, 0.5]
    for bad, message in (
        (np.zeros(0), "holds no samples"),
        (np.zeros((5, 0)), "has no channels"),
        (np.array([0, math.nan, math.inf]), "2 of its 3 samples are NaN or infinite"),
        (np.zeros((2, 16000)), r"shape \(2, 16000\); must be \(samples,\) or \(samples, channels\)"),
        (np.zeros((2, 3, 4)), "must be"),
        (np.array(["a"]), "must be integers or floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            read_audio(bad, 8000)
    for rate in (0, 4294967291):
        with pytest.raises(ValueError, match=rf"sampling_rate = {rate}: must be an integer 1 … 1,000,000"):
            read_audio(x, rate)


@pytest.mark.parametrize("rate", [0, 1, 99, 1_000_001, 4294967291])
def test_rates_that_no_sound_has(rate: int, tmp_path: Path):
    """Resampling from them would take memory out of all proportion."""
    message = "has a sampling rate of {:,}; must be 100 … 1,000,000 samples a second"
    path = write_wave(tmp_path / "a.wav", np.zeros(4000))
    raw = path.read_bytes()
    path.write_bytes(raw[:24] + rate.to_bytes(4, "little") + raw[28:])
    with pytest.raises(ValueError, match=message.format(rate)) as caught:
        read_audio(path, 8000)
    assert str(path) in str(caught.value)
    for wrong in (rate, math.nan):
        with pytest.raises(ValueError, match="the array: " + message.format(wrong)):
            read_audio(np.zeros(4000), 8000, rate=wrong)  # type: ignore[arg-type]


def test_rates_at_the_limits():
    for rate in (100, 1_000_000):
        assert len(read_audio(np.zeros(500), 1000, rate=rate)) == -(-500 * 1000 // rate)
    assert len(read_audio(np.zeros(500), 50, rate=50)) == 500, "as it is: nothing is to be resampled"


def test_files_that_are_no_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = write_wave(tmp_path / "good.wav", np.random.default_rng(0).uniform(-1, 1, 500)).read_bytes()
    patched = {
        "empty.wav": (b"", "is empty"),
        "header.wav": (good[:20], "is truncated within its header"),
        "cut.wav": (good[:-100], "is truncated; its header says 500 samples, 450 are there"),
        "channels.wav": (good[:22] + b"\0\0" + good[24:], "no sound WAV file: bad # of channels"),
        "rate.wav": (good[:24] + b"\0\0\0\0" + good[28:], "sampling rate of 0"),
        "size.wav": (good[:16] + b"\0\0\0\x80" + good[20:], "is damaged: the size of one of its parts is wrong"),
        "none.wav": (good[:40] + b"\0\0\0\0", "holds no samples"),
        "bits.wav": (good[:34] + b"\0\0" + good[36:], "bad sample width"),
        "float.wav": (
            good[:20] + b"\3\0" + good[22:],
            r"no WAV file of integers; for .* pip install 'resonance-nn\[audio\]'",
        ),
        "cut_float.wav": (
            good[:20] + b"\3\0" + good[22:-100],
            "is truncated; its header says 1044 bytes, 944 are there",
        ),
        "text.mp3": (b"no sound at all", r"pip install 'resonance-nn\[audio\]'"),
    }
    streamed = good[:4] + b"\xff" * 4 + good[8:40] + b"\xff" * 4 + good[44:]
    (tmp_path / "streamed.wav").write_bytes(streamed)
    assert np.array_equal(read_audio(tmp_path / "streamed.wav", 8000), read_audio(tmp_path / "good.wav", 8000))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for name, (content, message) in patched.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_audio(tmp_path / name, 8000)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    for name in ("missing.wav", "."):
        with pytest.raises(ValueError, match="cannot read"):
            read_audio(tmp_path / name, 8000)
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    with pytest.raises(ValueError, match=r"needs scipy; pip install 'resonance-nn\[audio\]'"):
        read_audio(tmp_path / "good.wav", 16000)


def test_other_files_are_soundfiles_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in with its interface: what it gives is mixed, resampled and checked as any other."""

    class SoundFile:
        frames, samplerate = 400, 16000
        content = np.stack((np.ones(400), np.zeros(400)), axis=1)

        def __init__(self, path: str) -> None:
            if "bad" in path:
                raise RuntimeError("Error opening: unknown\nmore")

        def __enter__(self) -> SoundFile:
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, dtype: str, always_2d: bool) -> np.ndarray:
            assert always_2d
            return self.content.astype(dtype)

    module = ModuleType("soundfile")
    module.SoundFile = SoundFile  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "soundfile", module)
    for name in ("a.flac", "bad.flac"):
        (tmp_path / name).write_bytes(b"fLaC")
    y = read_audio(tmp_path / "a.flac", 8000)
    assert y.shape == (200,)
    assert np.abs(y[50:150] - 0.5).max() < 1e-3
    with pytest.raises(ValueError, match=r"bad.flac: cannot be read as sound: Error opening: unknown$"):
        read_audio(tmp_path / "bad.flac", 8000)

    def read_too_much(*_: Any, **__: Any) -> np.ndarray:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(SoundFile, "read", read_too_much)
        with pytest.raises(ValueError, match=r"a.flac: is longer than memory, or its header is damaged \(no room\)"):
            read_audio(tmp_path / "a.flac", 8000)
    SoundFile.content = SoundFile.content[:300]
    with pytest.raises(ValueError, match=r"a.flac: is truncated; its header says 400 samples, 300 are there"):
        read_audio(tmp_path / "a.flac", 8000)


# --- variants and events


def test_variants_are_those_of_the_generator_and_can_be_switched_off():
    x = np.sin(2 * np.pi * 0.05 * np.arange(4000)).astype(np.float32)
    a, b = (augment(x, 8000, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(a, b)
    assert a.dtype == np.float32
    assert not np.array_equal(a[:100], augment(x, 8000, np.random.default_rng(4))[:100])
    off: dict[str, Any] = dict(speed=0.0, tempo=0.0, shift_seconds=0.0, mask=0.0, filter_db=0.0, noise_db=None)
    rng = np.random.default_rng(0)
    assert np.array_equal(augment(x, 8000, rng, **off), x)
    for _ in range(5):
        y = augment(x, 8000, rng, **{**off, "speed": 0.2})
        factor = len(x) / len(y)
        assert 0.79 < factor < 1.21
        peak = np.abs(np.fft.rfft(y, 40000)).argmax() / 40000
        assert abs(peak / 0.05 - factor) < 0.01  # pitch goes with tempo
        y = augment(x, 8000, rng, **{**off, "noise_db": (20.0, 20.0)})
        assert abs(10 * np.log10((x**2).mean() / ((y - x) ** 2).mean()) - 20) < 1
        y = augment(np.ones(4000), 8000, rng, **{**off, "shift_seconds": 0.05})
        assert len(y) == 4000
        assert 0 < (y == 0).sum() <= 400
    assert len(augment(np.ones(1), 8000, rng)) == 1
    assert np.isfinite(augment(np.zeros(100), 8000, rng)).all()
    for bad in (np.zeros((2, 3)), np.zeros(0), np.zeros(3, np.int16)):
        with pytest.raises(ValueError, match="must be one sound"):
            augment(bad, 8000, rng)
    with pytest.raises(ValueError, match=r"speed = 1.5: must be in \[0, 1\)"):
        augment(x, 8000, rng, speed=1.5)


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.1, 1.4])
def test_another_tempo_keeps_pitch_and_level_and_moves_what_happens(factor: float):
    rate = 8000
    t = np.arange(rate) / rate
    x = np.sin(2 * np.pi * 440 * t) * np.where(t < 0.5, 1.0, 0.1)  # loud, then faint
    y = stretched(x, factor, rate)
    assert len(y) == round(rate / factor)
    spectrum = np.abs(np.fft.rfft(y * np.hanning(len(y)), 1 << 16))
    assert abs(spectrum.argmax() * rate / (1 << 16) - 440) < 2
    level = np.sqrt(np.convolve(y**2, np.ones(400) / 400, "same"))
    middle = len(y) // 2
    assert np.allclose(level[1000 : middle - 800], np.sqrt(0.5), atol=0.03)
    assert np.allclose(level[middle + 800 : -1000], 0.1 * np.sqrt(0.5), atol=0.003)


def test_another_tempo_of_any_sound():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 100, 239, 240, 241, 5000):
        for rate in (100, 8000):
            for factor in (0.6, 1.0, 1.7):
                y = stretched(rng.standard_normal(n), factor, rate)
                assert len(y) == max(1, round(n / factor))
                assert np.isfinite(y).all()
    assert not stretched(np.zeros(1000), 0.7, 8000).any()
    x = rng.standard_normal(1000).astype(np.float32)
    off: dict[str, Any] = dict(speed=0.0, shift_seconds=0.0, mask=0.0, filter_db=0.0, noise_db=None)
    lengths = {len(augment(x, 8000, rng, tempo=0.4, **off)) for _ in range(200)}
    assert 715 <= min(lengths) < 740
    assert 1600 < max(lengths) <= 1667
    with pytest.raises(ValueError, match=r"tempo = 1: must be in \[0, 1\)"):
        augment(x, 8000, rng, tempo=1)


def test_a_masked_sound_lacks_a_stretch_and_a_band():
    rng = np.random.default_rng(0)
    off: dict[str, Any] = dict(speed=0.0, tempo=0.0, shift_seconds=0.0, filter_db=0.0, noise_db=None)
    x = rng.standard_normal(20_000)
    silent, faint = [], []
    for _ in range(20):
        y = augment(x, 8000, rng, mask=0.4, **off)
        assert len(y) == len(x)
        there = np.convolve(np.abs(y), np.ones(51) / 51, "same") > 0.1
        silent.append(1 - there.mean())
        spectrum = np.convolve(np.abs(np.fft.rfft(y)), np.ones(101) / 101, "same")
        low = spectrum < 0.3 * np.median(spectrum)
        faint.append(np.ptp(np.sqrt(np.flatnonzero(low) / len(low))) if low.any() else 0.0)
        if not there.all():
            assert np.ptp(np.flatnonzero(~there)) < (~there).sum() + 20, "one stretch"
    for shares in (silent, faint):
        assert max(shares) < 0.43
        assert np.mean(shares) == pytest.approx(0.2, abs=0.07)
    with pytest.raises(ValueError, match=r"mask = 1: must be in \[0, 1\)"):
        augment(x, 8000, rng, mask=1)


def test_a_filter_is_smooth_and_within_its_gain():
    rng = np.random.default_rng(0)
    x = np.zeros(4000)
    x[2000] = 1.0  # the filter's answer lies within the sound
    off = dict(speed=0.0, tempo=0.0, shift_seconds=0.0, mask=0.0, noise_db=None)
    spreads = []
    for _ in range(10):
        y = augment(x, 8000, rng, filter_db=6.0, **off)  # type: ignore[arg-type]
        gain = 20 * np.log10(np.abs(np.fft.rfft(y)[:-1] / np.fft.rfft(x)[:-1]))
        assert np.abs(gain).max() < 6.01
        assert np.abs(np.diff(gain[100:])).max() < 0.2
        spreads.append(np.ptp(gain))
    assert np.mean(spreads) > 6


def test_events():
    times = np.stack((np.arange(10), np.arange(10) + 1), axis=1) / 10
    p = np.zeros((10, 2))
    p[[1, 2, 4, 8], 0] = 0.9, 0.7, 0.8, 0.6
    p[9, 1] = 1.0
    p[3, 0] = 0.3
    found = detect_events(p, times)
    assert found == [
        pytest.approx(e) for e in [(0, 0.1, 0.3, 0.8), (0, 0.4, 0.5, 0.8), (0, 0.8, 0.9, 0.6), (1, 0.9, 1.0, 1.0)]
    ]
    merged = detect_events(p, times, merge_gap_seconds=0.1, min_seconds=0.2)
    assert merged == [pytest.approx((0, 0.1, 0.5, 0.675))]
    assert [e[:2] for e in detect_events(p, times, threshold=[0.85, 0.5])] == [(0, 0.1), (1, 0.9)]
    assert detect_events(torch.zeros(10, 2), times) == []
    assert detect_events(np.ones((10, 1)), times) == [(0, 0.0, 1.0, 1.0)]
    assert detect_events(np.zeros((0, 2)), np.zeros((0, 2))) == []
    overlapping = np.stack((np.arange(4) * 0.1, np.arange(4) * 0.1 + 0.3), axis=1)
    found = detect_events([[1.0], [0.0], [1.0], [0.0]], overlapping)
    assert found == [pytest.approx(e) for e in [(0, 0.0, 0.2, 1.0), (0, 0.3, 0.4, 1.0)]]
    for bad, message in (
        (p + 1, "take logits.sigmoid"),
        (p * math.nan, "each 0 … 1"),
        (p[:5], r"times of shape \(10, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            detect_events(bad, times)


def test_normalised_sounds_are_those_of_wav2vec2s_feature_extractor():
    rng = np.random.default_rng(0)
    sounds = [
        (0.3 + rng.normal(0, scale, n)).astype(np.float32) for scale, n in ((1, 50), (1e-3, 7), (30, 120), (0, 1))
    ]
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=True, return_attention_mask=True)
    theirs = extractor(sounds, sampling_rate=8000, padding=True, return_tensors="pt")
    ours = normalised(sounds)
    assert ours.keys() == theirs.keys()
    assert torch.allclose(ours["input_values"], theirs["input_values"], atol=1e-5)
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"].long())
