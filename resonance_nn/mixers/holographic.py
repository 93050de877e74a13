"""``holographic``: an associative memory. Each token binds a value to a key, corrects what stood there, and recalls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import RMSNorm, ShortConv
from resonance_nn.mixers.base import Mixer, State, decay_rates, inverse_softplus, real_tokens
from resonance_nn.ops.delta_rule import delta_rule_chunked, delta_rule_step
from resonance_nn.ops.elementwise import sigmoid_gate, silu_gate, unit
from resonance_nn.ops.polygon import polygon_transition
from resonance_nn.ops.precision import wide_dtype, wide_linear
from resonance_nn.ops.semiseparable import to_heads

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

MIN_LOG_DECAY = -5.0  # of a channel's decay: a token keeps at least e^−5
UNIT_EPS = 1e-6  # added to |q|² and |k|²
KEY_TAP, VALUE_TAP = 0.25, 0.1  # of the convolution at first: silu is all but linear on what comes
STRETCH = 0.1  # of "hard" gates, below 0 and above 1

FLA_OPTIONS = {  # that fla's kernels have
    "erase": ("delta", "none"),
    "decay": ("head", "none"),
    "rotation": ("none", "step"),
}


class HolographicMixer(Mixer):
    """The operator of ``ops.delta_rule`` with keys, values and gates from the token:

        q, k, v = silu(shortconv(W x))          K = 2·num_modes reals a key, |q| = |k| = 1, shared by the heads of each
                                                of G = key_groups groups
        δ_t     = softplus(W_δ x + bias)        α_t = exp(−a δ_t), a = softplus(·) one a head
        β_t     = max_beta · g(W_β x)                   g = σ, or with gates "hard" clamp(1.2σ − 0.1, 0, 1)
        S_t     = (I − β_t k_t k_t^T) α_t S_{t−1} + β_t k_t v_t^T
        y       = W_o( RMSNorm(S_t^T q_t) ∘ 2σ(W_z x) )                 a norm a head, one weight for all

    Options (``config.erase``, ``decay``, ``rotation``), one operator:

        erase "gated"      S_t = (I − k(e ∘ k)^T) D_t S_{t−1} + k (w ∘ v)^T, e, w = g(W x) a key, a value channel
        erase "hermitian"  the same on complex keys of N modes: (I − k(e ∘ k)^H), y = Re(q^H S)
        erase "none"       Hebbian: β_t k_t v_t^T is added
        decay "channel"    D_t = diag(α_t), one factor a key channel (a mode with "step" or "hermitian"), in (e^−5, 1)
        decay "none"       nothing is forgotten but by erasing
        output_gate "silu" silu(W_z x) in place of 2σ(W_z x)
        rotation "step"    D_t turns mode n by δ_t ω_n
        rotation "token"   the first half of the heads turn, the others are as above:
                           S_t = λ_t ∘ S_{t−1} + (1 − |λ_t|²) ∘ k_t v_t^T, with λ of the token's own a mode, the point
                           nearest to z = W_λ x in the polygon of the p-th roots of unity, p = ``config.orders`` in turn
                           (``ops.polygon``). A mode that keeps all of its state has room for nothing new

    A "hard" gate is 0 or 1 itself beyond |score| = 2.4 (stretched as in Louizos et al. 2018). A sigmoid is not: 2·10⁻⁴
    at each token, below what training notices, adds up to a lost memory after some 10⁴ of them. With decay "none" a
    token whose gates are shut leaves the memory as it is, to the last bit.

    W_λ is a parameter of its own and no linear layer, as weight decay would pull λ inwards and make the state forget.
    Angles and log-decays add up over tokens, so what they come from is computed in float32 or wider under autocast too.

    State: ``conv`` (B, W − 1, 2GK + HP), ``memory`` (B, H, K, P), whatever the context.
    """

    state_names = ("conv", "memory")
    backends = ("torch", "fla")
    float32_parameters = ("damping", "frequency", "step_bias", "decay_bias", "step_proj", "roots")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H, N, P = config.hidden_size, config.num_heads, config.num_modes, self.head_dim
        self.num_modes, self.initializer_range = N, config.initializer_range
        self.initial_recall = config.initial_recall if config.rotation == "none" else 0.0
        self.output_gate = sigmoid_gate if config.output_gate == "sigmoid" else silu_gate
        self.shortest, self.longest = config.shortest_context, config.initial_context
        self.chunk_size, self.backend = min(config.chunk_size, 64), config.backend
        self.erase, self.decay, self.max_beta = config.erase, config.decay, config.max_beta
        self.rotation, self.hard_gates = config.rotation, config.gates == "hard"
        self.turning_heads = H // 2 if self.rotation == "token" else 0
        G = self.gated_heads = H - self.turning_heads
        self.hermitian = self.erase == "hermitian"
        if self.backend == "fla":
            for field, allowed in FLA_OPTIONS.items():
                if getattr(config, field) not in allowed:
                    raise ValueError(
                        f"backend = 'fla': holographic with {field} = {getattr(config, field)!r} has no kernel there; "
                        f"use backend = 'torch', or {field} = {' or '.join(map(repr, allowed))}"
                    )
        K = 2 * N
        self.key_groups = config.key_groups or H
        self.sizes = (2 * K * self.key_groups + D, D)  # [q | k | v] for the convolution, z
        self.in_proj = nn.Linear(D, sum(self.sizes), bias=False)
        self.conv = ShortConv(self.sizes[0], config.conv_size)
        self.steps = self.decay == "head" or self.rotation == "step"
        if self.steps:
            self.step_proj = nn.Linear(D, G, bias=False)
            self.step_bias = nn.Parameter(torch.empty(G))
        if self.decay == "head":
            self.damping = nn.Parameter(torch.empty(G))
        elif self.decay == "channel":
            self.decay_channels = N if self.rotation == "step" or self.hermitian else K
            self.decay_proj = nn.Sequential(
                nn.Linear(D, P, bias=False), nn.Linear(P, G * self.decay_channels, bias=False)
            )
            self.decay_bias = nn.Parameter(torch.empty(G, self.decay_channels))
        if self.rotation == "step":
            self.frequency = nn.Parameter(torch.empty(H, N))
        elif self.rotation == "token":
            self.orders = [config.orders[n % len(config.orders)] for n in range(N)]
            self.roots = nn.Parameter(torch.empty(2 * self.turning_heads * N, D))  # W_λ
        if self.erase in ("delta", "none"):
            self.beta_proj = nn.Linear(D, G, bias=False)
        else:
            self.erase_channels = N if self.hermitian else K
            self.gates_proj = nn.Sequential(
                nn.Linear(D, P, bias=False), nn.Linear(P, G * (self.erase_channels + P), bias=False)
            )
        self.norm = RMSNorm(P, K * config.norm_eps)  # as if |q| were K^{−1/2}
        self.out_proj = nn.Linear(D, D, bias=False)
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        """δ = 1; time constants log-spaced over the heads, or over each head's channels, from the shortest context to
        the longest; ω_n = 2π/context · n/N, at most a turn in the longest context, as a key must still meet itself
        where it is asked for; |z| about 0.3, well inside of the polygons, where the loss can move λ anywhere. The short
        convolution begins as small as the linear maps: keys are normalised after it, and learn the faster what of the
        last tokens they are made of (docs/experiments.md, 11).

        With ``initial_recall`` r > 0 and keys that do not turn the layer begins as an induction head (Olsson et al.
        2022): q is of this token, k by the same map of the one before, v of this one, by orthogonal maps, and
        W_o = r W_v^T, so that y points to what followed the last tokens that were like this one. From random maps that
        is learned late and all at once, if at all (docs/experiments.md, 13)."""
        H, N = self.gated_heads, self.num_modes
        values = {"conv.weight": torch.randn(self.conv.weight.shape) * self.initializer_range}
        if self.initial_recall:
            values |= self._induction_head(values["conv.weight"])
        if self.steps:
            values["step_bias"] = inverse_softplus(torch.ones(H, dtype=torch.float64))
        if self.decay == "head":
            values["damping"] = inverse_softplus(decay_rates(self.shortest, self.longest, H))
        elif self.decay == "channel":
            share = decay_rates(self.shortest, self.longest, self.decay_channels) / -MIN_LOG_DECAY
            values["decay_bias"] = torch.logit(share).expand(H, -1)
        if self.rotation == "step":
            omega = 2 * math.pi / self.longest * torch.arange(N, dtype=torch.float64) / N
            values["frequency"] = omega.expand(H, N)
        elif self.rotation == "token":
            values["roots"] = torch.randn(self.roots.shape) * 0.2 * self.hidden_size**-0.5
        return values

    def _induction_head(self, taps: Tensor) -> dict[str, Tensor]:
        """Initial maps and convolution; ``taps`` (W, channels) are of values, and random."""
        K, D = self.sizes[0] // 2 - self.hidden_size // 2, self.hidden_size  # K: reals of all keys
        keys, values = (nn.init.orthogonal_(torch.empty(rows, D), self.initializer_range * D**0.5) for rows in (K, D))
        gates = torch.randn(D, D) * self.initializer_range
        taps[:, : 2 * K] = 0
        taps[0, :K] = KEY_TAP
        taps[min(1, len(taps) - 1), K : 2 * K] = KEY_TAP
        taps[0, 2 * K :] += VALUE_TAP
        return {
            "in_proj.weight": torch.cat((keys, keys, values, gates)),
            "conv.weight": taps,
            "out_proj.weight": self.initial_recall * values.T,
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
        H, G, K = self.num_heads, self.key_groups, 2 * self.num_modes
        state = state or {}
        qkv, z = self.in_proj(x).split(self.sizes, dim=-1)
        qkv, tail = self.conv(qkv, state.get("conv"), reset=reset, length=length)
        qk, v = F.silu(qkv).split((2 * G * K, D), dim=-1)
        q, k = unit(qk.view(B, L, 2 * G, K), UNIT_EPS).split(G, dim=2)
        v = v.view(B, L, H, -1)
        S, T = state.get("memory"), self.turning_heads
        if T or self.erase not in ("delta", "none"):  # heads differ in what becomes of their keys
            q, k = to_heads(q, H), to_heads(k, H)
        if T == 0:
            y, S = self._recall(x, q, k, v, S, reset, length)
        else:
            (q0, q1), (k0, k1), (v0, v1) = (t.tensor_split([T], dim=2) for t in (q, k, v))
            S0, S1 = (None, None) if S is None else S.tensor_split([T], dim=1)
            y0, S0 = self._turn(x, q0, k0, v0, S0, reset, length)
            y1, S1 = self._recall(x, q1, k1, v1, S1, reset, length)
            y, S = torch.cat((y0, y1), dim=2), torch.cat((S0, S1), dim=1)
        y = self.norm(y.to(x.dtype)).reshape(B, L, D)
        y = self.out_proj(self.output_gate(y, z))
        return y, {"conv": tail, "memory": S} if return_state else None

    def _recall(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, reset: Tensor | None, length: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y (B, L, G, P) and the memory of the G gated heads."""
        log_decay, angle = self._transition(x)
        erase, v = self._gates(x, k, v)
        return self._delta_rule(v, k, q, erase, log_decay, angle, S, reset, length, self.hermitian)

    def _turn(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, S: Tensor | None, reset: Tensor | None, length: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y (B, L, T, P) and the memory of the T turning heads."""
        log_modulus, angle = self._roots(x)
        room = -torch.expm1(2 * log_modulus)  # 1 − |λ|²
        k = k * torch.cat((room, room), dim=-1)
        return self._delta_rule(v, k, q, None, log_modulus, angle, S, reset, length)

    def _delta_rule(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        erase: Tensor | None,
        log_decay: Tensor,
        angle: Tensor | None,
        S: Tensor | None,
        reset: Tensor | None,
        length: Tensor | None,
        hermitian: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if v.shape[1] == 1 and S is not None and reset is None and length is None:
            e, turn = (None if t is None else t[:, 0] for t in (erase, angle))
            y, after = delta_rule_step(v[:, 0], k[:, 0], q[:, 0], e, log_decay[:, 0], turn, S, hermitian=hermitian)
            return y[:, None], after
        return delta_rule_chunked(
            *(v, k, q, erase, log_decay, angle),
            hermitian=hermitian,
            min_log_decay=MIN_LOG_DECAY,
            state=S,
            reset=reset,
            mask=real_tokens(v, length),
            chunk_size=self.chunk_size,
            backend=self.backend,
        )

    def _roots(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log|λ| and arg λ (B, L, T, N) of the turning heads."""
        z = wide_linear(x, self.roots).unflatten(-1, (self.turning_heads, 2, self.num_modes))
        re, im = z.unbind(-2)
        return polygon_transition(re, im, self.orders, MIN_LOG_DECAY)

    def _transition(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the gated heads: log-decays (B, L, G) or (B, L, G, channels), angles (B, L, G, N) or None."""
        B, L, _ = x.shape
        wide = wide_dtype(x)
        delta = x.new_zeros(B, L, self.gated_heads, dtype=wide)
        if self.steps:
            delta = F.softplus(wide_linear(x, self.step_proj.weight) + self.step_bias.to(wide))
        if self.decay == "head":
            log_decay = -delta * F.softplus(self.damping.to(wide))
        elif self.decay == "channel":
            score = self.decay_proj(x).view(B, L, self.gated_heads, -1).to(wide) + self.decay_bias.to(wide)
            log_decay = MIN_LOG_DECAY * torch.sigmoid(score)
        else:
            log_decay = torch.zeros_like(delta)
        if self.rotation == "step":
            return log_decay, delta[..., None] * self.frequency.to(wide)
        return log_decay, None

    def _gates(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """Of the gated heads: ``erase`` and v (B, L, G, P) as ``delta_rule_chunked`` takes them."""
        if self.erase in ("delta", "none"):
            beta = self.max_beta * self.gate(self.beta_proj(x))  # (B, L, G)
            return (beta, v) if self.erase == "delta" else (None, beta[..., None].to(v.dtype) * v)
        gates = self.gate(self.gates_proj(x)).unflatten(-1, (self.gated_heads, -1))
        e, w = gates.tensor_split([self.erase_channels], dim=-1)
        e = torch.cat((e, e), dim=-1) if self.hermitian else e
        return e * k, w.to(v.dtype) * v

    def gate(self, score: Tensor) -> Tensor:
        """How far a gate is open, in [0, 1]."""
        opened = torch.sigmoid(score)
        return ((1 + 2 * STRETCH) * opened - STRETCH).clamp(0, 1) if self.hard_gates else opened
