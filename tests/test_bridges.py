"""The bridges alone, and that a model learns to say what it can only know through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative
from contract import small_config
from torch.nn import functional as F

from resonance_nn import ResonanceConfig
from resonance_nn.bridges import BRIDGES, MemoryBridge, SpectralBridge
from resonance_nn.models.seq2seq import ResonanceForConditionalGeneration
from resonance_nn.ops.fusion import extent_modes_reference
from resonance_nn.ops.spectrum import ENERGY_FLOOR
from resonance_nn.optim import build_optimizer


def test_memory_is_the_delta_rule_over_the_source():
    torch.manual_seed(0)
    bridge, source = MemoryBridge(small_config()).double(), torch.randn(2, 90, 32, dtype=torch.float64)
    H, K, P = 2, 16, 16
    k, v = bridge.source_proj(source).split((H * K, 32), -1)
    w = bridge.conv.weight  # (7, H·K), the fourth is a token's own
    neighbours = F.pad(k, (0, 0, 3, 3))
    k = torch.stack([w[j] * neighbours[:, 6 - j : 96 - j] for j in range(7)]).sum(0)
    k = F.normalize(F.silu(k).view(2, 90, H, K), dim=-1)
    v, beta = v.view(2, 90, H, P), torch.sigmoid(bridge.beta_proj(source))
    S = torch.zeros(2, H, K, P, dtype=torch.float64)
    for s in range(90):
        error = v[:, s] - (k[:, s, :, None] @ S).squeeze(2)
        S = S + beta[:, s, :, None, None] * k[:, s, :, :, None] * error[:, :, None]
    assert relative(bridge.write(source), S) < 1e-4  # UNIT_EPS


@torch.no_grad()
def test_spectral_is_the_gated_modes_of_the_source():
    torch.manual_seed(0)
    bridge, source = SpectralBridge(small_config()).double(), torch.randn(2, 40, 32, dtype=torch.float64)
    length = torch.tensor([40, 5])
    source[1, 5:] = 0
    S, N, J = bridge.write(source, length), 8, bridge.gate_bias.shape[1]
    plain = torch.stack(
        [extent_modes_reference(bridge.value_proj(source[b : b + 1, :n]), N)[0] for b, n in ((0, 40), (1, 5))]
    )
    plain = plain.view(2, N, 2, 2, 16).permute(0, 3, 2, 1, 4).reshape(2, 2, 2 * N, 16)  # (B, H, [Re | Im], P)
    assert relative(S, plain) < 1e-12
    bridge.gate_bias[0, J - 1], bridge.gate_weight[1, 0, 0] = -1.0, 0.5
    gated = bridge.write(source, length)
    last = [k for k, j in enumerate(bridge.bands) if j == J - 1]
    of_band = [*last, *(N + k for k in last)]
    others = [i for i in range(2 * N) if i not in of_band]
    assert relative(gated[:, 0, of_band], 2 * torch.sigmoid(torch.tensor(-1.0)) * plain[:, 0, of_band]) < 1e-6
    assert relative(gated[:, 0, others], plain[:, 0, others]) < 1e-12
    energy = plain[:, 1, 0].square().mean(-1)  # of the mean, k = 0, a band of its own
    gate = 2 * torch.sigmoid(0.5 * (energy + ENERGY_FLOOR).log())
    assert relative(gated[:, 1, 0], gate[:, None] * plain[:, 1, 0]) < 1e-12
    assert relative(gated[:, 1, 1:], plain[:, 1, 1:]) < 1e-12


@pytest.mark.parametrize("bridge", BRIDGES)
@torch.no_grad()
def test_what_is_read_does_not_grow_with_the_source(bridge: str):
    torch.manual_seed(0)
    of = BRIDGES[bridge](small_config()).double()
    x, source = torch.randn(1, 50, 32).double(), torch.randn(1, 20, 32).double()
    y = of.read(x, of.write(source))
    repeated = of.read(x, of.write(source.repeat(1, 50, 1)))
    assert 0.5 < float(repeated.norm() / y.norm()) < 2


def accuracy_of_reversing(bridge: str, steps: int) -> float:
    """Of the tokens that a small model says when asked for 8 random ones of 19 in reverse order."""
    torch.manual_seed(0)
    config = ResonanceConfig(
        vocab_size=20,
        hidden_size=64,
        num_heads=2,
        num_hidden_layers=1,
        num_encoder_layers=1,
        initial_context=16,
        bridge=bridge,
        mixers=("spectral_gate",),
        bos_token_id=0,
    )
    model: Any = ResonanceForConditionalGeneration(config).train()
    optimizer = build_optimizer(model, lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 10) * (1 - i / steps))
    for _ in range(steps):
        source = torch.randint(1, 20, (64, 8))
        loss = model(source, labels=source.flip(1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    source = torch.randint(1, 20, (100, 8))
    said = model.eval().generate(source, max_new_tokens=8, do_sample=False)[:, 1:]
    return (said == source.flip(1)).double().mean().item()


def test_the_memory_carries_what_was_said():
    assert accuracy_of_reversing("memory", 200) > 0.95


def test_the_modes_carry_what_was_said():
    assert accuracy_of_reversing("spectral", 30) > 0.25  # by chance: 0.05
