"""The chunked form of ``ops.semiseparable`` on whole chunks, with its derivative written out.

Letters as there: B batch, L = C·T length in C chunks of T, H heads, P channels a head, K reals of a mode vector, N
complex modes, G groups of heads that share b and c, R = H/G.
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
    c̃ = e^{−iθ} c, D_ts = e^{target_t − source_s} (s ≤ t), c̄_t = e^{target_t} c̃_t and b̄_s = e^{total − source_s} b̃_s.
    A chunk is

        A = (c̃ b̃^T) ∘ D        Y = [A + diag(skip) | c̄] [V ; S]        S' = e^{total} S + b̄^T V

    in the frame that turns with the modes, so that states are carried without rotation. Backwards, with dS' from the
    chunk after,

        [dA | dc̄] = dY [V ; S]^T       dV = [(A + diag(skip))^T | b̄] [dY ; dS']
        dS = e^{total} dS' + c̄^T dY    db̄ = V dS'^T
        dc̃ = (dA ∘ D) b̃ + e^{target} dc̄                       db̃ = (dA ∘ D)^T c̃ + e^{total − source} db̄
        dtarget = rowsum(A ∘ dA) + c̄·dc̄     dsource = −colsum(A ∘ dA) − b̄·db̄     dtotal = Σ b̄·db̄ + ⟨e^{total} S, dS'⟩

    and db = e^{iθ} db̃, dθ = Re(i b̃^H db̃) + Re(i c̃^H dc̃). Row and column sums are of the same rounded products, so what
    a token reads of its own write drops out of the decays' gradient exactly, in bfloat16 too.
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
        B, L, H, P = v.shape
        _, C, _, T = cum.shape
        K, dtype, wide = b.shape[-1], v.dtype, cum.dtype

        def chunks(x: Tensor) -> Tensor:  # (B, L, G | H, ·) -> (B, C, G | H, T, ·)
            return x.unflatten(1, (C, T)).transpose(2, 3)

        cos = sin = None
        ctx.groups, ctx.dtypes = b.shape[2], (b.dtype, None if state is None else state.dtype)
        b, c = chunks(b.to(dtype)), chunks(c.to(dtype))
        if theta is None:
            b, c = b.contiguous(), c.contiguous()
        else:
            cos, sin = chunks(theta.cos().to(dtype)), chunks(theta.sin().to(dtype))  # (B, C, H, T, N)
            b, c = _turn(b, cos, sin, back=True), _turn(c, cos, sin, back=True)
        G = b.shape[2]

        total = cum[..., -1:]  # (B, C, H, 1)
        from_start, to_end, carry = _exp(target), _exp(total - source), _exp(total)
        seen = torch.ones(T, T, dtype=torch.bool, device=v.device).tril(-1 if read_first else 0)
        if document is not None:
            seen = seen & (document[..., :, None] == document[..., None, :])  # (B, C, 1, T, T)
            to_end = to_end * (document == document[..., -1:])
            from_start = from_start * (document == 0)
            carry = carry * (document[..., -1:] == 0)
        hidden = torch.zeros(seen.shape, dtype=wide, device=v.device).masked_fill_(~seen, float("-inf"))
        decay = _exp((target[..., :, None] - source[..., None, :]).add_(hidden)).to(dtype)  # (B, C, H, T, T)
        from_start, to_end = from_start[..., None].to(dtype), to_end[..., None].to(dtype)  # (B, C, H, T, 1)

        carried = state is not None or C > 1
        left = v.new_empty(B, C, H, T, T + K * carried)  # [A | c̄]
        right = v.new_empty(B, C, H, T + K * carried, P)  # [V ; S]
        scores = _bmm(c, b.transpose(-1, -2))  # (B, C, G, T, T)
        torch.mul(_groups(decay, G), scores.unsqueeze(3), out=_groups(left[..., :T], G))
        own = None  # what a token reads of its own write
        if skip is not None:
            diagonal = left[..., :T].diagonal(dim1=-2, dim2=-1)
            own = diagonal.clone()
            diagonal += skip
        right[..., :T, :] = chunks(v)
        written = (_groups(to_end, G) * b.unsqueeze(3)).flatten(2, 3)  # b̄
        writes = _bmm(written.transpose(-1, -2), right[..., :T, :]).to(wide)  # (B, C, H, K, P)
        S = v.new_zeros(B, H, K, P, dtype=wide) if state is None else state.to(wide, copy=True)
        if carried:
            torch.mul(_groups(from_start, G), c.unsqueeze(3), out=_groups(left[..., T:], G))
        for j, (carry_j, writes_j) in enumerate(zip(carry[..., None].unbind(1), writes.unbind(1), strict=True)):
            if carried:
                right[:, j, :, T:] = S
            S.mul_(carry_j).add_(writes_j)
        y = _bmm(left, right).transpose(2, 3).reshape(B, L, H, P)
        ctx.save_for_backward(b, c, left, right, decay, from_start, to_end, carry, own, cos, sin)
        ctx.set_materialize_grads(False)
        return y, S

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_y: Tensor | None, grad_S: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        b, c, left, right, decay, from_start, to_end, carry, own, cos, sin = ctx.saved_tensors
        B, C, H, T, _ = decay.shape
        G, K, P, wide = b.shape[2], b.shape[-1], right.shape[-1], carry.dtype
        A, v, carried = left[..., :T], right[..., :T, :], left.shape[-1] > T

        d_right = right.new_empty(B, C, H, T + K, P)  # [dY ; dS']
        d_right[..., :T, :] = 0 if grad_y is None else grad_y.unflatten(1, (C, T)).transpose(2, 3)
        dy, dS = d_right[..., :T, :], d_right[..., T:, :]
        d_left = _bmm(dy, right.transpose(-1, -2))  # [dA | dc̄]
        reads = _bmm(left[..., T:].transpose(-1, -2), dy).to(wide) if carried else None  # c̄^T dY
        running = right.new_zeros(B, H, K, P, dtype=wide) if grad_S is None else grad_S.to(wide, copy=True)
        for j in range(C - 1, -1, -1):
            dS[:, j] = running
            if reads is not None:
                running.mul_(carry[:, j, ..., None]).add_(reads[:, j])

        d_total = right.new_zeros(B, C, H, 1, dtype=wide)
        if carried:
            d_total += carry * (dS * right[..., T:, :]).sum((-2, -1), dtype=wide)[..., None]
        written = left.new_empty(B, C, H, T, T + K)  # [A^T | b̄]
        written[..., :T] = A.transpose(-1, -2)
        torch.mul(_groups(to_end, G), b.unsqueeze(3), out=_groups(written[..., T:], G))
        dv = _bmm(written, d_right).transpose(2, 3).reshape(B, C * T, H, P)
        db = _bmm(v, dS.transpose(-1, -2))  # db̄ (B, C, H, T, K)
        of_writes = (db * written[..., T:]).sum(-1, dtype=wide)  # b̄·db̄ (B, C, H, T)
        d_total += of_writes.sum(-1, keepdim=True)
        db *= to_end

        dA, d_skip = d_left[..., :T], None
        overlap = A * dA
        if own is not None:
            d_skip = dA.diagonal(dim1=-2, dim2=-1)
            overlap.diagonal(dim1=-2, dim2=-1).copy_(own * d_skip)
            d_skip = d_skip.to(wide)
        d_target = overlap.sum(-1, dtype=wide)
        d_source = -overlap.sum(-2, dtype=wide) - of_writes
        d_scores = dA * decay
        if G < H:  # the heads of a group share its scores
            d_scores, db = _groups(d_scores, G).sum(3), _groups(db, G).sum(3)
        db += _bmm(d_scores.transpose(-1, -2), c)
        dc = _bmm(d_scores, b)
        if carried:
            read = d_left[..., T:]  # dc̄
            d_target += (read * left[..., T:]).sum(-1, dtype=wide)
            read = read * from_start
            dc += _groups(read, G).sum(3) if G < H else read
        d_cum = F.pad(d_total, (T - 1, 0))

        d_theta = None
        if cos is not None:
            d_theta = (_cross(db, b) + _cross(dc, c)).to(wide).transpose(2, 3).reshape(B, C * T, H, -1)
            db, dc = _turn(db, cos, sin), _turn(dc, cos, sin)

        def tokens(x: Tensor) -> Tensor:  # (B, C, G | H, T, K) -> (B, L, groups, K)
            x = x.transpose(2, 3).reshape(B, C * T, x.shape[2], K)
            return x if x.shape[2] == ctx.groups else x.unflatten(2, (ctx.groups, -1)).sum(3)

        of_b, of_state = ctx.dtypes
        d_state = None if of_state is None else running.to(of_state)
        db, dc = tokens(db).to(of_b), tokens(dc).to(of_b)
        return dv, db, dc, d_cum, d_source, d_target, d_skip, d_theta, d_state, None, None


def _exp(x: Tensor) -> Tensor:
    """e^x, by 2^x: three times as fast on a CPU, and not slowed down by −inf or by results that underflow."""
    return (x * math.log2(math.e)).exp2_()


def _bmm(x: Tensor, y: Tensor) -> Tensor:
    """(B, C, H, ·, ·) @ (B, C, H, ·, ·)."""
    return torch.bmm(x.flatten(0, 2), y.flatten(0, 2)).unflatten(0, x.shape[:3])


def _groups(x: Tensor, G: int) -> Tensor:
    """(B, C, H, ·, ·) -> (B, C, G, R, ·, ·)."""
    return x.unflatten(2, (G, -1))


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x (B, C, G | H, T, K) times e^{iθ}, or e^{−iθ}, each group as its heads are turned: (B, C, H, T, K)."""
    G = x.shape[2]
    cos, sin = _groups(cos, G), _groups(sin, G)  # (B, C, G, R, T, N)
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
