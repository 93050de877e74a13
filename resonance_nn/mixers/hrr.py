"""``hrr``: holographic reduced representations. Pairs are bound by circular convolution and superposed in a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import RMSNorm, ShortConv
from resonance_nn.mixers.base import Mixer, State, decay_rates, inverse_softplus, real_tokens
from resonance_nn.ops.elementwise import silu_gate
from resonance_nn.ops.holographic import hrr_chunked, hrr_step, unit_spectrum
from resonance_nn.ops.precision import wide_dtype, wide_linear

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig


SOFTNESS = 0.1  # weak bins of a key count less: in bfloat16 their phase is rounding, and their gradient huge


class HRRMixer(Mixer):
    """The memory of ``ops.holographic``, one trace of P reals a head, or R (``config.num_traces``):

        v       = silu(shortconv(W_v x))
        κ, κ_q  = shortconv(W x), at each frequency f scaled to norm 1 over the R traces (less where it is weak)
        α_t     = exp(−a δ_t),  δ_t = softplus(W_δ x + bias),  a = softplus(·) one a head
        β_t     = max_beta · σ(W_β x)
        M_t     = α_t M_{t−1} + β_t κ_t F(v_t)_f                         R = 1, or erase "none"
        M_t     = (I − β_t κ_t κ_t^H) α_t M_{t−1} + β_t κ_t F(v_t)_f     R ≥ 2
        y       = W_o( RMSNorm(F⁻¹(κ_q^H M_t)) ∘ silu(W_z x) )          a norm a head, one weight for all

    With one trace any two unitary keys are parallel at each frequency, so erasing along one would erase everything:
    R = 1 is Hebbian. Keys are W x as a spectrum already, so no transform of theirs is needed.

    State: ``conv`` (B, W − 1, H·P(2R + 1)), ``memory`` (B, H, R, P), whatever the context: R/K of ``holographic``'s.
    """

    state_names = ("conv", "memory")
    float32_parameters = ("damping", "step_bias", "step_proj")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H, R = config.hidden_size, config.num_heads, config.num_traces
        self.num_traces, self.chunk_size = R, config.chunk_size
        self.shortest, self.longest = config.shortest_context, config.initial_context
        self.erases, self.max_beta = R > 1 and config.erase != "none", config.max_beta
        self.sizes = (R * D, R * D, D)  # q, k, v
        self.in_proj = nn.Linear(D, sum(self.sizes) + D, bias=False)
        self.conv = ShortConv(sum(self.sizes), config.conv_size)
        self.step_proj = nn.Linear(D, H, bias=False)
        self.beta_proj = nn.Linear(D, H, bias=False)
        self.damping = nn.Parameter(torch.empty(H))
        self.step_bias = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        """δ = 1; time constants log-spaced over the heads from the shortest context to the longest."""
        H = self.num_heads
        return {
            "damping": inverse_softplus(decay_rates(self.shortest, self.longest, H)),
            "step_bias": inverse_softplus(torch.ones(H, dtype=torch.float64)),
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
        H, R, P = self.num_heads, self.num_traces, self.head_dim
        state = state or {}
        qkv, z = self.in_proj(x).split((sum(self.sizes), D), dim=-1)
        qkv, tail = self.conv(qkv, state.get("conv"), reset=reset, length=length)
        q, k, v = qkv.split(self.sizes, dim=-1)
        query, key = (unit_spectrum(t.reshape(B, L, H, R, P), softness=SOFTNESS) for t in (q, k))
        v = F.silu(v).view(B, L, H, P)
        wide = wide_dtype(x)
        delta = F.softplus(wide_linear(x, self.step_proj.weight) + self.step_bias.to(wide))  # (B, L, H)
        log_decay = -delta * F.softplus(self.damping.to(wide))
        beta = self.max_beta * torch.sigmoid(self.beta_proj(x).to(wide))
        S = state.get("memory")
        if L == 1 and S is not None and reset is None and length is None:
            y, S = hrr_step(v[:, 0], key[:, 0], query[:, 0], log_decay[:, 0], beta[:, 0], S, erase=self.erases)
            y = y[:, None]
        else:
            mask = real_tokens(x, length)
            chunk_size = 16 if self.erases else self.chunk_size
            y, S = hrr_chunked(
                *(v, key, query, log_decay, beta),
                erase=self.erases,
                state=S,
                reset=reset,
                mask=mask,
                chunk_size=chunk_size,
            )
        y = self.norm(y).reshape(B, L, D)
        y = self.out_proj(silu_gate(y, z))
        return y, {"conv": tail, "memory": S} if return_state else None
