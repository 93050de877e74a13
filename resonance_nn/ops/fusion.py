"""Several modalities as one: superposed under holographic roles, or mode by mode of their spectra.

Both are sums over the modalities that are present, with weights that sum to 1 over them; an absent one is an absent
term, whatever finite values stand in its place.

**Holographic** (Plate 1995). r_m a fixed unitary role (``ops.holographic``), u_m a vector of modality m:

    c = Σ_m w_m bind(r_m, u_m) / √(Σ_m w_m²)        unbind(r_m, c) = w_m u_m / √(Σ w²) + crosstalk

Terms under different roles are nearly orthogonal, so c is as long as the u_m are, however many there are. M equal
weights are 1/M: the sum over √M, and what is unbound has the cosine 1/√M with u_m.

**Spectral.** A modality's n tokens x_t lie at (t + ½)/n of its own extent, and have the Fourier coefficients

    F_k = (μ_k/n) Σ_t x_t e^{−2πi k(t+½)/n},   k < K,        x(s) = Re Σ_k (2 − δ_k) F_k e^{2πi ks},  s in (0, 1)

with δ_0 = 1 alone, μ_k = 1 for 2k < n, ½ for 2k = n (shared with −k) and 0 beyond, where n tokens have no such mode; so
x(s) goes through all tokens if n ≤ 2K − 1. Modes are cut into J bands; in each, modality m has a phase, which it turns
towards the others' (see :func:`phase_alignment`).

Letters: B batch, M modalities, n tokens, D width, K modes, J bands. Modes are real pairs (..., K, 2, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resonance_nn.ops.holographic import bind, unitary
from resonance_nn.ops.precision import wide_dtype, without_autocast
from resonance_nn.ops.spectrum import ENERGY_FLOOR

STRONGEST = 0.999  # coupling: at 1, the phase of 1 + e^{iα} jumps at α = π


def masked_softmax(scores: Tensor, present: Tensor, dim: int = -1) -> Tensor:
    """Softmax along ``dim`` over what is ``present`` (bool, broadcast), 0 elsewhere; in float32 or wider. Where nothing
    is present all are 0."""
    scores = scores.to(wide_dtype(scores))
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~present, lowest).softmax(dim).masked_fill(~present, 0)


@without_autocast
def holographic_superposition_reference(
    values: Tensor, roles: Tensor, scores: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, an example and a term at a time; binding by a circulant matrix. Arguments as
    :func:`holographic_superposition`."""
    D, wide = values.shape[-1], wide_dtype(values)
    n = torch.arange(D, device=values.device)
    circulant = unitary(roles.to(wide))[:, (n[:, None] - n) % D]  # (M, D, D)
    traces, weights = [], []
    for u, score, here in zip(values.to(wide), scores.to(wide), present, strict=True):
        w = score[here].softmax(0)
        terms = (circulant[here] @ u[here][..., None]).squeeze(-1)
        traces.append((w[:, None] * terms).sum(0) / w.square().sum().sqrt())
        weights.append(torch.zeros_like(score).index_put((here.nonzero().squeeze(1),), w))
    return torch.stack(traces), torch.stack(weights)


@without_autocast
def holographic_superposition(values: Tensor, roles: Tensor, scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """c of one or more modalities of each example.

    Args:
        values: u (B, M, D), anything finite where absent.
        roles: (M, D); they are made unitary, so that the dtype they are kept in does not matter.
        scores: (B, M), of which w is the softmax over the modalities present.
        present: (B, M) bool.

    Returns:
        c (B, D) and w (B, M), in float32 or wider.
    """
    wide = wide_dtype(values)
    weights = masked_softmax(scores, present)
    scale = weights * (weights.square().sum(-1, keepdim=True) + torch.finfo(wide).tiny).rsqrt()
    values = values.to(wide).masked_fill(~present[..., None], 0)
    return bind(unitary(roles.to(wide)), scale[..., None] * values).sum(1), weights


@without_autocast
def extent_modes_reference(x: Tensor, num_modes: int, mask: Tensor | None = None) -> Tensor:
    """The definition, row by row. Arguments as :func:`extent_modes`."""
    k = torch.arange(num_modes, dtype=wide_dtype(x), device=x.device)
    rows = []
    for b, row in enumerate(x.to(k.dtype)):
        tokens = row if mask is None else row[mask[b].bool()]
        n = max(1, len(tokens))
        t = torch.arange(len(tokens), dtype=k.dtype, device=x.device) + 0.5
        share = (2 * k < n).to(k) + 0.5 * (2 * k == n)
        waves = torch.exp(-2j * math.pi * k[:, None] * t / n) * (share / n)[:, None]
        F = waves @ tokens.to(waves.dtype)
        rows.append(torch.stack((F.real, F.imag), dim=1))
    return torch.stack(rows)


@without_autocast
def extent_modes(x: Tensor, num_modes: int, mask: Tensor | None = None) -> Tensor:
    """The first Fourier coefficients of rows over their own extents, in O(K·n·D).

    Args:
        x: tokens (B, n, D).
        num_modes: K.
        mask: (B, n), False or 0 at padding, anywhere in a row; None means none. A row of padding alone has modes 0.

    Returns:
        (B, K, 2, D) in float32 or wider.
    """
    B, L = x.shape[:2]
    wide = wide_dtype(x)
    x = x.to(wide)
    k = torch.arange(num_modes, device=x.device)[:, None]  # (K, 1)
    t = torch.arange(L, device=x.device)[None]  # (B or 1, n): a real token's place in its row
    n = torch.full_like(t[:, :1], L)
    if mask is not None:
        mask = mask.bool()
        t, n = mask.cumsum(1) - 1, mask.sum(1, keepdim=True).clamp(min=1)
        x = x.masked_fill(~mask[..., None], 0)
    n = n[:, None]  # (B or 1, 1, 1)
    turns = (k * (2 * t[:, None] + 1)) % (2 * n)  # in units of π/n: exact, however long the row
    angle = turns.to(wide) * math.pi / n
    share = ((2 * k < n).to(wide) + 0.5 * (2 * k == n)) / n
    waves = torch.stack((angle.cos(), -angle.sin()), dim=2) * share[..., None]  # (B or 1, K, 2, n)
    waves = waves.flatten(1, 2).expand(B, -1, -1)
    return (waves @ x).unflatten(1, (num_modes, 2))


@without_autocast
def extent_signal(modes: Tensor, points: int) -> Tensor:
    """x(s) at the middles of ``points`` equal parts of the extent: (B, K, 2, D) -> (B, points, D)."""
    K = modes.shape[1]
    k = torch.arange(K, device=modes.device)
    s = torch.arange(points, device=modes.device)[:, None]
    angle = ((2 * s + 1) * k % (2 * points)).to(modes.dtype) * (math.pi / points)  # (points, K)
    waves = torch.stack((angle.cos(), -angle.sin()), dim=2) * torch.where(k > 0, 2.0, 1.0).to(modes)[:, None]
    return waves.flatten(1) @ modes.flatten(1, 2)


def log_bands(num_modes: int, num_bands: int) -> list[int]:
    """The band j of each of K modes: the mean, k = 0, is a band of its own, the edges of the others are log-spaced from
    1 to K, rounded such that none is empty. There are min(J, K)."""
    J = min(num_bands, num_modes)
    edges = [0, 1][: J + 1]
    for j in range(2, J + 1):
        edge = round(num_modes ** ((j - 1) / (J - 1)))
        edges.append(min(max(edge, edges[-1] + 1), num_modes - (J - j)))
    edges[-1] = num_modes
    return [j for j in range(J) for _ in range(edges[j], edges[j + 1])]


@without_autocast
def band_energies(modes: Tensor, bands: Sequence[int]) -> Tensor:
    """Mean square over the extent and the channels of what a signal has in each band: modes (..., K, 2, D), the band of
    each (K) -> (..., J). They add up to that of x(s)."""
    power = modes.square().sum(-2).mean(-1)  # (..., K)
    power = torch.cat((power[..., :1], 2 * power[..., 1:]), dim=-1)  # k stands for −k too
    return power @ _membership(bands, power).T


@without_autocast
def band_gates(energy: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """γ_m,j = 2 σ( Σ_i A_m,ji log(E_m,i + ε) + a_m,j ) of energies (B, M, J), weight A (M, J, J), bias a (M, J): a gate
    a modality and band, in (0, 2), driven by the modality's own spectrum; 1 where weight and bias are 0."""
    logits = torch.einsum("mji,bmi->bmj", weight.to(energy.dtype), (energy + ENERGY_FLOOR).log())
    return 2 * torch.sigmoid(logits + bias.to(energy.dtype))


@without_autocast
def phase_alignment(modes: Tensor, weights: Tensor, coupling: Tensor, lag: Tensor, bands: Sequence[int]) -> Tensor:
    """The angle by which each modality turns in each band, from its phase towards the others'.

    With the coherence of each pair in band j, |C| ≤ 1, and a coupling s in [0, 1),

        C_mn = Σ_k ⟨F_m,k, F_n,k⟩ / √(Σ|F_m,k|² Σ|F_n,k|²)        φ_m = Σ_n w_n θ_mn,   θ_mm = 0
        θ_mn = 2 arg(1 + s_mn C̄_mn e^{iℓ_mn}) = −θ_nm             ℓ_mn = −ℓ_nm, a lag expected of the pair

    θ_mn is 0 for pairs without coherence, and tends to their difference of phase as s|C| → 1: then all meet at their
    weighted mean phase. A modality by itself does not turn. The pull of pairs on phases is that of coupled oscillators
    (Kuramoto 1975), in one step.

    Args:
        modes: F (B, M, K, 2, D), anything finite where absent.
        weights: w (B, M, J), 0 where absent.
        coupling: s (M, M, J), symmetric.
        lag: ℓ (M, M, J), antisymmetric.
        bands: the band of each mode (K).

    Returns:
        φ (B, M, J).
    """
    re, im = modes.unbind(-2)  # (B, M, K, D)
    member = _membership(bands, modes)
    energy = (re.square() + im.square()).sum(-1) @ member.T  # (B, M, J)
    cosine = (torch.einsum("bmkd,bnkd->bmnk", re, re) + torch.einsum("bmkd,bnkd->bmnk", im, im)) @ member.T
    sine = torch.einsum("bmkd,bnkd->bmnk", im, re) @ member.T
    sine = sine - sine.transpose(1, 2)  # (B, M, M, J)
    scale = (energy + ENERGY_FLOOR).rsqrt()
    scale = coupling.to(energy.dtype) * scale[:, :, None] * scale[:, None]
    cosine, sine = scale * cosine, -scale * sine  # s C̄
    turn, back = lag.to(energy.dtype).cos(), lag.to(energy.dtype).sin()
    theta = 2 * torch.atan2(sine * turn + cosine * back, 1 + cosine * turn - sine * back)
    return (theta * weights[:, None]).sum(2)


@without_autocast
def rotate_modes(modes: Tensor, angle: Tensor, bands: Sequence[int]) -> Tensor:
    """e^{iφ} F: modes (..., K, 2, D), φ (..., J) -> (..., K, 2, D) of the same magnitudes."""
    angle = angle @ _membership(bands, angle)  # (..., K)
    turn, back = angle.cos()[..., None], angle.sin()[..., None]
    re, im = modes.unbind(-2)
    return torch.stack((turn * re - back * im, back * re + turn * im), dim=-2)


def _membership(bands: Sequence[int], like: Tensor) -> Tensor:
    """(J, K), 1 where a mode is of a band."""
    j = torch.arange(bands[-1] + 1, device=like.device)
    return (j[:, None] == torch.tensor(bands, device=like.device)).to(like.dtype)
