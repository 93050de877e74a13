"""The causal semiseparable operator: a bank of damped, rotating resonators, written and read at every token.

    S_t = Λ_t ∘ S_{t-1} + b_t ⊗ v_t          Λ_t = exp(−δ_t + i ω_t),  one δ a head, one ω a mode
    y_t = Re( c_t^H S_t )

so y = M v with M_ts = Re( c_t^H ∏_{r=s+1..t} Λ_r  b_s ) for s ≤ t and 0 above the diagonal: causal by construction.

Letters: B batch, L length, H heads, P channels a head, N complex modes a head, T chunk length.
Every tensor at the border is real. A complex vector of N modes is stored as K = 2N reals, ``[real | imaginary]``;
without ``angle`` the modes are real and K = N. Then Re(c^H S) is the plain dot product of K reals.

Three evaluations of the same map, equal in value and gradient:

    semiseparable_reference   the recurrence in complex arithmetic, one token at a time    O(L·K·P), sequential
    semiseparable_chunked     T×T masked matmuls, states carried between chunks            O(L·T·(K+P) + L·K·P), matmuls
    semiseparable_step        one token                                                    O(K·P)

Sources: Mamba-2 / state-space duality (Dao & Gu 2024), RetNet (Sun et al. 2023), LRU (Orvieto et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.precision import phase_dtype, reduce_angle, wide_dtype, without_autocast


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dim: int = -1) -> Tensor:
    """Multiply the 2N reals ``[re | im]`` along ``dim`` by cos + i·sin (N along it): a rotation, so norms are kept."""
    re, im = x.chunk(2, dim=dim)
    return torch.cat((re * cos - im * sin, re * sin + im * cos), dim=dim)


@without_autocast
def semiseparable_reference(
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    angle: Tensor | None = None,
    *,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in complex arithmetic. Arguments as :func:`semiseparable_chunked`."""
    B, L, H, P = v.shape
    wide = wide_dtype(v)
    b, c, log_decay, angle = _mask_inputs(b.to(wide), c.to(wide), log_decay.to(wide), angle, mask)

    def to_complex(x: Tensor) -> Tensor:
        return torch.complex(*x.chunk(2, dim=-1)) if angle is not None else torch.complex(x, torch.zeros_like(x))

    b, c = to_complex(b), to_complex(c)  # (B, L, H, N)
    N = b.shape[-1]
    omega = torch.zeros(B, L, H, N, dtype=wide, device=v.device) if angle is None else angle.to(wide)
    transition = torch.exp(torch.complex(log_decay[..., None].expand_as(omega), omega))
    S = v.new_zeros(B, H, N, P, dtype=transition.dtype)
    if state is not None:
        S = to_complex(state.to(wide).transpose(-1, -2)).transpose(-1, -2)
    outputs = []
    for t in range(L):
        if reset is not None:
            S = S * (~reset[:, t])[:, None, None, None]
        S = transition[:, t, :, :, None] * S + b[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((c[:, t].conj()[..., None] * S).sum(-2).real)
    final = torch.cat((S.real, S.imag), dim=-2) if angle is not None else S.real
    return torch.stack(outputs, dim=1).to(v.dtype), final


@without_autocast
def semiseparable_chunked(
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    angle: Tensor | None = None,
    *,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Evaluate the operator over L tokens by matmuls within chunks of T and a short recurrence between them.

    With θ the angle and ``cum`` the log-decay accumulated from a chunk's start, b̃_s = e^{−iθ_s} b_s and
    c̃_t = e^{−iθ_t} c_t (rotary embedding with learned, token-dependent frequencies),

        y_t  = Σ_{s≤t in chunk} e^{cum_t − cum_s} Re(c̃_t^H b̃_s) v_s  +  e^{cum_t} Re(c̃_t^H S_in)
        S_out = e^{iθ_T} ( e^{cum_T} S_in + Σ_s e^{cum_T − cum_s} b̃_s v_s^T )

    Both sums restart in every chunk, so nothing grows with the position.

    Args:
        v: values (B, L, H, P). Matmuls run in its dtype; decays, angles and states in float32 or wider.
        b, c: write and read vectors (B, L, H, K), K = 2N with ``angle``, else N.
        log_decay: −δ (B, L, H), nats a step; differences are formed before ``exp``.
        angle: ω (B, L, H, N), radians a step, or None for real modes.
        state: S before the first token (B, H, K, P); None is zeros.
        reset: (B, L) bool, True where a document begins: the state is cleared before that token.
        mask: (B, L) bool, False at padding: such a step leaves the state as it was.
        chunk_size: T.

    Returns:
        y (B, L, H, P) in v's dtype, and S after the last token (B, H, K, P) in float32 or wider.
    """
    B, L, H, P = v.shape
    K = b.shape[-1]
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: must be a positive integer, 64 to 128 is fastest")
    T = min(chunk_size, L)
    wide, dtype = wide_dtype(v), v.dtype
    b, c, log_decay, angle = _mask_inputs(b, c, log_decay, angle, mask)
    padding = -L % T
    if padding:  # a step with b = 0, no decay and no rotation changes nothing
        v, b, c, log_decay = (_pad_length(x, padding) for x in (v, b, c, log_decay))
        angle = None if angle is None else _pad_length(angle, padding)
        reset = None if reset is None else F.pad(reset, (0, padding))
    C = (L + padding) // T

    def chunks(x: Tensor) -> Tensor:  # (B, L, H, ·) -> (B, C, H, T, ·)
        return x.view(B, C, T, H, -1).transpose(2, 3)

    cum = chunks(log_decay).squeeze(-1).cumsum(-1, dtype=wide)  # (B, C, H, T)
    total = cum[..., -1:]  # (B, C, H, 1)
    v = chunks(v)
    b, c = chunks(b), chunks(c)
    cos = sin = None
    if angle is not None:
        theta = reduce_angle(chunks(angle).cumsum(-2, dtype=phase_dtype(angle)), wide)  # (B, C, H, T, N)
        cos, sin = theta.cos(), theta.sin()
        b, c = rotate(b, cos, -sin), rotate(c, cos, -sin)
        cos, sin = cos[..., -1, :, None], sin[..., -1, :, None]  # e^{iθ_T}, (B, C, H, N, 1)

    causal = torch.ones(T, T, dtype=torch.bool, device=v.device).tril()  # (T, T)
    to_end, from_start, carry = (total - cum).exp(), cum.exp(), total.exp()  # (B, C, H, T) twice, (B, C, H, 1)
    if reset is not None:
        document = reset.view(B, C, 1, T).cumsum(-1)  # how many documents have begun in this chunk up to t
        causal = causal & (document[..., :, None] == document[..., None, :])  # (B, C, 1, T, T)
        to_end = to_end * (document == document[..., -1:])
        from_start = from_start * (document == 0)
        carry = carry * (document[..., -1:] == 0)
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill_(~causal, float("-inf")).exp_()  # (B, C, H, T, T)
    b, c = b.to(dtype), c.to(dtype)
    y = ((c @ b.transpose(-1, -2)) * decay.to(dtype)) @ v
    writes = (b.transpose(-1, -2) @ (v * to_end[..., None].to(dtype))).to(wide)  # (B, C, H, K, P)

    S = v.new_zeros(B, H, K, P, dtype=wide) if state is None else state.to(wide)
    starts = []
    for j in range(C):
        starts.append(S)
        S = carry[:, j, :, :, None] * S + writes[:, j]
        if cos is not None and sin is not None:
            S = rotate(S, cos[:, j], sin[:, j], dim=-2)
    if state is None and C == 1:
        return _unchunk(y, L), S
    y = y + (c @ torch.stack(starts, dim=1).to(dtype)) * from_start[..., None].to(dtype)
    return _unchunk(y, L), S


@without_autocast
def semiseparable_step(
    v: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, angle: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: v (B, H, P), b and c (B, H, K), log_decay (B, H), angle (B, H, N) or None,
    state (B, H, K, P) -> y (B, H, P) and the next state. Cost O(K·P) a head, whatever came before."""
    wide = wide_dtype(v)
    S = state.to(wide) * log_decay.to(wide).exp()[..., None, None]
    if angle is not None:
        angle = angle.to(wide)[..., None]
        S = rotate(S, angle.cos(), angle.sin(), dim=-2)
    S = S + b.to(wide)[..., :, None] * v.to(wide)[..., None, :]
    y = (c.to(wide)[..., None, :] @ S).squeeze(-2)
    return y.to(v.dtype), S


def _mask_inputs(
    b: Tensor, c: Tensor, log_decay: Tensor, angle: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """At padding: nothing written, no decay, no rotation."""
    if mask is None:
        return b, c, log_decay, angle
    b = b.masked_fill(~mask[..., None, None], 0)
    log_decay = log_decay.masked_fill(~mask[..., None], 0)
    angle = None if angle is None else angle.masked_fill(~mask[..., None, None], 0)
    return b, c, log_decay, angle


def _pad_length(x: Tensor, padding: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))


def _unchunk(y: Tensor, L: int) -> Tensor:  # (B, C, H, T, P) -> (B, L, H, P)
    B, C, H, T, P = y.shape
    return y.transpose(2, 3).reshape(B, C * T, H, P)[:, :L]
