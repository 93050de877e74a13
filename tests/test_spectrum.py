"""Two-sided spectral filters: fast == definition, the octave bands, and what does not depend on the grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import relative
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops import spectrum_2d
from resonance_nn.ops.spectrum import (
    ENERGY_FLOOR,
    max_bands,
    octave_bands,
    spectral_filter,
    spectral_filter_reference,
)
from resonance_nn.ops.spectrum_2d import spectral_filter_2d, spectral_filter_2d_reference


def parameters(*shape: int, J: int, H: int = 2, R: int = 1) -> list[Tensor]:
    """G of the shape, A and a: a gate that moves by a factor of a few."""
    drawn = (torch.randn(H, R, *shape, 2), 0.3 * torch.randn(H, J, J), 0.3 * torch.randn(H, J))
    return [t.double().requires_grad_() for t in drawn]


def assert_equal(y: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values, and gradients of each input, to 1e-10."""
    assert relative(y, expected) < 1e-10
    weight = torch.randn_like(y)
    exact = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad((y * weight).sum(), inputs), exact, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("L", [1, 2, 3, 8, 9, 16, 17, 18, 33, 70])
@pytest.mark.parametrize(("K", "J"), [(1, 1), (7, 3), (16, 2), (16, 5)])
@pytest.mark.parametrize("R", [1, 3])
def test_sequences_equal_the_definition(K: int, J: int, L: int, R: int, poisoned_memory: None):
    v = torch.randn(3, L, 2, 3, dtype=torch.float64, requires_grad=True)
    learned = parameters(K, J=J, R=R)
    length = torch.tensor([L, L // 2, 0])
    for real in (None, length):
        y = spectral_filter(v, *learned, length=real)
        assert_equal(y, spectral_filter_reference(v, *learned, length=real), [v, *learned])


@pytest.mark.parametrize(("Y", "X"), [(1, 1), (3, 2), (2, 9), (4, 6), (7, 5), (8, 12)])
@pytest.mark.parametrize(("K", "bands"), [((1, 1), (1, 1)), ((4, 6), (3, 2)), ((7, 5), (2, 3))])
@pytest.mark.parametrize("R", [1, 3])
def test_images_equal_the_definition(K, bands, Y: int, X: int, R: int, poisoned_memory: None, monkeypatch):
    v = torch.randn(2, Y, X, 2, 3, dtype=torch.float64, requires_grad=True)
    learned = parameters(2 * K[0] - 1, K[1], J=bands[0] * bands[1], R=R)
    y = spectral_filter_2d(v, *learned, num_bands=bands)
    assert_equal(y, spectral_filter_2d_reference(v, *learned, num_bands=bands), [v, *learned])
    monkeypatch.setattr(spectrum_2d, "suits_pairs", lambda v, filters: False)  # through the spectrum, few tokens too
    y = spectral_filter_2d(v, *learned, num_bands=bands)
    assert_equal(y, spectral_filter_2d_reference(v, *learned, num_bands=bands), [v, *learned])


@pytest.mark.parametrize("seed", range(8))
def test_silent_bands_of_few_tokens_are_measured_exactly(seed: int):
    """A row of 64 tokens with as little in some band as there can be, six orders below the whole: the gate of the
    definition, in float32. Energies summed in float32 miss by 1e-4."""
    torch.manual_seed(seed)
    k = torch.arange(64, dtype=torch.float64)
    waves = torch.exp(-1j * torch.pi / 64 * k[:, None] * k)  # (frequency, token)
    bands = octave_bands(torch.pi / 64 * k, 7) * torch.where(k > 0, 2.0, 1.0)
    forms = torch.einsum("ks,jk,kt->jst", waves.conj(), bands.to(waves.dtype), waves).real / 128**2
    silence, tokens = torch.linalg.eigh(forms)  # of each band, ascending
    quiet = int(silence[:, 0].argmin())
    assert silence[quiet, 0] * 64 < 1e-5
    v = (8 * tokens[quiet, :, 0, None, None] * torch.randn(2, 8, dtype=torch.float64))[None, None]
    learned = [t.detach() for t in parameters(1, 64, J=7)]
    exact = spectral_filter_2d_reference(v, *learned, num_bands=(1, 7))
    y = spectral_filter_2d(v.float(), *(t.float() for t in learned), num_bands=(1, 7))
    assert relative(y.double(), exact) < 1e-5


@pytest.mark.parametrize("L", [3, 5, 9])
def test_gradcheck(L: int):
    v = torch.randn(1, L, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spectral_filter, (v, *parameters(4, J=2)))
    v = torch.randn(1, 2, L, 2, 2, dtype=torch.float64, requires_grad=True)
    learned = parameters(3, 4, J=4)
    assert torch.autograd.gradcheck(lambda *inputs: spectral_filter_2d(*inputs, num_bands=(2, 2)), (v, *learned))


@pytest.mark.parametrize("J", range(1, 9))
def test_bands_share_out_every_frequency(J: int):
    """Weights ≥ 0 that sum to 1; trigonometric polynomials of degree 2^{J−1} − 1; the last is the mean over 2^{J−1}."""
    n = 1024
    omega = 2 * torch.pi / n * torch.arange(n, dtype=torch.float64)
    bands = octave_bands(omega, J)
    assert bands.min() >= 0
    assert torch.allclose(bands.sum(0), torch.ones(n, dtype=torch.float64), atol=1e-14)
    taps = torch.fft.ifft(bands).abs()
    assert taps[:, 2 ** (J - 1) : n - 2 ** (J - 1) + 1].max() < 1e-15
    mean = torch.zeros(n, dtype=torch.float64)
    mean[: 2 ** (J - 1)] = 2.0 ** (1 - J)
    assert torch.allclose(bands[-1], torch.fft.fft(mean).abs().square(), atol=1e-14)
    centres = bands[:-1, : n // 2 + 1].argmax(1)  # about an octave apart
    assert all(1.6 < a / b < 2.8 for a, b in itertools.pairwise(centres.tolist()))


@pytest.mark.parametrize("L", [5, 16, 40])
def test_the_gate_reads_the_mean_square_of_real_tokens(L: int):
    """Parseval: with one band E is the mean square of each row's tokens and channels, at any length and padding."""
    v = torch.randn(2, L, 2, 3, dtype=torch.float64)
    G, weight, bias = (t.detach() for t in parameters(16, J=1))
    length = torch.tensor([L, L - 2])
    y = spectral_filter(v, G, weight, bias, length=length)
    plain = spectral_filter(v, G, 0 * weight, 0 * bias, length=length)
    for row, real in enumerate(length):
        energy = v[row, :real].square().mean((0, 2))  # (H)
        gate = 2 * torch.sigmoid(weight[:, 0, 0] * (energy + ENERGY_FLOOR).log() + bias[:, 0])
        assert relative(y[row, :real], gate[:, None] * plain[row, :real]) < 1e-12


def test_not_circular_and_of_finite_reach():
    """An impulse comes out as h, cut where the sequence ends, and K tokens away as nothing."""
    K, L = 8, 30
    G, weight, bias = (t.detach() for t in parameters(K, J=1, H=1))
    h = torch.fft.irfft(F.pad(torch.view_as_complex(G[0, 0]), (0, 1)), n=2 * K)
    for at in (0, 11, L - 1):
        v = torch.zeros(1, L, 1, 1, dtype=torch.float64)
        v[0, at] = 1
        y = spectral_filter(v, G, 0 * weight, bias * 0).flatten()
        for t in range(L):
            expected = h[(t - at) % (2 * K)] if abs(t - at) < K else 0.0
            assert abs(y[t] - expected) < 1e-12


@pytest.mark.parametrize("learned_on", ["coarse", "fine"])
def test_a_finer_grid_of_the_same_picture_gives_the_same_function(learned_on: str):
    """A band-limited field away from the edges, sampled at cell centres: outputs agree where the centres coincide."""
    coarse, fine = (32, 36), (96, 108)  # finer threefold, so that the centre of coarse cell i is that of cell 3i + 1

    def field(grid: tuple[int, int]) -> Tensor:
        y, x = (((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5) for n in grid)
        bump = torch.exp(-100 * (y[:, None].square() + x.square()))
        return torch.stack((bump * (1 + x), bump * torch.cos(9 * y)[:, None]), dim=-1)[None, :, :, None]

    K = coarse if learned_on == "coarse" else fine
    learned = parameters(2 * K[0] - 1, K[1], J=9, H=1)
    with torch.no_grad():
        small = spectral_filter_2d(field(coarse), *learned, num_bands=(3, 3))
        large = spectral_filter_2d(field(fine), *learned, num_bands=(3, 3))
    assert relative(large[:, 1::3, 1::3], small) < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype):
    """Results in the input's dtype; half precision is computed in float32, also inside autocast."""
    v = torch.randn(2, 20, 2, 3).to(dtype)
    learned = [t.detach().float() for t in parameters(16, J=3)]
    exact = spectral_filter(v.double(), *learned)
    with torch.autocast("cpu", torch.bfloat16):
        y = spectral_filter(v, *learned)
    assert y.dtype == dtype
    assert relative(y, exact.to(dtype)) <= {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 0.01)


def test_too_many_bands():
    assert [max_bands(K) for K in (1, 2, 3, 4, 7, 8, 2048)] == [1, 2, 2, 3, 3, 4, 12]
    v = torch.randn(1, 5, 2, 3)
    with pytest.raises(ValueError, match="4 octave bands of 7 frequencies: must be 1 to 3"):
        spectral_filter(v, *(t.float() for t in parameters(7, J=4)))
    with pytest.raises(ValueError, match="num_bands: 3 octave bands of 2 frequencies"):
        spectral_filter_2d(v[:, None], *(t.float() for t in parameters(3, 4, J=9)), num_bands=(3, 3))
