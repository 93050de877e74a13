"""The gated delta rule: an associative memory that erases what a key recalls before it writes.

    S̄_t = Λ_t S_{t−1}                          decay, and turn if there are angles
    S_t = S̄_t + k_t ( v_t − e_t^T S̄_t )^T      erase along e_t, write v_t
    y_t = q_t^T S_t                            read after the write

With e_t = β_t k_t and v_t = β_t·value this is S_t = (I − β k k^T) Λ_t S_{t−1} + β k value^T, the gated delta rule;
e_t = (gate ∘ k_t) and v_t = (gate' ∘ value) separate erasing from writing; without e_t it is a gated sum.

Letters: B batch, L length, H heads, P channels a head, K reals of a key, T chunk length. Every tensor at the border is
real. With ``angle`` (B, L, H, N) a key is K = 2N reals ``[re | im]`` and Λ_t turns each pair by ω: orthogonal, so
2N real keys can be orthogonal, twice as many as N complex ones in the same storage. ``hermitian=True`` is the complex
form, S_t = S̄_t + k_t(v_t − e_t^H S̄_t), y_t = Re(q_t^H S_t), on the same storage.

    delta_rule_reference   the recurrence, one token at a time                              O(L·K·P), sequential
    delta_rule_chunked     WY form: one triangular inverse a chunk, the rest is matmuls      O(L·T·(K+P) + L·K·(K+P))
    delta_rule_step        one token                                                        O(K·P)

Sources: DeltaNet in parallel (Yang et al. 2024), Gated DeltaNet (Yang et al. 2025), per-channel decay: Kimi Delta
Attention (2025), separate gates: Gated DeltaNet-2 (Hatamizadeh et al. 2026). The turning state is ours.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resonance_nn.ops import fla_backend
from resonance_nn.ops.chunked_delta import ChunkedDelta
from resonance_nn.ops.precision import phase_dtype, reduce_angle, wide_dtype, without_autocast
from resonance_nn.ops.semiseparable import phases, rotate, to_heads, turn_back, turn_state

SUB_CHUNK = 16  # tokens between re-basings of decays a channel
EXPONENT = 80.0  # e^80 is finite in float32


@without_autocast
def delta_rule_reference(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    erase: Tensor | None,
    log_decay: Tensor,
    angle: Tensor | None = None,
    *,
    hermitian: bool = False,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. Arguments as :func:`delta_rule_chunked`."""
    B, L, H, P = v.shape
    k, q = to_heads(k, H), to_heads(q, H)
    v, erase = _apply_beta(v, k, erase)
    S = v.new_zeros(B, H, k.shape[-1], P, dtype=wide_dtype(v)) if state is None else state
    outputs = []
    for t in range(L):
        if reset is not None:
            S = S * (~reset[:, t])[:, None, None, None]
        turn = None if angle is None else angle[:, t]
        e = None if erase is None else erase[:, t]
        y, after = delta_rule_step(v[:, t], k[:, t], q[:, t], e, log_decay[:, t], turn, S, hermitian)
        S = after if mask is None else torch.where(mask[:, t, None, None, None], after, S)
        outputs.append(y)
    return torch.stack(outputs, dim=1), S


@without_autocast
def delta_rule_step(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    erase: Tensor | None,
    log_decay: Tensor,
    angle: Tensor | None,
    state: Tensor,
    hermitian: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: v (B, H, P), k and q (B, G, K), erase (B, H, K) or β (B, H), log_decay (B, H) or (B, H, K)
    (N with angles or hermitian), angle (B, H, N) or None, state (B, H, K, P) -> y (B, H, P) and the next state."""
    wide, H = wide_dtype(v), v.shape[1]
    k, q = to_heads(k, H, dim=1), to_heads(q, H, dim=1)
    v, erase = _apply_beta(v, k, erase)
    S, k, q, value = state.to(wide), k.to(wide), q.to(wide), v.to(wide)
    erase = None if erase is None else erase.to(wide)
    decay = log_decay.to(wide).exp()
    if decay.dim() == 2:
        decay = decay[..., None]
    elif decay.shape[-1] < S.shape[-2]:  # one a mode
        decay = torch.cat((decay, decay), dim=-1)
    S = S * decay[..., None]
    if angle is not None:
        turn = angle.to(wide)[..., None]
        S = rotate(S, turn.cos(), turn.sin(), dim=-2)
    if hermitian:
        S, k, q = _complex(S, -2), _complex(k), _complex(q)
        erase = None if erase is None else _complex(erase)
    if erase is not None:
        value = value - (erase.conj()[..., None, :] @ S).squeeze(-2)  # (B, H, P)
    S = S + k[..., :, None] * value[..., None, :]
    y = (q.conj()[..., None, :] @ S).squeeze(-2)
    if hermitian:
        y, S = y.real, _real(S, -2)
    return y.to(v.dtype), S


@without_autocast
def delta_rule_chunked(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    erase: Tensor | None,
    log_decay: Tensor,
    angle: Tensor | None = None,
    *,
    hermitian: bool = False,
    min_log_decay: float | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 64,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Evaluate the memory over L tokens, T at a time.

    Within a chunk the writes w_t = v_t − e_t^T S̄_t obey a triangular system: with cum and θ the log-decay and the angle
    accumulated from the chunk's start, k̃ = e^{−iθ}k, ẽ and q̃ likewise, A_ts = ẽ_t^T e^{cum_t − cum_s} k̃_s for s < t,
    M_ts = q̃_t^T e^{cum_t − cum_s} k̃_s for s ≤ t, E_t = e^{cum_t} ẽ_t, Q_t = e^{cum_t} q̃_t, K̂_s = e^{cum_T − cum_s} k̃_s,

        (I + A) W = V − E S_in            X = (I + A)^{−1}, U = X V, Z = X E, so W = U − Z S_in
        Y     = M U + (Q − M Z) S_in
        S_out = e^{iθ_T} ( e^{cum_T} − K̂^T Z ) S_in + e^{iθ_T} K̂^T U

    so that between chunks one K×K by K×P product is left; without erasing, U = V and Z = 0, and none is.

    Args:
        v: what is written (B, L, H, P). Products with it run in its dtype; the inverse, decays, angles and states in
            float32 or wider.
        k, q: (B, L, G, K), K = 2N with ``angle`` or ``hermitian``. G divides H: heads h = gR … gR + R − 1 share those
            of group g, and with β and one decay a head the products of them.
        erase: e (B, L, H, K); or β (B, L, H), the gated delta rule proper: e_t = β_t k_t, and β_t v_t is written; or
            None: nothing is erased.
        log_decay: ≤ 0, nats a step: (B, L, H), one a head, or (B, L, H, K), one a channel (N, one a mode,
            with angles or hermitian).
        angle: (B, L, H, N), radians a step, or None.
        hermitian: the complex form.
        min_log_decay: a promise that decays a channel are ≥ this: then they are split into two factors, which spares
            T'×T'×K exponentials a sub-chunk. None promises nothing.
        state: S before the first token (B, H, K, P); None is zeros.
        reset: (B, L) bool, True where a document begins.
        mask: (B, L) bool, False at padding: such a step leaves the state as it was.
        chunk_size: T; 64 is the most that float32 solves well.
        backend: "torch", or "fla": a kernel of ``ops.fla_backend``, on NVIDIA GPUs, with its own T. It has one decay a
            head, and erases β or nothing.

    Returns:
        y (B, L, H, P) in v's dtype, and S after the last token (B, H, K, P) in float32 or wider.

    Raises:
        ValueError: chunk_size out of range, or a backend that is unknown, cannot run here or lacks what is asked.
    """
    B, L, H, P = v.shape
    K = k.shape[-1]
    if not 1 <= chunk_size <= 64:
        raise ValueError(f"chunk_size = {chunk_size}: must be in 1 … 64; 64 is fastest")
    T = min(chunk_size, L)
    wide = wide_dtype(v)
    by_channel = log_decay.dim() == 4
    if mask is not None:
        hidden = ~mask[..., None, None]
        k = k.masked_fill(hidden, 0)
        erase = None if erase is None else erase.masked_fill(hidden if erase.dim() == 4 else hidden[..., 0], 0)
        log_decay = log_decay.masked_fill(hidden if by_channel else hidden[..., 0], 0)
        angle = None if angle is None else angle.masked_fill(hidden, 0)
    if fla_backend.chosen(backend, v):
        _check_kernel(hermitian, by_channel, erase)
        k, q = to_heads(k, H), to_heads(q, H)
        theta = None if angle is None else phases(angle, None, wide, T)
        k, q = (k, q) if theta is None else (turn_back(k, theta), turn_back(q, theta))
        if erase is None:
            y, S = fla_backend.linear_attention(v, k, q, log_decay, state, reset)
        else:
            y, S = fla_backend.gated_delta_rule(v, k, q, erase, log_decay, state, reset)
        return y, S if theta is None else turn_state(S, theta)
    if erase is not None and erase.dim() == 3 and angle is None and not (by_channel or hermitian):
        return _proper(v, k, q, erase, log_decay, state, reset, T)
    padding = -L % T
    C = (L + padding) // T
    k, q = to_heads(k, H), to_heads(q, H)
    v, erase = _apply_beta(v, k, erase)

    def chunks(x: Tensor) -> Tensor:  # (B, L, H, ·) -> (B, C, H, T, ·)
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)) if padding else x
        return x.view(B, C, T, H, -1).transpose(2, 3)

    v, k, q = chunks(v), chunks(k).to(wide), chunks(q).to(wide)
    erase = None if erase is None else chunks(erase).to(wide)
    # a channel may lose e^5 a token, so that cum passes −300: differences are formed in float64
    cum = chunks(log_decay).cumsum(-2, dtype=phase_dtype(log_decay) if by_channel else wide)  # (B, C, H, T, 1 or K)
    cos = sin = None
    if angle is not None:
        theta = reduce_angle(chunks(angle).cumsum(-2, dtype=phase_dtype(angle)), wide)  # (B, C, H, T, N)
        cos, sin = theta.cos(), theta.sin()
        k, q = rotate(k, cos, -sin), rotate(q, cos, -sin)
        erase = None if erase is None else rotate(erase, cos, -sin)
        cos, sin = cos[..., -1, :, None], sin[..., -1, :, None]  # (B, C, H, N, 1)
        if by_channel and not hermitian:
            cum = torch.cat((cum, cum), dim=-1)
    S = v.new_zeros(B, H, K, P, dtype=wide) if state is None else state.to(wide)
    out_dtype = dtype = v.dtype
    if hermitian:
        k, q, S = _complex(k), _complex(q).conj(), _complex(S, -2)
        erase = None if erase is None else _complex(erase).conj()
        v, dtype = v.to(k.dtype), k.dtype

    from_start, to_end, carry = (x.to(wide).exp() for x in (cum, cum[..., -1:, :] - cum, cum[..., -1, :]))
    same = None
    if reset is not None:
        reset = F.pad(reset, (0, padding)) if padding else reset
        document = reset.view(B, C, 1, T).cumsum(-1)  # how many documents have begun in this chunk up to t
        same = document[..., :, None] == document[..., None, :]  # (B, C, 1, T, T)
        from_start = from_start * (document == 0)[..., None]
        to_end = to_end * (document == document[..., -1:])[..., None]
        carry = carry * (document[..., -1:] == 0)
    ended = (k * to_end).to(dtype).mT  # K̂^T
    reads = (q * from_start).to(dtype)  # Q
    if erase is None:
        (M,) = _scores([q], k, cum, same, min_log_decay)  # (B, C, H, T, T)
        U, M = v, M.to(dtype)
        G = carry.expand(*carry.shape[:-1], k.shape[-1])[..., None]  # (B, C, H, K, 1)
    else:
        A, M = _scores([erase, q], k, cum, same, min_log_decay)
        X, M = UnitLowerInverse.apply(A).to(dtype), M.to(dtype)
        U, Z = X @ v, X @ (erase * from_start).to(dtype)  # (B, C, H, T, P or K)
        G = torch.diag_embed(carry.expand(*carry.shape[:-1], k.shape[-1])) - (ended @ Z).to(S.dtype)  # (B, C, H, K, K)
        reads = reads - M @ Z
    written = (ended @ U).to(S.dtype)
    turns = itertools.repeat(None)
    if cos is not None and sin is not None:
        written = _turn(written, cos, sin, hermitian)
        if erase is None:
            turns = zip(cos.unbind(1), sin.unbind(1), strict=True)
        else:
            G = _turn(G, cos, sin, hermitian)
    starts = []
    for G_j, W_j, turn in zip(G.unbind(1), written.unbind(1), turns, strict=False):  # a slice has a whole gradient
        starts.append(S)
        if erase is None:
            S = G_j * S
            S = W_j + (S if turn is None else _turn(S, *turn, hermitian))
        else:
            S = torch.baddbmm(W_j.flatten(0, 1), G_j.flatten(0, 1), S.flatten(0, 1)).view_as(S)
    y = M @ U
    if state is not None or C > 1:
        y = y + reads @ torch.stack(starts, dim=1).to(dtype)
    if hermitian:
        y, S = y.real, _real(S, -2)
    return y.transpose(2, 3).reshape(B, C * T, H, P)[:, :L].to(out_dtype), S


def _proper(
    v: Tensor,
    k: Tensor,
    q: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    reset: Tensor | None,
    T: int,
) -> tuple[Tensor, Tensor]:
    """:func:`delta_rule_chunked` with β, one decay a head and keys that stand still."""
    L, wide = v.shape[1], wide_dtype(v)
    padding = -L % T
    if padding:  # a step with k = 0 and no decay changes nothing
        v, k, q = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (v, k, q))
        beta, log_decay = (F.pad(x, (0, 0, 0, padding)) for x in (beta, log_decay))
        reset = None if reset is None else F.pad(reset, (0, padding))
    C = (L + padding) // T

    def chunks(x: Tensor) -> Tensor:  # (B, L, H) -> (B, C, H, T)
        return x.unflatten(1, (C, T)).transpose(2, 3)

    document = None if reset is None else chunks(reset[..., None]).cumsum(-1)  # how many have begun in the chunk
    cum = chunks(log_decay).cumsum(-1, dtype=wide)
    result = ChunkedDelta.apply(v, k, q, chunks(beta).to(wide), cum, state, document)
    assert isinstance(result, tuple)
    return result[0][:, :L], result[1]


def _apply_beta(v: Tensor, k: Tensor, erase: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is written, and the erase vectors, where ``erase`` may be β (…), without the K of k (…, K)."""
    if erase is None or erase.dim() == k.dim():
        return v, erase
    beta = erase[..., None]
    return beta.to(v.dtype) * v, beta * k


def _check_kernel(hermitian: bool, by_channel: bool, erase: Tensor | None) -> None:
    """Refuse what fla's kernels cannot do."""
    for asked, name in (
        (hermitian, "hermitian = True"),
        (by_channel, "log_decay (B, L, H, K), only (B, L, H)"),
        (erase is not None and erase.dim() == 4, "erase (B, L, H, K), only β (B, L, H)"),
    ):
        if asked:
            raise ValueError(f"backend = 'fla': its kernels have no {name}; use backend = 'torch'")


def _scores(
    rows: list[Tensor], k: Tensor, cum: Tensor, same: Tensor | None, min_log_decay: float | None
) -> list[Tensor]:
    """r_t^T e^{cum_t − cum_s} k_s, s ≤ t, 0 between documents (B, C, H, T, T), of each r (B, C, H, T, K) in ``rows``"""
    T = k.shape[-2]
    visible = torch.ones(T, T, dtype=torch.bool, device=k.device).tril()
    if same is not None:
        visible = visible & same
    if cum.shape[-1] == 1:  # one decay a head: it stands outside the product
        difference = cum - cum.mT
        decay = difference.masked_fill(~visible, float("-inf")).exp()
        return [(r @ k.mT) * decay for r in rows]
    wide, stacked = k.real.dtype, torch.stack(rows)  # (·, B, C, H, T, K)
    blocks = []
    size = SUB_CHUNK
    if min_log_decay is not None:
        size = max(1, min(size, int(EXPONENT / max(-min_log_decay, 1e-6))))
    for begin in range(0, T, size):
        end = min(begin + size, T)
        base = cum[..., begin - 1 : begin, :] if begin else torch.zeros_like(cum[..., :1, :])
        own, past = cum[..., begin:end, :], cum[..., :begin, :]
        x = stacked[..., begin:end, :]
        if min_log_decay is not None:  # exponents within ±EXPONENT / 2
            centre = base + min_log_decay * (end - begin) / 2
            left = x * (own - centre).to(wide).exp()
            block = left @ (k[..., :end, :] * (centre - cum[..., :end, :]).to(wide).exp()).mT
        else:
            decay = (own[..., :, None, :] - own[..., None, :, :]).clamp(max=0).to(wide).exp()  # (…, T', T', K)
            inner = torch.einsum("rbchtk,bchsk,bchtsk->rbchts", x, k[..., begin:end, :], decay.to(x.dtype))
            outer = (x * (own - base).to(wide).exp()) @ (k[..., :begin, :] * (base - past).to(wide).exp()).mT
            block = torch.cat((outer, inner), dim=-1)
        blocks.append(F.pad(block, (0, T - end)))
    scores = torch.cat(blocks, dim=-2).masked_fill(~visible, 0)
    return list(scores)


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^{−1} for the strictly lower part of A (…, T, T); what stands on and above the diagonal is not read."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
        X = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (X,) = ctx.saved_tensors
        return -(X.mH @ gradient @ X.mH).tril(-1)


def _complex(x: Tensor, dim: int = -1) -> Tensor:
    re, im = x.chunk(2, dim=dim)
    return torch.complex(re.contiguous(), im.contiguous())


def _real(x: Tensor, dim: int) -> Tensor:
    return torch.cat((x.real, x.imag), dim=dim)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, hermitian: bool) -> Tensor:
    return x * torch.complex(cos, sin) if hermitian else rotate(x, cos, sin, dim=-2)
