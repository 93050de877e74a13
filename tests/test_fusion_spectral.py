"""Spectral fusion: the modes of an extent, bands, alignment of phases, padding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import relative
from fusion_cases import KINDS, LENGTHS, D, every_subset, inputs_of, make
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.fusion import SpectralFusion
from resonance_nn.ops.fusion import (
    band_energies,
    band_gates,
    extent_modes,
    extent_modes_reference,
    extent_signal,
    log_bands,
    phase_alignment,
    rotate_modes,
)


@pytest.mark.parametrize("num_modes", [1, 2, 7, 16])
def test_modes_are_their_definition_whatever_the_padding(num_modes: int):
    lengths = [*range(1, 12), 33, 64, 65, 0]
    x = torch.randn(len(lengths), 65, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.stack([torch.randperm(65) < n for n in lengths])  # anywhere
    F_ = extent_modes(x, num_modes, mask)
    exact = extent_modes_reference(x, num_modes, mask)
    assert relative(F_, exact) < 1e-12
    assert F_.shape == (len(lengths), num_modes, 2, 3)
    assert (F_[-1] == 0).all()
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), x) for t in (F_, exact)), strict=True):
        assert relative(a, b) < 1e-10
    assert relative(extent_modes(x, num_modes), extent_modes_reference(x, num_modes)) < 1e-12
    for row, n in enumerate(lengths[:-1]):
        alone = extent_modes(x[row : row + 1, mask[row]], num_modes)
        assert relative(F_[row : row + 1], alone) < 1e-12
        if n <= 2 * num_modes - 1:  # then nothing is lost
            assert relative(extent_signal(alone, n), x[row : row + 1, mask[row]]) < 1e-12


def test_modes_belong_to_the_extent_not_to_the_tokens():
    """A wave of the extent has the same modes however finely it is sampled, and to the end of a long row."""
    for n in (40, 257, 5000):
        s = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        wave = 3 + 2 * torch.cos(2 * math.pi * 5 * s + 0.7)
        modes = extent_modes(wave[None, :, None], 8)[0, :, :, 0]
        expected = torch.zeros(8, 2, dtype=torch.float64)
        expected[0, 0] = 3
        expected[5] = torch.tensor([math.cos(0.7), math.sin(0.7)], dtype=torch.float64)
        assert relative(modes, expected) < 1e-10
        assert relative(extent_modes(wave[None, :, None].float(), 8)[0, :, :, 0], expected) < 1e-5


@pytest.mark.parametrize(("K", "J"), [(1, 1), (1, 8), (2, 8), (5, 8), (8, 8), (9, 8), (16, 8), (32, 8), (100, 3)])
def test_bands_are_log_spaced_and_none_is_empty(K: int, J: int):
    bands = log_bands(K, J)
    assert len(bands) == K
    assert sorted(bands) == bands
    assert set(bands) == set(range(min(J, K)))
    assert bands.count(0) == 1 or min(J, K) == 1
    if (K, J) == (32, 8):
        assert [bands.count(j) for j in range(8)] == [1, 1, 1, 1, 3, 5, 8, 12]


def test_band_energies_add_up_to_the_mean_square():
    x = torch.randn(4, 31, 6, dtype=torch.float64)
    energy = band_energies(extent_modes(x, 16), log_bands(16, 5))
    assert energy.shape == (4, 5)
    assert relative(energy.sum(-1), x.square().mean((1, 2))) < 1e-12


def random_modes(B: int = 3, M: int = 3, K: int = 12) -> tuple[Tensor, Tensor, list[int]]:
    bands = log_bands(K, 5)
    weights = torch.randn(B, M, 5, dtype=torch.float64).softmax(1)
    return torch.randn(B, M, K, 2, 8, dtype=torch.float64), weights, bands


def pairs_of(M: int = 3, J: int = 5, coupling: float | None = None) -> tuple[Tensor, Tensor]:
    s, lag = torch.rand(M, M, J, dtype=torch.float64), torch.randn(M, M, J, dtype=torch.float64)
    s = (s + s.transpose(0, 1)) / 2 if coupling is None else torch.full_like(s, coupling)
    return s, lag - lag.transpose(0, 1)


def magnitudes(modes: Tensor) -> Tensor:
    return modes.square().sum(-2)


def test_alignment_turns_phases_and_keeps_magnitudes():
    modes, weights, bands = random_modes()
    angle = phase_alignment(modes, weights, *pairs_of(), bands)
    assert (angle != 0).all()
    assert angle.abs().max() < math.pi
    turned = rotate_modes(modes, angle, bands)
    assert relative(magnitudes(turned), magnitudes(modes)) < 1e-12
    z, y = (torch.view_as_complex(t.transpose(-1, -2).contiguous()) for t in (modes, turned))
    assert relative(torch.view_as_real(y), torch.view_as_real(z * torch.exp(1j * angle[..., bands, None]))) < 1e-12


def test_alignment_is_its_definition():
    modes, weights, bands = random_modes(B=1)
    s, lag = pairs_of()
    angle = phase_alignment(modes, weights, s, lag, bands)
    z = torch.view_as_complex(modes[0].transpose(-1, -2).contiguous())  # (M, K, D)
    for m, j in itertools.product(range(3), range(5)):
        mine = [k for k in range(12) if bands[k] == j]
        expected = 0.0
        for n in set(range(3)) - {m}:
            a, b = z[m, mine].flatten(), z[n, mine].flatten()
            C = (a * b.conj()).sum() / (a.abs().square().sum() * b.abs().square().sum()).sqrt()
            theta = 2 * torch.angle(1 + s[m, n, j] * C.conj() * torch.exp(1j * lag[m, n, j]))
            expected = expected + float(weights[0, n, j] * theta)
        assert abs(float(angle[0, m, j]) - expected) < 1e-5


def test_with_strong_coupling_coherent_modalities_meet_at_their_mean_phase():
    base, weights, bands = random_modes(M=1)
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)[None, :, None].expand(3, 3, 5)
    phases = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
    modes = rotate_modes(base.expand(-1, 3, -1, -1, -1), phases[None, :, None].expand(3, 3, 5), bands)
    coupling, lag = pairs_of(coupling=1.0)
    angle = phase_alignment(modes, weights, coupling, 0 * lag, bands)
    mean = (weights[0, :, 0] * phases).sum()
    assert relative(angle, (mean - phases)[None, :, None].expand(3, 3, 5)) < 1e-4
    assert phase_alignment(modes, weights, 0 * coupling, lag, bands).abs().max() == 0


def test_a_modality_alone_is_not_turned():
    module, x = make("spectral"), inputs_of("spectral", 7)
    _, weights, angle = module.fuse_modes(x, present=every_subset())
    alone = every_subset().sum(1) == 1
    assert (angle[alone] == 0).all()
    assert (weights[alone].amax(1) == 1).all()
    assert (angle[~every_subset()] == 0).all()
    assert (angle[~alone][every_subset()[~alone]] != 0).any(1).all()


def test_pairs_turn_each_other_by_opposite_angles():
    """Σ_m w_m φ_m = 0, lags and all: the mean phase stays."""
    module, x = make("spectral"), inputs_of("spectral", 7)
    _, weights, angle = module.fuse_modes(x, present=every_subset())
    assert angle.abs().max() > 0.01
    assert (weights * angle).sum(1).abs().max() < 1e-12


def test_gates_are_driven_by_the_own_spectrum():
    energy = torch.rand(4, 3, 5, dtype=torch.float64)
    weight, bias = torch.randn(3, 5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    gates = band_gates(energy, weight, bias)
    expected = 2 * torch.sigmoid(weight[1] @ (energy[2, 1] + 1e-6).log() + bias[1])
    assert relative(gates[2, 1], expected) < 1e-12
    assert (band_gates(energy, 0 * weight, 0 * bias) == 1).all()


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padded_tokens_equal_tokens_alone(where: str):
    module: SpectralFusion = make("spectral")
    x, real = inputs_of("spectral", 4), {"text": 5, "image": 16, "audio": 23}
    masks: dict[str, Tensor | None] = {"image": None}
    for m in ("text", "audio"):
        n, r = LENGTHS[m], real[m]
        mask = torch.ones(4, n, dtype=torch.bool)
        mask[1, {"left": slice(0, n - r), "right": slice(r, n), "middle": slice(2, 2 + n - r)}[where]] = False
        masks[m] = mask
    y = module(x, masks)
    alone = {m: x[m][1:2] if masks[m] is None else x[m][1:2, masks[m][1]] for m in KINDS}
    assert relative(y[1:2], module(alone)) < 1e-10
    noisy = {m: t if masks[m] is None else t.masked_fill(~masks[m][..., None], math.nan) for m, t in x.items()}
    assert relative(module(noisy, masks), y) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 257])
def test_any_number_of_tokens(n: int):
    module = make("spectral")
    x = {"text": torch.randn(2, n, D, dtype=torch.float64), "image": torch.randn(2, 5, D, dtype=torch.float64)}
    y = module(x)
    assert torch.isfinite(y).all()
    padded = {**x, "text": F.pad(x["text"], (0, 0, 3, 4))}
    mask = F.pad(torch.ones(2, n), (3, 4))
    assert relative(module(padded, {"text": mask}), y) < 1e-10


def test_wrong_masks():
    module, x = make("spectral"), inputs_of("spectral", 2)
    with pytest.raises(ValueError, match=r"mask of text, of shape \(2, 4\): must be \(2, 9\)"):
        module(x, {"text": torch.ones(2, 4)})
    with pytest.raises(ValueError, match=r"mask of audio.* left out, as is the input"):
        module({"text": x["text"]}, {"audio": torch.ones(2, 40)})
    with pytest.raises(ValueError, match=r"text of shape \(2, 0, 32\): must be \(B, n, D\) with n ≥ 1"):
        module({"text": x["text"][:, :0]})
