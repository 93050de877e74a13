"""The chunked form of ``ops.semiseparable`` on whole chunks, with its derivative written out.

Letters as there: B batch, L = C·T length in C chunks of T, H heads, P channels a head, K reals of a mode vector, N
complex modes, G groups of heads that share b and c, R = H/G heads in a group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resonance_nn.ops.precision import without_autocast


class Chunked(torch.autograd.Function):
    """The chunked form on whole chunks, with its derivative written out.

    With θ the phase since the first token of the call and ``cum`` the log-decay since the chunk's, let b̃ = e^{−iθ} b,
    c̃ = e^{−iθ} c, D_ts = e^{target_t − source_s} (s ≤ t), f_t = e^{target_t} and e_s = e^{total − source_s}. A chunk is

        A = (c̃ b̃^T) ∘ D       Z = c̃ S       Y = (A + diag(skip)) V + f ∘ Z       S' = e^{total} S + b̃^T (e ∘ V)

    in the frame that turns with the modes, so that states are carried without rotation. D, f and e are a head's own; b̃,
    c̃ and so c̃ b̃^T, Z and the writes are shared by the heads of a group, which stand side by side in the columns of V
    and S. Backwards, with dS' from the chunk after,

        dA = dY V^T      W = b̃ dS'      dV = (A + diag(skip))^T dY + e ∘ W      dS = e^{total} dS' + c̃^T (f ∘ dY)
        dc̃ = Σ_heads (dA ∘ D) b̃ + (f ∘ dY) S^T                   db̃ = Σ_heads (dA ∘ D)^T c̃ + (e ∘ V) dS'^T
        dtarget = rowsum(A ∘ dA) + f dY·Z       dsource = −colsum(A ∘ dA) − e V·W
        dtotal = Σ e V·W + ⟨e^{total} S, dS'⟩

    and db = e^{iθ} db̃, dθ = Re(i b̃^H db̃) + Re(i c̃^H dc̃). Row and column sums are of the same rounded products, so what
    a token reads of its own write drops out of the decays' gradient exactly, in bfloat16 too.

    Products are of contiguous tensors, but for the halves of complex vectors: on a CPU a product of two slices of 64
    channels takes seven times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        b: Tensor,
        c: Tensor,
        cum: Tensor,
        source: Tensor,
        target: Tensor,
        skip: Tensor | None,
        theta: Tensor | None,
        state: Tensor | None,
        document: Tensor | None,
        read_first: bool,
    ) -> tuple[Tensor, Tensor]:
        """v (B, L, H, P), b and c (B, L, G, K), cum, source, target and skip (B, C, H, T), theta (B, L, H, N), document
        (B, C, 1, T), L = C·T. Returns y (B, L, H, P) and the last state, not turned back (B, H, K, P)."""
        B, _, H, P = v.shape
        C = cum.shape[1]
        K, dtype, wide = b.shape[-1], v.dtype, cum.dtype

        cos = sin = None
        ctx.groups, ctx.dtypes = b.shape[2], (b.dtype, None if state is None else state.dtype)
        b, c = by_group(b.to(dtype), C), by_group(c.to(dtype), C)
        if theta is not None:
            cos, sin = by_group(theta.cos().to(dtype), C), by_group(theta.sin().to(dtype), C)  # (B, C, H, T, N)
            b, c = _turn(b, cos, sin, back=True), _turn(c, cos, sin, back=True)
        G = b.shape[2]

        from_start, to_end, carry, decay = decays(cum, source, target, document, -1 if read_first else 0)
        decay = decay.to(dtype)  # D (B, C, H, T, T)
        A = (groups(decay, G) * bmm(c, b.mT).unsqueeze(3)).flatten(2, 3)
        own = None  # what a token reads of its own write
        if skip is not None:
            diagonal = A.diagonal(dim1=-2, dim2=-1)
            own = diagonal.clone()
            diagonal += skip
        values = by_group(v, C)  # (B, C, H, T, P)
        y = bmm(A, values)

        from_start, to_end = _rows(from_start, G).to(dtype), _rows(to_end, G).to(dtype)  # (B, C, G, T, R, 1)
        writes = bmm(b.mT, _scaled(to_end, v)).to(wide)  # (B, C, G, K, R·P)
        S = v.new_zeros(B, G, K, H // G * P, dtype=wide) if state is None else _pack(state.to(wide), G)
        states = reads = None
        if state is not None or C > 1:
            states = v.new_empty(B, C, G, K, H // G * P)
        carry = carry.view(B, C, G, 1, -1, 1)
        _recur(S, P, carry, writes, states)
        if states is not None:
            reads = bmm(c, states)  # Z (B, C, G, T, R·P)
        y = _joined(y, from_start, reads)
        ctx.save_for_backward(v, b, c, A, decay, values, states, reads, from_start, to_end, carry, own, cos, sin)
        ctx.set_materialize_grads(False)
        return y, _unpack(S, P)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_y: Tensor | None, grad_S: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        v, b, c, A, decay, values, states, reads, from_start, to_end, carry, own, cos, sin = ctx.saved_tensors
        B, C, H, T, _ = decay.shape
        G, K, P, wide = b.shape[2], b.shape[-1], v.shape[-1], carry.dtype
        grad_y = torch.zeros_like(v) if grad_y is None else grad_y.to(v.dtype)

        read = None if states is None else _scaled(from_start, grad_y)  # f ∘ dY (B, C, G, T, R·P)
        into = None if read is None else bmm(c.mT, read).to(wide)
        running = v.new_zeros(B, G, K, H // G * P, dtype=wide) if grad_S is None else _pack(grad_S.to(wide), G)
        dS = v.new_empty(B, C, G, K, H // G * P)
        if into is None:
            dS.copy_(running.unsqueeze(1))
        else:
            _recur(running, P, carry, into, dS, backwards=True)

        dy = by_group(grad_y, C)  # (B, C, H, T, P)
        d_scores = bmm(dy, values.mT)  # dA
        overlap, d_skip = A * d_scores, None
        if own is not None:
            d_skip = d_scores.diagonal(dim1=-2, dim2=-1).to(wide, copy=True)
            overlap.diagonal(dim1=-2, dim2=-1).copy_(own * d_skip)
        d_target, d_source = overlap.sum(-1, dtype=wide), -overlap.sum(-2, dtype=wide)
        d_scores *= decay
        if G < H:
            d_scores = groups(d_scores, G).sum(3)
        db, dc = bmm(d_scores.mT, c), bmm(d_scores, b)

        written, into_v = _scaled(to_end, v), bmm(b, dS)  # e ∘ V, W (B, C, G, T, R·P)
        dv = _joined(bmm(A.mT, dy), to_end, into_v)
        db += bmm(written, dS.mT)
        of_writes = _head_sums(written * into_v, P, wide)  # (B, C, H, T)
        d_source -= of_writes
        d_total = of_writes.sum(-1, keepdim=True)
        if states is not None and read is not None:
            dc += bmm(read, states.mT)
            d_target += _head_sums(read * reads, P, wide)
            kept = _per_head(states * dS, P).sum((-1, -3), dtype=wide)  # (B, C, G, R)
            d_total += (kept * carry[..., 0, :, 0]).flatten(2)[..., None]
        d_cum = F.pad(d_total, (T - 1, 0))

        d_theta = None
        if cos is not None:
            d_theta = (_cross(db, b) + _cross(dc, c)).to(wide).transpose(2, 3).reshape(B, C * T, H, -1)
            if ctx.dtypes[1] is None and grad_S is None:  # only differences of angles count: their sum is rounding
                d_theta -= d_theta.mean(1, keepdim=True)
            db, dc = _turn(db, cos, sin), _turn(dc, cos, sin)

        def tokens(x: Tensor) -> Tensor:  # (B, C, G | H, T, K) -> (B, L, groups, K)
            x = x.transpose(2, 3).reshape(B, C * T, x.shape[2], K)
            return x if x.shape[2] == ctx.groups else x.unflatten(2, (ctx.groups, -1)).sum(3)

        of_b, of_state = ctx.dtypes
        d_state = None if of_state is None else _unpack(running, P).to(of_state)
        db, dc = tokens(db).to(of_b), tokens(dc).to(of_b)
        return dv, db, dc, d_cum, d_source, d_target, d_skip, d_theta, d_state, None, None


def decays(
    cum: Tensor, source: Tensor, target: Tensor, document: Tensor | None, diagonal: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, e (B, C, H, T), e^{total} (B, C, H, 1) and D (B, C, H, T, T), with D_ts = 0 for s > t + ``diagonal`` and
    wherever a document begins in between; arguments as of :class:`Chunked`."""
    total, T = cum[..., -1:], cum.shape[-1]
    from_start, to_end, carry = exp(target), exp(total - source), exp(total)
    seen = torch.ones(T, T, dtype=torch.bool, device=cum.device).tril(diagonal)
    if document is not None:
        seen = seen & (document[..., :, None] == document[..., None, :])  # (B, C, 1, T, T)
        to_end = to_end * (document == document[..., -1:])
        from_start = from_start * (document == 0)
        carry = carry * (document[..., -1:] == 0)
    hidden = torch.zeros(seen.shape, dtype=cum.dtype, device=cum.device).masked_fill_(~seen, float("-inf"))
    return from_start, to_end, carry, exp((target[..., :, None] - source[..., None, :]).add_(hidden))


def _recur(S: Tensor, P: int, carry: Tensor, new: Tensor, before: Tensor | None, *, backwards: bool = False) -> None:
    """S (B, G, K, R·P) ← carry_j S + new_j over the chunks j, in place; ``before`` takes S as each chunk finds it."""
    heads, chunks = _per_head(S, P), range(new.shape[1])
    carries, news, found = carry.unbind(1), new.unbind(1), None if before is None else before.unbind(1)
    for j in reversed(chunks) if backwards else chunks:
        if found is not None:
            found[j].copy_(S)
        heads.mul_(carries[j])
        S.add_(news[j])


def exp(x: Tensor) -> Tensor:
    """e^x, by 2^x: three times as fast on a CPU, and not slowed down by −inf or by results that underflow."""
    return (x * math.log2(math.e)).exp2_()


def bmm(x: Tensor, y: Tensor) -> Tensor:
    """(B, C, H, ·, ·) @ (B, C, H, ·, ·)."""
    return torch.bmm(x.flatten(0, 2), y.flatten(0, 2)).unflatten(0, x.shape[:3])


def by_group(x: Tensor, C: int) -> Tensor:
    """(B, L, G, ·) -> (B, C, G, T, ·), contiguous."""
    return x.unflatten(1, (C, -1)).transpose(2, 3).contiguous()


def _rows(x: Tensor, G: int) -> Tensor:
    """A number a head and token (B, C, H, T) -> (B, C, G, T, R, 1)."""
    return x.unflatten(2, (G, -1)).transpose(-1, -2).contiguous()[..., None]


def _scaled(rows: Tensor, x: Tensor) -> Tensor:
    """rows (B, C, G, T, R, 1) ∘ x (B, L, H, P), the heads of a group side by side: (B, C, G, T, R·P)."""
    _, C, G, _, R, _ = rows.shape
    x = x.unflatten(1, (C, -1)).unflatten(3, (G, R)).transpose(2, 3)  # (B, C, G, T, R, P)
    return torch.mul(x, rows, out=x.new_empty(x.shape)).flatten(-2)


def _joined(x: Tensor, rows: Tensor, z: Tensor | None) -> Tensor:
    """x (B, C, H, T, P) + rows (B, C, G, T, R, 1) ∘ z (B, C, G, T, R·P) -> (B, L, H, P)."""
    B, C, H, T, P = x.shape
    if z is None:
        return x.transpose(2, 3).reshape(B, C * T, H, P)
    G = rows.shape[2]
    parts = groups(x, G).transpose(3, 4), rows, _per_head(z, P)  # (B, C, G, T, R, P)
    lies_as_shaped = None if torch.compiler.is_compiling() else x.new_empty(B, C, T, G, H // G, P)
    return torch.addcmul(*(part.transpose(2, 3) for part in parts), out=lies_as_shaped).reshape(B, C * T, H, P)


def _per_head(x: Tensor, P: int) -> Tensor:
    """(…, R·P) -> (…, R, P)."""
    return x.unflatten(-1, (-1, P))


def _head_sums(x: Tensor, P: int, dtype: torch.dtype) -> Tensor:
    """(B, C, G, T, R·P) summed over each head's channels: (B, C, H, T)."""
    return _per_head(x, P).sum(-1, dtype=dtype).transpose(-1, -2).flatten(2, 3)


def _pack(state: Tensor, G: int) -> Tensor:
    """(B, H, K, P) -> (B, G, K, R·P), a copy."""
    return state.unflatten(1, (G, -1)).transpose(2, 3).flatten(-2).clone(memory_format=torch.contiguous_format)


def _unpack(state: Tensor, P: int) -> Tensor:
    """(B, G, K, R·P) -> (B, H, K, P)."""
    return _per_head(state, P).transpose(2, 3).flatten(1, 2).contiguous()


def groups(x: Tensor, G: int) -> Tensor:
    """(B, C, H, ·, ·) -> (B, C, G, R, ·, ·)."""
    return x.unflatten(2, (G, -1))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x (B, C, G | H, T, K) times e^{iθ}, or e^{−iθ}, each group as its heads are turned: (B, C, H, T, K)."""
    G = x.shape[2]
    cos, sin = groups(cos, G), groups(sin, G)  # (B, C, G, R, T, N)
    out = x.new_empty(*cos.shape[:-1], x.shape[-1])
    (re, im), (out_re, out_im) = x.unsqueeze(3).chunk(2, dim=-1), out.chunk(2, dim=-1)
    sign = 1 if back else -1
    torch.mul(re, cos, out=out_re).addcmul_(im, sin, value=sign)
    torch.mul(im, cos, out=out_im).addcmul_(re, sin, value=-sign)
    return out.flatten(2, 3)


def _cross(gradient: Tensor, x: Tensor) -> Tensor:
    """Re(i x^H gradient) a mode: what turning x by −θ adds to θ's gradient, (…, 2N) twice -> (…, N)."""
    (d_re, d_im), (re, im) = gradient.chunk(2, dim=-1), x.chunk(2, dim=-1)
    return torch.mul(d_re, im).addcmul_(d_im, re, value=-1)
