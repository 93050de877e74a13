"""The filter of :mod:`resonance_nn.ops.spectrum_2d` on grids of few tokens, as a matrix over pairs of tokens.

    y_t = Σ_s h_{t−s} v_s,    h_d = Σ_j γ_j κ_{j,d},    κ_{j,d} = (1/4YX) Σ_k w_j(k) Re(G_k e^{iθ_k(d)})

θ_k(d) = π (k_y d_y / Y + k_x d_x / X), w_j the band weights, κ_j what the filter is within band j: as many taps as
there are distances d, made once for all images. Each image blends its own h from them, and is filtered by one matmul of
S × S, S = YX. Its energies need no spectrum either:

    E_j = Σ_{s,t} (v_s · v_t) m_{j,t−s},    m_{j,d} = (1/(4S²P)) Σ_k w_j(k) cos θ_k(d)

of the S² dot products of its tokens. They cancel where a band is nearly silent, so they are summed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resonance_nn.ops.spectrum import band_gates

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
    real, imaginary = _turns(ky, kx, (Y, X))
    at = _distances(Y, X, device)
    u = v.to(dtype).flatten(1, 2).transpose(1, 2).contiguous()  # (B, H, S, P)
    wide = u.double()
    measure = (bands.double() @ real)[:, at].T / (4 * S * S * P)  # (S², J)
    energy = (wide @ wide.mT).flatten(2) @ measure
    gate = band_gates(energy.clamp_min(0).to(dtype), weight, bias)  # (B, H, J)
    waves = torch.cat((real, -imaginary)).to(dtype) / (4 * S)  # (2N, distances)
    parts = bands[:, None] * G[..., 0].permute(2, 0, 1)[:, None]  # (H, J, 2, N)
    taps = (parts.flatten(2) @ waves)[..., at]  # (H, J, S²)
    h = (gate.transpose(0, 1) @ taps).view(H, B, S, S)
    y = h.transpose(0, 1) @ u
    return y.transpose(1, 2).reshape(v.shape).to(v.dtype)


def _turns(ky: Tensor, kx: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """cos θ_k(d) and sin θ_k(d), float64 (N, distances): d_y = 1 − Y … Y − 1, and d_x likewise."""
    angles = []
    for k, size in zip((ky, kx), grid, strict=True):
        d = torch.arange(1 - size, size, device=k.device)
        turn = torch.remainder(k[:, None] * d, 2 * size)  # whole turns are taken off while they are integers
        angles.append(math.pi / size * turn.double())
    angle = (angles[0][:, None, :, None] + angles[1][None, :, None]).flatten(2).flatten(0, 1)
    return angle.cos(), angle.sin()


def _distances(Y: int, X: int, device: torch.device) -> Tensor:
    """(S²): where the distance t − s of each pair of tokens stands among all."""
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(Y), torch.arange(X), indexing="ij"))
    rows, columns = y[:, None] - y + Y - 1, x[:, None] - x + X - 1
    return (rows * (2 * X - 1) + columns).flatten().to(device)
