"""Two-sided spectral filters whose gate follows the input's own spectrum, on sequences.

    y = F⁻¹( γ(v) ∘ G ∘ F(v) )         G learned, complex;  γ one positive number a head and octave band

Letters: B batch, L length, H heads, P channels a head, R filters a head (1 or P), J bands, K frequencies.

**Sequences.** G is learned at ω_k = πk/K, k < K, the frequencies of a period of n = 2K tokens, and with G_{−k} = Ḡ_k

    h_τ = (1/n) Σ_{|k|<K} γ_k G_k e^{iω_k τ}  for |τ| < K, else 0          y_t = Σ_s h_{t−s} v_s

is a linear convolution, not a circular one: zeros around a row change nothing, whatever grid the FFT runs on. The
transfer function Σ_τ h_τ e^{−iωτ} is continuous, and each length samples it elsewhere.

**Gate.** With p the power |F(v)|² meant over a head's channels and w_j the bands of :func:`octave_bands`,

    E_j = Σ_ω w_j(ω) p(ω) / (grid · tokens),    γ_j = 2 σ( Σ_i A_ji log(E_i + ε) + a_j ),    γ_k = Σ_j w_j(ω_k) γ_j

E_j is the mean square of v in band j; in a sequence they add up to the mean square of v, by Parseval. A w_j is a
trigonometric polynomial of degree < 2^{J−1}, so that its sum over any grid of L + 2^{J−1} frequencies or more is the
integral, exactly: E_j does not know the grid either.

Sources: FNet (Lee-Thorp et al. 2022), GFNet (Rao et al. 2021), AFNO (Guibas et al. 2022); the modes of an extent are
those of FNO (Li et al. 2021). Deviations: filters are linear, not circular, and the gate reads energies in bands.
Images: :mod:`resonance_nn.ops.spectrum_2d`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.fft_conv import fft_length
from resonance_nn.ops.precision import wide_dtype, without_autocast

ENERGY_FLOOR = 1e-6  # ε: what counts as silence, beside inputs of mean square about 1


def max_bands(size: int) -> int:
    """The most octave bands that K = ``size`` frequencies can tell apart: 2^{J−1} ≤ K."""
    return size.bit_length()


def octave_bands(omega: Tensor, num_bands: int) -> Tensor:
    """J weights w_j(ω) ≥ 0 that sum to 1 at every frequency (radians a token): (...) -> (J, ...).

        w_j = sin²(2^j ω/2) ∏_{i<j} cos²(2^i ω/2),      w_{J−1} = ∏_{i<J−1} cos²(2^i ω/2)

    the power responses of the Haar wavelets of 2, 4, …, 2^{J−1} tokens and of the mean over 2^{J−1}: octaves from the
    fastest, around ω = π, down to the mean. Each is a trigonometric polynomial of degree < 2^{J−1}.
    """
    weights, rest = [], torch.ones_like(omega)
    for j in range(num_bands - 1):
        half = 2**j / 2 * omega
        weights.append(rest * half.sin().square())
        rest = rest * half.cos().square()
    return torch.stack((*weights, rest))


@without_autocast
def spectral_filter_reference(
    v: Tensor, spectrum: Tensor, weight: Tensor, bias: Tensor, *, length: Tensor | None = None
) -> Tensor:
    """The definition: h summed over its frequencies, y over pairs of tokens, E_j from correlations of tokens at each
    distance. O(L²). Arguments as :func:`spectral_filter`."""
    (B, L, H, P), K, J = v.shape, spectrum.shape[2], bias.shape[1]
    wide, device = wide_dtype(v), v.device
    u, tokens = _real_tokens(v.to(wide), length)
    t, k, d = (torch.arange(size, device=device) for size in (L, K, 2 ** (J - 1)))
    lag = t[:, None] - t  # (L, L): t − s
    grid = math.pi / len(d) * torch.arange(2 * len(d), device=device, dtype=wide)
    taps = octave_bands(grid, J) @ torch.cos(grid[:, None] * d) / len(grid)  # (J, 2^{J−1}): w_j at each distance
    correlate = taps[:, lag.abs().clamp(max=len(d) - 1)] * (lag.abs() < len(d))  # (J, L, L)
    energy = torch.einsum("bthp,jts,bshp->bhj", u, correlate, u) / P / tokens.clamp(min=1)[:, None, None]
    omega = math.pi / K * k.to(wide)
    gate = band_gates(energy, weight, bias) @ octave_bands(omega, J)  # (B, H, K)
    twice = torch.where(k > 0, 2.0, 1.0).to(wide)  # k stands for −k too
    G = gate[:, :, None] * torch.view_as_complex(spectrum.to(wide)) * twice  # (B, H, R, K)
    h = torch.einsum("bhrk,tsk->bhrts", G, torch.exp(1j * omega * lag[..., None])).real / (2 * K)
    h = (h * (lag.abs() < K)).expand(B, H, P, L, L)
    return torch.einsum("bhrts,bshr->bthr", h, u).to(v.dtype)


@without_autocast
def spectral_filter(
    v: Tensor, spectrum: Tensor, weight: Tensor, bias: Tensor, *, length: Tensor | None = None
) -> Tensor:
    """Gated two-sided filter of sequences, in O((L + 2^J) log L) a channel.

    A row's result depends on its own tokens only: not on the batch's L, exactly but for rounding.

    Args:
        v: inputs (B, L, H, P). FFTs run in float32 or wider.
        spectrum: G as real pairs (H, R, K, 2), R = 1 or P filters a head. The imaginary part at k = 0 has no effect.
        weight: A (H, J, J) of the gate.
        bias: a (H, J) of the gate; 2^{J−1} ≤ K.
        length: (B) real tokens of each row, the rest being right padding, whatever it holds; None means L.

    Returns:
        y (B, L, H, P) in v's dtype; at padding what the filter spills there.
    """
    L, wide = v.shape[1], wide_dtype(v)
    K, J = spectrum.shape[2], bias.shape[1]
    check_bands(J, K, "bias")
    u, tokens = _real_tokens(v.to(wide), length)
    reach = min(L, K) - 1
    n = 2 * K
    learned_grid = L <= K < 2 * L  # where G can be used as it is
    N = n if learned_grid else fft_length(L + max(reach, 2 ** (J - 1)))
    V = torch.fft.rfft(u.permute(0, 2, 3, 1), n=N)  # (B, H, P, N/2 + 1)
    k = torch.arange(N // 2 + 1, device=v.device)
    twice = torch.where((k > 0) & (2 * k < N), 2.0, 1.0).to(wide)  # a bin stands for k and −k
    bands = octave_bands(2 * math.pi / N * k.to(wide), J) * (twice / N)  # (J, N/2 + 1)
    energy = power(V) @ bands.T / tokens.clamp(min=1)[:, None, None]  # (B, H, J)
    omega = math.pi / K * torch.arange(K, device=v.device, dtype=wide)
    gate = band_gates(energy, weight, bias) @ octave_bands(omega, J)  # (B, H, K)
    G = F.pad(gate[:, :, None] * torch.view_as_complex(spectrum.to(wide)), (0, 1))  # (B, H, R, K + 1): none at ω = π
    if not learned_grid:
        h = torch.fft.irfft(G, n=n)
        zeros = h.new_zeros(*h.shape[:-1], N - 2 * reach - 1)
        G = torch.fft.rfft(torch.cat((h[..., : reach + 1], zeros, h[..., n - reach :]), dim=-1), n=N)
    y = torch.fft.irfft(V * G, n=N)[..., :L]
    return y.permute(0, 3, 1, 2).to(v.dtype)


def _real_tokens(v: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """v with zeros at right padding, and the number of real tokens of each row (B)."""
    B, L = v.shape[:2]
    if length is None:
        return v, torch.full((B,), L, device=v.device)
    padding = torch.arange(L, device=v.device) >= length[:, None]
    return v.masked_fill(padding[..., None, None], 0), length


def power(V: Tensor) -> Tensor:
    """|V|² meant over a head's channels: (B, H, P, ...) -> (B, H, ...)."""
    return (V.real.square() + V.imag.square()).mean(2)


def band_gates(energy: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """γ of E (B, H, J): in (0, 2), and 1 where weight and bias are 0."""
    logits = torch.einsum("hji,bhi->bhj", weight.to(energy.dtype), (energy + ENERGY_FLOOR).log())
    return 2 * torch.sigmoid(logits + bias.to(energy.dtype))


def half_turns(k: Tensor, t: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """e^{−iπkt/size} of integers k and t: complex (len(k), len(t)). Whole turns go while they are integers."""
    angle = -math.pi / size * torch.remainder(k[:, None] * t, 2 * size).to(dtype)
    return torch.complex(angle.cos(), angle.sin())


def check_bands(J: int, K: int, name: str) -> None:
    if not 1 <= J <= max_bands(K):
        raise ValueError(f"{name}: {J} octave bands of {K} frequencies: must be 1 to {max_bands(K)}; use fewer bands")
