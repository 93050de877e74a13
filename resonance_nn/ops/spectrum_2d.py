"""Two-sided spectral filters of images whose gate follows the image's own spectrum.

    y = F⁻¹( γ(v) ∘ G ∘ F(v) )         G learned, complex;  γ one positive number a head and pair of octave bands

Letters: B batch, (Y, X) grid of tokens, H heads, P channels a head, R filters a head (1 or P), J bands, (K_y, K_x)
frequencies, m = min(K, tokens) of them that an image has along an axis, N = (2m_y − 1) m_x in all.

G is learned on a grid of (K_y, K_x) tokens. An image of (Y, X) tokens is the same picture, sampled elsewhere: its
frequencies are those of the picture's extent, k_y and k_x half-turns from edge to edge, so G is cropped or continued by
zeros, as in Fourier interpolation, and opposite edges do not meet. At (K_y, K_x) it is as learned. Gates are those of
:mod:`resonance_nn.ops.spectrum`, with bands the products of those of the two axes; its sources are ours.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from resonance_nn.ops.blocks import BLOCK_ELEMENTS, in_blocks
from resonance_nn.ops.precision import wide_dtype, without_autocast
from resonance_nn.ops.spectrum import band_gates, check_bands, half_turns, octave_bands, power
from resonance_nn.ops.spectrum_pairs import filter_pairs, suits_pairs


@without_autocast
def spectral_filter_2d_reference(
    v: Tensor, spectrum: Tensor, weight: Tensor, bias: Tensor, *, num_bands: tuple[int, int]
) -> Tensor:
    """The definition: Fourier coefficients summed over tokens, h over frequencies, y over pairs of tokens, O(Y²X²).
    Arguments as :func:`spectral_filter_2d`."""
    (Y, X, H, P), wide = v.shape[1:], wide_dtype(v)
    Ky, Kx = (spectrum.shape[2] + 1) // 2, spectrum.shape[3]
    u = v.to(wide).flatten(1, 2)  # (B, Y·X, H, P)
    rows, columns, kx = (torch.arange(size, device=v.device) for size in (Y, X, Kx))
    y, x = (t.flatten() for t in torch.meshgrid(rows, columns, indexing="ij"))
    ky, kx = torch.meshgrid(_signed(Ky, v.device), kx, indexing="ij")
    seen = (ky.abs() < Y) & (kx < X)
    turns = torch.exp(1j * math.pi * (y[:, None, None].to(wide) * ky / Y + x[:, None, None].to(wide) * kx / X))
    V = torch.einsum("bshp,skl->bhpkl", u.to(turns.dtype), turns.conj())
    twice = torch.where(kx > 0, 2.0, 1.0).to(wide) * seen
    bands = octave_bands(math.pi / Ky * ky.to(wide), num_bands[0])[:, None]
    bands = (bands * octave_bands(math.pi / Kx * kx.to(wide), num_bands[1])).flatten(0, 1)  # (J, 2K_y − 1, K_x)
    energy = torch.einsum("bhkl,jkl->bhj", power(V), bands * twice) / (2 * Y * X) ** 2
    gate = torch.einsum("bhj,jkl->bhkl", band_gates(energy, weight, bias), bands)
    G = gate[:, :, None] * torch.view_as_complex(spectrum.to(wide)) * twice
    pairs = turns[:, None] * turns.conj()  # (t, s, k_y, k_x)
    h = torch.einsum("bhrkl,tskl->bhrts", G, pairs).real / (4 * Y * X)
    out = torch.einsum("bhrts,bshr->bthr", h.expand(-1, -1, P, -1, -1), u)
    return out.view(-1, Y, X, H, P).to(v.dtype)


@without_autocast
def spectral_filter_2d(
    v: Tensor, spectrum: Tensor, weight: Tensor, bias: Tensor, *, num_bands: tuple[int, int]
) -> Tensor:
    """Gated two-sided filter of images; not circular: edges do not meet.

    The Fourier transform at the few frequencies of the filter is two small real matmuls, O(YX·K_x + Y·K_y·K_x) a
    channel with nothing padded or permuted: linear in the tokens of ever finer grids. Images are taken a few at a time
    on a CPU, so that spectra stay in the cache; they are made anew in the derivative. There, up to 64 tokens are
    filtered by a matrix over their pairs (:mod:`resonance_nn.ops.spectrum_pairs`).

    Args:
        v: inputs (B, Y, X, H, P) on any grid. Computed in float32 or wider.
        spectrum: G as real pairs (H, R, 2K_y − 1, K_x, 2) for k_y = 0 … K_y − 1, −K_y + 1 … −1 and k_x = 0 … K_x − 1,
            R = 1 or P filters a head. At k_x = 0 only the part with G_{−k_y} conjugate to G_{k_y} has an effect.
        weight: A (H, J, J) of the gate.
        bias: a (H, J) of the gate, J = J_y·J_x products of octave bands of the two axes.
        num_bands: (J_y, J_x), 2^{J_y−1} ≤ K_y and 2^{J_x−1} ≤ K_x.

    Returns:
        y (B, Y, X, H, P) in v's dtype.
    """
    (Y, X), wide = v.shape[1:3], wide_dtype(v)
    Ky, Kx = (spectrum.shape[2] + 1) // 2, spectrum.shape[3]
    for J, K in zip(num_bands, (Ky, Kx), strict=True):
        check_bands(J, K, "num_bands")
    my, mx = min(Ky, Y), min(Kx, X)
    ky, kx = _signed(my, v.device), torch.arange(mx, device=v.device)
    bands = _bands(ky, kx, (Ky, Kx), num_bands, wide)
    G = torch.cat((spectrum[:, :, :my, :mx], spectrum[:, :, 2 * Ky - my :, :mx]), dim=2).to(wide)
    G = G.permute(4, 2, 3, 0, 1).flatten(1, 2)  # (2, N, H, R): real and imaginary parts
    learned = (G, weight.to(wide), bias.to(wide))
    if suits_pairs(v, G.shape[3]):
        return filter_pairs(v, *learned, ky, kx, bands)
    basis = _basis((Y, X), ky, kx, bands)
    if not torch.is_grad_enabled():
        return _forward(v, *learned, basis)
    result = _SpectralFilter2d.apply(v, *learned, basis)
    assert isinstance(result, Tensor)
    return result


class _Basis(NamedTuple):
    """What a grid's size says, all of it constant."""

    x: Tensor  # (2m_x, X): e^{−iπk_x x/X}, real parts above imaginary ones
    y: Tensor  # (2·(2m_y − 1), 2Y): e^{−iπk_y y/Y} times a complex column, its parts one after the other for each y
    bands: Tensor  # (J, N), every k_x > 0 counted twice, since it stands for −k_x too


def _bands(ky: Tensor, kx: Tensor, learned: tuple[int, int], num_bands: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(J, N), as in :class:`_Basis`."""
    twice = torch.where(kx > 0, 2.0, 1.0).to(dtype)
    bands_y, bands_x = (
        octave_bands(math.pi / K * k.to(dtype), J) for k, K, J in zip((ky, kx), learned, num_bands, strict=True)
    )
    return (bands_y[:, None, :, None] * (bands_x * twice)[None, :, None]).flatten(0, 1).flatten(1)


def _basis(grid: tuple[int, int], ky: Tensor, kx: Tensor, bands: Tensor) -> _Basis:
    y, x = (
        half_turns(k, torch.arange(size, device=k.device), size, bands.dtype)
        for k, size in zip((ky, kx), grid, strict=True)
    )
    real = torch.stack((y.real, -y.imag), dim=-1)
    imaginary = torch.stack((y.imag, y.real), dim=-1)
    return _Basis(torch.cat((x.real, x.imag)), torch.stack((real, imaginary)).flatten(0, 1).flatten(1), bands)


def _analyse(v: Tensor, basis: _Basis) -> Tensor:
    """Images (b, Y, X, H, P) -> their coefficients (b, 2, N, H, P), real and imaginary parts."""
    b, Y, X, H, P = v.shape
    rows = basis.x @ v.reshape(b * Y, X, H * P)
    return (basis.y @ rows.reshape(b, 2 * Y, -1)).reshape(b, 2, -1, H, P)


def _synthesise(V: Tensor, basis: _Basis) -> Tensor:
    """The adjoint of :func:`_analyse`: (b, 2, N, H, P) -> (b, Y, X, H, P)."""
    (b, _, _, H, P), X = V.shape, basis.x.shape[1]
    rows = basis.y.T @ V.reshape(b, basis.y.shape[0], -1)
    Y = rows.shape[1] // 2
    return (basis.x.T @ rows.reshape(b * Y, -1, H * P)).reshape(b, Y, X, H, P)


def _transfer(squares: Tensor, G: Tensor, weight: Tensor, bias: Tensor, *, bands: Tensor, tokens: int) -> Tensor:
    """γ G / 4YX (b, 2, N, H, R) of the mean |V|² over a head's channels at each frequency (b, N, H)."""
    energy = torch.einsum("bnh,jn->bhj", squares, bands) / (2 * tokens) ** 2
    gate = torch.einsum("bhj,jn->bnh", band_gates(energy, weight, bias), bands) / (4 * tokens)
    return gate[:, None, ..., None] * G


class _Heads:
    """Sums over a head's channels as matmuls: a CPU is slow at short rows."""

    def __init__(self, num_heads: int, head_dim: int, like: Tensor) -> None:
        heads = torch.eye(num_heads, dtype=like.dtype, device=like.device)
        self.members = heads.repeat_interleave(head_dim, dim=0)  # (H·P, H)

    def sum(self, x: Tensor) -> Tensor:
        """(…, H, P) -> (…, H)."""
        return x.flatten(-2) @ self.members


def _blocks(v: Tensor, basis: _Basis) -> list[slice]:
    """Images to take at once."""
    (B, _, _, H, P), step = v.shape, max(1, v.shape[0])
    if in_blocks(v):
        step = max(1, BLOCK_ELEMENTS // (2 * basis.bands.shape[1] * H * P))
    return [slice(i, i + step) for i in range(0, B, step)]


def _forward(v: Tensor, G: Tensor, weight: Tensor, bias: Tensor, basis: _Basis) -> Tensor:
    Y, X, H, P = v.shape[1:]
    heads = _Heads(H, P, G)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    for block in _blocks(v, basis):
        V = _analyse(v[block].to(G.dtype), basis)
        T = _transfer(heads.sum(_squares(V)) / P, G, weight, bias, bands=basis.bands, tokens=Y * X)
        y[block] = _synthesise(_complex_product(T, V), basis)
    return y


def _complex_product(a: Tensor, b: Tensor, *, conjugate: bool = False) -> Tensor:
    """a b of tensors (b, 2, N, H, 1 or P) and (b, 2, N, H, P), real and imaginary parts; ā b with ``conjugate``."""
    sign = -1 if conjugate else 1
    if torch.compiler.is_compiling():  # which does not take out= of a part of a tensor
        real = a[:, 0] * b[:, 0] - sign * a[:, 1] * b[:, 1]
        return torch.stack((real, a[:, 0] * b[:, 1] + sign * a[:, 1] * b[:, 0]), dim=1)
    product = torch.empty_like(b)
    torch.mul(a[:, 0], b[:, 0], out=product[:, 0]).addcmul_(a[:, 1], b[:, 1], value=-sign)
    torch.mul(a[:, 0], b[:, 1], out=product[:, 1]).addcmul_(a[:, 1], b[:, 0], value=sign)
    return product


def _squares(V: Tensor) -> Tensor:
    """|V|² (b, N, H, P) of coefficients (b, 2, N, H, P)."""
    return V[:, 0].square().addcmul_(V[:, 1], V[:, 1])


class _SpectralFilter2d(torch.autograd.Function):
    """With T the transfer function γ G and dZ = F(dy), as analysis is the adjoint of synthesis:

    dT = V̄ dZ, summed over the channels of a filter        dV = T̄ dZ + 2V dp / P        dv = F⁻¹(dV)

    where dp is the derivative by the mean square that the gate reads.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, G: Tensor, weight: Tensor, bias: Tensor, basis: _Basis) -> Tensor:
        ctx.save_for_backward(v, G, weight, bias, *basis)
        return _forward(v, G, weight, bias, basis)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        v, G, weight, bias, *constant = ctx.saved_tensors  # once: checkpointing gives them once
        learned, basis = (G, weight, bias), _Basis(*constant)
        (Y, X, H, P), R, dtype = v.shape[1:], learned[0].shape[3], learned[0].dtype
        heads = _Heads(H, P, learned[0])
        dv, totals = torch.empty_like(v), [torch.zeros_like(t) for t in learned]
        for block in _blocks(v, basis):
            V, dZ = _analyse(v[block].to(dtype), basis), _analyse(grad[block].to(dtype), basis)
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in (heads.sum(_squares(V)) / P, *learned)]
                T = _transfer(*inputs, bands=basis.bands, tokens=Y * X)
            dT = _complex_product(V, dZ, conjugate=True)
            dp, *own = torch.autograd.grad(T, inputs, dT if R == P else heads.sum(dT)[..., None])
            for total, part in zip(totals, own, strict=True):
                total += part
            dV = _complex_product(T.detach(), dZ, conjugate=True)
            dV.addcmul_(V, dp.mul_(2 / P)[:, None, ..., None])
            dv[block] = _synthesise(dV, basis)
        return dv, *totals, None


def _signed(size: int, device: torch.device) -> Tensor:
    """0 … size − 1, −size + 1 … −1, as an FFT orders them without its Nyquist frequency."""
    k = torch.arange(size, device=device)
    return torch.cat((k, -k[1:].flip(0)))
