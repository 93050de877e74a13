"""Resolvents of a tridiagonal Hamiltonian as sequence operators: causal (prefix) and over the whole sequence.

    𝓗 = tridiag(a_t; b_t),  z = E + iη,  G = (z − 𝓗)⁻¹,  m_t = [(z − 𝓗_{≤t})⁻¹]_tt      (ops.continued_fraction)

Causal: S_t = α_t S_{t−1} + m_t k_t v_tᵀ,  α_t = b_{t−1} m_t,  y_t = q_tᵀ S_t, that is

    y_t = Σ_{s≤t} (q_t · k_s) g_ts v_s,    g_ts = [(z − 𝓗_{≤t})⁻¹]_ts = m_s ∏_{r=s+1..t} α_r

Single |α_t| may exceed 1; a span's |g_ts| is ≤ 1/η, because 𝓗 is self-adjoint. So magnitudes are multiplied as sums of
logs, log|m_s| among them, before ``exp`` is taken (``log_write`` of ops.semiseparable). Phases are one number a head
and token: the values are turned back by the phase at which they are written, and the outputs forward.

Both directions: y = G v over the whole sequence, by Thomas elimination from both ends.

Letters: B batch, L length, H heads, P channels a head, N real key channels, T chunk length. Real tensors at every
border; a complex value of P channels is 2P reals, ``[real | imaginary]``.

    resolvent_reference   the recurrence in complex arithmetic          O(L·N·P), sequential
    resolvent_chunked     scan of m, then T×T masked matmuls             O(L·T·(N + P) + L·N·P)
    resolvent_step        one token                                      O(N·P)
    two_sided_reference   the definition, a dense solve                  O(L³)
    two_sided_solve       elimination from both ends, in chunks          O(L·T·P)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.continued_fraction import (
    continued_fraction,
    continued_fraction_reference,
    green_from_fractions,
    squared_couplings,
    two_sided_fractions,
)
from resonance_nn.ops.precision import phase_dtype, wide_dtype, without_autocast
from resonance_nn.ops.semiseparable import rotate, semiseparable_chunked


class Hamiltonian(NamedTuple):
    """𝓗 and z = E + iη of every head, all real."""

    potential: Tensor  # a_t (B, L, H)
    log_coupling: Tensor  # log b_t (B, L, H), b_t > 0 between t and t + 1
    energy: Tensor  # E (H)
    eta: Tensor  # η > 0 (H)


class ResolventState(NamedTuple):
    """What the causal resolvent keeps of the past. Zeros are a fresh start."""

    memory: Tensor  # S (B, H, N, 2P), float32 or wider
    green: Tensor  # m (B, H, 2), float64, as the continued fraction that goes on from it
    coupling: Tensor  # b (B, H) to the next token, float64

    @classmethod
    def fresh(cls, v: Tensor, k: Tensor) -> ResolventState:
        """Zeros for v (B, ..., H, P) and k (B, ..., H, N)."""
        (B, *_, H, P), N = v.shape, k.shape[-1]
        exact = phase_dtype(v)
        memory = v.new_zeros(B, H, N, 2 * P, dtype=wide_dtype(v))
        return cls(memory, v.new_zeros(B, H, 2, dtype=exact), v.new_zeros(B, H, dtype=exact))


@without_autocast
def resolvent_reference(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    hamiltonian: Hamiltonian,
    *,
    state: ResolventState | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, ResolventState]:
    """The recurrence, token by token, in complex arithmetic. Arguments as :func:`resolvent_chunked`."""
    state = ResolventState.fresh(v, k) if state is None else state
    a, log_b, energy, eta = hamiltonian
    b, before = log_b.exp(), state.coupling  # (B, L, H), (B, H)
    fraction = continued_fraction_reference(a, squared_couplings(b, before, reset), energy, eta, state.green)
    m = 1 / torch.view_as_complex(fraction)
    S = torch.complex(*state.memory.chunk(2, dim=-1))  # (B, H, N, P)
    outputs = []
    for t in range(v.shape[1]):
        if reset is not None:
            before = before.masked_fill(reset[:, t, None], 0)
        write = k[:, t, :, :, None] * v[:, t, :, None, :]
        S = m[:, t, :, None, None].to(S.dtype) * (before[..., None, None].to(write.dtype) * S + write)
        outputs.append((q[:, t, :, :, None] * S).sum(-2))
        before = b[:, t]
    y = torch.stack(outputs, dim=1)
    memory, green = torch.cat((S.real, S.imag), dim=-1), torch.view_as_real(m[:, -1])
    final = ResolventState(memory, green, before.to(green.dtype))
    return torch.cat((y.real, y.imag), dim=-1).to(v.dtype), final


@without_autocast
def resolvent_chunked(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    hamiltonian: Hamiltonian,
    *,
    state: ResolventState | None = None,
    reset: Tensor | None = None,
    length: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, ResolventState]:
    """Evaluate the causal resolvent over L tokens.

    With φ_t = −Σ_{r≤t} arg L_r, magnitude and phase part: g_ts = |g_ts| e^{i(φ_t − φ_{s−1})}, and

        log|g_ts| = Σ_{r=s+1..t} (log b_{r−1} − log|L_r|) − log|L_s|  ≤  −log η

    so the real operator of ops.semiseparable with signed log-decays does the rest on the values e^{−iφ_{s−1}} v_s. Its
    exponents restart in every chunk, and S is itself a sum of g_ts k_s v_sᵀ: nothing grows with the position.

    Args:
        v: values (B, L, H, P). Matmuls run in its dtype.
        k, q: keys and queries (B, L, H, N), real.
        hamiltonian: 𝓗 and z, float32 or wider.
        state: of the tokens before; None is a fresh start.
        reset: (B, L) bool, True where a document begins: b_{t−1} = 0 there.
        length: (B) real tokens of each row, the rest being right padding; None means L. Only the state needs it.
        chunk_size: T.

    Returns:
        y (B, L, H, 2P) in v's dtype, and the state after each row's last real token.
    """
    B, L, H, _ = v.shape
    state = ResolventState.fresh(v, k) if state is None else state
    S, mask = state.memory * state.coupling[..., None, None].to(state.memory.dtype), None
    if length is not None:
        S = torch.where(length[:, None, None, None] > 0, S, state.memory)  # no token, no step
        mask = torch.arange(L, device=v.device) < length[:, None]  # (B, L)
    a, log_b, energy, eta = hamiltonian
    k2 = squared_couplings(log_b.exp(), state.coupling, reset)
    log_L = torch.view_as_complex(continued_fraction(a, k2, energy, eta, state.green)).log()  # (B, L, H)
    y, S = _prefix(v, k, q, log_L, hamiltonian, S, reset, mask, chunk_size)
    b = hamiltonian.log_coupling.exp().to(log_L.real.dtype)
    last = torch.cat((torch.view_as_real((-log_L).exp()), b[..., None]), dim=-1)  # (B, L, H, 3)
    if length is None:
        last = last[:, -1]
    else:
        index = (length - 1).clamp(min=0)[:, None, None, None].expand(B, 1, H, 3)
        before = torch.cat((state.green, state.coupling[..., None]), dim=-1)
        last = torch.where(length[:, None, None] > 0, last.gather(1, index).squeeze(1), before)
    return y, ResolventState(S, last[..., :2].clone(), last[..., 2].clone())


@without_autocast
def resolvent_step(
    v: Tensor, k: Tensor, q: Tensor, hamiltonian: Hamiltonian, state: ResolventState
) -> tuple[Tensor, ResolventState]:
    """One token: v (B, H, P), k and q (B, H, N), a_t and log b_t (B, H) -> y (B, H, 2P) and the next state."""
    a, log_b, energy, eta = hamiltonian
    S, m, b = state
    wide, exact = S.dtype, phase_dtype(v)
    past = m * b.square()[..., None]  # b²/L
    real, imag = energy - a - past[..., 0], eta - past[..., 1]
    m = torch.stack((real, -imag), dim=-1) / (real.square() + imag.square())[..., None]
    write = k.to(wide)[..., :, None] * v.to(wide)[..., None, :]
    S = S * b[..., None, None].to(wide) + F.pad(write, (0, write.shape[-1]))
    S = rotate(S, m[..., 0, None, None].to(wide), m[..., 1, None, None].to(wide))  # times m_t
    y = (q.to(wide)[..., None, :] @ S).squeeze(-2)
    return y.to(v.dtype), ResolventState(S, m.to(exact), log_b.exp().to(exact))


@without_autocast
def two_sided_reference(v: Tensor, hamiltonian: Hamiltonian) -> Tensor:
    """y = (z − 𝓗)⁻¹ v by a dense solve a head. Arguments as :func:`two_sided_solve`."""
    a, log_b, energy, eta = (x.to(phase_dtype(v)) for x in hamiltonian)
    off = log_b.exp()[:, :-1].transpose(1, 2)  # (B, H, L − 1)
    operator = torch.diag_embed((energy - a).transpose(1, 2)) - torch.diag_embed(off, 1) - torch.diag_embed(off, -1)
    eye = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    operator = torch.complex(operator, eta[:, None, None] * eye.expand_as(operator))  # (B, H, L, L)
    x = v.to(a.dtype).permute(0, 2, 1, 3)  # (B, H, L, P)
    y = torch.linalg.solve(operator, torch.complex(x, torch.zeros_like(x))).transpose(1, 2)
    return torch.cat((y.real, y.imag), dim=-1).to(v.dtype)


@without_autocast
def two_sided_solve(
    v: Tensor,
    hamiltonian: Hamiltonian,
    *,
    reset: Tensor | None = None,
    length: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor:
    """y = G v over each whole row, by Thomas elimination from both ends:

        x_t = v_t + (b_{t−1}/L_{t−1}) x_{t−1},     x'_t = v_t + (b_t/R_{t+1}) x'_{t+1}
        y_t = G_tt (x_t + x'_t − v_t)

    since G_ts = G_tt ∏_{r=s..t−1} b_r/L_r for s ≤ t, and likewise from the right. Both halves are partial sums of what
    is asked for. Elimination with back substitution costs as much but passes through prefix resolvents, up to 1/η
    larger than y where a prefix is near resonance, and in float32 loses those digits.

    Args:
        v: values (B, L, H, P).
        hamiltonian: 𝓗 and z, float32 or wider; the last b of a row, or of a document, couples to nothing.
        reset: (B, L) bool, True where a document begins: documents do not see each other.
        length: (B) real tokens of each row, the rest being right padding, which changes nothing in y of the real ones.
        chunk_size: T.

    Returns:
        y (B, L, H, 2P) in v's dtype.
    """
    a, log_b, energy, eta = hamiltonian
    ends = mask = None
    if reset is not None:
        ends = torch.cat((reset[:, 1:], torch.zeros_like(reset[:, :1])), dim=1)
    if length is not None:
        steps = torch.arange(v.shape[1], device=v.device)
        mask, last = steps < length[:, None], steps == length[:, None] - 1
        ends = last if ends is None else ends | last
    left, right = two_sided_fractions(a, log_b.exp(), energy, eta, reset, ends)
    green = green_from_fractions(left, right, a, energy, eta)
    log_left, log_right = (torch.view_as_complex(x).log() for x in (left, right))
    # A span's ∏ b/L is ≤ max b/η. This in place of the step into a new document keeps longer products below it too.
    apart = eta.log() - log_b.amax(1, keepdim=True).clamp(min=0)  # (B, 1, H)
    zero = torch.zeros_like(log_left[:, :1])
    step = torch.cat((zero, log_b[:, :-1] - log_left[:, :-1]), dim=1)  # to t from t − 1
    x = _eliminate(v, step, apart, reset, mask, chunk_size)
    step = torch.cat((zero, (log_b[:, :-1] - log_right[:, 1:]).flip(1)), dim=1)  # to t from t + 1
    ends, mask = (None if flags is None else flags.flip(1) for flags in (ends, mask))
    x = x + _eliminate(v.flip(1), step, apart, ends, mask, chunk_size).flip(1) - F.pad(v, (0, v.shape[-1]))
    real, imag = green.to(v.dtype)[..., None].unbind(-2)
    return rotate(x, real, imag)  # times G_tt


def _eliminate(
    v: Tensor, log_step: Tensor, apart: Tensor, reset: Tensor | None, mask: Tensor | None, chunk_size: int
) -> Tensor:
    """x_t = v_t + e^{log_step_t} x_{t−1}, with x = 0 before a document: v (B, L, H, P), log_step (B, L, H) complex ->
    (B, L, H, 2P)."""
    one = v.new_ones(*v.shape[:3], 1)
    log_decay, phase = log_step.real, log_step.imag.cumsum(1)
    if reset is not None:
        log_decay = torch.where(reset[..., None], apart.to(log_decay.dtype), log_decay)
    x, _ = semiseparable_chunked(
        _written(v, -phase), one, one, log_decay, reset=reset, mask=mask, chunk_size=chunk_size
    )
    return _turn(x, phase)


def _prefix(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    log_L: Tensor,
    hamiltonian: Hamiltonian,
    memory: Tensor | None,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Σ_{s≤t} (q_t · k_s) g_ts v_s from log L, with b_{−1} S_{−1} as ``memory``, and S after the last token that
    ``mask`` keeps."""
    # At a reset S is cleared, so b is of no account there: log η in its place keeps the sums that span several
    # documents ≤ −log η too.
    log_b = hamiltonian.log_coupling.to(log_L.real.dtype)
    log_before = torch.cat((torch.zeros_like(log_b[:, :1]), log_b[:, :-1]), dim=1)
    if reset is not None:
        log_before = torch.where(reset[..., None], hamiltonian.eta.to(log_b.dtype).log(), log_before)
    angle = -log_L.imag
    if mask is not None:
        angle = angle.masked_fill(~mask[..., None], 0)
    phase = angle.cumsum(1)
    y, S = semiseparable_chunked(
        _written(v, angle - phase),  # by −φ_{s−1}
        k,
        q,
        log_before - log_L.real,
        log_write=-log_L.real,
        state=memory,
        reset=reset,
        mask=mask,
        chunk_size=chunk_size,
    )
    return _turn(y, phase), _turn(S, phase[:, -1, :, None])


def _written(v: Tensor, phase: Tensor) -> Tensor:
    """e^{i·phase} v for real v (..., P): (..., 2P)."""
    cos_sin = torch.stack((phase.cos(), phase.sin()), dim=-1).to(wide_dtype(v))
    return (v[..., None, :] * cos_sin[..., None]).flatten(-2).to(v.dtype)


def _turn(x: Tensor, phase: Tensor) -> Tensor:
    """Multiply the complex x (..., 2P) by e^{i·phase}, phase (...)."""
    wide = wide_dtype(x)
    return rotate(x.to(wide), phase.cos().to(wide)[..., None], phase.sin().to(wide)[..., None]).to(x.dtype)
