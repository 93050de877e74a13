"""``spectral_gate``: selective resonators. Each token writes to, turns and reads a bank of damped oscillators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import RMSNorm, ShortConv
from resonance_nn.mixers.base import Mixer, State
from resonance_nn.ops.precision import wide_dtype, wide_linear
from resonance_nn.ops.semiseparable import semiseparable_chunked, semiseparable_step

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig


class SpectralGateMixer(Mixer):
    """The operator of ``ops.semiseparable`` with gates that depend on the token:

        v, b, c = silu(shortconv(W x))          b_t, c_t complex, N modes a head, normalised to |·| = 1
        δ_t     = softplus(W_δ x + bias)        step, per head: scales damping and rotation
        Λ_t     = exp(δ_t (−a + iω_n))          a = softplus(·) one a head, ω_n learned per head
        S_t     = Λ_t ∘ S_{t−1} + δ_t b_t ⊗ v_t
        y       = W_o( RMSNorm(Re(c_t^H S_t) + d ∘ v_t) ∘ silu(W_z x) )     a norm a head, one weight for all

    so b_t and c_t gate magnitude and phase of each frequency, and δ_t decides how far the oscillators turn: a token
    can rotate the state, which real, positive decays cannot. Angles add up over tokens, so δ is computed in float32 or
    wider under autocast too: in bfloat16 its rounding alone would blur the phase by 0.1 radians within a chunk.

    State: ``conv`` (B, W − 1, H(P + 4N)), ``memory`` (B, H, 2N, P), whatever the context.
    """

    state_names = ("conv", "memory")
    float32_parameters = ("damping", "frequency", "step_bias", "step_proj")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H, N = config.hidden_size, config.num_heads, config.num_modes
        self.num_modes, self.longest, self.chunk_size = N, config.initial_context, config.chunk_size
        self.sizes = (D + 4 * N * H, D)  # [v | b | c] for the convolution, z
        self.in_proj = nn.Linear(D, sum(self.sizes), bias=False)
        self.step_proj = nn.Linear(D, H, bias=False)
        self.conv = ShortConv(self.sizes[0], config.conv_size)
        self.damping = nn.Parameter(torch.empty(H))
        self.frequency = nn.Parameter(torch.empty(H, N))
        self.step_bias = nn.Parameter(torch.empty(H))
        self.skip = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        """δ = 1; time constants 1/a log-spaced over the heads from 4 tokens to the longest context;
        ω_n = π/8 · context^(−n/N), one turn in 16 tokens and slower: faster ones hinder learning at first
        (docs/experiments.md)."""
        H, N = self.num_heads, self.num_modes
        heads = torch.linspace(0, 1, H, dtype=torch.float64) if H > 1 else torch.tensor([0.5], dtype=torch.float64)
        shortest = min(4.0, self.longest)
        a = torch.exp(-(math.log(shortest) + heads * math.log(self.longest / shortest)))
        omega = math.pi / 8 * torch.exp(-math.log(self.longest) * torch.arange(N, dtype=torch.float64) / N)
        return {
            "damping": a.expm1().log(),  # softplus(damping) = a
            "frequency": omega.expand(H, N),
            "step_bias": torch.full((H,), math.log(math.expm1(1.0))),  # softplus(step_bias) = 1
            "skip": torch.ones(H),
        }

    def mix(
        self,
        x: Tensor,
        *,
        length: Tensor | None = None,
        reset: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        B, L, D = x.shape
        H, K = self.num_heads, 2 * self.num_modes
        state = state or {}
        vbc, z = self.in_proj(x).split(self.sizes, dim=-1)
        vbc, tail = self.conv(vbc, state.get("conv"), reset=reset, length=length)
        v, b, c = (t.view(B, L, H, -1) for t in F.silu(vbc).split((D, H * K, H * K), dim=-1))
        wide = wide_dtype(x)
        delta = F.softplus(wide_linear(x, self.step_proj.weight) + self.step_bias.to(wide))  # (B, L, H)
        log_decay = -delta * F.softplus(self.damping.to(wide))
        angle = delta[..., None] * self.frequency.to(wide)  # (B, L, H, N)
        b = F.normalize(b.to(wide), dim=-1, eps=1e-6) * delta[..., None]  # (B, L, H, K)
        c = F.normalize(c.to(wide), dim=-1, eps=1e-6)
        S = state.get("memory")
        if L == 1 and S is not None and reset is None and length is None:
            y, S = semiseparable_step(v[:, 0], b[:, 0], c[:, 0], log_decay[:, 0], angle[:, 0], S)
            y = y[:, None]
        else:
            mask = None if length is None else torch.arange(L, device=x.device) < length[:, None]
            y, S = semiseparable_chunked(
                v, b, c, log_decay, angle, state=S, reset=reset, mask=mask, chunk_size=self.chunk_size
            )
        y = self.norm(y + self.skip.to(y.dtype)[:, None] * v)  # (B, L, H, P)
        y = self.out_proj(y.reshape(B, L, D) * F.silu(z))
        return y, {"conv": tail, "memory": S} if return_state else None
