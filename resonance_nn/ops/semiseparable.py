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

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops import fla_backend
from resonance_nn.ops.chunked import Chunked
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
    frequency: Tensor | None = None,
    log_write: Tensor | None = None,
    log_read: Tensor | None = None,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    read_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in complex arithmetic. Arguments as :func:`semiseparable_chunked`."""
    B, L, H, P = v.shape
    wide = wide_dtype(v)
    b, c, log_decay, angle = _mask_inputs(b.to(wide), c.to(wide), log_decay.to(wide), angle, mask)
    b, c = to_heads(b, H), to_heads(c, H)
    if log_write is not None:
        b = b * log_write.to(wide).exp()[..., None]
    if log_read is not None:
        c = c * log_read.to(wide).exp()[..., None]
    if angle is not None and frequency is not None:
        angle = angle.to(wide)[..., None] * frequency.to(wide)

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
    y = torch.stack(outputs, dim=1)
    return (y if skip is None else y + skip[..., None] * v).to(v.dtype), final


@without_autocast
def semiseparable_chunked(
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    angle: Tensor | None = None,
    *,
    frequency: Tensor | None = None,
    log_write: Tensor | None = None,
    log_read: Tensor | None = None,
    skip: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    read_first: bool = False,
    chunk_size: int = 64,
    backend: str = "torch",
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
        frequency: (H, N): with it ``angle`` is (B, L, H), and a mode turns by their product. Cheaper, as sums are of
            one number a head.
        log_write: (B, L, H) or None: b_s is multiplied by its exponential, which is taken only after it joins the
            decays: log-decays may be positive if only the sums of decays and log_write are bounded.
        log_read: (B, L, H) or None: the same for c_t. Scales of b and c cost nothing here.
        skip: d (H) or (B, L, H) or None: d ∘ v_t is added to y_t.
        state: S before the first token (B, H, K, P); None is zeros.
        reset: (B, L) bool, True where a document begins: the state is cleared before that token.
        mask: (B, L) bool, False at padding: such a step leaves the state as it was.
        read_first: whether a token reads before it writes, y_t = Re(c_t^H Λ_t S_{t−1}).
        chunk_size: T.
        backend: "torch", or "fla": the sums by a kernel of ``ops.fla_backend``, on NVIDIA GPUs, with its own T. The
            exponentials of log_write and log_read are then taken by themselves, and have to be finite.

    Returns:
        y (B, L, H, P) in v's dtype, and S after the last token (B, H, K, P) in float32 or wider.

    Raises:
        ValueError: chunk_size < 1, or a backend that is unknown or cannot run here.
    """
    B, L, H, _ = v.shape
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: must be a positive integer, 64 to 128 is fastest")
    T = min(chunk_size, L)
    wide = wide_dtype(v)
    b, c, log_decay, angle = _mask_inputs(b, c, log_decay, angle, mask)
    if b.shape[2] != c.shape[2]:
        b, c = to_heads(b, H), to_heads(c, H)
    if fla_backend.chosen(backend, v):
        theta = None if angle is None else phases(angle, frequency, wide, T)
        b = b if log_write is None else to_heads(b, H) * log_write.to(wide).exp()[..., None]
        c = c if log_read is None else to_heads(c, H) * log_read.to(wide).exp()[..., None]
        y, S = _by_kernel(v, to_heads(b, H), to_heads(c, H), log_decay, theta, state, reset, read_first)
        return (y if skip is None else y + skip.to(wide)[..., None] * v).to(v.dtype), S
    padding = -L % T
    if padding:  # a step with b = 0, no decay and no rotation changes nothing
        v, b, c, log_decay = (_pad_length(x, padding) for x in (v, b, c, log_decay))
        angle = None if angle is None else _pad_length(angle, padding)
        log_write = None if log_write is None else _pad_length(log_write, padding)
        log_read = None if log_read is None else _pad_length(log_read, padding)
        skip = skip if skip is None or skip.dim() == 1 else _pad_length(skip, padding)
        reset = None if reset is None else F.pad(reset, (0, padding))
    C = (L + padding) // T

    def chunks(x: Tensor) -> Tensor:  # (B, L, H) -> (B, C, H, T)
        return x.unflatten(1, (C, T)).transpose(2, 3)

    cum = chunks(log_decay).cumsum(-1, dtype=wide)
    source = cum if log_write is None else cum - chunks(log_write).to(wide)  # what is left of s: − source_s
    target = cum if log_read is None else cum + chunks(log_read).to(wide)
    theta = None if angle is None else phases(angle, frequency, wide, T)  # (B, L, H, N)
    if skip is not None:
        skip = skip[:, None].to(wide) if skip.dim() == 1 else chunks(skip).to(wide)
        skip = skip.expand(cum.shape)
    document = None if reset is None else reset.view(B, C, 1, T).cumsum(-1)  # how many have begun in the chunk up to t
    result = Chunked.apply(v, b, c, cum, source, target, skip, theta, state, document, read_first)
    assert isinstance(result, tuple)
    y, S = result
    return y[:, :L], S if theta is None else turn_state(S, theta)


@without_autocast
def semiseparable_step(
    v: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, angle: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: v (B, H, P), b and c (B, G, K), log_decay (B, H), angle (B, H, N) or None,
    state (B, H, K, P) -> y (B, H, P) and the next state. Cost O(K·P) a head, whatever came before."""
    wide, H = wide_dtype(v), v.shape[1]
    S = state.to(wide) * log_decay.to(wide).exp()[..., None, None]
    if angle is not None:
        angle = angle.to(wide)[..., None]
        S = rotate(S, angle.cos(), angle.sin(), dim=-2)
    if 1 < b.shape[1] < H:  # one group is broadcast
        b, c = to_heads(b, H, dim=1), to_heads(c, H, dim=1)
    S.addcmul_(b.to(wide)[..., None], v.to(wide).unsqueeze(-2))
    y = c.to(wide).unsqueeze(-2) @ S
    return y.view(v.shape).to(v.dtype), S


def to_heads(x: Tensor, H: int, dim: int = 2) -> Tensor:
    """(…, G, K) -> (…, H, K): each group's vector for its heads."""
    return x if x.shape[dim] == H else x.repeat_interleave(H // x.shape[dim], dim=dim)


def _mask_inputs(
    b: Tensor, c: Tensor, log_decay: Tensor, angle: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """At padding: nothing written, no decay, no rotation."""
    if mask is None:
        return b, c, log_decay, angle
    b = b.masked_fill(~mask[..., None, None], 0)
    log_decay = log_decay.masked_fill(~mask[..., None], 0)
    if angle is not None:
        angle = angle.masked_fill(~mask.view(*mask.shape, *[1] * (angle.dim() - 2)), 0)
    return b, c, log_decay, angle


def _pad_length(x: Tensor, padding: int) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))


def phases(angle: Tensor, frequency: Tensor | None, dtype: torch.dtype, T: int) -> Tensor:
    """The angles (B, L, H, N), or (B, L, H) times ``frequency`` (H, N), summed from the first token on, modulo 2π:
    (B, L, H, N) in ``dtype``. The sums over chunks of T are reduced at each, so that nothing grows."""
    L = angle.shape[1]
    if L % T:
        return phases(_pad_length(angle, -L % T), frequency, dtype, T)[:, :L]
    theta = angle.unflatten(1, (-1, T)).cumsum(2, dtype=phase_dtype(angle))
    turns = theta[:, :, -1:]  # (B, C, 1, H, …)
    if frequency is not None:
        turns = turns[..., None] * frequency.to(turns.dtype)
    turns = reduce_angle(turns, turns.dtype)
    start = reduce_angle(turns.cumsum(1) - turns, turns.dtype)
    if frequency is None:
        return reduce_angle(theta + start, dtype).flatten(1, 2)
    return (start.to(dtype) + theta.to(dtype)[..., None] * frequency.to(dtype)).flatten(1, 2)


def turn_back(x: Tensor, theta: Tensor) -> Tensor:
    """e^{−iθ} x, for x (B, L, H, 2N) and θ (B, L, H, N), in θ's dtype."""
    return rotate(x.to(theta.dtype), theta.cos(), -theta.sin())


def turn_state(S: Tensor, theta: Tensor) -> Tensor:
    """A state (B, H, 2N, P) in the frame that turns with the modes as it stands after the last token of θ
    (B, L, H, N)."""
    last = theta[:, -1, :, :, None]
    return rotate(S, last.cos(), last.sin(), dim=2)


def _by_kernel(
    v: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    theta: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    read_first: bool,
) -> tuple[Tensor, Tensor]:
    """y and S of :func:`semiseparable_chunked` by fla's kernel, which knows real modes and reads after it writes:
    b̃ and c̃ are its keys and queries, and to read first, tokens are written one place later than they are read."""
    if theta is not None:
        b, c = turn_back(b, theta), turn_back(c, theta)
    if not read_first:
        y, S = fla_backend.linear_attention(v, b, c, log_decay, state, reset)
    else:
        v, b, late = (F.pad(x, (0, 0) * (x.dim() - 2) + (1, 0)) for x in (v, b, log_decay))
        late_reset = None if reset is None else F.pad(reset, (1, 0))
        y, S = fla_backend.linear_attention(v, b, _pad_length(c, 1), late, state, late_reset)
        read = log_decay.to(S.dtype).exp()
        y = y[:, :-1] * (read if reset is None else read.masked_fill(reset[..., None], 0))[..., None]
    return y, S if theta is None else turn_state(S, theta)
