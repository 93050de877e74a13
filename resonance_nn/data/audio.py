"""Sound files -> samples -> batches; samples -> others that sound alike; probabilities of frames -> events."""

from __future__ import annotations

import math
import os
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from resonance_nn.data.documents import DataError

EXTRA = "pip install 'resonance-nn[audio]'"
MAX_CHANNELS = 64
RATES = (100, 1_000_000)  # samples a second that can be resampled: a header with others is likelier damaged than true
STREAMED = 0xFFFFFFFF  # the size in the header of a WAV file written by a program that could not know it, as ffmpeg's
TOLERANCE = 1e-9  # seconds by which sums of times may be off
Samples = NDArray[np.float32]


def read_audio(source: str | os.PathLike[str] | np.ndarray, sampling_rate: int, *, rate: int | None = None) -> Samples:
    """Samples (n) at ``sampling_rate``, channels averaged, integers scaled to −1 … 1.

    A WAV file of 8, 16, 24 or 32-bit integers is read by Python itself; any other file (WAV of floats, FLAC, Ogg, MP3)
    needs soundfile, and another rate needs scipy (a polyphase low-pass filter): both are in the extra ``audio``.

    Args:
        source: a file, or an array (samples) or (samples, channels) of integers or floating-point numbers.
        sampling_rate: samples a second that are wanted, ``config.sampling_rate`` for a model; at most 1,000,000.
        rate: that of an array; None means ``sampling_rate``. It, and that of a file, may be any 100 … 1,000,000, or
            ``sampling_rate`` itself: memory for others would be out of proportion.

    Raises:
        DataError: a ValueError of one line that names the file and what is wrong with it.
    """
    lowest, highest = RATES
    if type(sampling_rate) is not int or not 1 <= sampling_rate <= highest:
        raise ValueError(f"sampling_rate = {sampling_rate!r}: must be an integer 1 … {highest:,}, such as 16000")
    if isinstance(source, np.ndarray):
        name, samples, rate = "the array", _as_float(source), sampling_rate if rate is None else rate
    else:
        name = os.fspath(source)
        samples, rate = _read_file(Path(source))
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] > MAX_CHANNELS:
        raise DataError(
            f"{name}: samples of shape {samples.shape}; must be (samples,) or (samples, channels), with at most "
            f"{MAX_CHANNELS} channels"
        )
    if samples.shape[1] == 0:
        raise DataError(f"{name}: has no channels")
    if samples.shape[0] == 0:
        raise DataError(f"{name}: holds no samples")
    if rate != sampling_rate and not lowest <= rate <= highest:
        raise DataError(
            f"{name}: has a sampling rate of {rate:,}; must be {lowest} … {highest:,} samples a second; if its header "
            "is damaged, save the sound anew"
        )
    wrong = int((~np.isfinite(samples)).any(1).sum())
    if wrong:
        raise DataError(f"{name}: {wrong} of its {len(samples)} samples are NaN or infinite")
    return resample(samples.mean(1, dtype=np.float64), int(rate), sampling_rate)


def normalised(sounds: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Sounds of any lengths as a batch, as `Wav2Vec2FeatureExtractor(do_normalize=True)` makes it: ``input_values``
    (B, longest), (x − mean) / √(variance + 1e-7) of each, right-padded with zeros, and ``attention_mask``."""
    rows = [torch.from_numpy((x - x.mean()) / np.sqrt(x.var() + 1e-7)) for x in sounds]
    mask = pad_sequence([torch.ones(len(x), dtype=torch.long) for x in rows], batch_first=True)
    return {"input_values": pad_sequence(rows, batch_first=True), "attention_mask": mask}


def resample(samples: np.ndarray, rate: int, new_rate: int) -> Samples:
    """Samples (n) at another rate, ⌈n · new_rate/rate⌉ of them, without what the lower of the two cannot hold."""
    if rate != new_rate:
        try:
            from scipy.signal import resample_poly
        except ImportError:
            raise DataError(f"from {rate} to {new_rate} samples a second: needs scipy; {EXTRA}") from None
        divisor = math.gcd(rate, new_rate)
        samples = resample_poly(samples, new_rate // divisor, rate // divisor)
    return samples.astype(np.float32)


def _read_file(path: Path) -> tuple[np.ndarray, int]:
    """(samples, channels) and their rate."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise DataError(f"{path}: is empty")
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        try:
            return _read_wave(path, size)
        except EOFError:
            raise DataError(f"{path}: is truncated within its header") from None
        except RuntimeError:  # Python's, without a message
            raise DataError(f"{path}: is damaged: the size of one of its parts is wrong; save it anew") from None
        except wave.Error as error:
            if "unknown" not in str(error):  # unknown to Python: floats, compressed, or extended headers
                raise DataError(f"{path}: is no sound WAV file: {error}") from None
        promised = int.from_bytes(head[4:8], "little")
        if size + 8 < promised < STREAMED:  # the sizes of some writers are 8 bytes off, or a byte of padding
            raise DataError(f"{path}: is truncated; its header says {promised + 8} bytes, {size} are there")
    return _read_other(path)


def _read_wave(path: Path, size: int) -> tuple[np.ndarray, int]:
    with wave.open(str(path), "rb") as file:
        channels, width, frames, rate = file.getnchannels(), file.getsampwidth(), file.getnframes(), file.getframerate()
        data = file.readframes(min(frames, size))
    if width not in (1, 2, 3, 4):
        raise DataError(f"{path}: samples of {8 * width} bits; must be of 8, 16, 24 or 32")
    there = len(data) // (channels * width)
    if there < frames and (frames + 1) * channels * width <= STREAMED:
        raise DataError(f"{path}: is truncated; its header says {frames} samples, {there} are there")
    if width == 3:
        values = np.zeros((there * channels, 4), np.uint8)
        values[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        values = values.view("<i4")
    else:
        values = np.frombuffer(data, {1: "u1", 2: "<i2", 4: "<i4"}[width])
    return _as_float(values.reshape(-1, channels)), rate


def _read_other(path: Path) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without its C library
        raise DataError(f"{path}: is no WAV file of integers; for other files {EXTRA}") from None
    try:
        with soundfile.SoundFile(str(path)) as file:
            frames, samples, rate = file.frames, file.read(dtype="float32", always_2d=True), file.samplerate
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be read as sound: {str(error).splitlines()[0]}") from None
    except MemoryError as error:
        raise DataError(f"{path}: is longer than memory, or its header is damaged ({error})") from None
    if len(samples) < frames:
        raise DataError(f"{path}: is truncated; its header says {frames} samples, {len(samples)} are there")
    return samples, rate


def _as_float(values: np.ndarray) -> np.ndarray:
    """Integers as −1 … 1, unsigned ones around their middle; floating-point numbers as they are."""
    if values.dtype.kind == "f":
        return values
    if values.dtype.kind not in "iu":
        raise DataError(f"samples of {values.dtype}: must be integers or floating-point numbers")
    middle = 2.0 ** (8 * values.dtype.itemsize - 1)
    return (values - (middle if values.dtype.kind == "u" else 0.0)) / middle


FILTER_KNOTS = 6  # frequencies at which the gain of a random filter is drawn
GRAIN_SECONDS = 0.03  # of sound that keeps its pitch when the tempo changes
FAST = 256  # samples: a DFT of a multiple of them is fast


def augment(
    samples: np.ndarray,
    sampling_rate: int,
    rng: np.random.Generator,
    *,
    speed: float = 0.3,
    tempo: float = 0.4,
    shift_seconds: float = 0.05,
    mask: float = 0.2,
    filter_db: float = 12.0,
    noise_db: tuple[float, float] | None = (10.0, 40.0),
) -> Samples:
    """One random variant of a sound (n), for training on few speakers; the same for the same state of ``rng``.

    In this order, each drawn uniformly:

    speed: played faster by a factor in 1 ± speed, so that pitch, formants, tempo and length change together. By linear
        interpolation, which dulls the highest octave a little and folds back what passes the top. 0: off.
    tempo: spoken faster by a factor in 1 ± tempo, pitch and formants as they are (:func:`stretched`). 0: off.
    shift_seconds: later or earlier by up to so much; zeros move in, and what moves out is lost. 0: off.
    mask: silent for a stretch of up to this share of its time, and 30 dB fainter in a band of up to this share of the
        frequencies, on an axis of their square roots (as SpecAugment, Park et al. 2019, but on samples). 0: off.
    filter_db: through a filter whose gain is up to ± so many decibels at six frequencies, even on that axis, and on
        straight lines between: another microphone, another room. 0: off.
    noise_db: white Gaussian noise at a signal-to-noise ratio between the two, in decibels. None: off.
    """
    if samples.ndim != 1 or len(samples) == 0 or samples.dtype.kind != "f":
        raise ValueError(
            f"samples of shape {samples.shape} and {samples.dtype}: must be one sound (n,) of floating-point numbers; "
            "read_audio makes it"
        )
    for name, share in (("speed", speed), ("tempo", tempo), ("mask", mask)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} = {share}: must be in [0, 1)")
    y = samples.astype(np.float64)
    if speed > 0:
        factor = rng.uniform(1 - speed, 1 + speed)
        y = np.interp(np.arange(max(1, round(len(y) / factor))) * factor, np.arange(len(y)), y)
    if tempo > 0:
        y = stretched(y, rng.uniform(1 - tempo, 1 + tempo), sampling_rate)
    if shift_seconds > 0:
        shift = round(rng.uniform(-shift_seconds, shift_seconds) * sampling_rate)
        shift = max(-len(y), min(len(y), shift))
        zeros = np.zeros(abs(shift))
        y = np.concatenate((zeros, y[: len(y) - shift]) if shift > 0 else (y[-shift:], zeros))
    padded = len(y) + -len(y) % FAST
    axis = np.sqrt(np.linspace(0, 1, padded // 2 + 1))  # of frequencies
    gain = np.ones_like(axis)
    if mask > 0:
        width = round(rng.uniform(0, mask) * len(y))
        start = int(rng.integers(len(y) - width + 1))
        y[start : start + width] = 0
        share = rng.uniform(0, mask)
        low = rng.uniform(0, 1 - share)
        gain[(axis >= low) & (axis < low + share)] = 10 ** (-30 / 20)
    if filter_db > 0:
        knots, decibels = np.linspace(0, 1, FILTER_KNOTS), rng.uniform(-filter_db, filter_db, FILTER_KNOTS)
        gain *= 10 ** (np.interp(axis, knots, decibels) / 20)
    if mask > 0 or filter_db > 0:
        y = np.fft.irfft(np.fft.rfft(y, padded) * gain, padded)[: len(y)]
    if noise_db is not None:
        level = np.sqrt(np.mean(y**2)) * 10 ** (-rng.uniform(*noise_db) / 20)
        y = y + level * rng.standard_normal(len(y))
    return y.astype(np.float32)


def stretched(samples: NDArray[np.float64], factor: float, sampling_rate: int) -> NDArray[np.float64]:
    """A sound (n) faster by a factor, at the same pitch: n/factor samples, rounded, at least one.

    Stretches of 30 ms under a Hann window follow each other every 15 ms; each comes from where it would by the factor,
    or up to 7.5 ms beside it, where it continues the one before best by their product (WSOLA: Verhelst and Roelands
    1993).
    """
    hop = max(1, round(GRAIN_SECONDS / 2 * sampling_rate))
    size, reach, length = 2 * hop, hop // 2, max(1, round(len(samples) / factor))
    window = 0.5 - 0.5 * np.cos(np.pi / hop * np.arange(size))  # two of them, a hop apart, add up to 1
    source = np.concatenate((np.zeros(hop + reach), samples, np.zeros(3 * size)))
    y, at = np.zeros(length + 2 * size), 0
    for i in range(0, length + hop, hop):
        earliest = min(round(i * factor), len(source) - 2 * size - 2 * reach)
        around, continuation = source[earliest:][: size + 2 * reach], source[at + hop :][:size]
        at = earliest + (int(np.argmax(np.correlate(around, continuation, "valid"))) if i > 0 else reach)
        y[i : i + size] += window * source[at : at + size]
    return y[hop : hop + length]


def detect_events(
    probabilities: ArrayLike,
    times: ArrayLike,
    threshold: float | Sequence[float] = 0.5,
    min_seconds: float = 0.0,
    merge_gap_seconds: float = 0.0,
) -> list[tuple[int, float, float, float]]:
    """Events (label, start, end, score) in the order of their starts, from the probabilities of frames.

    An event is a run of frames whose probability reaches the threshold. First, those of a label with a gap of at most
    ``merge_gap_seconds`` between them become one; then those shorter than ``min_seconds`` are dropped. The score is the
    mean probability from start to end.

    Args:
        probabilities: (n, labels), 0 … 1: sigmoids of the logits of an
            :class:`~resonance_nn.models.audio.ResonanceForAudioFrameClassification`.
        times: (n, 2), start and end of each frame in seconds, as its ``frame_times`` gives. Where frames overlap, one
            ends and the next begins in the middle of what they share.
        threshold: one for all labels, or one for each.
    """
    p, spans = np.asarray(probabilities, dtype=np.float64), np.asarray(times, dtype=np.float64)
    if p.ndim != 2 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"probabilities of shape {p.shape}: must be (frames, labels), each 0 … 1; take logits.sigmoid()"
        )
    if spans.shape != (len(p), 2):
        raise ValueError(f"times of shape {spans.shape}: must be ({len(p)}, 2), start and end of each frame")
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=np.float64), p.shape[1:])
    if len(p) == 0:
        return []
    borders = np.concatenate((spans[:1, 0], (spans[:-1, 1] + spans[1:, 0]) / 2, spans[-1:, 1]))  # (n + 1)
    events: list[tuple[int, float, float, float]] = []
    for label in range(p.shape[1]):
        active = np.concatenate(([False], p[:, label] >= thresholds[label], [False]))
        edges = np.flatnonzero(active[1:] != active[:-1])
        runs: list[tuple[int, int]] = []  # first frame, one after the last
        for first, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            if runs and borders[first] - borders[runs[-1][1]] <= merge_gap_seconds + TOLERANCE:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((first, end))
        for first, end in runs:
            if borders[end] - borders[first] >= min_seconds - TOLERANCE:
                score = float(p[first:end, label].mean())
                events.append((label, float(borders[first]), float(borders[end]), score))
    return sorted(events, key=lambda event: (event[1], event[0]))
