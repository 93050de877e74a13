"""``resolvent`` and ``bidirectional_resolvent``: tokens make a potential, and read each other by its resolvent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import RMSNorm, ShortConv
from resonance_nn.mixers.base import Mixer, State, document_begin, inverse_softplus
from resonance_nn.ops.elementwise import silu_gate
from resonance_nn.ops.precision import phase_dtype, wide_dtype, wide_linear
from resonance_nn.ops.prime_bump import prime_bump
from resonance_nn.ops.resolvent import (
    Hamiltonian,
    ResolventState,
    resolvent_chunked,
    resolvent_step,
    two_sided_solve,
)

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig


class _HamiltonianMixer(Mixer):
    """What both mixers share: 𝓗 and z of every head from the tokens.

        a_t = σ_a ∘ W_a x_t (+ gain ∘ V(t), the prime bumps)      potential
        b_t = b_max sigmoid(σ_b ∘ W_b x_t + bias)                 coupling of t and t + 1
        z   = E + i(η_min + softplus(damping))

    In float32 and float64 under autocast too: a and b act on the phase of everything before them.
    """

    float32_parameters = (
        *("hamiltonian_proj", "potential_scale", "coupling_scale", "coupling_bias"),
        *("energy", "damping", "prime_gain"),
    )

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H = config.hidden_size, config.num_heads
        self.chunk_size, self.longest = config.chunk_size, config.initial_context
        self.max_coupling, self.min_damping = config.max_coupling, config.min_damping
        self.initial_spread = config.initializer_range * math.sqrt(D)  # standard deviation of a linear map's outputs
        self.bumps = (config.prime_bump_limit, config.prime_bump_epsilon) if config.prime_bump else None
        self.hamiltonian_proj = nn.Linear(D, 2 * H, bias=False)
        self.potential_scale = nn.Parameter(torch.empty(H))
        self.coupling_scale = nn.Parameter(torch.empty(H))
        self.coupling_bias = nn.Parameter(torch.empty(H))
        self.energy = nn.Parameter(torch.empty(H))
        self.damping = nn.Parameter(torch.empty(H))
        self.skip = nn.Parameter(torch.empty(H))
        self.prime_gain = nn.Parameter(torch.empty(H)) if config.prime_bump else None
        self.norm = RMSNorm(2 * self.head_dim, config.norm_eps)
        self.out_proj = nn.Linear(2 * D, D, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        """Inside the band: b̄ = b_max/2, E_h = 2b̄ cos κ_h, κ_h = π(h + ½)/H. η_h = 2b̄/T_h with T_h log-spaced from 4
        tokens to the longest context T, longest in the middle of the band, where memory is ≈ T_h. Disorder Var a +
        4 Var b = 8b̄²/T, half of it each, which alone would leave a memory of T sin² κ_h (docs/mixers/resolvent.md)."""
        H, T, b = self.num_heads, self.longest, self.max_coupling / 2
        kappa = math.pi * (torch.arange(H, dtype=torch.float64) + 0.5) / H
        rank = kappa.sin().argsort(stable=True).argsort() / (H - 1) if H > 1 else torch.tensor([0.5])
        eta = 2 * b / T * (T / min(4, T)) ** (1 - rank.double())
        std = 2 * b / math.sqrt(T)  # of a; b_t fluctuates by half of it
        values = {
            "potential_scale": torch.full((H,), std / self.initial_spread),
            "coupling_scale": torch.full((H,), std / (b * self.initial_spread)),  # db/d(pre-activation) is b̄/2
            "coupling_bias": torch.zeros(H),
            "energy": 2 * b * kappa.cos(),
            "damping": inverse_softplus((eta - self.min_damping).clamp(min=b / T)),
            "skip": torch.ones(H),
        }
        return values if self.prime_gain is None else {**values, "prime_gain": torch.full((H,), std)}

    def hamiltonian(self, x: Tensor, position: Tensor | None = None) -> Hamiltonian:
        """𝓗 and z of x (B, L, D) in float64; ``position`` (B, L) in the document places the prime bumps, None counts
        from 0. Only the linear map is float32: rounding b itself would turn a wave by 1e-5 in 2,000 tokens."""
        exact = phase_dtype(x)
        a, u = wide_linear(x, self.hamiltonian_proj.weight).to(exact).chunk(2, dim=-1)  # (B, L, H)
        a = a * self.potential_scale
        if self.bumps is not None and self.prime_gain is not None:
            if position is None:
                position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            a = a + prime_bump(position, *self.bumps)[..., None] * self.prime_gain
        log_b = math.log(self.max_coupling) + F.logsigmoid(u * self.coupling_scale + self.coupling_bias)
        eta = self.min_damping + F.softplus(self.damping.to(exact))
        return Hamiltonian(a, log_b, self.energy.to(exact), eta)

    def _output(self, y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """y (B, L, H, 2P), v (B, L, H, P), gate (B, L, 2D) -> (B, L, D)."""
        y = y + F.pad(self.skip.to(v.dtype)[:, None] * v, (0, v.shape[-1]))
        return self.out_proj(silu_gate(self.norm(y).flatten(-2), gate))


class ResolventMixer(_HamiltonianMixer):
    """Every prefix's own resolvent (``ops.resolvent``):

        v, k, q = silu(shortconv(W x))         k_t, q_t real, N channels a head, normalised to |·| = 1
        S_t     = m_t (b_{t−1} S_{t−1} + k_t v_tᵀ),     m_t = [(z − 𝓗_{≤t})⁻¹]_tt
        y       = W_o( RMSNorm([Re q_tᵀS_t + d ∘ v_t, Im q_tᵀS_t]) ∘ silu(W_g x) )     a norm a head, one weight for all

    so s reaches t by the amplitude [(z − 𝓗_{≤t})⁻¹]_ts: a wave that passes the tokens between, turned by where its
    energy stands in the band, damped by η and reflected by their potential.

    State: ``conv`` (B, W − 1, H(P + 2N)), ``memory`` S (B, H, N, 2P), ``green`` m (B, H, 2), ``coupling`` b (B, H),
    and with the prime bumps ``position`` (B), tokens of the document so far; whatever the context.
    """

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H, N = config.hidden_size, config.num_heads, config.num_modes
        self.num_modes = N
        self.sizes = (D + 2 * N * H, 2 * D)  # [v | k | q] for the convolution, gate
        self.state_names = ("conv", "memory", "green", "coupling", *(("position",) if config.prime_bump else ()))
        self.in_proj = nn.Linear(D, sum(self.sizes), bias=False)
        self.conv = ShortConv(self.sizes[0], config.conv_size)
        self._initialise()

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
        H, N, wide = self.num_heads, self.num_modes, wide_dtype(x)
        state = state or {}
        vkq, gate = self.in_proj(x).split(self.sizes, dim=-1)
        vkq, tail = self.conv(vkq, state.get("conv"), reset=reset, length=length)
        v, k, q = (t.view(B, L, H, -1) for t in F.silu(vkq).split((D, H * N, H * N), dim=-1))
        k = F.normalize(k.to(wide), dim=-1, eps=1e-6)
        q = F.normalize(q.to(wide), dim=-1, eps=1e-6)
        position = None
        if self.bumps is not None:
            position = document_position(x, state.get("position"), reset)
        hamiltonian = self.hamiltonian(x, position)
        before = ResolventState(*(state[name] for name in ResolventState._fields)) if state else None
        if L == 1 and before is not None and reset is None and length is None:
            a, log_b, energy, eta = hamiltonian
            y, after = resolvent_step(v[:, 0], k[:, 0], q[:, 0], Hamiltonian(a[:, 0], log_b[:, 0], energy, eta), before)
        else:
            y, after = resolvent_chunked(
                v, k, q, hamiltonian, state=before, reset=reset, length=length, chunk_size=self.chunk_size
            )
        y = self._output(y.view(B, L, H, -1), v, gate)
        if not return_state:
            return y, None
        new_state = {"conv": tail, **after._asdict()}
        if position is not None:
            new_state["position"] = _after_last(position, length, state.get("position"))
        return y, new_state


class BidirectionalResolventMixer(_HamiltonianMixer):
    """y = W_o( RMSNorm([Re Gv + d ∘ v, Im Gv]) ∘ silu(W_g x) ),  v = silu(W_v x),  G = (z − 𝓗)⁻¹ of the whole sequence,
    by elimination from both ends in O(L). For encoders only: every token sees every other.

    Exact: a padded row gives what it gives alone, and documents packed with ``reset`` what separate ones give. There is
    no state: ``state`` and ``return_state`` are refused.
    """

    causal = False

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D = config.hidden_size
        self.in_proj = nn.Linear(D, 3 * D, bias=False)
        self._initialise()

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
        if state is not None or return_state:
            raise ValueError(
                f"{'return_state = True' if return_state else 'state'}: bidirectional_resolvent reads the whole input "
                "at once (causal = False) and keeps no state; call it once on whole inputs, without a cache, or use "
                "resolvent"
            )
        B, L, D = x.shape
        v, gate = self.in_proj(x).split((D, 2 * D), dim=-1)
        position = document_position(x, None, reset) if self.bumps is not None else None
        v = F.silu(v).view(B, L, self.num_heads, -1)
        hamiltonian = self.hamiltonian(x, position)
        y = two_sided_solve(v, hamiltonian, reset=reset, length=length, chunk_size=self.chunk_size)
        return self._output(y, v, gate), None

    def state_bytes(self, context: int = 1) -> int:
        """None is kept."""
        return 0


def document_position(x: Tensor, past: Tensor | None, reset: Tensor | None) -> Tensor:
    """Tokens before t in t's document, (B, L): ``past`` (B) of them in earlier calls; a reset begins a new one."""
    steps, begin = document_begin(x, past, reset)
    return steps - begin


def _after_last(position: Tensor, length: Tensor | None, past: Tensor | None) -> Tensor:
    """Position of the token that follows each row's last real one, (B)."""
    if length is None:
        return position[:, -1] + 1
    before = torch.zeros_like(length) if past is None else past
    last = position.gather(1, (length - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(length > 0, last + 1, before)
