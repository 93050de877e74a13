"""Constant resonators: one filter, evaluated by FFT, by chunks or token by token from the same parameters.

    h_τ = Re Σ_n g_n e^{iφ_n} λ_n^τ,   λ_n = e^{−a_n + iω_n}          (MATH: b_n = 1, c_n = g_n e^{−iφ_n})
    S_t = λ ∘ S_{t−1} + v_t,           y_t = Σ_n g_n Re( e^{iφ_n} S_{t,n} )

Letters: B batch, L length, F filters, R channels that share a filter, N modes a filter, T chunk length.
Parameters are four real tensors (F, N): ``damping`` a > 0, ``frequency`` ω, ``gain`` g, ``phase`` φ, kept together in
:class:`Resonators`. A state holds N complex numbers as 2N reals ``[re | im]``: (B, F, 2N, R). Phases ωτ are reduced
modulo 2π in float64, so position 1,000,000 is as exact as position 1.

    resonator_reference   the recurrence in complex arithmetic          O(L·N), sequential
    resonator_fft         y = h * v, zero-padded, in blocks              O(L log L)
    resonator_chunked     T×T Toeplitz matmuls; honours resets           O(L·(T + N))
    resonator_step        one token                                      O(N)

Sources: S4D (Gu et al. 2022), LRU (Orvieto et al. 2023), Laughing Hyena (Massaroli et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.fft_conv import BLOCK_SIZE, DIRECT_MAX_LENGTH, fft_conv
from resonance_nn.ops.precision import phase_dtype, reduce_angle, wide_dtype, without_autocast


class Resonators(NamedTuple):
    """Parameters of F filters with N modes each, all real (F, N)."""

    damping: Tensor  # a > 0, nats a step
    frequency: Tensor  # ω, radians a step
    gain: Tensor  # g
    phase: Tensor  # φ, radians

    def widen(self, dtype: torch.dtype) -> Resonators:
        return Resonators(*(x.to(dtype) for x in self))


def powers(modes: Resonators, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Re and Im of λ_n^τ for integer steps τ (J): two tensors (F, N, J)."""
    tau = steps.to(modes.damping.dtype)
    exact = phase_dtype(tau)
    angle = reduce_angle(modes.frequency.to(exact)[..., None] * steps.to(exact), tau.dtype)
    magnitude = torch.exp(-modes.damping[..., None] * tau)
    return magnitude * angle.cos(), magnitude * angle.sin()


def read_weights(modes: Resonators, steps: Tensor) -> Tensor:
    """The 2N reals w with Re Σ_n g_n e^{iφ_n} λ_n^τ S_n = w · [Re S | Im S], for each τ: (F, J, 2N)."""
    re, im = powers(modes, steps)
    cos, sin = (modes.gain * modes.phase.cos())[..., None], (modes.gain * modes.phase.sin())[..., None]
    return torch.cat((cos * re - sin * im, -(sin * re + cos * im)), dim=1).transpose(1, 2)


@without_autocast
def impulse_response(damping: Tensor, frequency: Tensor, gain: Tensor, phase: Tensor, length: int) -> Tensor:
    """h_0 … h_{length−1}: (F, length).

    With τ = qT + r, h is a product of two small tables, λ^{qT} (with gain and phase) and λ^r, so only
    O(N·√length) exponentials are taken.
    """
    modes = Resonators(damping, frequency, gain, phase).widen(wide_dtype(damping))
    T = 1 << (max(length - 1, 1).bit_length() + 1) // 2
    Q = -(-length // T)
    device = damping.device
    coarse = read_weights(modes, torch.arange(0, Q * T, T, device=device))  # (F, Q, 2N)
    fine = torch.cat(powers(modes, torch.arange(T, device=device)), dim=1)  # (F, 2N, T)
    return (coarse @ fine).flatten(1)[:, :length]


@without_autocast
def resonator_reference(
    v: Tensor, modes: Resonators, *, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in complex arithmetic. Arguments as :func:`resonator_chunked`."""
    wide = wide_dtype(v)
    a, omega, g, phi = modes.widen(wide)
    rate = torch.exp(torch.complex(-a, omega))[..., None]  # (F, N, 1)
    read = torch.polar(torch.ones_like(phi), phi)[..., None] * g[..., None]
    B, L, Fn, R = v.shape
    S = torch.zeros(B, Fn, a.shape[1], R, dtype=rate.dtype, device=v.device)
    if state is not None:
        S = torch.complex(*state.to(wide).chunk(2, dim=2))
    outputs = []
    for t in range(L):
        if reset is not None:
            S = S * (~reset[:, t])[:, None, None, None]
        S = rate * S + v[:, t, :, None, :]
        outputs.append((read * S).sum(2).real)
    return torch.stack(outputs, dim=1).to(v.dtype), torch.cat((S.real, S.imag), dim=2)


@without_autocast
def resonator_fft(
    v: Tensor,
    modes: Resonators,
    *,
    state: Tensor | None = None,
    length: Tensor | None = None,
    block_size: int | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y = h * v by zero-padded FFT, one block up to 16,384 tokens and blocks of 8,192 above.

    Between blocks the tail of the convolution is carried by the resonators' states, which is exact for a filter of
    any length and keeps memory at O(block).

    Args:
        v: inputs (B, L, F, R).
        modes: the filters' parameters (F, N).
        state: S before the first token (B, F, 2N, R) or None.
        length: (B) real tokens of each row, the rest being right padding; None means L. Only the state needs it.
        block_size: tokens an FFT takes at once; None chooses as above.
        return_state: skip the final state when nobody asks for it.

    Returns:
        y (B, L, F, R) in v's dtype and S after each row's last real token.
    """
    L, wide = v.shape[1], wide_dtype(v)
    modes = modes.widen(wide)
    if block_size is None:
        block_size = L if L <= DIRECT_MAX_LENGTH else BLOCK_SIZE
    h = impulse_response(*modes, min(block_size, L))  # (F, T)
    outputs, S, begin = [], state, 0
    for piece in v.split(block_size, dim=1):
        T = piece.shape[1]
        u = piece.permute(0, 2, 3, 1)  # (B, F, R, T)
        y = fft_conv(u, h[:, None, :T], block_size=T)[0].permute(0, 3, 1, 2)
        if S is not None:
            y = y + _read(modes, S, T).to(y.dtype)
        outputs.append(y)
        begin += T
        if return_state or begin < L:
            real = None if length is None else (length - (begin - T)).clamp(0, T)
            S = _advance(piece.to(wide), modes, S, real)
    return torch.cat(outputs, dim=1), S if return_state else None


@without_autocast
def resonator_chunked(
    v: Tensor,
    modes: Resonators,
    *,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    length: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Toeplitz matmuls inside chunks of T, states carried between them.

    Args:
        v: inputs (B, L, F, R).
        modes: the filters' parameters (F, N).
        state: S before the first token (B, F, 2N, R) or None.
        reset: (B, L) bool, True where a document begins.
        length: (B) real tokens of each row, the rest being right padding; None means L.
        chunk_size: T.

    Returns:
        y (B, L, F, R) in v's dtype, and S after each row's last real token (B, F, 2N, R).
    """
    B, L, Fn, R = v.shape
    wide, dtype, device = wide_dtype(v), v.dtype, v.device
    modes = modes.widen(wide)
    T = min(chunk_size, L)
    C = -(-L // T)
    pad = C * T - L
    real = torch.full((B,), L, device=device) if length is None else length
    v = F.pad(v.to(wide), (0, 0, 0, 0, 0, pad)).view(B, C, T, Fn, R).transpose(2, 3)  # (B, C, F, T, R)
    steps = torch.arange(T, device=device)
    lag = steps[:, None] - steps[None, :]  # (T, T)
    toeplitz = impulse_response(*modes, T)[:, lag.clamp(min=0)].masked_fill(lag < 0, 0)  # (F, T, T)
    kept = (real[:, None] - T * torch.arange(C, device=device)).clamp(0, T)  # (B, C): real tokens of each chunk
    exponent = kept[..., None] - 1 - steps  # (B, C, T): λ^exponent carries v_s to the chunk's last real token
    write = exponent >= 0
    from_start = torch.ones(B, C, T, dtype=torch.bool, device=device)
    if reset is not None:
        document = F.pad(reset, (0, pad)).view(B, C, T).cumsum(-1)
        last = document.gather(-1, (kept - 1).clamp(min=0)[..., None])  # the document of the last real token
        toeplitz = toeplitz * (document[..., :, None] == document[..., None, :])[:, :, None]  # (B, C, F, T, T)
        write = write & (document == last)
        from_start = document == 0
        carry = (last == 0) | (kept[..., None] == 0)  # (B, C, 1)
    else:
        carry = torch.ones(B, C, 1, dtype=torch.bool, device=device)
    y = toeplitz @ v
    table = torch.cat(powers(modes, torch.arange(T + 1, device=device)), dim=1)  # (F, 2N, T + 1): λ^0 … λ^T
    if length is None:  # the same exponents in every chunk but the last
        exponent = exponent[:1]
    weights = table[:, :, exponent.clamp(min=0)].permute(2, 3, 0, 1, 4)  # (B | 1, C, F, 2N, T)
    writes = weights @ (v * write[:, :, None, :, None])  # (B, C, F, 2N, R)
    decay = table[:, :, kept].permute(2, 3, 0, 1)[..., None]  # (B, C, F, 2N, 1): λ^kept
    N = modes.damping.shape[1]
    S = v.new_zeros(B, Fn, 2 * N, R) if state is None else state.to(wide)
    starts = []
    for j in range(C):
        starts.append(S)
        S = _multiply(decay[:, j], S * carry[:, j, :, None, None]) + writes[:, j]
    read = read_weights(modes, steps + 1)  # (F, T, 2N): t tokens into a chunk, S_start has turned t + 1 times
    y = y + (read @ torch.stack(starts, dim=1)) * from_start[:, :, None, :, None]
    return y.transpose(2, 3).reshape(B, C * T, Fn, R)[:, :L].to(dtype), S


@without_autocast
def resonator_step(v: Tensor, modes: Resonators, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: v (B, F, R), state (B, F, 2N, R) -> y (B, F, R) and the next state."""
    wide = wide_dtype(v)
    modes = modes.widen(wide)
    one = torch.ones(1, device=v.device)
    rate = torch.cat(powers(modes, one), dim=1)  # (F, 2N, 1)
    S = _multiply(rate, state.to(wide))
    re, im = S.chunk(2, dim=-2)
    S = torch.cat((re + v.to(wide)[:, :, None], im), dim=-2)
    y = (read_weights(modes, one * 0) @ S).squeeze(-2)  # (F, 1, 2N) @ (B, F, 2N, R)
    return y.to(v.dtype), S


def _multiply(rate: Tensor, S: Tensor) -> Tensor:
    """Complex product of [re | im] pairs along the last but one dimension."""
    a, b = rate.chunk(2, dim=-2)
    re, im = S.chunk(2, dim=-2)
    return torch.cat((a * re - b * im, a * im + b * re), dim=-2)


def _read(modes: Resonators, S: Tensor, T: int) -> Tensor:
    """What a state still gives to the next T outputs: (B, T, F, R)."""
    weights = read_weights(modes, torch.arange(1, T + 1, device=S.device))  # (F, T, 2N)
    return (weights @ S).transpose(1, 2)


def _advance(v: Tensor, modes: Resonators, state: Tensor | None, length: Tensor | None) -> Tensor:
    """S after the last real one of the T tokens v (B, T, F, R): Σ_s λ^{len−1−s} v_s + λ^len S."""
    T = v.shape[1]
    table = torch.cat(powers(modes, torch.arange(T + 1, device=v.device)), dim=1)  # (F, 2N, T + 1)
    if length is None:
        S = table[..., :T].flip(-1) @ v.transpose(1, 2)  # (F, 2N, T) @ (B, F, T, R)
        decay = table[None, ..., T:]
    else:
        exponent = length[:, None] - 1 - torch.arange(T, device=v.device)  # (B, T)
        weights = table[:, :, exponent.clamp(min=0)].permute(2, 0, 1, 3) * (exponent >= 0)[:, None, None]
        S = weights @ v.transpose(1, 2)
        decay = table[:, :, length].permute(2, 0, 1)[..., None]  # (B, F, 2N, 1)
    return S if state is None else S + _multiply(decay, state)
