"""``holographic`` against its definition, and the gates that turn a state by a token's own angles."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from contract import VARIANTS, make_mixer
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.mixers import HolographicMixer
from resonance_nn.mixers.base import turning_angle
from resonance_nn.mixers.holographic import MIN_LOG_DECAY

OPTIONS = [
    *(overrides for name, overrides in VARIANTS if name == "holographic"),
    {"rotation": "step"},
    {"decay": "channel", "rotation": "token", "num_modes": 5},
    {"decay": "none", "rotation": "token"},
    {"erase": "none", "rotation": "token"},
    {"erase": "hermitian", "decay": "channel", "rotation": "token"},
]


def randomised(**overrides) -> HolographicMixer:
    """With every parameter away from the zeros and ones that some start at."""
    mixer = make_mixer("holographic", **overrides)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return mixer


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def definition(m: HolographicMixer, x: Tensor) -> Tensor:
    """The docstring's equations, a token at a time; a state that turns is complex, [re | im]."""
    B, L, D = x.shape
    H, N, P, p = m.num_heads, m.num_modes, m.head_dim, dict(m.named_parameters())
    K = 2 * N
    qkv, z = (x @ p["in_proj.weight"].T).split(m.sizes, dim=-1)
    taps = p["conv.weight"]
    before = F.pad(qkv, (0, 0, len(taps) - 1, 0))
    qkv = F.silu(sum(taps[j] * before[:, len(taps) - 1 - j :][:, :L] for j in range(len(taps))))
    q, k, v = (t.view(B, L, H, -1) for t in qkv.split((H * K, H * K, D), dim=-1))
    q, k = unit(q) / math.sqrt(K), unit(k)
    delta = F.softplus(x @ p["step_proj.weight"].T + p["step_bias"]) if "step_bias" in p else None
    log_decay = torch.zeros(B, L, H, 1, dtype=x.dtype)
    if m.decay == "head":
        log_decay = -(delta * F.softplus(p["damping"]))[..., None]
    elif m.decay == "channel":
        score = m.decay_proj(x).view(B, L, H, -1) + p["decay_bias"]
        log_decay = MIN_LOG_DECAY * torch.sigmoid(score)
    angle = torch.zeros(B, L, H, N, dtype=x.dtype)
    if m.rotation == "step":
        angle = delta[..., None] * p["frequency"]
    elif m.rotation == "token":
        scores = (x @ p["angle_proj.weight"].T).view(B, L, 2, H, -1)
        a, b = (1.02 * torch.sigmoid(scores - 4) - 0.01).clamp(0, 1).unbind(2)
        angle[..., : (N + 1) // 2] = math.pi * (a - b)
    if m.erase in ("delta", "none"):
        beta = m.max_beta * torch.sigmoid(x @ p["beta_proj.weight"].T)[..., None]
        erase, v = (0 if m.erase == "none" else beta) * k, beta * v
    else:
        e, w = torch.sigmoid(m.gates_proj(x)).view(B, L, H, -1).split((K if m.erase == "gated" else N, P), dim=-1)
        erase, v = (torch.cat((e, e), dim=-1) if m.erase == "hermitian" else e) * k, w * v
    decay = log_decay.exp().expand(B, L, H, log_decay.shape[-1])
    decay = decay.expand(B, L, H, K) if decay.shape[-1] in (1, K) else torch.cat((decay, decay), dim=-1)
    S, outputs = torch.zeros(B, H, K, P, dtype=x.dtype), []
    for t in range(L):
        S = decay[:, t, :, :, None] * S
        turn = torch.polar(torch.ones_like(angle[:, t]), angle[:, t])[..., None]
        turned = torch.complex(*S.chunk(2, dim=2)) * turn
        if m.erase == "hermitian":
            kc, ec, qc = (torch.complex(*u[:, t].chunk(2, dim=-1)) for u in (k, erase, q))
            recalled = (ec.conj()[..., None] * turned).sum(2)
            turned = turned + kc[..., None] * (v[:, t] - recalled)[:, :, None]
            outputs.append((qc.conj()[..., None] * turned).sum(2).real)
            S = torch.cat((turned.real, turned.imag), dim=2)
            continue
        S = torch.cat((turned.real, turned.imag), dim=2)
        S = S + k[:, t][..., None] * (v[:, t] - (erase[:, t][..., None] * S).sum(2))[:, :, None]
        outputs.append((q[:, t][..., None] * S).sum(2))
    y = torch.stack(outputs, 1)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + m.norm.eps) * p["norm.weight"]
    return (y.flatten(2) * F.silu(z)) @ p["out_proj.weight"].T


@pytest.mark.parametrize("overrides", OPTIONS)
def test_equals_its_definition(overrides: dict):
    mixer, x = randomised(**overrides), torch.randn(2, 90, 32, dtype=torch.float64)
    assert relative(mixer(x)[0], definition(mixer, x)) < 1e-10


def test_angles_of_tokens_are_exactly_none_or_a_half_turn_beyond_finite_scores():
    scores = torch.tensor([[0.0, -1.0, 9.0, -9.0, 5.0, 4.0], [0.0, -9.0, -1.0, 9.0, 4.0, 5.0]]).T.double()
    angle = turning_angle(scores).squeeze(-1)
    assert angle[:4].tolist() == [0.0, 0.0, math.pi, -math.pi]
    assert angle[4] == -angle[5]
    assert 0 < angle[4] < math.pi


def test_the_other_half_of_the_modes_stands_still():
    mixer = make_mixer("holographic", rotation="token", num_modes=5)
    _, angle = mixer._transition(torch.randn(2, 50, 32, dtype=torch.float64))
    assert (angle[..., :3] != 0).any(dim=(0, 1)).all()
    assert not angle[..., 3:].any()
