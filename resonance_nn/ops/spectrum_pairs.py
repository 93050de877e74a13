"""The filter of :mod:`resonance_nn.ops.spectrum_2d` on grids of few tokens, as a matrix over pairs of tokens.

    y_t = Σ_s h_{t−s} v_s,    h_d = Σ_j γ_j κ_{j,d},    κ_{j,d} = (1/4YX) Σ_k w_j(k) Re(G_k e^{iθ_k(d)})

θ_k(d) = π (k_y d_y / Y + k_x d_x / X), w_j the band weights, κ_j what the filter is within band j: as many taps as
there are distances d, made once for all images. Each image blends its own h from them, and is filtered by one matmul of
S × S, S = YX. Its energies need no spectrum either:

    E_j = Σ_{s,t} (v_s · v_t) m_{j,t−s},    m_{j,d} = (1/(4S²P)) Σ_k w_j(k) cos θ_k(d)

of the S² dot products of its tokens. They cancel where a band is nearly silent, so they are summed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resonance_nn.ops.spectrum import band_gates, half_turns

FEW = 64  # tokens; beyond, spectra are faster


def suits_pairs(v: Tensor, filters: int) -> bool:
    """Whether images (B, Y, X, H, P) are filtered faster so: on a CPU, of few tokens, by one filter a head."""
    on_cpu = v.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and filters == 1 and v.shape[1] * v.shape[2] <= FEW


def filter_pairs(v: Tensor, G: Tensor, weight: Tensor, bias: Tensor, ky: Tensor, kx: Tensor, bands: Tensor) -> Tensor:
    """Images filtered by G: v (B, Y, X, H, P) -> y, in v's dtype, computed in G's.

    Args:
        G: (2, N, H, 1), real parts and imaginary ones at N = N_y·N_x frequencies.
        weight, bias: of the gate, (H, J, J) and (H, J).
        ky, kx: the frequencies (N_y) and (N_x), integers.
        bands: w (J, N), twice where a frequency stands for −k too.
    """
    (B, Y, X, H, P), dtype, device = v.shape, G.dtype, v.device
    S = Y * X
    turns, at = _turns(ky, kx, (Y, X)), _distances(Y, X, device)
    u = v.to(dtype).flatten(1, 2).transpose(1, 2).contiguous()  # (B, H, S, P)
    wide = u.double()
    measure = (bands.double() @ turns.real)[:, at].T / (4 * S * S * P)  # (S², J)
    energy = (wide @ wide.mT).flatten(2) @ measure
    gate = band_gates(energy.clamp_min(0).to(dtype), weight, bias)  # (B, H, J)
    waves = torch.cat((turns.real, turns.imag)).to(dtype) / (4 * S)  # (2N, distances)
    parts = bands[:, None] * G[..., 0].permute(2, 0, 1)[:, None]  # (H, J, 2, N)
    taps = (parts.flatten(2) @ waves)[..., at]  # (H, J, S²)
    h = (gate.transpose(0, 1) @ taps).view(H, B, S, S)
    y = h.transpose(0, 1) @ u
    return y.transpose(1, 2).reshape(v.shape).to(v.dtype)


def _turns(ky: Tensor, kx: Tensor, grid: tuple[int, int]) -> Tensor:
    """e^{−iθ_k(d)}, complex128 (N, distances): d_y = 1 − Y … Y − 1, and d_x likewise."""
    y, x = (
        half_turns(k, torch.arange(1 - size, size, device=k.device), size, torch.float64)
        for k, size in zip((ky, kx), grid, strict=True)
    )
    return (y[:, None, :, None] * x[None, :, None]).flatten(2).flatten(0, 1)


def _distances(Y: int, X: int, device: torch.device) -> Tensor:
    """(S²): where the distance t − s of each pair of tokens stands among all."""
    rows, columns = (torch.arange(size, device=device) for size in (Y, X))
    y, x = (t.flatten() for t in torch.meshgrid(rows, columns, indexing="ij"))
    return ((y[:, None] - y + Y - 1) * (2 * X - 1) + x[:, None] - x + X - 1).flatten()
