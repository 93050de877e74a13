"""``spectral_gate``: selective resonators. Each token writes to, turns and reads a bank of damped oscillators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.layers import GroupedRMSNorm, RMSNorm, ShortConv
from resonance_nn.mixers.base import Mixer, State, decay_rates, inverse_softplus, real_tokens
from resonance_nn.ops.elementwise import silu_gate, unit
from resonance_nn.ops.precision import wide_dtype, wide_linear, without_autocast
from resonance_nn.ops.semiseparable import semiseparable_chunked, semiseparable_step, to_heads

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig


class SpectralGateMixer(Mixer):
    """The operator of ``ops.semiseparable`` with gates that depend on the token:

        v, b, c = shortconv(W x)                b, c through silu, normalised to |·| = 1; complex, N modes
        δ_t     = softplus(W_δ x + bias)        step, per head: scales damping and rotation
        Λ_t     = exp(δ_t (−a + iω_n))          a = softplus(·) one a head, ω_n learned per head
        S_t     = Λ_t ∘ S_{t−1} + δ_t b_t ⊗ v_t
        y       = W_o( RMSNorm(Re(c_t^H S_t) + d ∘ v_t) ∘ silu(W_z x) )     a norm a head, one weight for all

    As it comes ω = 0 (2N real modes), and b and c are shared by all heads. With ω, b_t and c_t gate magnitude and phase
    of each frequency, and δ_t decides how far the oscillators turn: a token can rotate the state, which real, positive
    decays cannot. Angles add up over tokens, so δ is computed in float32 or wider then, under autocast too: in bfloat16
    its rounding alone would blur the phase by 0.1 radians within a chunk.

    Options, by their fields of the config:

        rotation            "none": 2N real modes, no ω.  "step": as above.
                            "token": angle δ_t ω_n + π tanh(W_φ x), W_φ = 0 at first
        expand, num_groups  heads of P = expand·D/H channels; b and c shared by the H/G heads of a group
        normalize_gates     False: b and c as they are
        activate_values     v through silu too
        output_norm         "gated": RMSNorm in G groups of the gated output, (y + d ∘ v) ∘ silu(W_z x), before W_o;
                            "none": no norm
        conv_bias, time_step_limit    a bias before silu; δ clamped to (low, high)
        frequency_mixing    c_t^H (I + C) S_t is read, C complex N×N, one a head, 0 at first: (I + C)^H c_t for c_t
        mode_fraction       read the k = ⌈ρN⌉ modes of largest |c_t,n| only, see :func:`keep_largest`
        entropy_weight      λ(log N − H(p)) to ``losses``, see :func:`entropy_gap`
        trapezoidal         S_t = Λ_t (S_{t−1} + (1 − γ_t) δ_t b_{t−1} ⊗ v_{t−1}) + γ_t δ_t b_t ⊗ v_t,
                            γ_t = σ(W_γ x + bias)

    With "none", b and c are 2N signed reals, C is 2N×2N and real, and a mode is one real. The trapezoidal rule needs
    no second write: later tokens read token s with w_s = γ_s δ_s + (1 − γ_{s+1}) δ_{s+1}, s itself with γ_s δ_s, and
    what depends on token s + 1 never enters what is computed for s.

    State: ``conv`` (B, W − 1, HP + 4GN), ``memory`` (B, H, 2N, P), and, if trapezoidal, ``last`` (B, 2GN + HP), b and
    v of the last token; whatever the context.
    """

    state_names = ("conv", "memory")
    backends = ("torch", "fla")
    float32_parameters = ("damping", "frequency", "step_bias", "step_proj", "angle_proj")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        D, H, N = config.hidden_size, config.num_heads, config.num_modes
        G = config.num_groups or H
        E, K = config.expand * D, 2 * N
        self.head_dim, self.num_groups, self.num_modes = E // H, G, N
        self.shortest, self.longest = config.shortest_context, config.initial_context
        self.chunk_size, self.backend = config.chunk_size, config.backend
        self.initial_step, self.time_step_limit = config.initial_step, config.time_step_limit
        self.rotation = config.rotation
        self.normalize_gates, self.trapezoidal = config.normalize_gates, config.trapezoidal
        self.activate_values, self.output_norm = config.activate_values, config.output_norm
        self.entropy_weight, self.mode_noise = config.entropy_weight, config.mode_noise
        self.modes = K if self.rotation == "none" else N  # that can be chosen
        self.modes_kept = math.ceil(config.mode_fraction * self.modes - 1e-9)  # 0.07 · 100 is 7
        self.sizes = (E + 2 * G * K, E)  # [v | b | c] for the convolution, z
        self.in_proj = nn.Linear(D, sum(self.sizes), bias=False)
        self.step_proj = nn.Linear(D, H, bias=False)
        self.conv = ShortConv(self.sizes[0], config.conv_size, config.conv_bias)
        self.damping = nn.Parameter(torch.empty(H))
        if self.rotation != "none":
            self.frequency = nn.Parameter(torch.empty(H, N))
        self.step_bias = nn.Parameter(torch.empty(H))
        self.skip = nn.Parameter(torch.empty(H))
        if self.rotation == "token":
            self.angle_proj = nn.Linear(D, H * N, bias=False)
        self.mixing = None
        if config.frequency_mixing:  # C: [real | imaginary], or real
            self.mixing = nn.Parameter(torch.empty(H, K // self.modes, self.modes, self.modes))
        if self.trapezoidal:
            self.blend_proj = nn.Linear(D, H, bias=False)
            self.blend_bias = nn.Parameter(torch.empty(H))
            self.state_names = (*self.state_names, "last")
        self.norm = None
        if self.output_norm != "none":
            grouped = self.output_norm == "gated"
            self.norm = GroupedRMSNorm(E, G, config.norm_eps) if grouped else RMSNorm(E // H, config.norm_eps)
        self.out_proj = nn.Linear(E, D, bias=False)
        self._initialise()

    def initial_values(self) -> dict[str, Tensor]:
        """δ = 1; time constants 1/a log-spaced over the heads from the shortest context to the longest;
        ω_n = π/8 · context^(−n/N), one turn in 16 tokens and slower: faster ones hinder learning at first
        (docs/experiments.md). With ``initial_step`` as in Mamba-2: a = 1 … H, and δ log-uniform in its bounds.
        γ = 1/2, the trapezoidal rule proper."""
        H, N = self.num_heads, self.num_modes
        if self.initial_step is None:
            a = decay_rates(self.shortest, self.longest, H)
            delta = torch.ones(H, dtype=torch.float64)
        else:
            low, high = self.initial_step
            a = torch.arange(1, H + 1, dtype=torch.float64)
            delta = low * (high / low) ** torch.rand(H, dtype=torch.float64)
        values = {"damping": inverse_softplus(a), "step_bias": inverse_softplus(delta), "skip": torch.ones(H)}
        if self.rotation != "none":
            omega = math.pi / 8 * torch.exp(-math.log(self.longest) * torch.arange(N, dtype=torch.float64) / N)
            values["frequency"] = omega.expand(H, N)
        if self.rotation == "token":
            values["angle_proj.weight"] = torch.zeros(self.angle_proj.weight.shape)
        if self.mixing is not None:
            values["mixing"] = torch.zeros(self.mixing.shape)
        if self.trapezoidal:
            values["blend_bias"] = torch.zeros(H)
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
        B, L, _ = x.shape
        H, P, G, K = self.num_heads, self.head_dim, self.num_groups, 2 * self.num_modes
        state = state or {}
        vbc, z = self.in_proj(x).split(self.sizes, dim=-1)
        vbc, tail = self.conv(vbc, state.get("conv"), reset=reset, length=length)
        v, bc = (F.silu(vbc) if self.activate_values else vbc).split((H * P, 2 * G * K), dim=-1)
        v, bc = v.view(B, L, H, P), bc.view(B, L, 2 * G, K)
        bc = bc if self.activate_values else F.silu(bc)
        b, c = (unit(bc) if self.normalize_gates else bc).split(G, dim=2)
        c = self._read(c)
        delta, log_decay, angle = self._transition(x)
        mask = real_tokens(x, length)
        S, last, write, own, direct = state.get("memory"), state.get("last"), delta, None, self.skip
        if self.trapezoidal:
            S, write, own = self._trapezoid(x, delta, mask, S, last)
        if losses is not None and self.entropy_weight > 0:
            losses.append(self.entropy_weight * entropy_gap(v, b, write, self.modes, mask))
        frequency = None if self.rotation != "step" else self.frequency
        if L == 1 and S is not None and reset is None and length is None:
            if angle is not None:
                angle = angle[:, 0] if frequency is None else angle[:, 0, :, None] * frequency.to(angle.dtype)
            value, write = v[:, 0], write[:, 0, :, None]
            y, S = semiseparable_step(value * write, b[:, 0], c[:, 0], log_decay[:, 0], angle, S)
            y = torch.addcmul(y, direct[..., None], value).to(z.dtype)[:, None]
        else:
            if own is not None:
                direct = direct + own * self._overlap(b, c)
            y, S = semiseparable_chunked(
                *(v, b, c, log_decay, angle),
                frequency=frequency,
                log_write=write.clamp(min=torch.finfo(write.dtype).tiny).log(),  # δ may underflow
                skip=direct,
                state=S,
                reset=reset,
                mask=mask,
                read_first=own is not None,
                chunk_size=self.chunk_size,
                backend=self.backend,
            )
        if self.norm is None:
            y = silu_gate(y.flatten(2), z)
        elif self.output_norm == "gated":
            y = self.norm(silu_gate(y.flatten(2), z))
        else:
            y = silu_gate(self.norm(y).flatten(2), z)
        y = self.out_proj(y)
        if not return_state:
            return y, None
        state = {"conv": tail, "memory": S}
        if self.trapezoidal:
            state["last"] = _last(torch.cat((b.flatten(2), v.flatten(2)), dim=-1), length, last)
        return y, state

    def _transition(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """δ_t and log|Λ_t| (B, L, H), and the angles of Λ_t: (B, L, H, N); with rotation "step" δ_t, to be multiplied
        by the frequencies; None for real modes."""
        wide = wide_dtype(x)
        weight, bias = self.step_proj.weight, self.step_bias.to(wide)
        if self.rotation != "none" or x.shape[1] == 1:
            step = wide_linear(x, weight, bias)
        else:
            step = F.linear(x, weight.to(x.dtype)).to(wide) + bias
        delta = F.softplus(step)  # (B, L, H)
        if self.time_step_limit is not None:
            delta = delta.clamp(*self.time_step_limit)
        log_decay = -delta * F.softplus(self.damping.to(wide))
        if self.rotation == "none":
            return delta, log_decay, None
        if self.rotation == "step":
            return delta, log_decay, delta
        angle = delta[..., None] * self.frequency.to(wide)
        own = wide_linear(x, self.angle_proj.weight).view(angle.shape)
        return delta, log_decay, angle + math.pi * torch.tanh(own)

    def _read(self, c: Tensor) -> Tensor:
        """c (B, L, G, 2N) as the memory is read with it: mixed, (B, L, H, 2N), and of the largest modes only."""
        if self.mixing is not None:
            if self.rotation == "none":
                C = self.mixing[:, 0]  # (H, 2N, 2N)
            else:  # C^H c as a row of reals [re | im] times a matrix
                re, im = self.mixing.unbind(1)  # (H, N, N)
                C = torch.cat((torch.cat((re, -im), dim=-1), torch.cat((im, re), dim=-1)), dim=-2)  # (H, 2N, 2N)
            if self.num_groups < self.num_heads:
                c = to_heads(c, self.num_heads)
            c = c + (c.transpose(1, 2) @ C.to(c.dtype)).transpose(1, 2)
        if self.modes_kept < self.modes:
            c = keep_largest(c, self.modes, self.modes_kept, self.mode_noise if self.training else 0.0)
        return c

    def _trapezoid(
        self, x: Tensor, delta: Tensor, mask: Tensor | None, S: Tensor | None, last: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """S with what the first token adds to the write before it; w and γδ (B, L, H)."""
        B, _, H = delta.shape
        gamma = torch.sigmoid(wide_linear(x, self.blend_proj.weight) + self.blend_bias.to(delta.dtype))
        own, before = gamma * delta, (1 - gamma) * delta  # written of itself, and of the token before
        if mask is not None:
            before = before * mask[..., None]
        if S is not None:
            assert last is not None
            b, v = last.to(S.dtype).split((last.shape[-1] - H * self.head_dim, H * self.head_dim), dim=-1)
            b = to_heads(b.view(B, self.num_groups, -1), H, dim=1)  # (B, H, K)
            S = S + (before[:, 0, :, None] * b)[..., :, None] * v.view(B, H, 1, -1)
        return S, own + F.pad(before[:, 1:], (0, 0, 0, 1)), own

    def _overlap(self, b: Tensor, c: Tensor) -> Tensor:
        """Re(c_t^H b_t) (B, L, H), what a token reads of its own write; b (B, L, G, K), c (B, L, G or H, K)."""
        product = (c.unflatten(2, (self.num_groups, -1)) * b.unsqueeze(3)).sum(-1, dtype=wide_dtype(b)).flatten(2)
        return to_heads(product, self.num_heads)


def modulus(x: Tensor, modes: int) -> Tensor:
    """|x_n| (…, N) of N modes, reals or complex pairs ``[re | im]``, in float32 or wider."""
    x = x.to(wide_dtype(x))
    return x.abs() if x.shape[-1] == modes else torch.hypot(*x.chunk(2, dim=-1))


def keep_largest(c: Tensor, modes: int, k: int, noise: float = 0.0) -> Tensor:
    """Read the k modes of largest score s_n = |c_n| only: c_n · min(1, s_n/τ − 1) where s_n > τ, else 0, with τ the
    (k + 1)-th largest score: in full from twice the score of the first mode left out.

    A mask of 0 and 1 would let the output jump where two scores cross, so that rounding decides what is read (in
    bfloat16 an error of up to 40% of the largest output); here a mode enters with weight 0, and the output is
    continuous. The gradient is straight through: with respect to c_n of every mode, kept or left out, it is the one
    with respect to the result, as if all weights were 1.

    Args:
        c: (…, K), K = 2·modes for complex modes ``[re | im]``, or K = modes.
        modes: N.
        k: modes kept, < N.
        noise: scale of Gumbel noise on log s_n, in training.
    """
    with torch.no_grad():
        score = modulus(c, modes)  # (…, N)
        tiny, largest = torch.finfo(score.dtype).tiny, torch.finfo(score.dtype).max
        if noise > 0:
            gumbel = -(-torch.rand_like(score).clamp(min=tiny).log()).log()
            score = (score * (noise * gumbel).exp()).clamp(max=largest)
        threshold = score.topk(k + 1, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        weight = (score / threshold.clamp(min=tiny) - 1).clamp(0, 1)
        left_out = c * (torch.cat((weight,) * (c.shape[-1] // modes), dim=-1) - 1)
    return c + left_out


@without_autocast
def entropy_gap(v: Tensor, b: Tensor, write: Tensor, modes: int, mask: Tensor | None) -> Tensor:
    """log N − H(p), a mean over the heads: 0 if the memory's modes hold equal energies, log N if one holds all.

    A token adds w_t b_t,n v_t^T to mode n, of squared norm w_t²|v_t|²|b_t,n|², and what is added decays alike in all
    modes of a head. So, with phases that do not hang together from token to token, the modes' energies E|S_n|² stand
    in the ratio of

        E_n = Σ_t e_t |b_t,n|²,  e_t = w_t²|v_t|²,  over the real tokens of the batch          p_n = E_n / Σ_m E_m

    Single tokens may be as selective as they like; only their sum is spread. e_t is taken for a constant: the loss
    moves the gates b. Cost O(N + P) a token and head, no states.

    Args: v (B, L, H, P), b (B, L, G, K), write w (B, L, H), N modes, mask (B, L) of real tokens or None.
    """
    wide, G = wide_dtype(v), b.shape[2]
    power = b.to(wide).square()
    power = power if modes == b.shape[-1] else power[..., :modes] + power[..., modes:]  # |b_n|², (B, L, G, N)
    with torch.no_grad():
        energy = write.square() * v.to(wide).square().sum(-1)  # (B, L, H)
        if mask is not None:
            energy = energy.masked_fill(~mask[..., None], 0)
        energy = energy / energy.sum((0, 1)).clamp(min=torch.finfo(wide).tiny)
    total = torch.einsum("blgr,blgn->grn", energy.unflatten(-1, (G, -1)), power)  # (G, R, N)
    total = total + torch.finfo(wide).eps
    p = total / total.sum(-1, keepdim=True)
    return (math.log(modes) - torch.special.entr(p).sum(-1)).mean()


def _last(x: Tensor, length: Tensor | None, before: Tensor | None) -> Tensor:
    """x (B, L, ·) at each row's last real token; of a row without one, what was ``before``, or zeros."""
    if length is None:
        return x[:, -1].clone()
    index = (length - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[-1])
    before = torch.zeros_like(x[:, 0]) if before is None else before.to(x.dtype)
    return torch.where((length > 0)[:, None], x.gather(1, index)[:, 0], before)
