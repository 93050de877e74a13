"""``spectral_gate`` and its options against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from contract import MAMBA2, VARIANTS, make_mixer, small_config, small_model
from torch import Tensor
from torch.nn import functional as F

from resonance_nn import ResonanceConfig
from resonance_nn.mixers import SpectralGateMixer
from resonance_nn.mixers.spectral_gate import entropy_gap, keep_largest

OPTIONS = [
    *(overrides for name, overrides in VARIANTS if name == "spectral_gate"),
    {"frequency_mixing": True, "mode_fraction": 0.6},
    {"trapezoidal": True, "num_groups": 1, "rotation": "none"},
]


def randomised(**overrides) -> SpectralGateMixer:
    """With every parameter away from the zeros and ones that some start at."""
    mixer = make_mixer("spectral_gate", **overrides)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return mixer


def definition(m: SpectralGateMixer, x: Tensor) -> Tensor:
    """The docstring's equations, a token at a time in complex arithmetic."""
    B, L, _ = x.shape
    H, G, P, N, p = m.num_heads, m.num_groups, m.head_dim, m.num_modes, dict(m.named_parameters())
    turning = m.rotation != "none"
    of_head = torch.arange(H) // (H // G)

    def to_complex(t: Tensor) -> Tensor:
        return torch.complex(*t.chunk(2, dim=-1)) if turning else t.to(torch.complex128)

    vbc, z = (x @ p["in_proj.weight"].T).split(m.sizes, dim=-1)
    taps = p["conv.weight"]
    before = F.pad(vbc, (0, 0, len(taps) - 1, 0))
    vbc = sum(taps[j] * before[:, len(taps) - 1 - j :][:, :L] for j in range(len(taps))) + p.get("conv.bias", 0)
    v, b, c = vbc.split((H * P, 2 * G * N, 2 * G * N), dim=-1)
    v, b, c = (F.silu(v) if m.activate_values else v).view(B, L, H, P), F.silu(b), F.silu(c)
    b, c = (t.view(B, L, G, 2 * N)[:, :, of_head] for t in (b, c))  # (B, L, H, 2N)
    if m.normalize_gates:
        b, c = b / b.norm(dim=-1, keepdim=True), c / c.norm(dim=-1, keepdim=True)
    b, c = to_complex(b), to_complex(c)
    if m.mixing is not None:
        C = torch.complex(*m.mixing.unbind(1)) if turning else m.mixing[:, 0].to(torch.complex128)
        c = c + torch.einsum("hnm,blhn->blhm", C.conj(), c)  # (I + C)^H c
    if m.modes_kept < m.modes:
        score = c.abs()
        first_left_out = score.sort(dim=-1, descending=True).values[..., m.modes_kept, None]
        c = torch.where(score > first_left_out, c * (score / first_left_out - 1).clamp(max=1), 0)
    delta = F.softplus(x @ p["step_proj.weight"].T + p["step_bias"])
    if m.time_step_limit is not None:
        delta = delta.clamp(*m.time_step_limit)
    omega = p["frequency"] * delta[..., None] if turning else torch.zeros(B, L, H, 1)
    if m.rotation == "token":
        omega = omega + math.pi * torch.tanh(x @ p["angle_proj.weight"].T).view(omega.shape)
    damping = -delta * F.softplus(p["damping"])
    decay = torch.exp(torch.complex(damping[..., None].expand(omega.shape), omega.double()))
    gamma = torch.ones_like(delta)
    if m.trapezoidal:
        gamma = torch.sigmoid(x @ p["blend_proj.weight"].T + p["blend_bias"])
    S, outputs = torch.zeros(B, H, b.shape[-1], P, dtype=torch.complex128), []
    for t in range(L):
        if t > 0:
            old = b[:, t - 1, :, :, None] * v[:, t - 1, :, None, :]
            S = decay[:, t, :, :, None] * (S + ((1 - gamma) * delta)[:, t, :, None, None] * old)
        S = S + (gamma * delta)[:, t, :, None, None] * b[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((c[:, t].conj()[..., None] * S).sum(-2).real + p["skip"][:, None] * v[:, t])
    y, silu = torch.stack(outputs, 1), F.silu(z)
    if m.norm is None:
        y = y.flatten(2) * silu
    elif m.output_norm == "gated":
        y = (y.flatten(2) * silu).view(B, L, G, -1)
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + m.norm.eps)).flatten(2) * p["norm.weight"]
    else:
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + m.norm.eps) * p["norm.weight"]).flatten(2) * silu
    return y @ p["out_proj.weight"].T


@pytest.mark.parametrize("overrides", OPTIONS)
def test_equals_its_definition(overrides: dict):
    mixer, x = randomised(**overrides), torch.randn(2, 150, 32, dtype=torch.float64)
    assert relative(mixer(x)[0], definition(mixer, x)) < 1e-10


def test_parameters():
    """As it comes the heads share b and c of K = 16; a group a head and frequencies make it the complex form."""
    shared = {name: tuple(p.shape) for name, p in make_mixer("spectral_gate").named_parameters()}
    assert shared["in_proj.weight"] == (32 + 2 * 16 + 32, 32)
    assert "frequency" not in shared
    mixer = make_mixer("spectral_gate", rotation="step", num_groups=None)
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "in_proj.weight": (32 + 4 * 16 + 32, 32),
        "step_proj.weight": (2, 32),
        "conv.weight": (4, 32 + 4 * 16),
        "damping": (2,),
        "frequency": (2, 8),
        "step_bias": (2,),
        "skip": (2,),
        "norm.weight": (16,),
        "out_proj.weight": (32, 32),
    }
    assert set(mixer.state_names) == {"conv", "memory"}


def test_new_parts_change_nothing_at_first():
    """W_φ and C are 0 in a new model, not only in a new mixer, and the gradient still finds them."""
    ids = torch.randint(0, 61, (2, 40))
    plain = small_model(("spectral_gate",), rotation="token")
    model = small_model(("spectral_gate",), rotation="token", frequency_mixing=True)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert {name.rpartition("mixer.")[-1] for name in missing} == {"mixing"}
    assert relative(model(ids).logits, plain(ids).logits) < 1e-6
    model(ids, labels=ids).loss.backward()
    new = [p for name, p in model.named_parameters() if name.endswith(("angle_proj.weight", "mixing"))]
    assert len(new) == 4
    assert all(p.grad.abs().max() > 0 for p in new)
    assert all(not p.any() for p in new)


def test_real_and_complex_modes_have_equal_states():
    real, turning = make_mixer("spectral_gate"), make_mixer("spectral_gate", rotation="step")
    assert real.state_bytes() == turning.state_bytes()
    count = [sum(p.numel() for p in mixer.parameters()) for mixer in (real, turning)]
    assert count[1] - count[0] == turning.frequency.numel()


def test_trapezoid_with_full_weight_on_its_own_token_is_the_default():
    plain, blended = make_mixer("spectral_gate"), make_mixer("spectral_gate", trapezoidal=True)
    blended.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        blended.blend_bias.fill_(50.0)  # γ = 1
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    assert relative(blended(x)[0], plain(x)[0]) < 1e-12
    assert set(blended.state_names) == {"conv", "memory", "last"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trapezoid_sees_nothing_of_the_next_token(dtype: torch.dtype):
    """Not even by rounding, though the weight of a write depends on the token after it."""
    mixer, x = make_mixer("spectral_gate", torch.float32, trapezoidal=True), torch.randn(1, 100, 32)
    changed = x.clone()
    changed[:, 50] = 100 * torch.randn(32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(mixer(changed)[0][:, :50], mixer(x)[0][:, :50])


# --- adaptive sparsity


@pytest.mark.parametrize("parts", [1, 2], ids=["real", "complex"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_at_most_k_modes_are_read(parts: int, k: int):
    c = torch.randn(5, 40, parts * 8, dtype=torch.float64)
    kept = keep_largest(c, 8, k)

    def modulus(x: Tensor) -> Tensor:
        return x.unflatten(-1, (parts, 8)).norm(dim=-2)

    score, read = modulus(c), modulus(kept)
    order = score.argsort(dim=-1, descending=True)
    assert (read.gather(-1, order[..., k:]) == 0).all()
    assert ((read > 0).sum(-1) == k).all()
    in_full = score >= 2 * score.gather(-1, order[..., k, None])
    assert in_full.any()
    assert relative(read[in_full], score[in_full]) < 1e-12
    assert (read <= score * (1 + 1e-12)).all()


def test_selection_is_continuous_where_scores_cross():
    def read(difference: float) -> Tensor:
        return keep_largest(torch.tensor([3.0, 1 + difference, 1 - difference, 0.1], dtype=torch.float64), 4, 2)

    assert relative(read(1e-9), read(-1e-9)) < 1e-8


def test_straight_through_gradient():
    """∂/∂c of w·read(c) is w for every mode, kept or left out."""
    c, w = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    (gradient,) = torch.autograd.grad((w * keep_largest(c, 8, 2)).sum(), c)
    assert torch.equal(gradient, w)


def test_selection_noise_in_training_only():
    noisy, x = make_mixer("spectral_gate", mode_fraction=0.4, mode_noise=0.5), torch.randn(2, 30, 32).double()
    plain = make_mixer("spectral_gate", mode_fraction=0.4)
    assert torch.equal(noisy.eval()(x)[0], plain.train()(x)[0])
    assert torch.equal(noisy(x)[0], plain.eval()(x)[0])
    assert not torch.equal(noisy.train()(x)[0], noisy(x)[0])
    assert torch.isfinite(make_mixer("spectral_gate", mode_fraction=0.4, mode_noise=100.0).train()(x)[0]).all()


# --- entropy


def test_entropy_gap_bounds_and_definition():
    B, L, H, G, N, P = 2, 30, 4, 2, 8, 5
    v, write = torch.randn(B, L, H, P).double(), torch.rand(B, L, H).double()
    one = torch.zeros(B, L, G, 2 * N).double()
    one[..., [3, 3 + N]] = 1
    assert entropy_gap(v, one, write, N, None) == pytest.approx(math.log(N), abs=1e-6)
    assert entropy_gap(v, torch.ones_like(one), write, N, None) == pytest.approx(0, abs=1e-6)
    b = torch.randn(B, L, G, 2 * N).double()
    gaps = []
    for h in range(H):
        power = b[:, :, h // 2, :N].square() + b[:, :, h // 2, N:].square()
        energy = ((write[:, :, h, None] * v[:, :, h]).square().sum(-1, keepdim=True) * power).sum((0, 1))
        p = energy / energy.sum()
        gaps.append(math.log(N) + (p * p.log()).sum())
    assert entropy_gap(v, b, write, N, None) == pytest.approx(float(sum(gaps)) / H)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, 7:] = False
    alone = torch.cat((torch.arange(L), L + torch.arange(7)))  # the real tokens, as one row
    rows = [t.flatten(0, 1)[alone][None] for t in (v, b, write)]
    assert entropy_gap(v, b, write, N, mask) == pytest.approx(float(entropy_gap(*rows, N, None)))
    assert torch.isfinite(entropy_gap(v, b, write, N, torch.zeros_like(mask)))


@pytest.mark.parametrize("rotation", ["none", "step"])
def test_the_loss_raises_the_entropy_of_the_modes(rotation: str):
    mixer = make_mixer("spectral_gate", torch.float32, entropy_weight=1.0, rotation=rotation)
    with torch.no_grad():
        mixer.conv.weight[:, 32 : 32 + 32 : 8] *= 20  # a mode of each head takes nearly all
    x, optimizer = torch.randn(4, 60, 32), torch.optim.Adam(mixer.parameters(), lr=3e-2)
    gaps = []
    for _ in range(30):
        losses: list[Tensor] = []
        mixer(x, losses=losses)
        (loss,) = losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gaps.append(loss.item())
    assert gaps[0] > 0.5
    assert gaps[-1] < 0.5 * gaps[0]


def test_entropy_loss_in_training_only_and_never_in_the_outputs():
    ids, mask = torch.randint(0, 61, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    plain, model = small_model(("spectral_gate",)), small_model(("spectral_gate",), entropy_weight=0.1)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model(ids, labels=ids).aux_loss is None
    assert plain.train()(ids, labels=ids).aux_loss is None
    out = model.train()(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert 0 < out.aux_loss < 0.1 * 2 * math.log(8)  # two layers of 8 modes
    cross_entropy = plain(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert relative(out.loss - out.aux_loss, cross_entropy) < 1e-5


def test_config_keeps_infinite_bounds(tmp_path):
    small_config(**MAMBA2 | {"time_step_limit": (0.001, math.inf)}).save_pretrained(tmp_path)
    assert ResonanceConfig.from_pretrained(tmp_path).time_step_limit == (0.001, math.inf)
