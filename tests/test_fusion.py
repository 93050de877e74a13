"""Fusion of modalities: the algebra of both kinds, and that a missing modality is as if there were no slot for it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import relative
from contract import small_config
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.fusion import FUSIONS, Fusion, HolographicFusion, SpectralFusion, drop_modalities
from resonance_nn.ops.fusion import (
    band_energies,
    band_gates,
    extent_modes,
    extent_modes_reference,
    extent_signal,
    holographic_superposition,
    holographic_superposition_reference,
    log_bands,
    masked_softmax,
    phase_alignment,
    rotate_modes,
)

KINDS = ("text", "image", "audio")
LENGTHS = {"text": 9, "image": 16, "audio": 40}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(KINDS, size)]
D = 32
fusions = pytest.mark.parametrize("name", FUSIONS)
subsets = pytest.mark.parametrize("names", SUBSETS, ids="+".join)


def make(name: str, modalities: tuple[str, ...] = KINDS, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A fusion whose parameters that begin at 0 or 1 have left it."""
    torch.manual_seed(0)
    module = FUSIONS[name](small_config(modalities=modalities, fusion=name, num_modes=12, num_bands=5, **overrides))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return module.to(dtype)


def smaller(module: Fusion, name: str, modalities: tuple[str, ...]) -> Any:
    """Of fewer modalities, with the same weights."""
    small = make(name, modalities)
    weights = module.state_dict()
    assert set(small.state_dict()) <= set(weights)
    small.load_state_dict({key: weights[key] for key in small.state_dict()})
    return small


def inputs_of(name: str, B: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {m: (B, D) if name == "holographic" else (B, LENGTHS[m], D) for m in KINDS}
    return {m: torch.randn(shape, generator=generator, dtype=torch.float64) for m, shape in shapes.items()}


def every_subset() -> Tensor:
    """(7, 3): an example with each."""
    return torch.tensor([[m in names for m in KINDS] for names in SUBSETS])


def gradients(module: Fusion, y: Tensor) -> dict[str, Tensor | None]:
    weights = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad((y * weights).sum(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


# --- what both kinds promise


@subsets
@fusions
def test_a_missing_modality_is_as_if_there_were_no_slot_for_it(name: str, names: tuple[str, ...]):
    """By itself and in a batch with every other subset, outputs and gradients; whatever stands in the empty slots."""
    whole, x = make(name), inputs_of(name, len(SUBSETS))
    small, row = smaller(whole, name, names), SUBSETS.index(names)
    present = every_subset()
    for m, column in zip(KINDS, present.T, strict=True):
        x[m][~column] = math.nan
    one = {m: x[m][row : row + 1] for m in names}
    expected = small(one)
    exact_gradients = gradients(small, expected)
    of_batch = whole(x, present=present)[row : row + 1]
    left_out = whole(one)
    for y in (of_batch, left_out):
        assert relative(y, expected) < 1e-12
        found = gradients(whole, y)
        for key, exact in exact_gradients.items():
            if exact is None or float(exact.abs().max()) < 1e-13:  # of what has no effect for want of others
                assert found[key] is None or float(found[key].abs().max()) < 1e-13
            else:
                assert found[key] is not None, key
                assert relative(found[key], exact) < 1e-10, key
        for key in set(found) - set(dict(small.named_parameters())):
            assert found[key] is None or not found[key].any(), key


@fusions
def test_present_by_name_is_present_by_column(name: str):
    module, x, present = make(name), inputs_of(name, 7), every_subset()
    y = module(x, present=present)
    assert torch.equal(module(x, present=dict(zip(KINDS, present.T, strict=True))), y)
    every = torch.ones(7, 3, dtype=torch.bool)
    assert torch.equal(module(x, present={"image": every[:, 0]}), module(x))
    assert torch.equal(module(x, present=every), module(x))
    assert (
        relative(
            module({m: x[m] for m in ("audio", "text")}, present=every),
            smaller(module, name, ("text", "audio"))({m: x[m] for m in ("text", "audio")}),
        )
        < 1e-12
    )


@fusions
def test_the_order_of_modalities_and_of_examples_does_not_matter(name: str):
    module, x, present = make(name), inputs_of(name, 7), every_subset()
    y = module(x, present=present)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    assert relative(module({m: x[m][order] for m in reversed(KINDS)}, present=present[order]), y[order]) < 1e-12
    turned = smaller(module, name, KINDS[::-1])
    assert relative(turned(x, present=present.flip(1)), y) < 1e-12


@fusions
def test_an_example_moves_no_other(name: str):
    module, x = make(name), inputs_of(name, 4)
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).bool()
    leaves = {m: t.clone().requires_grad_() for m, t in x.items()}
    y = module(leaves, present=present)
    found = torch.autograd.grad(y[1].square().sum(), list(leaves.values()))
    for m, gradient in zip(leaves, found, strict=True):
        assert gradient[[0, 2, 3]].abs().max() == 0, m
        assert bool(gradient[1].any()) == (m != "image")


@fusions
def test_weights_sum_to_1_over_those_present(name: str):
    module, x, present = make(name), inputs_of(name, 7), every_subset()
    weights = module.superpose(x, present)[1] if name == "holographic" else module.fuse_modes(x, present=present)[1]
    assert relative(weights.sum(1), torch.ones_like(weights.sum(1))) < 1e-12
    assert (weights[~present] == 0).all()
    assert (weights[present] > 0).all()


@fusions
def test_every_parameter_is_trained_from_the_start(name: str):
    torch.manual_seed(0)
    module = FUSIONS[name](small_config(modalities=KINDS, fusion=name)).double()
    for key, gradient in gradients(module, module(inputs_of(name, 3))).items():
        assert gradient is not None, key
        assert gradient.abs().max() > 0, key
    assert not any(tensor.is_complex() for tensor in module.state_dict().values())


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@fusions
def test_bf16_autocast_is_finite_and_near_float32(name: str, scale: float):
    module = make(name, dtype=torch.float32)
    x = {m: scale * t.float() for m, t in inputs_of(name, 7).items()}
    exact = module(x, present=every_subset())
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, present=every_subset())
    assert y.dtype == torch.float32
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert torch.isfinite(y).all()
    assert relative(y, exact) < 0.1
    assert relative(module(x), make(name)({m: t.double() for m, t in x.items()}).float()) < 1e-4


@fusions
def test_in_half_precision_it_stays_near(name: str):
    x = {m: t.bfloat16() for m, t in inputs_of(name, 7).items()}
    y = make(name, dtype=torch.bfloat16)(x, present=every_subset())
    exact = make(name, dtype=torch.float32)({m: t.float() for m, t in x.items()}, present=every_subset())
    assert relative(y, exact) < 0.15


@pytest.mark.parametrize("value", [-1e4, -30.0, 30.0, 1e4])
@fusions
def test_any_finite_parameters_give_finite_outputs(name: str, value: float):
    module = make(name, dtype=torch.float32)
    x = {m: t.float() for m, t in inputs_of(name, 7).items()}
    for key, p in module.named_parameters():
        kept = p.detach().clone()
        with torch.no_grad():
            p.fill_(value)
        module.zero_grad()
        y = module(x, present=every_subset())
        y.mean().backward()
        assert torch.isfinite(y).all(), key
        assert all(torch.isfinite(q.grad).all() for q in module.parameters()), key
        with torch.no_grad():
            p.copy_(kept)


@fusions
def test_wrong_inputs(name: str):
    module, x = make(name), inputs_of(name, 3)
    present = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="'smell' is no modality of this model: modalities = text, image, audio"):
        module({**x, "smell": x["text"]})
    with pytest.raises(ValueError, match="'smell' is no modality"):
        module(x, present={"smell": present[:, 0]})
    with pytest.raises(ValueError, match=r"present of shape \(3, 2\): must be \(3, 3\)"):
        module(x, present=present[:, :2])
    with pytest.raises(ValueError, match=r"present\['text'\] of shape \(2,\): must be \(3,\)"):
        module(x, present={"text": present[:2, 0]})
    with pytest.raises(ValueError, match="example 1 has none of text, image, audio"):
        module(x, present=present.index_fill(0, torch.tensor(1), False))
    with pytest.raises(ValueError, match="example 2 has none of text, which are given"):
        module({"text": x["text"]}, present={"text": torch.tensor([True, True, False])})
    with pytest.raises(ValueError, match="image: 2 examples beside 3 of text"):
        module({**x, "image": x["image"][:2]})
    with pytest.raises(ValueError, match=r"audio of shape .*: must be \(B, .*D\)"):
        module({**x, "audio": x["audio"][..., :5]})
    with pytest.raises(ValueError, match="no inputs: give one or more of text, image, audio"):
        module({})


def test_dropping_modalities():
    torch.manual_seed(0)
    present = every_subset().repeat(4000, 1)
    kept = drop_modalities(present, 0.4)
    assert not (kept & ~present).any()
    assert kept.any(1).all()
    two = kept[present.sum(1) == 2]
    both, one = two.sum(1).eq(2).double().mean(), two.double().sum() / len(two)
    assert abs(both - 0.36) < 0.02
    assert abs(one - (2 * 0.36 + 0.64)) < 0.02
    assert abs(kept[6::7].double().mean(0) - kept[6::7].double().mean()).max() < 0.03  # none is preferred
    assert torch.equal(drop_modalities(present, 0.0), present)
    assert not drop_modalities(torch.zeros(5, 3, dtype=torch.bool), 0.5).any()
    with pytest.raises(ValueError, match=r"modality_dropout = 1.0: must be in \[0, 1\)"):
        drop_modalities(present, 1.0)


def test_masked_softmax():
    scores = torch.randn(50, 4, dtype=torch.float64) * 1e3
    present = torch.rand(50, 4) < 0.5
    present[0] = False
    w = masked_softmax(scores, present)
    assert (w[~present] == 0).all()
    for row in range(50):
        assert torch.equal(w[row][present[row]], scores[row][present[row]].softmax(0)) or not present[row].any()


# --- holographic


@pytest.mark.parametrize("width", [1, 2, 7, 32])
def test_superposition_is_its_definition(width: int):
    M, present = 3, every_subset()
    values = torch.randn(7, M, width, dtype=torch.float64, requires_grad=True)
    roles = torch.randn(M, width, dtype=torch.float64)
    scores = torch.randn(7, M, dtype=torch.float64, requires_grad=True)
    results = [
        f(values, roles, scores, present) for f in (holographic_superposition, holographic_superposition_reference)
    ]
    for fast, exact in zip(*results, strict=True):
        assert relative(fast, exact) < 1e-12
    found, expected = (torch.autograd.grad(c.square().sum() + w.square().sum(), (values, scores)) for c, w in results)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("width", [32, 40, 72])
def test_roles_are_unitary_fixed_and_the_same_in_every_model(width: int):
    module = make("holographic", hidden_size=width, num_heads=1)
    again = make("holographic", ("audio", "text"), hidden_size=width, num_heads=1)
    for m in KINDS:
        role = module.slots[m].role
        spectrum = torch.fft.fft(role)
        assert relative(spectrum.abs(), torch.ones_like(role)) < 1e-6  # kept in float32
        assert abs(spectrum[width // 2].imag) + abs(spectrum[0].imag) < 1e-6
        x = torch.randn(5, width, dtype=torch.float64)
        trace, _ = module.superpose({m: x})
        assert relative(module.unbind(trace, m), module.slots[m](x)[0]) < 1e-12  # made exact where they are used
        assert m == "image" or torch.equal(role, again.slots[m].role)
    assert not any("role" in key for key, _ in module.named_parameters())
    assert sum("role" in key for key in module.state_dict()) == 3


def test_unbinding_recalls_up_to_crosstalk():
    torch.manual_seed(0)
    module = HolographicFusion(small_config(modalities=KINDS, hidden_size=1024, num_heads=16)).double()
    B = 50
    x = {m: torch.randn(B, 1024, dtype=torch.float64) for m in KINDS}
    for names in SUBSETS:
        trace, weights = module.superpose({m: x[m] for m in names})
        expected = 1 / math.sqrt(len(names))  # with equal weights, as at first
        assert torch.equal(weights > 0, torch.tensor([m in names for m in KINDS]).expand(B, -1))
        assert abs(trace.square().mean().item() - 1) < 0.02  # as long as one alone
        for m in names:
            y, u = module.unbind(trace, m), module.slot(m)(x[m])[0]
            assert abs(F.cosine_similarity(y, u).mean().item() - expected) < 0.01
            for other in set(names) - {m}:
                assert abs(F.cosine_similarity(y, module.slot(other)(x[other])[0]).mean().item()) < 0.02
    with pytest.raises(ValueError, match="'smell' is no modality"):
        module.unbind(trace, "smell")


def test_the_weight_of_a_modality_is_its_cosine():
    module = make("holographic", hidden_size=512, num_heads=8)
    with torch.no_grad():
        for p, value in zip((module.slots[m].prior for m in KINDS), (1.0, 0.0, -1.0), strict=True):
            p.fill_(value)
    x = {m: torch.randn(20, 512, dtype=torch.float64) for m in KINDS}
    trace, w = module.superpose(x)
    share = w / w.square().sum(1, keepdim=True).sqrt()
    for i, m in enumerate(KINDS):
        cosine = F.cosine_similarity(module.unbind(trace, m), module.slot(m)(x[m])[0])
        assert (cosine - share[:, i]).abs().mean() < 0.1


# --- spectral


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
