"""The continued fraction behind every resolvent of a tridiagonal 𝓗: Thomas forward elimination of z − 𝓗.

    L_t = w_t − b²_{t−1} / L_{t−1},      w_t = z − a_t,  z = E + iη,  η > 0          m_t = 1/L_t

𝓗 has the real diagonal a_t and the off-diagonal b_t between tokens t and t + 1; b is 0 before a document's first
token. m_t = [(z − 𝓗_{≤t})⁻¹]_tt, so Im L_t ≥ η (Herglotz), |m_t| ≤ 1/η, and Σ log L_t = log det(z − 𝓗).

Letters: B batch, L length, H heads; T tokens a block, C blocks. Real tensors at every border, complex numbers as pairs
in a last dimension of 2; inside, complex numbers in float64 (float32 on devices without it): L has only B·L·H entries.

    continued_fraction_reference    the recurrence                                      sequential in L
    continued_fraction              an associative scan of Möbius maps in two levels     sequential in √L

Sources: the scan of a first-order recurrence by blocks (Blelloch 1990, Prefix sums and their applications); the rule
that composes the maps is Redheffer's star product (1962).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from resonance_nn.ops.precision import phase_dtype, without_autocast


def squared_couplings(b: Tensor, first: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """k_t = b²_{t−1}, the numerators: from b (B, L, H), the coupling before the first token (B, H) (None: 0) and
    reset (B, L) bool, where it is 0 too."""
    first = torch.zeros_like(b[:, 0]) if first is None else first.to(b.dtype)
    k = torch.cat((first[:, None], b[:, :-1]), dim=1).square()
    return k if reset is None else k.masked_fill(reset[..., None], 0)


@without_autocast
def continued_fraction_reference(
    a: Tensor, k: Tensor, energy: Tensor, eta: Tensor, green: Tensor | None = None
) -> Tensor:
    """The recurrence, token by token. Arguments as :func:`continued_fraction`."""
    w, k, m = _complex_inputs(a, k, energy, eta, green)
    outputs = []
    for t in range(a.shape[1]):
        outputs.append(w[:, t] - k[:, t] * m)
        m = 1 / outputs[-1]
    return torch.view_as_real(torch.stack(outputs, dim=1))


@without_autocast
def continued_fraction(a: Tensor, k: Tensor, energy: Tensor, eta: Tensor, green: Tensor | None = None) -> Tensor:
    """L_t for all t.

    A step L ↦ w − k/L is a Möbius map, and so is any product of steps. One with lower left entry 1 (the matrix is
    projective, so that is a free choice) has three numbers,

        F(L) = X − Y / (L − Z)             one step more:  X' = w − k/X,   Y' = k Y/X²,   Z' = Z + Y/X

    X being the fraction started afresh (Im X ≥ η), Y = (b_0 X G)² with G the block's own corner resolvent, |G| ≤ 1/η,
    and −Z in the upper half plane: nothing overflows, no denominator comes closer to 0 than η, and Y may underflow.
    The L tokens are cut into C ≈ √L blocks of T. All blocks find their map at once; the C maps are applied one after
    the other; then one sweep of the recurrence through all blocks at once gives every L_t, with Im L_t ≥ η restored
    whatever was rounded before. The gradient is the adjoint recurrence λ_t = g_t + conj(k_{t+1}/L_t²) λ_{t+1}, a
    linear scan in the same blocks.

    Args:
        a: the potential (B, L, H).
        k: b²_{t−1} ≥ 0 (B, L, H); 0 where a document begins.
        energy, eta: E and η > 0 (H).
        green: m before the first token (B, H, 2); None is 0, as good as any where k is 0.

    Returns:
        L (B, L, H, 2) in float64 (see above).
    """
    w, k, m = _complex_inputs(a, k, energy, eta, green)
    return torch.view_as_real(_ContinuedFraction.apply(w, k, m))  # pyright: ignore[reportArgumentType]


@without_autocast
def two_sided_fractions(
    a: Tensor, b: Tensor, energy: Tensor, eta: Tensor, begins: Tensor | None = None, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Elimination from the left and from the right: L_t as above, R_t = w_t − b_t²/R_{t+1}.

    a, b (B, L, H), E and η (H); begins, ends (B, L) bool: where a document begins, and where it ends, besides the first
    and the last token. Returns two tensors (B, L, H, 2). The diagonal of (z − 𝓗)⁻¹ is 1/(L_t + R_t − w_t).
    """
    left = continued_fraction(a, squared_couplings(b, reset=begins), energy, eta)
    onward = torch.cat((b[:, :-1].flip(1), b[:, :1]), dim=1)  # b from right to left; the last one is not used
    k = squared_couplings(onward, reset=None if ends is None else ends.flip(1))
    return left, continued_fraction(a.flip(1), k, energy, eta).flip(1)


@without_autocast
def two_sided_green(
    a: Tensor, b: Tensor, energy: Tensor, eta: Tensor, begins: Tensor | None = None, ends: Tensor | None = None
) -> Tensor:
    """G_tt of G = (z − 𝓗)⁻¹ over the whole of each row, (B, L, H, 2). Arguments as :func:`two_sided_fractions`."""
    left, right = two_sided_fractions(a, b, energy, eta, begins, ends)
    return green_from_fractions(left, right, a, energy, eta)


def green_from_fractions(left: Tensor, right: Tensor, a: Tensor, energy: Tensor, eta: Tensor) -> Tensor:
    """1/(L_t + R_t − w_t), (B, L, H, 2)."""
    w = torch.complex(energy.to(left.dtype) - a.to(left.dtype), eta.to(left.dtype).expand_as(a))
    return torch.view_as_real(1 / (torch.view_as_complex(left) + torch.view_as_complex(right) - w))


def _complex_inputs(
    a: Tensor, k: Tensor, energy: Tensor, eta: Tensor, green: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    exact = phase_dtype(a)
    real = energy.to(exact) - a.to(exact)
    w = torch.complex(real, eta.to(exact).expand_as(real))
    k = k.to(exact)
    m = torch.zeros_like(w[:, 0]) if green is None else torch.complex(*green.to(exact).unbind(-1))
    return w, k, m


class _ContinuedFraction(torch.autograd.Function):
    """w (B, L, H) complex, k (B, L, H) real, m before the first token (B, H) complex -> L (B, L, H) complex."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, k: Tensor, m: Tensor) -> Tensor:
        L = mobius_scan(w, k, m)
        ctx.save_for_backward(L, k, m)
        return L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        L, k, m = ctx.saved_tensors
        before = torch.cat((m[:, None], 1 / L[:, :-1]), dim=1)  # m_{t−1}
        slope = (k * before.square()).conj()  # conj dL_t/dL_{t−1}, but at the first token, where m is the variable
        slope = torch.cat((slope[:, 1:], torch.zeros_like(slope[:, :1])), dim=1)  # of L_{t+1} by L_t
        adjoint = _linear_scan(gradient.flip(1), slope.flip(1)).flip(1)
        return adjoint, -(before.conj() * adjoint).real, -k[:, 0] * adjoint[:, 0]


def mobius_scan(w: Tensor, k: Tensor, m: Tensor) -> Tensor:
    """:func:`continued_fraction` on complex tensors: w (B, L, H), k (B, L, H) real, m (B, H)."""
    B, L, H = w.shape
    w = _blocks(w, 1j)  # (T, C, B, H)
    k = _blocks(k, 0).to(w.dtype)
    T, C = w.shape[:2]
    X = torch.empty_like(w)
    X[0] = w[0]
    for t in range(1, T):
        torch.sub(w[t], k[t] / X[t - 1], out=X[t])
    Y = k[0] * torch.cat((torch.ones_like(X[:1]), k[1:] / X[:-1].square())).cumprod(0)  # (T, C, B, H)
    Z = (Y[:-1] / X[:-1]).sum(0)  # of the whole block
    starts = torch.empty_like(X[0])  # m before each block
    for j in range(C):
        starts[j] = m
        m = 1 / (X[-1, j] - Y[-1, j] * m / (1 - m * Z[j]))
    before = starts
    for t in range(T):
        torch.sub(w[t], k[t] * before, out=X[t])
        before = 1 / X[t]
    return X.permute(2, 1, 0, 3).reshape(B, C * T, H)[:, :L]


def _linear_scan(g: Tensor, slope: Tensor) -> Tensor:
    """λ_t = g_t + slope_t λ_{t−1} with λ = 0 before the first token; complex (B, L, H), in the same blocks."""
    B, L, H = g.shape
    g, slope = _blocks(g, 0), _blocks(slope, 0)  # (T, C, B, H)
    T, C = g.shape[:2]
    out = torch.empty_like(g)
    out[0] = g[0]
    for t in range(1, T):
        torch.addcmul(g[t], slope[t], out[t - 1], out=out[t])
    product = slope.cumprod(0)
    starts = torch.empty_like(out[0])  # λ before each block
    before = torch.zeros_like(out[0, 0])
    for j in range(C):
        starts[j] = before
        before = torch.addcmul(out[-1, j], product[-1, j], before)
    return torch.addcmul(out, product, starts).permute(2, 1, 0, 3).reshape(B, C * T, H)[:, :L]


def _blocks(x: Tensor, fill: complex) -> Tensor:
    """(B, L, H) -> (T, C, B, H) contiguous: token t of block j at [t, j]; what is missing at the end is ``fill``."""
    B, L, H = x.shape
    T = max(1, math.isqrt(L))
    C = -(-L // T)
    if C * T > L:
        x = torch.cat((x, x.new_full((B, C * T - L, H), fill)), dim=1)
    return x.view(B, C, T, H).permute(2, 1, 0, 3).contiguous()
