"""Holographic binding (Plate 1995) and the recurrent memory made of it.

A value v ∈ R^P is bound to a key by circular convolution and unbound by circular correlation. With F the discrete
Fourier transform both are products at each of the P/2 + 1 bins of a real signal,

    bind(k, v) = F⁻¹( F(k) ∘ F(v) )        unbind(q, c) = F⁻¹( conj F(q) ∘ c )

and a *unitary* key, |F(k)| = 1 at every bin, makes binding orthogonal: unbind(k, bind(k, v)) = v.

The memory has R traces; at each frequency f a key is a vector κ_t ∈ C^R of norm 1 (R = 1: a unitary key). It reads

    y_t = F⁻¹( κ_q,t^H M_t )        after the write of token t

    Hebbian                 M_t = α_t M_{t−1} + β_t κ_t F(v_t)_f
    with ``erase``          M_t = (I − β_t κ_t κ_t^H) α_t M_{t−1} + β_t κ_t F(v_t)_f

α_t = exp(log_decay) and β_t are one scalar a head. A Hebbian recall is disturbed by every other pair. Erasing is the
delta rule at each frequency: exact for R keys that are orthonormal at every f. With R = 1 it forgets all but β's share
at each write, since any two unitary keys are parallel in C^1.

Letters: B batch, L length, H heads, P channels a head, R traces, F = P//2 + 1 bins, T chunk length. All tensors at the
border are real: keys are packed spectra (see :func:`key_spectrum`), a state is the traces themselves, F⁻¹(M), so that
``unbind`` applies to it. Inside, complex64, or complex128 for float64.

    hrr_reference   the recurrence, one token at a time              O(L·R·P), sequential
    hrr_chunked     Hebbian: the semiseparable operator with one real mode, on bound values    O(L·T·R·P), matmuls
                    erase: two sweeps, over chunks in parallel       O(L·R²·P), L/T + 2T sequential steps
    hrr_step        one token                                        O(R·P + P log P)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resonance_nn.ops.precision import wide_dtype, without_autocast
from resonance_nn.ops.semiseparable import semiseparable_chunked


@without_autocast
def bind(key: Tensor, value: Tensor) -> Tensor:
    """Circular convolution of real signals (..., P): c_n = Σ_m k_m v_{(n−m) mod P}."""
    return _inverse(_key(key) * _transform(value), value)


@without_autocast
def unbind(query: Tensor, trace: Tensor) -> Tensor:
    """Circular correlation of real signals (..., P): y_n = Σ_m q_m c_{(n+m) mod P}, the adjoint of :func:`bind`."""
    return _inverse(_key(query).conj() * _transform(trace), trace)


@without_autocast
def unitary(x: Tensor, trace_dim: int | None = None) -> Tensor:
    """The nearest signals (..., P) with |F| = 1 at every bin: each bin keeps its phase, a zero bin becomes 1.

    With ``trace_dim`` the norm is that of the vectors along that dimension (R traces), Σ_r |F_r|² = 1.
    """
    z = _key(x)
    power = z.abs() if trace_dim is None else torch.linalg.vector_norm(z, dim=trace_dim, keepdim=True)
    empty = power == 0
    scale = 1 if trace_dim is None else x.shape[trace_dim] ** -0.5
    z = torch.where(empty, scale, z / torch.where(empty, 1, power))
    return torch.fft.irfft(z, n=x.shape[-1]).to(x.dtype)


def random_unitary(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Unitary keys of ``shape`` (..., P): phases uniform in [0, 2π), DC and (P even) Nyquist ±1 with equal chance."""
    P = shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    phase = 2 * torch.pi * torch.rand(*shape[:-1], P // 2 + 1, generator=generator, dtype=wide, device=device)
    real = [0, P // 2] if P % 2 == 0 else [0]
    phase[..., real] = torch.where(phase[..., real] < torch.pi, 0.0, torch.pi).to(wide)
    return torch.fft.irfft(torch.polar(torch.ones_like(phase), phase), n=P).to(dtype)


@without_autocast
def key_spectrum(x: Tensor) -> Tensor:
    """The spectrum of real signals (..., P) as P reals: ``[Re F_0 … Re F_{P//2} | Im F_1 … Im F_{(P−1)//2}]``.

    DC and, for even P, Nyquist have no imaginary part.
    """
    z = _key(x)
    return torch.cat((z.real, z.imag[..., 1 : (x.shape[-1] + 1) // 2]), dim=-1)


@without_autocast
def unit_spectrum(x: Tensor, eps: float = 1e-6, softness: float = 0.0) -> Tensor:
    """Make packed spectra (..., R, P) keys: at each frequency the R complex numbers are scaled to norm 1.

    κ = x · rsqrt(Σ_r |x_r|² + eps), so a mixer can project a token to R·P reals and have a key with a gradient that is
    bounded everywhere (at the real bins and R = 1 it is the gradient of a soft sign). float32 or wider. The phase of a
    small number is all rounding: with ``softness`` σ > 0, κ = x · rsqrt(Σ_r |x_r|² + σ · mean power of the bins), so
    that weak bins count less instead of at random.
    """
    x = x.to(wide_dtype(x))
    P = x.shape[-1]
    square = x.square().sum(-2, keepdim=True)
    power = square[..., : P // 2 + 1] + F.pad(square[..., P // 2 + 1 :], (1, 1 - P % 2))  # (..., 1, F)
    power = power + softness * power.mean(-1, keepdim=True)
    scale = torch.rsqrt(power + eps)
    return x * torch.cat((scale, scale[..., 1 : (P + 1) // 2]), dim=-1)


@without_autocast
def hrr_reference(
    v: Tensor,
    key: Tensor,
    query: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    erase: bool = False,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token. Arguments as :func:`hrr_chunked`."""
    B, L, H, R, P = key.shape
    wide = wide_dtype(v)
    log_decay, beta = _mask_inputs(log_decay.to(wide), beta.to(wide), mask)
    k, q, z = _unpack(key.to(wide)), _unpack(query.to(wide)), _transform(v)
    M = z.new_zeros(B, H, R, P // 2 + 1) if state is None else _transform(state.to(wide))
    outputs = []
    for t in range(L):
        if reset is not None:
            M = M * (~reset[:, t])[:, None, None, None]
        M = log_decay[:, t].exp()[..., None, None] * M
        target = z[:, t, :, None]  # (B, H, 1, F)
        if erase:
            target = target - (k[:, t].conj() * M).sum(-2, keepdim=True)
        M = M + beta[:, t, :, None, None] * k[:, t] * target
        outputs.append((q[:, t].conj() * M).sum(-2))
    return _inverse(torch.stack(outputs, dim=1), v), _inverse(M, v, wide)


@without_autocast
def hrr_chunked(
    v: Tensor,
    key: Tensor,
    query: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    erase: bool = False,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Evaluate the memory over L tokens. Causal; any split into calls with the state carried gives the same outputs.

    Args:
        v: values (B, L, H, P), real signals, any P ≥ 1.
        key, query: packed spectra (B, L, H, R, P) with norm 1 over R at each frequency: :func:`unit_spectrum`.
        log_decay: log α (B, L, H), ≤ 0, nats a step.
        beta: write strength β (B, L, H). With ``erase`` in [0, 2]: above 1 a write reflects what it erases.
        erase: whether a write first erases what its key recalls, else it only adds.
        state: the traces before the first token (B, H, R, P); None is zeros.
        reset: (B, L) bool, True where a document begins: the traces are cleared before that token.
        mask: (B, L) bool, False at padding: such a step leaves the traces as they were.
        chunk_size: T. Erasing takes 2T + L/T sequential steps; 16 to 128 are about equal at L = 2,048.

    Returns:
        y (B, L, H, P) in v's dtype, and the traces after the last token (B, H, R, P) in float32 or wider.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: must be a positive integer, 64 is a good one")
    B, L, H, R, P = key.shape
    wide = wide_dtype(v)
    k, z = _unpack(key.to(wide)), _transform(v)  # (B, L, H, R, F), (B, L, H, F)
    if erase:
        q = _unpack(query.to(wide))
        log_decay, beta = _mask_inputs(log_decay.to(wide), beta.to(wide), mask)
        alpha = log_decay.exp() if reset is None else log_decay.exp().masked_fill(reset[..., None], 0)
        M = z.new_zeros(B, H, R, P // 2 + 1) if state is None else _transform(state.to(wide))
        result = _Erasing.apply(z, k, q, alpha, beta, M, min(chunk_size, L))
        assert isinstance(result, tuple)
        return _inverse(result[0], v), _inverse(result[1], v, wide)
    bound = torch.view_as_real(k * z[..., None, :]).flatten(-3)  # (B, L, H, R·F·2)
    M = None if state is None else torch.view_as_real(_transform(state.to(wide))).flatten(-3)[:, :, None]
    trace, M = semiseparable_chunked(
        bound.to(v.dtype),
        beta[..., None],
        torch.ones_like(beta)[..., None],
        log_decay,
        state=M,
        reset=reset,
        mask=mask,
        chunk_size=chunk_size,
    )
    re, im = _parts(query.to(wide))  # in reals: torch.compile has lost the conjugate of q here, and its gradient
    trace_re, trace_im = trace.to(wide).unflatten(-1, (R, -1, 2)).unbind(-1)  # (B, L, H, R, F)
    y = torch.complex((re * trace_re + im * trace_im).sum(-2), (re * trace_im - im * trace_re).sum(-2))
    return _inverse(y, v), _inverse(_as_complex(M.squeeze(-2), R), v, wide)


@without_autocast
def hrr_step(
    v: Tensor,
    key: Tensor,
    query: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    erase: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: v (B, H, P), key and query (B, H, R, P), log_decay and beta (B, H), state (B, H, R, P)
    -> y (B, H, P) and the next state."""
    wide = wide_dtype(v)
    k, q = _unpack(key.to(wide)), _unpack(query.to(wide))
    M = log_decay.to(wide).exp()[..., None, None] * _transform(state.to(wide))
    target = _transform(v)[..., None, :]  # (B, H, 1, F)
    if erase:
        target = target - (k.conj() * M).sum(-2, keepdim=True)
    M = M + beta.to(wide)[..., None, None] * k * target
    return _inverse((q.conj() * M).sum(-2), v), _inverse(M, v, wide)


class _Erasing(torch.autograd.Function):
    """The erasing memory at the frequencies: z (B, L, H, F), k and q (B, L, H, R, F), α and β (B, L, H), M_0
    (B, H, R, F) -> κ_q^H M_t (B, L, H, F) and M_L. With G_t the gradient at M_t after all later uses,

        M_t     = A_t M_{t−1} + β_t κ_t z_t        A_t = α_t (I − β_t κ_t κ_t^H), Hermitian
        G_{t−1} = A_t G_t + q_{t−1} ȳ_{t−1}        the same recurrence, backwards

    so that only the M_t are kept, of which autograd would keep many copies."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, k: Tensor, q: Tensor, alpha: Tensor, beta: Tensor, M: Tensor, T: int
    ) -> tuple[Tensor, Tensor]:
        writes = k * (beta[..., None] * z)[..., None, :]
        states, last = _sweep(k, alpha, beta, writes, M, T)
        ctx.save_for_backward(z, k, q, alpha, beta, M, states)
        ctx.chunk_size = T
        return (q.conj() * states).sum(-2), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, k, q, alpha, beta, M, states = ctx.saved_tensors
        grad_y = grad_y[..., None, :]
        G, grad_M = _sweep(k, alpha, beta, q * grad_y, grad_last, ctx.chunk_size, backwards=True)
        grad_q = states * grad_y.conj()
        before = torch.cat((M[:, None], states[:, :-1]), dim=1)  # M_{t−1}
        decayed = before * alpha[..., None, None]
        b = beta[..., None, None]
        error = z[..., None, :] - (k.conj() * decayed).sum(-2, keepdim=True)  # (B, L, H, 1, F)
        h = (k.conj() * G).sum(-2, keepdim=True)
        grad_beta = (error.conj() * h).real.sum((-2, -1))
        grad_k = b * (G * error.conj() - decayed * h.conj())
        h = b * h
        grad_alpha = (before.conj() * (G - k * h)).real.sum((-2, -1))
        return h.squeeze(-2), grad_k, grad_q, grad_alpha, grad_beta, grad_M, None


def _sweep(
    k: Tensor, alpha: Tensor, beta: Tensor, x: Tensor, start: Tensor, T: int, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """X_t = A_t X_{t−1} + x_t from ``start``, or backwards X_t = A_{t+1} X_{t+1} + x_t: all X_t (B, L, H, R, F), and
    the last, or backwards A_1 X_1.

    First each chunk's map X_in ↦ Φ X_in + M, all chunks at once; then their chain; then all chunks again from where
    they start. T + L/T + T sequential steps.
    """
    B, L, H, R, bins = k.shape
    padding = -L % T
    if padding:  # A = I, x = 0
        k, x = (F.pad(t, (0, 0, 0, 0, 0, 0, 0, padding)) for t in (k, x))
        alpha, beta = F.pad(alpha, (0, 0, 0, padding), value=1.0), F.pad(beta, (0, 0, 0, padding))
    C = (L + padding) // T
    k, x = k.view(B, C, T, H, R, bins), x.view(B, C, T, H, R, bins)
    alpha, beta = (t.reshape(B, C, T, H, 1, 1) for t in (alpha, beta))
    conj_k, k = k.conj().resolve_conj(), k * beta
    order = range(T - 1, -1, -1) if backwards else range(T)

    def apply(t: int, X: Tensor) -> Tensor:  # A_t X, X (B, C, H, R, ·, F)
        recalled = (conj_k[:, :, t, :, :, None] * X).sum(-3, keepdim=True)
        return (X - k[:, :, t, :, :, None] * recalled) * alpha[:, :, t, ..., None]

    starts = start[:, None]  # (B, 1, H, R, F)
    if C > 1:
        X = F.pad(torch.eye(R, dtype=k.dtype, device=k.device), (0, 1))[..., None]  # [Φ | M], (R, R + 1, 1)
        X = X.expand(B, C, H, R, R + 1, bins).contiguous()
        for t in order:
            if backwards:
                X[..., R, :] += x[:, :, t]
            X = apply(t, X)
            if not backwards:
                X[..., R, :] += x[:, :, t]
        S, chain = start, [start] * C
        for j in range(C - 1, -1, -1) if backwards else range(C):
            chain[j] = S
            S = (X[:, j, :, :, :R] * S[:, :, None]).sum(-2) + X[:, j, :, :, R]
        starts = torch.stack(chain, dim=1)
    X, out = starts[..., None, :], torch.empty_like(x)
    for t in order:
        if backwards:
            X = X + x[:, :, t, :, :, None]
            out[:, :, t] = X.squeeze(-2)
            X = apply(t, X)
        else:
            X = apply(t, X) + x[:, :, t, :, :, None]
            out[:, :, t] = X.squeeze(-2)
    last = X[:, 0 if backwards else -1].squeeze(-2)
    return out.view(B, C * T, H, R, bins)[:, :L], last


def _key(x: Tensor) -> Tensor:  # (..., P) real -> (..., F) complex
    return torch.fft.rfft(x.to(wide_dtype(x)))


def _transform(x: Tensor) -> Tensor:
    """A value or a trace at the frequencies, with its norm: small enough for half precision."""
    return torch.fft.rfft(x.to(wide_dtype(x)), norm="ortho")


def _inverse(z: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(..., F) complex -> (..., P) real, P and (by default) dtype as those of ``like``."""
    return torch.fft.irfft(z, n=like.shape[-1], norm="ortho").to(dtype or like.dtype)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:  # packed (..., P) -> real and imaginary parts (..., F)
    P = x.shape[-1]
    return x[..., : P // 2 + 1], F.pad(x[..., P // 2 + 1 :], (1, 1 - P % 2))


def _unpack(x: Tensor) -> Tensor:  # packed (..., P) -> (..., F) complex
    return torch.complex(*_parts(x))


def _as_complex(x: Tensor, R: int) -> Tensor:  # (..., R·F·2) real -> (..., R, F) complex
    return torch.view_as_complex(x.unflatten(-1, (R, -1, 2)))


def _mask_inputs(log_decay: Tensor, beta: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """At padding: nothing written or erased, no decay."""
    if mask is None:
        return log_decay, beta
    return log_decay.masked_fill(~mask[..., None], 0), beta.masked_fill(~mask[..., None], 0)
