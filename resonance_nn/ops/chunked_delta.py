"""The chunked form of the gated delta rule proper on whole chunks, with its derivative written out.

Letters as in ``ops.delta_rule``: B batch, L = C·T length in C chunks of T, H heads, P channels a head, K reals of a
key, G groups of heads that share keys and queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resonance_nn.ops.chunked import bmm, by_group, decays, groups
from resonance_nn.ops.precision import without_autocast


class ChunkedDelta(torch.autograd.Function):
    """One decay a head, erasing and writing β along real keys: S_t = (I − β k k^T) α_t S_{t−1} + β k v^T.

    With ``cum`` the log-decay since the chunk's start, D_ts = e^{cum_t − cum_s} (s ≤ t), f_t = e^{cum_t},
    e_s = e^{total − cum_s}, g = e^{total}, a chunk is

        A = β ∘ D ∘ K K^T (below the diagonal)     X = (I + A)^{−1}     U = X (β ∘ V)     Z = X (βf ∘ K)
        W = U − Z S          Y = M W + (f ∘ Q) S,  M = D ∘ Q K^T          S' = R S + (e ∘ K)^T U,  R = g − (e ∘ K)^T Z

    W being what is written in truth. Backwards, with dS' from the chunk after and N = M^T dY,

        dS = R^T dS' + (f ∘ Q)^T dY − Z^T N                dW = N + (e ∘ K) dS'                V̄ = X^T dW
        dA = −V̄ W^T (below the diagonal)     dM = dY W^T (on it and below)     d(β ∘ V) = V̄     d(βf ∘ K) = −V̄ S^T
        d(f ∘ Q) = dY S^T                      d(e ∘ K) = W dS'^T

    since dX = (dU (β ∘ V)^T + dZ (βf ∘ K)^T) and dA = −X^T dX X^T meet in V̄. Products run in v's dtype; A, its inverse,
    decays and what is carried from chunk to chunk in float32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        beta: Tensor,
        cum: Tensor,
        state: Tensor | None,
        document: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """v (B, L, H, P), k and q (B, L, G, K), beta and cum (B, C, H, T), state (B, H, K, P), document (B, C, 1, T),
        L = C·T. Returns y (B, L, H, P) and the last state (B, H, K, P)."""
        B, C, H, T = cum.shape
        dtype, wide = v.dtype, cum.dtype
        ctx.dtypes = k.dtype, q.dtype, None if state is None else state.dtype
        v, k, q = by_group(v, C), by_group(k.to(dtype), C), by_group(q.to(dtype), C)  # (B, C, H | G, T, ·)
        from_start, to_end, carry, decay = decays(cum, cum, cum, document)
        exact = k.to(wide)
        overlap = _of_heads(decay, bmm(exact, exact.mT))  # D ∘ K K^T: rounding it would be rounding A
        eye = torch.eye(T, dtype=wide, device=v.device).expand(B, C, H, T, T)
        A = overlap * beta[..., None]  # what stands on its diagonal is not read
        X = torch.linalg.solve_triangular(A, eye, upper=False, unitriangular=True).to(dtype)
        decay = decay.to(dtype)
        M = _of_heads(decay, bmm(q, k.mT))
        U = bmm(X, _scaled(beta, v))
        ended = _scaled(to_end, k)
        writes = bmm(ended.mT, U).to(wide)  # (B, C, H, K, P)
        S = writes.new_zeros(writes[:, 0].shape) if state is None else state.to(wide)
        Z = states = reads = R = None
        W = U
        if state is not None or C > 1:
            Z = bmm(X, _scaled(beta * from_start, k))
            R = bmm(ended.mT, Z).to(wide).neg_()  # (B, C, H, K, K)
            R.diagonal(dim1=-2, dim2=-1).add_(carry)
            states = torch.empty_like(writes, dtype=dtype)
            S = _recur(S, R, writes, states)
            W = _less_product(U, Z, states)
            reads = _scaled(from_start, q)
            y = _add_product_(bmm(M, W), reads, states)
        else:
            S, y = writes[:, 0], bmm(M, W)
        ctx.save_for_backward(
            *(v, k, q, beta, from_start, to_end, carry, decay, overlap.to(dtype), M, X, W, Z, R, states, reads, ended)
        )
        ctx.set_materialize_grads(False)
        return y.transpose(2, 3).reshape(B, C * T, H, -1), S

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_y: Tensor | None, grad_S: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        v, k, q, beta, from_start, to_end, carry, decay, overlap, M, X, W, Z, R, states, reads, ended = (
            ctx.saved_tensors
        )
        B, C, H, T, P = v.shape
        K, dtype, wide = k.shape[-1], v.dtype, beta.dtype
        running = v.new_zeros(B, H, K, P, dtype=wide) if grad_S is None else grad_S.to(wide)
        dy = torch.zeros_like(v) if grad_y is None else by_group(grad_y.to(dtype), C)
        dW = bmm(M.mT, dy)
        dS = torch.empty(B, C, H, K, P, dtype=dtype, device=v.device)  # of the state after each chunk
        if states is None:
            dS.copy_(running.unsqueeze(1))
        else:
            into = _less_product(bmm(reads.mT, dy), Z.mT, dW).to(wide)
            running = _recur(running, R.mT, into, dS, backwards=True)
        dW = _add_product_(dW, ended, dS)
        dv = bmm(X.mT, dW)  # V̄

        d_scores = bmm(dv, W.mT).neg_().tril_(-1)  # dA
        at = d_scores * overlap  # β times it is A ∘ dA
        d_beta = at.sum(-1, dtype=wide)
        at *= beta.to(dtype)[..., None]
        d_scores *= decay
        d_scores *= beta.to(dtype)[..., None]
        d_reads = bmm(dy, W.mT)  # dM
        at.addcmul_(d_reads, M)
        d_cum = at.sum(-1, dtype=wide) - at.sum(-2, dtype=wide)
        d_reads *= decay
        G = k.shape[2]
        d_scores, d_reads = _to_groups(d_scores, G), _to_groups(d_reads, G)
        dq = bmm(d_reads, k)
        dk = _add_product_(bmm(d_scores + d_scores.mT, k), d_reads.mT, q)

        of_key = bmm(W, dS.mT)  # d(e ∘ K), and what each head adds to dK
        of_writes = (of_key * ended).sum(-1, dtype=wide)
        of_key *= to_end.to(dtype)[..., None]
        d_cum -= of_writes
        d_total = of_writes.sum(-1, keepdim=True)
        d_beta += (dv * v).sum(-1, dtype=wide)
        if states is not None:
            d_read = bmm(dy, states.mT)
            d_cum += (d_read * reads).sum(-1, dtype=wide)
            dq += _to_groups(_scaled(from_start, d_read), G)
            d_erase = bmm(dv, states.mT)  # −d(βf ∘ K)
            of_erase = _of_heads(d_erase, k).sum(-1, dtype=wide) * from_start
            d_beta -= of_erase
            d_cum -= of_erase * beta
            of_key.addcmul_(d_erase, (beta * from_start).to(dtype)[..., None], value=-1)
            d_total += (states * dS).sum((-1, -2), dtype=wide)[..., None] * carry
        dk += _to_groups(of_key, G)
        d_cum += F.pad(d_total, (T - 1, 0))
        dv *= beta.to(dtype)[..., None]

        def tokens(x: Tensor, of: torch.dtype) -> Tensor:  # (B, C, H | G, T, ·) -> (B, L, H | G, ·)
            return x.transpose(2, 3).reshape(B, C * T, x.shape[2], -1).to(of)

        of_k, of_q, of_state = ctx.dtypes
        d_state = None if of_state is None else running.to(of_state)
        return tokens(dv, dtype), tokens(dk, of_k), tokens(dq, of_q), d_beta, d_cum, d_state, None


def _recur(S: Tensor, R: Tensor, new: Tensor, before: Tensor, *, backwards: bool = False) -> Tensor:
    """S (B, H, K, P) ← R_j S + new_j over the chunks j; ``before`` takes S as each chunk finds it. The last S."""
    S = S.flatten(0, 1)
    chunks, found = range(new.shape[1]), before.unbind(1)
    steps = [(R_j.flatten(0, 1), W_j.flatten(0, 1)) for R_j, W_j in zip(R.unbind(1), new.unbind(1), strict=True)]
    for j in reversed(chunks) if backwards else chunks:
        found[j].copy_(S.view_as(found[j]))
        S = torch.baddbmm(steps[j][1], steps[j][0], S)
    return S.unflatten(0, new.shape[:1] + new.shape[2:3])


def _scaled(rows: Tensor, x: Tensor) -> Tensor:
    """rows (B, C, H, T) ∘ x (B, C, H | G, T, ·), in x's dtype."""
    return _of_heads(rows.to(x.dtype)[..., None], x)


def _of_heads(x: Tensor, y: Tensor) -> Tensor:
    """x (B, C, H, ·, ·) ∘ y (B, C, H | G, ·, ·), which the heads of a group share."""
    return x * y if y.shape[2] == x.shape[2] else (groups(x, y.shape[2]) * y.unsqueeze(3)).flatten(2, 3)


def _to_groups(x: Tensor, G: int) -> Tensor:
    """(B, C, H, ·, ·) summed over the heads of each group: (B, C, G, ·, ·)."""
    return x if x.shape[2] == G else groups(x, G).sum(3)


def _add_product_(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + y z of (B, C, H, ·, ·), in place of x."""
    x.flatten(0, 2).baddbmm_(y.flatten(0, 2), z.flatten(0, 2))
    return x


def _less_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x − y z of (B, C, H, ·, ·)."""
    return torch.baddbmm(x.flatten(0, 2), y.flatten(0, 2), z.flatten(0, 2), alpha=-1).view_as(x)
