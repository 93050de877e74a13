"""``holographic`` against its definition, and the roots of unity by which tokens turn a state."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from contract import VARIANTS, make_mixer
from torch import Tensor
from torch.nn import functional as F

from resonance_nn import ResonanceConfig
from resonance_nn.mixers import HolographicMixer
from resonance_nn.mixers.holographic import MIN_LOG_DECAY
from resonance_nn.ops.delta_rule import delta_rule_chunked
from resonance_nn.ops.elementwise import silu_gate
from resonance_nn.ops.polygon import polygon_transition

OPTIONS = [
    *(overrides for name, overrides in VARIANTS if name == "holographic"),
    {"rotation": "step"},
    {"decay": "channel", "rotation": "token", "num_modes": 5},
    {"decay": "none", "rotation": "token"},
    {"erase": "none", "rotation": "token"},
    {"erase": "none", "decay": "channel"},
    {"rotation": "token", "orders": (2, 3, 4, 7), "num_modes": 9, "max_beta": 2.0},
    {"erase": "hermitian", "decay": "channel", "rotation": "token"},
    {"erase": "gated", "gates": "hard", "max_beta": 2.0},
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


def nearest(z: Tensor, order: int) -> Tensor:
    """By comparing z itself, if it is inside, with the nearest points of all sides."""
    corners = torch.polar(torch.ones(order).double(), 2 * math.pi / order * torch.arange(order).double())
    best, inside = None, torch.ones(z.shape, dtype=torch.bool)
    for a, b in zip(corners, corners.roll(-1), strict=True):
        side = b - a
        share = ((z - a) * side.conj()).real / side.abs() ** 2
        point = a + share.clamp(0, 1) * side
        inside &= ((z - a) * side.conj()).imag >= 0 if order > 2 else False
        best = point if best is None else torch.where((point - z).abs() < (best - z).abs(), point, best)
    return torch.where(inside, z, best)


def definition(m: HolographicMixer, x: Tensor) -> Tensor:
    """The docstring's equations, a token at a time; a state that turns is complex, [re | im]."""
    B, L, D = x.shape
    H, N, P, p = m.num_heads, m.num_modes, m.head_dim, dict(m.named_parameters())
    K = 2 * N
    qkv, z = (x @ p["in_proj.weight"].T).split(m.sizes, dim=-1)
    taps = p["conv.weight"]
    before = F.pad(qkv, (0, 0, len(taps) - 1, 0))
    qkv = F.silu(sum(taps[j] * before[:, len(taps) - 1 - j :][:, :L] for j in range(len(taps))))
    shared = H // m.key_groups
    q, k, v = qkv.split((H * K // shared, H * K // shared, D), dim=-1)
    q, k = (unit(t.view(B, L, -1, K)).repeat_interleave(shared, dim=2) for t in (q, k))
    v = v.view(B, L, H, -1)
    T = m.turning_heads
    G = H - T
    S, outputs = torch.zeros(B, T, N, P, dtype=torch.complex128), []
    if T > 0:
        scores = (x @ p["roots"].T).view(B, L, T, 2, N)
        near = torch.complex(scores[:, :, :, 0], scores[:, :, :, 1])
        turns = torch.stack([nearest(near[..., n], m.orders[n]) for n in range(N)], dim=-1)
        turns = torch.polar(turns.abs().clamp(min=math.exp(MIN_LOG_DECAY)), turns.angle())
        kc, qc = (torch.complex(*u[:, :, :T].chunk(2, dim=-1)) for u in (k, q))
        for t in range(L):
            room = 1 - turns[:, t].abs().square()
            S = turns[:, t][..., None] * S + (room * kc[:, t])[..., None] * v[:, t, :T, None]
            outputs.append((qc[:, t].conj()[..., None] * S).sum(2).real)
    of_turning = torch.stack(outputs, 1) if T > 0 else v[:, :, :0]
    q, k, v = q[:, :, T:], k[:, :, T:], v[:, :, T:]
    delta = F.softplus(x @ p["step_proj.weight"].T + p["step_bias"]) if "step_bias" in p else None
    log_decay = torch.zeros(B, L, G, 1, dtype=x.dtype)
    if m.decay == "head":
        log_decay = -(delta * F.softplus(p["damping"]))[..., None]
    elif m.decay == "channel":
        score = m.decay_proj(x).view(B, L, G, -1) + p["decay_bias"]
        log_decay = MIN_LOG_DECAY * torch.sigmoid(score)
    angle = torch.zeros(B, L, G, N, dtype=x.dtype)
    if m.rotation == "step":
        angle = delta[..., None] * p["frequency"]

    def opened(score):
        return (1.2 * torch.sigmoid(score) - 0.1).clamp(0, 1) if m.hard_gates else torch.sigmoid(score)

    if m.erase in ("delta", "none"):
        beta = m.max_beta * opened(x @ p["beta_proj.weight"].T)[..., None]
        erase, v = (0 if m.erase == "none" else beta) * k, beta * v
    else:
        e, w = opened(m.gates_proj(x)).view(B, L, G, -1).split((K if m.erase == "gated" else N, P), dim=-1)
        erase, v = (torch.cat((e, e), dim=-1) if m.erase == "hermitian" else e) * k, w * v
    decay = log_decay.exp().expand(B, L, G, log_decay.shape[-1])
    decay = decay.expand(B, L, G, K) if decay.shape[-1] in (1, K) else torch.cat((decay, decay), dim=-1)
    S, outputs = torch.zeros(B, G, K, P, dtype=x.dtype), []
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
    y = torch.cat((of_turning, torch.stack(outputs, 1)), dim=2)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + m.norm.eps) * p["norm.weight"]
    gate = F.silu(z) if m.output_gate is silu_gate else 2 * z.sigmoid()
    return (y.flatten(2) * gate) @ p["out_proj.weight"].T


@pytest.mark.parametrize("overrides", OPTIONS)
def test_equals_its_definition(overrides: dict):
    mixer, x = randomised(**overrides), torch.randn(2, 90, 32, dtype=torch.float64)
    assert relative(mixer(x)[0], definition(mixer, x)) < 1e-10


@pytest.mark.parametrize("order", [2, 3, 5, 8])
def test_nearest_point_of_the_polygon(order: int):
    z = 1.3 * torch.randn(500, 1, dtype=torch.complex128)
    z.imag[:20] = 0.0
    log, angle = polygon_transition(z.real, z.imag, [order], min_log=-20.0)
    assert (torch.polar(log.exp(), angle) - nearest(z, order)).abs().max() < 1e-12


def test_roots_of_unity_are_exact_and_stable():
    """Whatever the rounding of z, a product of 512 roots is the root of the sum of their exponents."""
    generator = torch.Generator().manual_seed(0)
    for order in (2, 3, 5, 12):
        j = torch.randint(order, (512, 1), generator=generator)
        phase = 2 * math.pi * j / order + 0.3 * math.pi / order * torch.randn(512, 1, generator=generator).clamp(-1, 1)
        log, angle = polygon_transition(2 * phase.cos(), 2 * phase.sin(), [order], min_log=-5.0)
        assert log.abs().max() < 1e-6
        error = angle.double().sum() - 2 * math.pi / order * int(j.sum())
        assert abs(math.remainder(float(error), 2 * math.pi)) < 1e-4


@pytest.mark.parametrize("order", [2, 5])
def test_a_turning_mode_counts_modulo_its_order(order: int):
    """One write, then 20,000 digits that turn it, in float32: read at two phases, what is left is their sum."""
    L, generator = 20_000, torch.Generator().manual_seed(0)
    digits = torch.randint(order, (L,), generator=generator)
    phase = 2 * math.pi * digits / order + 0.2 * math.pi / order * torch.randn(L, generator=generator).clamp(-2, 2)
    re, im = 3 * phase.cos(), 3 * phase.sin()
    log, angle = (t.view(1, L, 1, 1) for t in polygon_transition(re[:, None], im[:, None], [order], min_log=-5.0))
    v = torch.zeros(1, L, 1, 1)
    v[0, 0] = 1.0
    k = torch.tensor([1.0, 0.0]).expand(1, L, 1, 2)
    sums = digits[1:].cumsum(0)
    for q, expected in ((k, torch.cos), (k.flip(-1), torch.sin)):
        y, _ = delta_rule_chunked(v, k, q, torch.zeros_like(k), log, angle, min_log_decay=-5.0)
        assert (y[0, 1:, 0, 0] - expected(2 * math.pi * sums / order)).abs().max() < 0.01


def test_orders_are_integers_from_two_on():
    for orders in ((), (1, 2), (2.0,), 5):
        with pytest.raises(ValueError, match=r"orders = .*: must be one or more integers ≥ 2"):
            ResonanceConfig(orders=orders)
    mixer = make_mixer("holographic", rotation="token", orders=[3, 2], num_modes=5)
    assert mixer.orders == [3, 2, 3, 2, 3]
    with pytest.raises(ValueError, match=r"num_heads = 1 .* give 2 or more"):
        ResonanceConfig(mixers=("holographic",), rotation="token", hidden_size=64, num_heads=1)


@pytest.mark.parametrize("order", [2, 3, 5])
def test_gradient_of_the_polygon(order: int):
    z = torch.randn(40, 2, dtype=torch.float64).mul_(0.7).requires_grad_()

    def transition(z: Tensor) -> Tensor:
        log, angle = polygon_transition(z[:, :1], z[:, 1:], [order], min_log=-9.0)
        return torch.view_as_real(torch.polar(log.exp(), angle))

    assert torch.autograd.gradcheck(transition, z)


def test_nothing_is_infinite_where_a_state_is_forgotten_at_once():
    z = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [0.0, -1e-5], [1e30, 1e30]], requires_grad=True)
    log, angle = polygon_transition(z[:, :1].expand(4, 3), z[:, 1:].expand(4, 3), [2, 3, 5], min_log=-5.0)
    (log.sum() + angle.sum()).backward()
    assert log.min() == -5.0
    assert log.max() <= 0.0
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("gates", ["soft", "hard"])
def test_a_shut_gate_leaves_the_memory_as_it_is(gates: str):
    """To the last bit, if it is hard; σ(−8) a token is a memory lost within some thousands of them."""
    mixer = make_mixer("holographic", torch.float32, decay="none", gates=gates)
    marked = torch.zeros(mixer.beta_proj.weight.shape[1])
    marked[0] = 1
    with torch.no_grad():
        mixer.beta_proj.weight.copy_(marked.expand_as(mixer.beta_proj.weight))
        told, filler = torch.randn(1, 5, len(marked)), torch.randn(1, 4000, len(marked))
        told[..., 0], filler[..., 0] = 3.0, -8.0
        _, before = mixer(told, return_state=True)
        _, after = mixer(filler, state=before, return_state=True)
        _, step = mixer(filler[:, :1], state=before, return_state=True)
    assert before["memory"].abs().max() > 0.01
    change = relative(after["memory"], before["memory"])
    if gates == "hard":
        assert torch.equal(after["memory"], before["memory"])
        assert torch.equal(step["memory"], before["memory"])
    else:
        assert change > 0.01


def test_it_begins_by_recalling_what_followed():
    """Of 24 tokens with orthonormal embeddings, all seen once, each that comes again brings to mind the one after it;
    from random maps none does but by chance."""
    tokens = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0][:24] * 8
    order = torch.cat((torch.arange(24), torch.randperm(23)))
    found = {}
    for recall in (0.0, 1.0):
        config = ResonanceConfig(hidden_size=64, mixers=("holographic",), initial_recall=recall)
        mixer = HolographicMixer(config).double()
        with torch.no_grad():
            scores = mixer(tokens[order][None])[0][0, 24:] @ tokens.T
        found[recall] = (scores.argmax(-1) == order[24:] + 1).double().mean()
    assert found[1.0] > 0.9
    assert found[0.0] < 0.3
