"""``holographic``: an associative memory. Each token binds a value to a key, corrects what stood there, and recalls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import RMSNorm, ShortConv
from resonance_nn.mixers.base import Mixer, State, decay_rates, inverse_softplus, real_tokens, turning_angle
from resonance_nn.ops.delta_rule import delta_rule_chunked, delta_rule_step
from resonance_nn.ops.precision import wide_dtype, wide_linear
from resonance_nn.ops.semiseparable import semiseparable_chunked, semiseparable_step

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

MIN_LOG_DECAY = -5.0  # of a channel's decay: a token keeps at least e^−5


class HolographicMixer(Mixer):
    """The operator of ``ops.delta_rule`` with keys, values and gates from the token:

        q, k, v = silu(shortconv(W x))          K = 2·num_modes reals a key, |k| = 1, |q| = K^{−1/2}
        δ_t     = softplus(W_δ x + bias)        α_t = exp(−a δ_t), a = softplus(·) one a head
        β_t     = max_beta · σ(W_β x)
        S_t     = (I − β_t k_t k_t^T) α_t S_{t−1} + β_t k_t v_t^T
        y       = W_o( RMSNorm(S_t^T q_t) ∘ silu(W_z x) )               a norm a head, one weight for all

    Options (``config.erase``, ``decay``, ``rotation``), one operator:

        erase "gated"      S_t = (I − k(e ∘ k)^T) D_t S_{t−1} + k (w ∘ v)^T, e, w in (0, 1) a key, a value channel
        erase "hermitian"  the same on complex keys of N modes: (I − k(e ∘ k)^H), y = Re(q^H S)
        erase "none"       Hebbian: β_t k_t v_t^T is added
        decay "channel"    D_t = diag(α_t), one factor a key channel (a mode, if it turns or is hermitian), in (e^−5, 1)
        decay "none"       nothing is forgotten but by erasing
        rotation "step"    D_t turns mode n by δ_t ω_n
        rotation "token"   D_t turns the first half of the modes by angles of the token's own (``turning_angle``); the
                           others stand still, so that a key meets its query whatever came in between

    Angles and log-decays add up over tokens, so what they come from is computed in float32 or wider under autocast too.

    State: ``conv`` (B, W − 1, H(2K + P)), ``memory`` (B, H, K, P), whatever the context.
    """

    state_names = ("conv", "memory")
    float32_parameters = ("damping", "frequency", "step_bias", "decay_bias", "step_proj", "angle_proj")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H, N, P = config.hidden_size, config.num_heads, config.num_modes, self.head_dim
        self.num_modes, self.longest = N, config.initial_context
        self.chunk_size = min(config.chunk_size, 64)
        self.erase, self.decay, self.max_beta = config.erase, config.decay, config.max_beta
        self.rotation = config.rotation or "none"
        self.turns = self.rotation != "none"
        self.hermitian = self.erase == "hermitian"
        K = 2 * N
        self.sizes = (2 * K * H + D, D)  # [q | k | v] for the convolution, z
        self.in_proj = nn.Linear(D, sum(self.sizes), bias=False)
        self.conv = ShortConv(self.sizes[0], config.conv_size)
        self.steps = self.decay == "head" or self.rotation == "step"
        if self.steps:
            self.step_proj = nn.Linear(D, H, bias=False)
            self.step_bias = nn.Parameter(torch.empty(H))
        if self.decay == "head":
            self.damping = nn.Parameter(torch.empty(H))
        elif self.decay == "channel":
            self.decay_channels = N if self.turns or self.hermitian else K
            self.decay_proj = nn.Sequential(
                nn.Linear(D, P, bias=False), nn.Linear(P, H * self.decay_channels, bias=False)
            )
            self.decay_bias = nn.Parameter(torch.empty(H, self.decay_channels))
        if self.rotation == "step":
            self.frequency = nn.Parameter(torch.empty(H, N))
        elif self.rotation == "token":
            self.turning_modes = (N + 1) // 2
            self.angle_proj = nn.Linear(D, 2 * H * self.turning_modes, bias=False)
        if self.erase in ("delta", "none"):
            self.beta_proj = nn.Linear(D, H, bias=False)
        else:
            self.erase_channels = N if self.hermitian else K
            self.gates_proj = nn.Sequential(
                nn.Linear(D, P, bias=False), nn.Linear(P, H * (self.erase_channels + P), bias=False)
            )
        self.norm = RMSNorm(P, config.norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        """δ = 1; time constants log-spaced, over the heads or over each head's channels, from 4 tokens to the longest
        context; ω_n = 2π/context · n/N, at most a turn in the longest context, as a key must still meet itself where
        it is asked for; tokens begin with no angle of their own, for the same reason."""
        H, N = self.num_heads, self.num_modes
        values: dict[str, Tensor] = {}
        if self.steps:
            values["step_bias"] = inverse_softplus(torch.ones(H, dtype=torch.float64))
        if self.decay == "head":
            values["damping"] = inverse_softplus(decay_rates(self.longest, H))
        elif self.decay == "channel":
            share = decay_rates(self.longest, self.decay_channels) / -MIN_LOG_DECAY
            values["decay_bias"] = torch.logit(share).expand(H, -1)
        if self.rotation == "step":
            omega = 2 * math.pi / self.longest * torch.arange(N, dtype=torch.float64) / N
            values["frequency"] = omega.expand(H, N)
        elif self.rotation == "token":
            values["angle_proj.weight"] = torch.zeros(self.angle_proj.weight.shape)
        return values

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
        qkv, z = self.in_proj(x).split(self.sizes, dim=-1)
        qkv, tail = self.conv(qkv, state.get("conv"), reset=reset, length=length)
        q, k, v = (t.view(B, L, H, -1) for t in F.silu(qkv).split((H * K, H * K, D), dim=-1))
        q, k = _unit(q) * K**-0.5, _unit(k)  # float32 or wider
        log_decay, angle = self._transition(x)
        erase, v = self._gates(x, k, v)
        S = state.get("memory")
        if L == 1 and S is not None and reset is None and length is None:
            turn = None if angle is None else angle[:, 0]
            if erase is None:
                y, S = semiseparable_step(v[:, 0], k[:, 0], q[:, 0], log_decay[:, 0], turn, S)
            else:
                y, S = delta_rule_step(
                    v[:, 0], k[:, 0], q[:, 0], erase[:, 0], log_decay[:, 0], turn, S, hermitian=self.hermitian
                )
            y = y[:, None]
        else:
            mask = real_tokens(x, length)
            common = {"state": S, "reset": reset, "mask": mask, "chunk_size": self.chunk_size}
            if erase is None:
                y, S = semiseparable_chunked(v, k, q, log_decay, angle, **common)
            else:
                y, S = delta_rule_chunked(
                    *(v, k, q, erase, log_decay, angle),
                    hermitian=self.hermitian,
                    min_log_decay=MIN_LOG_DECAY,
                    **common,
                )
        y = self.norm(y.to(x.dtype)).reshape(B, L, D)
        y = self.out_proj(y * F.silu(z))
        return y, {"conv": tail, "memory": S} if return_state else None

    def _transition(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-decays (B, L, H) or (B, L, H, channels), angles (B, L, H, N) or None."""
        B, L, _ = x.shape
        wide = wide_dtype(x)
        delta = x.new_zeros(B, L, self.num_heads, dtype=wide)
        if self.steps:
            delta = F.softplus(wide_linear(x, self.step_proj.weight) + self.step_bias.to(wide))
        if self.decay == "head":
            log_decay = -delta * F.softplus(self.damping.to(wide))
        elif self.decay == "channel":
            score = self.decay_proj(x).view(B, L, self.num_heads, -1).to(wide) + self.decay_bias.to(wide)
            log_decay = MIN_LOG_DECAY * torch.sigmoid(score)
        else:
            log_decay = torch.zeros_like(delta)
        if self.rotation == "step":
            return log_decay, delta[..., None] * self.frequency.to(wide)
        if self.rotation == "token":
            angle = turning_angle(wide_linear(x, self.angle_proj.weight)).view(B, L, self.num_heads, -1)
            return log_decay, F.pad(angle, (0, self.num_modes - self.turning_modes))
        return log_decay, None

    def _gates(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """What to erase (B, L, H, K), None for nothing, and what to write (B, L, H, P)."""
        B, L, H, P = v.shape
        if self.erase in ("delta", "none"):
            beta = self.max_beta * torch.sigmoid(self.beta_proj(x))[..., None]  # (B, L, H, 1)
            return (beta * k if self.erase == "delta" else None), beta.to(v.dtype) * v
        gates = torch.sigmoid(self.gates_proj(x)).view(B, L, H, -1)
        e, w = gates.split((self.erase_channels, P), dim=-1)
        e = torch.cat((e, e), dim=-1) if self.hermitian else e
        return e * k, w.to(v.dtype) * v


def _unit(x: Tensor) -> Tensor:
    """x / √(Σx² + 1e-6) in float32 or wider."""
    x = x.to(wide_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
