"""Holographic fusion: roles, superposition, and what unbinding recalls."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from contract import small_config
from fusion_cases import KINDS, SUBSETS, every_subset, make
from torch.nn import functional as F

from resonance_nn.fusion import HolographicFusion
from resonance_nn.ops.fusion import (
    holographic_superposition,
    holographic_superposition_reference,
)


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
