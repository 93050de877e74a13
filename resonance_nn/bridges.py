"""Bridges from an encoder to a decoder's blocks, without cross-attention: a source becomes a state of fixed size.

Letters as everywhere: B batch, n source tokens, m target tokens, D width, H heads, P channels a head, N modes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import RMSNorm, ShortConv
from resonance_nn.mixers.base import real_tokens
from resonance_nn.ops.delta_rule import delta_rule_chunked
from resonance_nn.ops.elementwise import short_conv, silu_gate, unit
from resonance_nn.ops.fusion import band_energies, band_gates, extent_modes, log_bands
from resonance_nn.ops.precision import wide_dtype

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

UNIT_EPS = 1e-6  # added to |q|² and |k|²


class Bridge(nn.Module):
    """A source is written once into S (B, H, K, P), K = 2·num_modes reals a channel, and read at every target token x:

        q, z = W x                                      |q| = 1
        y    = W_o( RMSNorm(S^T q) ∘ silu(z) )          a norm a head, one weight for all

    O(n) to write, O(1) to read. What is read depends on S and x alone: no token of the target sees another here.
    """

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__()
        D, H = config.hidden_size, config.num_heads
        self.num_heads, self.key_size = H, 2 * config.num_modes
        self.in_proj = nn.Linear(D, H * self.key_size + D, bias=False)
        self.norm = RMSNorm(D // H, config.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)

    def write(self, source: Tensor, length: Tensor | None = None) -> Tensor:
        """S (B, H, K, P), float32 or wider, of the rows of source (B, n, D) that begin with ``length`` (B) real tokens,
        zeros after them; None means n."""
        raise NotImplementedError

    def read(self, x: Tensor, S: Tensor) -> Tensor:
        """x (B, m, D), S (B, H, K, P) -> y (B, m, D)."""
        q, z = self.in_proj(x).split((self.num_heads * self.key_size, x.shape[-1]), dim=-1)
        q = self.query(q.unflatten(-1, (self.num_heads, self.key_size)))
        y = (q.transpose(1, 2) @ S.to(q.dtype)).transpose(1, 2)  # (B, m, H, P)
        return self.out_proj(silu_gate(self.norm(y).flatten(2), z))

    def query(self, q: Tensor) -> Tensor:
        """(B, m, H, K), of norm 1."""
        return unit(q, UNIT_EPS)


class MemoryBridge(Bridge):
    """A holographic memory of the source, written by the delta rule:

        k_s  = silu(conv(W_k h))_s, |k| = 1           conv: depthwise, conv_size − 1 tokens to either side
        v_s  = W_v h_s        β_s = σ(W_β h_s)        q as k, without the convolution
        S_s  = (I − β_s k_s k_s^T) S_{s−1} + β_s k_s v_s^T,      S = S_n

    That is Σ k v^T normalised: a key recalls its value, exactly for up to K orthonormal keys and β = 1, and at the
    values' size whatever n is. Where there are more tokens than keys, the later ones stand clearer.
    """

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        D, H = config.hidden_size, config.num_heads
        self.reach, self.chunk_size = config.conv_size - 1, min(config.chunk_size, 64)
        self.source_proj = nn.Linear(D, H * self.key_size + D, bias=False)
        self.conv = ShortConv(H * self.key_size, 2 * self.reach + 1)
        self.beta_proj = nn.Linear(D, H, bias=False)

    def write(self, source: Tensor, length: Tensor | None = None) -> Tensor:
        H, K = self.num_heads, self.key_size
        k, v = self.source_proj(source).split((H * K, source.shape[-1]), dim=-1)
        k = short_conv(F.pad(k, (0, 0, 0, self.reach)), self.conv.weight)[:, self.reach :]
        k, v = self.query(k.unflatten(-1, (H, K))), v.unflatten(-1, (H, -1))
        beta = self.beta_proj(source).sigmoid()
        _, S = delta_rule_chunked(
            *(v, k, torch.zeros_like(k), beta),
            torch.zeros_like(beta, dtype=wide_dtype(beta)),
            mask=real_tokens(source, length),
            chunk_size=self.chunk_size,
        )
        return S

    def query(self, q: Tensor) -> Tensor:
        return unit(F.silu(q), UNIT_EPS)


class SpectralBridge(Bridge):
    """The source as N Fourier modes over its own extent (``ops.fusion``), gated band by band by its own spectrum, and
    read with a complex number a mode, c_k = q_k + i q_{N+k}:

        F_k  k < N, of v_s = W_v h_s                S = [Re γF | Im γF]
        γ_j  = 2σ( Σ_i A_ji log(E_i + ε) + a_j )    E_j the energy in band j of a head's modes, bands log-spaced
        y    = W_o( RMSNorm(Re Σ_k conj(c_k) γ_k F_k) ∘ silu(z) )

    With c_k = e^{−2πikτ} that is the source around its relative place τ, the sharper the more modes there are; what the
    tokens say does not matter to where they are found. A source of n tokens has n/2 modes, the others are 0.
    """

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        H, N = config.num_heads, config.num_modes
        self.bands = log_bands(N, config.num_bands)
        J = self.bands[-1] + 1
        self.value_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate_weight = nn.Parameter(torch.zeros(H, J, J))
        self.gate_bias = nn.Parameter(torch.zeros(H, J))

    def initial_values(self) -> dict[str, Tensor]:
        """γ = 1."""
        return {name: torch.zeros(self.get_parameter(name).shape) for name in ("gate_weight", "gate_bias")}

    def write(self, source: Tensor, length: Tensor | None = None) -> Tensor:
        v, H = self.value_proj(source), self.num_heads
        modes = extent_modes(v, len(self.bands), real_tokens(source, length))  # (B, N, 2, D)
        modes = modes.unflatten(-1, (H, -1)).movedim(3, 1)  # (B, H, N, 2, P)
        gates = band_gates(band_energies(modes, self.bands), self.gate_weight, self.gate_bias)  # (B, H, J)
        return (modes * gates[..., self.bands, None, None]).transpose(2, 3).flatten(2, 3)


BRIDGES: dict[str, type[Bridge]] = {"memory": MemoryBridge, "spectral": SpectralBridge}
