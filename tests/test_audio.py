"""Sounds: log-mel spectra against others', what padding may not change, both heads and what goes with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from contract import small_config
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    Wav2Vec2FeatureExtractor,
    pipeline,
)
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

from resonance_nn import ResonanceConfig
from resonance_nn.data.audio import detect_events
from resonance_nn.models.audio import (
    AudioEmbedding,
    AudioEncoder,
    ResonanceForAudioClassification,
    ResonanceForAudioFrameClassification,
    mel_filters,
)
from resonance_nn.ops import mel
from resonance_nn.ops.mel import log_mel, log_mel_reference, mel_frames

HEADS = (ResonanceForAudioClassification, ResonanceForAudioFrameClassification)
MIXERS = (("global_filter",), ("spectral_gate", "reversed:spectral_gate"))
LENGTHS = (1, 2, 3, 63, 64, 65, 257)
front_ends = pytest.mark.parametrize("front_end", ["waveform", "log_mel"])
models = pytest.mark.parametrize(
    ("head", "front_end", "mixers"), [(h, f, m) for h in HEADS for f in ("waveform", "log_mel") for m in MIXERS]
)


def audio_config(**overrides) -> ResonanceConfig:
    fields = dict(sampling_rate=1000, frame_size=8, window_size=32, hop_size=8, num_mel_bins=12, num_labels=3)
    return small_config(**{**fields, **overrides})


def build(head: type[AudioEncoder], dtype: torch.dtype = torch.float64, **overrides) -> AudioEncoder:
    """A model whose maps that begin at 0 have left it."""
    torch.manual_seed(0)
    model = head(audio_config(**overrides)).eval()
    model.to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and not p.any():
                p.normal_(0, 0.2)
    return model


def embedding(front_end: str, **overrides) -> AudioEmbedding:
    model = build(ResonanceForAudioClassification, front_end=front_end, **overrides)
    return model.embed


# --- log-mel spectra


@pytest.mark.parametrize(
    ("rate", "window", "hop", "bins"), [(16000, 400, 160, 64), (8000, 200, 80, 40), (44100, 1102, 441, 64)]
)
def test_log_mel_is_that_of_transformers(rate: int, window: int, hop: int, bins: int):
    F = 2 ** math.ceil(math.log2(window))
    filters = mel_filter_bank(F // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    x = torch.randn(rate // 5 + 17, dtype=torch.float64) * torch.linspace(0, 1, rate // 5 + 17)
    options: dict[str, Any] = dict(frame_length=window, hop_length=hop, fft_length=F, power=2.0, center=False)
    expected = spectrogram(
        x.numpy(),
        window_function(window, "hann"),
        mel_filters=filters,
        log_mel="log",
        dtype=np.dtype(np.float64),
        **options,
    )
    y = log_mel(x[None], torch.from_numpy(filters), window_size=window, hop_size=hop, floor=1e-10)
    assert (y[0].T - torch.from_numpy(expected)).abs().max() < 1e-5  # theirs passes through complex64
    y = log_mel(x[None].float(), torch.from_numpy(filters), window_size=window, hop_size=hop, floor=1e-10)
    assert y.dtype == torch.float32
    assert (y[0].T - torch.from_numpy(expected)).abs().max() < 1e-3


@pytest.mark.parametrize("n", [*LENGTHS, 1000])
@pytest.mark.parametrize(("window", "hop"), [(64, 16), (50, 60), (1, 1)])
def test_fast_form_equals_the_definition(n: int, window: int, hop: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mel, "BLOCK_ELEMENTS", 1000)  # several blocks
    filters = torch.from_numpy(mel_filters(5, window, 1000))
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    arguments: dict[str, Any] = dict(
        window_size=window, hop_size=hop, floor=1e-8, length=torch.tensor([n, max(1, n // 2)])
    )
    y, expected = log_mel(x, filters, **arguments), log_mel_reference(x, filters, **arguments)
    assert y.shape == (2, mel_frames(n, window, hop), 5)
    assert relative(y, expected) < 1e-10
    g = torch.randn_like(y)
    a, b = (torch.autograd.grad((out * g).sum(), x)[0] for out in (y, expected))
    assert (a - b).abs().max() <= 1e-7 * (1 + b.abs().max())


@pytest.mark.parametrize("hop", [3, 10, 16])
def test_a_frame_sees_its_window_and_there_are_as_many_as_said(hop: int):
    window, filters = 10, torch.from_numpy(mel_filters(4, 10, 1000))
    for n in range(1, 45):
        x = torch.randn(1, n, dtype=torch.float64, requires_grad=True)
        y = log_mel(x, filters, window_size=window, hop_size=hop, floor=1e-8)
        assert y.shape[1] == mel_frames(n, window, hop) == int(mel_frames(torch.tensor(n), window, hop))
        for i in range(y.shape[1]):
            seen = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].nonzero().squeeze(1)
            assert all(hop * i < s < hop * i + window for s in seen.tolist())  # the first weight of the window is 0
            assert len(seen) == min(window, n - hop * i) - 1
    assert mel_frames(0, window, hop) == 0


@pytest.mark.parametrize(
    ("rate", "window", "bins"), [(8000, 200, 64), (16000, 400, 128), (8000, 32, 64), (16, 3, 64), (44100, 1102, 8)]
)
def test_white_noise_of_variance_one_has_power_one_in_every_band(rate: int, window: int, bins: int):
    filters = torch.from_numpy(mel_filters(bins, window, rate))
    x = torch.randn(1, 600 * window)
    power = log_mel(x, filters, window_size=window, hop_size=window, floor=1e-8).exp().mean(1)
    assert (power - 1).abs().max() < 0.35
    assert (power - 1).abs().mean() < 0.1


def test_bands_rise_with_pitch():
    filters, t = torch.from_numpy(mel_filters(64, 400, 16000)), torch.arange(1600) / 16000
    tones = torch.stack([torch.sin(2 * math.pi * pitch * t) for pitch in (100, 440, 1000, 3000, 7000)])
    y = log_mel(tones, filters, window_size=400, hop_size=160, floor=1e-8)
    bands = y.mean(1).argmax(1).tolist()
    assert bands == sorted(set(bands))
    centre = (filters * torch.linspace(0, 8000, 257)[:, None]).sum(0) / filters.sum(0)
    assert (centre[bands] / torch.tensor([100, 440, 1000, 3000, 7000]) - 1).abs().max() < 0.3


# --- tokens


@front_ends
def test_frames_of_a_padded_row_are_those_of_the_row_alone(front_end: str):
    embed = embedding(front_end)
    lengths = (*LENGTHS, 0)
    rows = [torch.randn(n, dtype=torch.float64) for n in lengths]
    for where in ("left", "right", "both", "scattered"):
        x, mask = (
            torch.full((len(rows), 300), math.nan, dtype=torch.float64),
            torch.zeros(len(rows), 300, dtype=torch.bool),
        )
        for b, row in enumerate(rows):
            n = len(row)
            start = {"left": 300 - n, "right": 0, "both": (300 - n) // 2}.get(where)
            places = torch.randperm(300)[:n].sort().values if start is None else torch.arange(start, start + n)
            x[b, places], mask[b, places] = row, True
        tokens, real = embed(x, mask)
        assert real is not None
        assert torch.equal(real.sum(1), embed.frame_count(torch.tensor(lengths)))
        assert (real.long().diff(dim=1) <= 0).all()  # right-padded
        for b, row in enumerate(rows[:-1]):
            alone, none = embed(row[None])
            assert none is None
            assert alone.shape[1] == embed.frame_count(len(row)) >= 1
            assert relative(tokens[b, real[b]], alone[0]) < 1e-10


def test_waveform_is_a_linear_map_of_side_by_side_frames():
    embed = embedding("waveform")
    x = torch.randn(2, 20, dtype=torch.float64)
    y, _ = embed(x)
    filled = torch.cat((x, torch.zeros(2, 4, dtype=torch.float64)), dim=1).view(2, 3, 8)
    assert relative(y, filled @ embed.proj.weight.T + embed.offset) < 1e-12


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_log_mel_tokens_at_any_rate(rate: int):
    config = audio_config(front_end="log_mel", sampling_rate=rate, window_size=None, hop_size=None, num_mel_bins=64)
    embed = AudioEmbedding(config)
    assert embed.frame_count(rate) == 98  # a second, in hops of 10 ms
    features = embed._features(torch.randn(1, rate), None)
    assert features.mean().abs() < 0.5
    assert features.std() < 1


@front_ends
def test_times_of_frames(front_end: str):
    model = build(ResonanceForAudioFrameClassification, front_end=front_end)
    times = model.frame_times(60)
    assert len(times) == model.frame_count(60) == model(torch.randn(1, 60, dtype=torch.float64)).logits.shape[1]
    expected = {
        "waveform": [[0, 0.008], [0.008, 0.016], [0.056, 0.06]],
        "log_mel": [[0, 0.032], [0.008, 0.04], [0.024, 0.056]],
    }
    assert np.allclose(times[[0, 1, -1]], expected[front_end])
    assert np.allclose(model.frame_times(5), [[0, 0.005]])


# --- models


@models
def test_padded_row_equals_row_alone(head: type[AudioEncoder], front_end: str, mixers: tuple[str, ...]):
    model = build(head, front_end=front_end, mixers=mixers)
    x = torch.randn(3, 300, dtype=torch.float64)
    mask = torch.ones(3, 300, dtype=torch.long)
    mask[1, :43] = mask[2, 120:] = 0
    with torch.no_grad():
        logits = model(x, mask).logits
        for b in range(3):
            alone = model(x[b : b + 1, mask[b] == 1]).logits
            ours = logits[b : b + 1, : alone.shape[1]] if alone.dim() == 3 else logits[b : b + 1]
            assert relative(ours, alone) < 1e-10
        order = torch.tensor([2, 0, 1])
        assert relative(model(x[order], mask[order]).logits, logits[order]) < 1e-10
        for pooling in ("last", "first"):
            model.config.pooling = pooling
            y = model(x, mask).logits
            assert relative(y[1:2, ..., 0].flatten()[:1], model(x[1:2, 43:]).logits[..., 0].flatten()[:1]) < 1e-10


@models
def test_the_end_of_one_sound_does_not_reach_its_neighbour(head, front_end: str, mixers: tuple[str, ...]):
    model = build(head, front_end=front_end, mixers=mixers)
    x = torch.randn(2, 300, dtype=torch.float64)
    mask = torch.arange(300) < torch.tensor([[300], [230]])
    other = x.clone()
    other[0, -16:] += 1  # the last frame
    other[1, 230:] = math.inf
    with torch.no_grad():
        before, after = model(x, mask).logits, model(other, mask).logits
    n = model.frame_count(230)
    assert relative(after[1, :n], before[1, :n]) < 1e-12
    assert relative(after[0], before[0]) > 1e-6


@models
def test_lengths_and_gradients(head: type[AudioEncoder], front_end: str, mixers: tuple[str, ...]):
    model = build(head, front_end=front_end, mixers=mixers)
    for n in LENGTHS:
        logits = model(torch.randn(2, n, dtype=torch.float64)).logits
        assert torch.isfinite(logits).all()
        assert head is ResonanceForAudioClassification or logits.shape == (2, model.frame_count(n), 3)
    model.train()
    x, mask = torch.randn(2, 257, dtype=torch.float64), torch.arange(257) < torch.tensor([[257], [100]])
    shape = (2,) if head is ResonanceForAudioClassification else (2, model.frame_count(257))
    model(x, mask, labels=torch.randint(0, 3, shape)).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


@models
def test_saved_and_loaded(head, front_end: str, mixers: tuple[str, ...], tmp_path: Path):
    model = build(head, torch.float32, front_end=front_end, mixers=mixers)
    x = torch.randn(2, 257)
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x).logits, model(x).logits)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, labels=None, output_hidden_states=True)
    assert len(y.hidden_states) == 3
    assert torch.isfinite(y.logits).all()
    assert relative(y.logits.float(), model(x).logits) < 0.03
    assert torch.isfinite(head.from_pretrained(tmp_path, dtype=torch.bfloat16)(x.bfloat16()).logits).all()


@front_ends
def test_loss_of_frames_leaves_padding_out(front_end: str):
    model = build(ResonanceForAudioFrameClassification, front_end=front_end)
    x, mask = torch.randn(2, 257, dtype=torch.float64), torch.ones(2, 257, dtype=torch.bool)
    mask[1, :120] = False
    n, m = model.frame_count(257), model.frame_count(137)
    events, classes = torch.randint(0, 2, (2, n, 3)).double(), torch.randint(0, 3, (2, n))
    logits = torch.cat((model(x[:1]).logits[0], model(x[1:, 120:]).logits[0]))
    for labels, expected in (
        (events, torch.nn.functional.binary_cross_entropy_with_logits),
        (classes, torch.nn.functional.cross_entropy),
    ):
        loss = model(x, mask, labels=labels).loss
        assert relative(loss, expected(logits, torch.cat((labels[0], labels[1, :m])))) < 1e-10
        hidden = labels.clone()
        hidden[1, m:] = -100
        assert torch.equal(model(x, mask, labels=hidden).loss, loss)
        hidden[1] = -100
        assert relative(model(x, mask, labels=hidden).loss, expected(logits[:n], labels[0])) < 1e-10
    assert model.config.problem_type is None


def test_one_label_a_frame_is_an_event_unless_told_otherwise():
    model = build(ResonanceForAudioFrameClassification, num_labels=1)
    x, labels = torch.randn(1, 257, dtype=torch.float64), torch.ones(1, 29).double()
    logits = model(x).logits
    assert relative(model(x, labels=labels).loss, -torch.nn.functional.logsigmoid(logits).mean()) < 1e-10
    model.config.problem_type = "regression"
    assert relative(model(x, labels=labels).loss, (logits - 1).square().mean()) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(5),), r"input_values of shape \(5,\).*must be \(sounds, samples\)"),
        ((torch.randn(1, 0),), "one sample or more"),
        ((torch.ones(1, 5, dtype=torch.int16),), "int16: must be .* floating-point"),
        ((torch.randn(2, 5), torch.ones(2, 4)), r"attention_mask of shape \(2, 4\): must be \(2, 5\)"),
        (
            (torch.randn(2, 257), None, torch.ones(2, 30)),
            r"labels of shape \(2, 30\): must be \(2, 29\) or \(2, 29, 3\)",
        ),
    ],
)
def test_what_cannot_be_a_sound(arguments: tuple[Tensor, ...], message: str):
    with pytest.raises(ValueError, match=message):
        build(ResonanceForAudioFrameClassification, torch.float32)(*arguments)


def test_a_window_has_a_sample_at_any_rate():
    embed = AudioEmbedding(audio_config(sampling_rate=10, window_size=None, hop_size=None))
    assert (embed.window_size, embed.hop_size) == (1, 1)
    assert embed(torch.randn(1, 5))[0].shape[:2] == (1, 5)


@front_ends
def test_finds_beeps(front_end: str):
    """Noise with a tone in it somewhere: trained for a moment, the model and ``detect_events`` say when."""
    torch.manual_seed(0)
    config = audio_config(front_end=front_end, num_labels=1, mixers=MIXERS[1], num_hidden_layers=2)
    model = ResonanceForAudioFrameClassification(config)

    def sounds(count: int) -> tuple[Tensor, Tensor, Tensor]:
        start = torch.randint(40, 200, (count, 1))
        t = torch.arange(400)
        on = (t >= start) & (t < start + 150)
        x = 0.3 * torch.randn(count, 400) + on * torch.sin(2 * math.pi * 0.11 * t + 6 * torch.rand(count, 1))
        middle = torch.from_numpy(model.frame_times(400).mean(1) * 1000).round().long()
        return x, on[:, middle, None].float(), start[:, 0]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        x, labels, _ = sounds(8)
        loss = model(x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, _, start = sounds(8)
    with torch.no_grad():
        p = model.eval()(x).logits.sigmoid()
    for b in range(8):
        events = detect_events(p[b], model.frame_times(400), min_seconds=0.05, merge_gap_seconds=0.05)
        assert [label for label, *_ in events] == [0]
        assert abs(events[0][1] - float(start[b]) / 1000) < 0.03
        assert abs(events[0][2] - float(start[b] + 150) / 1000) < 0.03
        assert events[0][3] > 0.5


@front_ends
def test_pipeline(front_end: str, tmp_path: Path):
    AutoConfig.register("resonance", ResonanceConfig, exist_ok=True)
    AutoModelForAudioClassification.register(ResonanceConfig, HEADS[0], exist_ok=True)
    AutoModelForAudioFrameClassification.register(ResonanceConfig, HEADS[1], exist_ok=True)
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES["resonance"] = HEADS[0].__name__  # type: ignore[index]
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=1000, do_normalize=True, return_attention_mask=True)
    model = build(HEADS[0], torch.float32, front_end=front_end, id2label={0: "yes", 1: "no", 2: "hm"})
    model.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    x = (3 + 5 * np.random.default_rng(0).standard_normal(500)).astype(np.float32)
    expected = model(torch.from_numpy((x - x.mean()) / x.std())[None]).logits[0].softmax(0)
    of_objects: Any = pipeline("audio-classification", model=model, feature_extractor=extractor)
    of_folder: Any = pipeline("audio-classification", model=str(tmp_path))
    for classify in (of_objects, of_folder):
        scores = {row["label"]: row["score"] for row in classify(x)}
        assert [scores[label] for label in ("yes", "no", "hm")] == pytest.approx(expected.tolist(), abs=1e-5)
        short = np.ones(3, dtype=np.float32)
        assert len(classify([x, short], batch_size=2)) == 2
    batch = extractor([x, x[:200]], sampling_rate=1000, padding=True, return_tensors="pt")
    loaded = AutoModelForAudioFrameClassification.from_pretrained(tmp_path)
    assert loaded(**batch).logits.shape == (2, loaded.frame_count(500), 3)
