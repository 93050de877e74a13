"""``resonance``: constant resonators. Every filter is a fixed bank of damped oscillations; training is one FFT."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import ShortConv
from resonance_nn.mixers.base import Mixer, State, inverse_softplus
from resonance_nn.ops.elementwise import silu_gate
from resonance_nn.ops.resonator import Resonators, resonator_chunked, resonator_fft, resonator_step

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

GOLDEN = (math.sqrt(5) - 1) / 2


class ResonanceMixer(Mixer):
    """y = W_o( (h * u) ∘ silu(W_g x) ),  u = shortconv(W_v x),  h_τ = Re Σ_n g_n e^{iφ_n} e^{(−a_n + iω_n)τ}

    One filter h a head, shared by its P channels, or one a channel (``config.filters``). Magnitude (g, a) and phase
    (φ, ω) are separate parameters; a = softplus(·) > 0.

    Forms, all from the same parameters: FFT for whole sequences, Toeplitz chunks where a document boundary resets the
    state, and the recurrence for one token. State: ``conv`` (B, W − 1, D), ``resonators`` (B, F, 2N, R).
    """

    state_names = ("conv", "resonators")
    float32_parameters = ("damping", "frequency", "gain", "phase")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D = config.hidden_size
        self.num_filters = config.num_heads if config.filters == "head" else D
        self.num_modes = config.num_modes
        self.longest = config.initial_context
        self.in_proj = nn.Linear(D, 2 * D, bias=False)
        self.conv = ShortConv(D, config.conv_size)
        shape = (self.num_filters, self.num_modes)
        self.damping = nn.Parameter(torch.empty(shape))
        self.frequency = nn.Parameter(torch.empty(shape))
        self.gain = nn.Parameter(torch.empty(shape))
        self.phase = nn.Parameter(torch.empty(shape))
        self.out_proj = nn.Linear(D, D, bias=False)
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        """ω evenly over (0, π]; time constants 1/a log-spaced from 1 to the longest context, paired with the
        frequencies by a golden-ratio sequence so that fast and slow modes have short and long memories alike;
        g_n = √(2(1 − e^{−2a_n})/N), so that Σ_τ h_τ² ≈ 1."""
        Fn, N = self.num_filters, self.num_modes
        index = torch.arange(Fn * N, dtype=torch.float64).view(Fn, N)
        a = torch.exp(-math.log(self.longest) * torch.remainder(index * GOLDEN, 1.0))
        omega = math.pi * (torch.arange(N, dtype=torch.float64) + 1) / N
        return {
            "damping": inverse_softplus(a),
            "frequency": omega.expand(Fn, N),
            "gain": torch.sqrt(2 * (1 - torch.exp(-2 * a)) / N),
            "phase": torch.remainder(index * GOLDEN * 2 * math.pi, 2 * math.pi),
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
        state = state or {}
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, tail = self.conv(u, state.get("conv"), reset=reset, length=length)
        u = u.view(B, L, self.num_filters, -1)  # (B, L, F, R)
        S, modes = state.get("resonators"), Resonators(F.softplus(self.damping), self.frequency, self.gain, self.phase)
        if L == 1 and S is not None and reset is None and length is None:
            y, S = resonator_step(u[:, 0], modes, S)
            y = y[:, None]
        elif reset is not None:
            chunk_size = 64 if u.shape[-1] >= 16 else 16  # a T×T matrix a filter and document: small for many filters
            y, S = resonator_chunked(u, modes, state=S, reset=reset, length=length, chunk_size=chunk_size)
        else:
            y, S = resonator_fft(u, modes, state=S, length=length, return_state=return_state)
        y = self.out_proj(silu_gate(y.reshape(B, L, D), gate))
        if not return_state:
            return y, None
        assert S is not None
        return y, {"conv": tail, "resonators": S}
