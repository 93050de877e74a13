"""The causal semiseparable operator: a bank of damped, rotating resonators, written and read at every token.

    S_t = Λ_t ∘ S_{t-1} + b_t ⊗ v_t          Λ_t = exp(−δ_t + i ω_t),  one δ a head, one ω a mode
    y_t = Re( c_t^H S_t )

so y = M v with M_ts = Re( c_t^H ∏_{r=s+1..t} Λ_r  b_s ) for s ≤ t and 0 above the diagonal: causal by construction.

Letters: B batch, L length, H heads, P channels a head, N complex modes a head, T chunk length, G groups of heads that
share b and c, R = H/G.
Every tensor at the border is real. A complex vector of N modes is stored as K = 2N reals, ``[real | imaginary]``;
without ``angle`` the modes are real and K = N. Then Re(c^H S) is the plain dot product of K reals.

Three evaluations of the same map, equal in value and gradient:

    semiseparable_reference   the recurrence in complex arithmetic, one token at a time    O(L·K·P), sequential
    semiseparable_chunked     T×T masked matmuls, states carried between chunks            O(L·T·(K+P) + L·K·P), matmuls
    semiseparable_step        one token                                                    O(K·P)

Sources: Mamba-2 / state-space duality (Dao & Gu 2024), RetNet (Sun et al. 2023), LRU (Orvieto et al. 2023).
"""

from __future__ import annotations

import itertools

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
    log_write: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    read_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in complex arithmetic. Arguments as :func:`semiseparable_chunked`."""
    B, L, H, P = v.shape
    wide = wide_dtype(v)
    b, c, log_decay, angle = _mask_inputs(b.to(wide), c.to(wide), log_decay.to(wide), angle, mask)
    b, c = _to_heads(b, H), _to_heads(c, H)
    if log_write is not None:
        b = b * log_write.to(wide).exp()[..., None]

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
        before = transition[:, t, :, :, None] * S
        S = before + b[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((c[:, t].conj()[..., None] * (before if read_first else S)).sum(-2).real)
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
    log_write: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    read_first: bool = False,
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
        b, c: write and read vectors (B, L, G, K), K = 2N with ``angle``, else N. G divides H: heads h = gR … gR + R − 1
            share the vectors of group g, and with real modes their T×T scores too.
        log_decay: −δ (B, L, H), nats a step; differences are formed before ``exp``.
        angle: ω (B, L, H, N), radians a step, or None for real modes.
        log_write: (B, L, H) or None: b_s is multiplied by its exponential, which is taken only after it joins the
            decays: log-decays may be positive if only the sums of decays and log_write are bounded.
        state: S before the first token (B, H, K, P); None is zeros.
        reset: (B, L) bool, True where a document begins: the state is cleared before that token.
        mask: (B, L) bool, False at padding: such a step leaves the state as it was.
        read_first: whether a token reads before it writes, y_t = Re(c_t^H Λ_t S_{t−1}).
        chunk_size: T.

    Returns:
        y (B, L, H, P) in v's dtype, and S after the last token (B, H, K, P) in float32 or wider.
    """
    B, L, H, P = v.shape
    K, G = b.shape[-1], max(b.shape[2], c.shape[2]) if angle is None else H
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: must be a positive integer, 64 to 128 is fastest")
    T = min(chunk_size, L)
    wide, dtype = wide_dtype(v), v.dtype
    b, c, log_decay, angle = _mask_inputs(b, c, log_decay, angle, mask)
    if angle is None:
        b, c = _to_heads(b, G), _to_heads(c, G)
    padding = -L % T
    if padding:  # a step with b = 0, no decay and no rotation changes nothing
        v, b, c, log_decay = (_pad_length(x, padding) for x in (v, b, c, log_decay))
        angle = None if angle is None else _pad_length(angle, padding)
        log_write = None if log_write is None else _pad_length(log_write, padding)
        reset = None if reset is None else F.pad(reset, (0, padding))
    C = (L + padding) // T

    def chunks(x: Tensor) -> Tensor:  # (B, L, H | G, ·) -> (B, C, H | G, T, ·)
        return x.view(B, C, T, *x.shape[2:3], -1).transpose(2, 3)

    cum = chunks(log_decay).squeeze(-1).cumsum(-1, dtype=wide)  # (B, C, H, T)
    total = cum[..., -1:]  # (B, C, H, 1)
    source = cum if log_write is None else cum - chunks(log_write).squeeze(-1).to(wide)  # what is left of s: − source_s
    v = chunks(v)
    b, c = chunks(b), chunks(c)
    cos = sin = None
    if angle is not None:
        theta = reduce_angle(chunks(angle).cumsum(-2, dtype=phase_dtype(angle)), wide)  # (B, C, H, T, N)
        cos, sin = theta.cos(), theta.sin()
        b, c = _rotate_groups(b, cos, -sin), _rotate_groups(c, cos, -sin)  # (B, C, H, T, K)
        cos, sin = cos[..., -1, :, None, None], sin[..., -1, :, None, None]  # e^{iθ_T}, (B, C, H, N, 1, 1)

    causal = torch.ones(T, T, dtype=torch.bool, device=v.device).tril(-1 if read_first else 0)  # (T, T)
    to_end, from_start, carry = (total - source).exp(), cum.exp(), total.exp()  # (B, C, H, T) twice, (B, C, H, 1)
    if reset is not None:
        document = reset.view(B, C, 1, T).cumsum(-1)  # how many documents have begun in this chunk up to t
        causal = causal & (document[..., :, None] == document[..., None, :])  # (B, C, 1, T, T)
        to_end = to_end * (document == document[..., -1:])
        from_start = from_start * (document == 0)
        carry = carry * (document[..., -1:] == 0)
    decay = (cum[..., :, None] - source[..., None, :]).masked_fill_(~causal, float("-inf")).exp_()  # (B, C, H, T, T)

    def groups(x: Tensor) -> Tensor:  # (B, C, H, T, ·) -> (B, C, G, R, T, ·)
        return x.unflatten(2, (G, -1))

    b, c = b.to(dtype), c.to(dtype)  # (B, C, G, T, K)
    scores = (c @ b.transpose(-1, -2)).unsqueeze(3)  # (B, C, G, 1, T, T)
    y = (scores * groups(decay.to(dtype))).flatten(2, 3) @ v  # (B, C, H, T, P)
    values = groups(v * to_end[..., None].to(dtype)).transpose(3, 4).flatten(4)  # (B, C, G, T, R·P)
    writes = (b.transpose(-1, -2) @ values).to(wide).unflatten(-1, (-1, P))  # (B, C, G, K, R, P)

    carry = carry.view(B, C, G, 1, -1, 1)
    S = v.new_zeros(B, G, K, H // G, P, dtype=wide)
    if state is not None:
        S = state.to(wide).unflatten(1, (G, -1)).transpose(2, 3)
    starts = []
    # unbind, not a slice a chunk: the gradient of each slice would be a whole tensor of zeros
    turns = itertools.repeat(None) if cos is None or sin is None else zip(cos.unbind(1), sin.unbind(1), strict=True)
    for carry_j, writes_j, turn in zip(carry.unbind(1), writes.unbind(1), turns, strict=False):
        starts.append(S)
        S = carry_j * S + writes_j
        if turn is not None:
            S = rotate(S, *turn, dim=2)
    if state is not None or C > 1:
        reads = c @ torch.stack(starts, dim=1).to(dtype).flatten(4)  # (B, C, G, T, R·P)
        reads = reads.unflatten(-1, (-1, P)).transpose(3, 4).flatten(2, 3)  # (B, C, H, T, P)
        y = y + reads * from_start[..., None].to(dtype)
    return _unchunk(y, L), S.transpose(2, 3).reshape(B, H, K, P)


@without_autocast
def semiseparable_step(
    v: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, angle: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: v (B, H, P), b and c (B, G, K), log_decay (B, H), angle (B, H, N) or None,
    state (B, H, K, P) -> y (B, H, P) and the next state. Cost O(K·P) a head, whatever came before."""
    wide, H = wide_dtype(v), v.shape[1]
    b, c = _to_heads(b, H, dim=1).to(wide), _to_heads(c, H, dim=1).to(wide)
    S = state.to(wide) * log_decay.to(wide).exp()[..., None, None]
    if angle is not None:
        angle = angle.to(wide)[..., None]
        S = rotate(S, angle.cos(), angle.sin(), dim=-2)
    S = S + b[..., :, None] * v.to(wide)[..., None, :]
    y = (c[..., None, :] @ S).squeeze(-2)
    return y.to(v.dtype), S


def _to_heads(x: Tensor, H: int, dim: int = 2) -> Tensor:
    """(…, G, K) -> (…, H, K): each group's vector for its heads."""
    return x if x.shape[dim] == H else x.repeat_interleave(H // x.shape[dim], dim=dim)


def _rotate_groups(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, C, G, T, K), each group turned as its heads are, cos and sin (B, C, H, T, N): (B, C, H, T, K)."""
    G = x.shape[2]
    return rotate(x.unsqueeze(3), cos.unflatten(2, (G, -1)), sin.unflatten(2, (G, -1))).flatten(2, 3)


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
