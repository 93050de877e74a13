"""Fusion of modalities without cross-attention: what texts, images and sounds have to say, as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resonance_nn.config_checks import MODALITIES
from resonance_nn.layers import MLPS, RMSNorm
from resonance_nn.ops.elementwise import rms_norm
from resonance_nn.ops.fusion import (
    STRONGEST,
    band_energies,
    band_gates,
    extent_modes,
    extent_signal,
    holographic_superposition,
    log_bands,
    masked_softmax,
    phase_alignment,
    rotate_modes,
)
from resonance_nn.ops.holographic import random_unitary, unbind, unitary
from resonance_nn.ops.precision import wide_dtype
from resonance_nn.ops.spectrum import ENERGY_FLOOR

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

Present = Tensor | Mapping[str, Tensor] | None


def presence(
    modalities: Sequence[str], given: Mapping[str, Tensor], present: Present, *, required: bool = True
) -> Tensor:
    """(B, M) bool: which modalities each example has.

    Args:
        modalities: the M of the model.
        given: a tensor (B, ...) of each modality that the call has; one that it has not is missing everywhere.
        present: (B, M), or (B) by name, where what has no name is present; None: what is given is present everywhere.
        required: whether every example must have one or more.

    Raises:
        ValueError: a modality that the model has not, other shapes, an example without any.
    """
    names = ", ".join(modalities)
    for name in [*given, *(present if isinstance(present, Mapping) else ())]:
        if name not in modalities:
            raise ValueError(f"{name!r} is no modality of this model: modalities = {names}; name it in the config")
    if not given:
        raise ValueError(f"no inputs: give one or more of {names}")
    first, x = next(iter(given.items()))
    B, device = x.shape[0], x.device
    for name, other in given.items():
        if len(other) != B:
            raise ValueError(
                f"{name}: {len(other)} examples beside {B} of {first}; give as many, with anything where there is "
                "none, and say so in present"
            )
    here = torch.tensor([m in given for m in modalities], device=device).expand(B, -1)
    if present is None:
        return here
    if isinstance(present, Mapping):
        for name, column in present.items():
            if column.shape != (B,):
                raise ValueError(f"present[{name!r}] of shape {tuple(column.shape)}: must be ({B},), one an example")
        everywhere = torch.ones(B, dtype=torch.bool, device=device)
        present = torch.stack([present.get(m, everywhere).to(device).bool() for m in modalities], dim=1)
    elif present.shape != here.shape:
        raise ValueError(
            f"present of shape {tuple(present.shape)}: must be {tuple(here.shape)}, for each example {names}"
        )
    here = here & present.to(device).bool()
    if required and not torch.compiler.is_compiling() and not bool(here.any(1).all()):
        row = int((~here.any(1)).nonzero()[0])
        raise ValueError(
            f"present: example {row} has none of {', '.join(given)}, which are given; each needs one: leave it out"
        )
    return here


def drop_modalities(present: Tensor, rate: float) -> Tensor:
    """``present`` (B, M) without each modality with probability ``rate``, but never without all that an example has:
    then one of them stays, each as likely."""
    if not 0 <= rate < 1:
        raise ValueError(f"modality_dropout = {rate}: must be in [0, 1)")
    draw = torch.rand(present.shape, device=present.device).masked_fill(~present, -1)
    kept = draw >= rate
    largest = draw == draw.amax(1, keepdim=True)  # of those present
    return torch.where(kept.any(1, keepdim=True), kept, largest) & present


class Fusion(nn.Module):
    """Base class: a slot of parameters for each modality, so that a model with fewer has a subset of them.

    What is computed for an example depends on its present modalities alone, and is what a module without the other
    slots computes with the same weights, gradients too.
    """

    def __init__(self, config: ResonanceConfig, slot: type[HolographicSlot] | type[SpectralSlot]) -> None:
        super().__init__()
        self.modalities = tuple(config.modalities)
        self.hidden_size: int = config.hidden_size
        self.slots = nn.ModuleDict({name: slot(config, name) for name in self.modalities})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def _present(self, inputs: Mapping[str, Tensor], present: Present, dim: int) -> tuple[list[str], Tensor]:
        """The modalities that the call has, A of them, and which each example has of these (B, A)."""
        for name, x in inputs.items():
            if x.dim() != dim or x.shape[-1] != self.hidden_size or 0 in x.shape[1:]:
                shape = "(B, D)" if dim == 2 else "(B, n, D) with n ≥ 1"
                raise ValueError(f"{name} of shape {tuple(x.shape)}: must be {shape}, D = {self.hidden_size}")
        here = presence(self.modalities, inputs, present)
        active = [name for name in self.modalities if name in inputs]
        return active, here[:, [self.modalities.index(name) for name in active]]

    def _out(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm.weight, self.norm.eps)


class HolographicSlot(nn.Module):
    """A modality's map, role, score and clean-up."""

    role: Tensor

    def __init__(self, config: ResonanceConfig, modality: str) -> None:
        super().__init__()
        D = config.hidden_size
        self.modality = modality
        self.proj = nn.Linear(D, D)
        self.score = nn.Parameter(torch.zeros(D))
        self.prior = nn.Parameter(torch.zeros(()))
        self.clean_norm = RMSNorm(D, config.norm_eps)
        self.clean = MLPS[config.mlp](D, config.intermediate_size)
        self.eps = config.norm_eps
        self.register_buffer("role", self.initial_role())

    def initial_role(self) -> Tensor:
        """By the modality's name: the same in every model of the width."""
        generator = torch.Generator("cpu").manual_seed(MODALITIES.index(self.modality))
        return random_unitary((len(self.score),), generator, device="cpu")

    def initial_values(self) -> dict[str, Tensor]:
        return {"score": torch.zeros(self.score.shape), "prior": torch.zeros(())}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) -> u (B, D), of mean square 1, and its score (B)."""
        z = self.proj(x.to(self.proj.weight.dtype))
        z = z.to(wide_dtype(z))
        u = z * (z.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return u, (u * self.score.to(u.dtype)).sum(-1) * len(self.score) ** -0.5 + self.prior.to(u.dtype)

    def clean_up(self, y: Tensor) -> Tensor:
        return y + self.clean(self.clean_norm(y).to(self.clean_norm.weight.dtype)).to(y.dtype)


class HolographicFusion(Fusion):
    """A vector of each modality -> one trace -> what each role unbinds from it, cleaned up -> one vector.

        u_m = norm(W_m x_m + b_m),  score_m = ⟨a_m, u_m⟩/√D + a'_m,  w = softmax over the modalities present
        c   = Σ_m w_m bind(r_m, u_m) / √(Σ_m w_m²)
        y_m = unbind(r_m, c),  v_m = y_m + mlp_m(norm(y_m)),  output = norm( Σ_m w_m v_m )

    (``ops.fusion``, MATH §7.) Roles r_m are fixed, random and unitary, and saved with the weights. y_m holds u_m, and
    the other modalities as noise, which the clean-up tells apart: with "relu2" it is an associative memory of
    ``intermediate_size`` prototypes, recalled by the square of their overlaps (Krotov & Hopfield 2016). It is also
    where modalities meet: the trace is a sum of what each has by itself. For one modality alone w = 1 and y_m = u_m.

    Source: holographic reduced representations, Plate 1995 (roles, fillers, clean-up). Deviations: unitary roles, whose
    unbinding is exact; weights; a learned clean-up.
    """

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config, HolographicSlot)

    def slot(self, modality: str) -> HolographicSlot:
        """A modality's parameters. Raises ValueError."""
        if modality not in self.modalities:
            raise ValueError(f"{modality!r} is no modality of this model: it has {', '.join(self.modalities)}")
        slot = self.slots[modality]
        assert isinstance(slot, HolographicSlot)
        return slot

    def superpose(self, inputs: Mapping[str, Tensor], present: Present = None) -> tuple[Tensor, Tensor]:
        """The trace c (B, D) and the weights w (B, M), 0 where absent. Arguments as :meth:`forward`."""
        active, here = self._present(inputs, present, 2)
        terms = [
            self.slot(name)(inputs[name].masked_fill(~here[:, i, None], 0))  # whatever stood there
            for i, name in enumerate(active)
        ]
        values, scores = (torch.stack(each, dim=1) for each in zip(*terms, strict=True))
        roles = torch.stack([self.slot(name).role for name in active])
        trace, weights = holographic_superposition(values, roles, scores, here)
        columns = [self.modalities.index(name) for name in active]
        return trace, weights.new_zeros(len(trace), len(self.modalities)).index_copy(
            1, torch.tensor(columns, device=trace.device), weights
        )

    def unbind(self, trace: Tensor, modality: str) -> Tensor:
        """What the role of a modality recalls from c (B, D): u_m (B, D) up to its weight and crosstalk."""
        return unbind(unitary(self.slot(modality).role.to(trace.dtype)), trace)

    def recall(self, trace: Tensor, modality: str) -> Tensor:
        """:meth:`unbind` and the clean-up: v_m (B, D)."""
        return self.slot(modality).clean_up(self.unbind(trace, modality))

    def forward(self, inputs: Mapping[str, Tensor], present: Present = None) -> Tensor:
        """Fuse vectors.

        Args:
            inputs: (B, D) by modality. Where an example has none, anything; a modality may also be left out.
            present: (B, M) bool in the order of ``config.modalities``, or (B) by name; None means all given.

        Returns:
            (B, D) in float32 or wider.

        Raises:
            ValueError: an unknown modality, other shapes, an example without any modality.
        """
        trace, weights = self.superpose(inputs, present)
        terms = [
            weights[:, i, None] * self.recall(trace, name).masked_fill(weights[:, i, None] == 0, 0)
            for i, name in enumerate(self.modalities)
            if name in inputs
        ]
        return self._out(torch.stack(terms).sum(0))


class SpectralSlot(nn.Module):
    """A modality's map, gates and share of each band."""

    def __init__(self, config: ResonanceConfig, modality: str) -> None:
        super().__init__()
        J = min(config.num_bands, config.num_modes)
        self.num_modes, self.eps = config.num_modes, config.norm_eps
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate_weight = nn.Parameter(torch.zeros(J, J))
        self.gate_bias = nn.Parameter(torch.zeros(J))
        self.exponent = nn.Parameter(torch.ones(J))
        self.prior = nn.Parameter(torch.zeros(J))

    def initial_values(self) -> dict[str, Tensor]:
        """Gates of 1, weights that are shares of the energy."""
        zeros = {n: torch.zeros(self.get_parameter(n).shape) for n in ("gate_weight", "gate_bias", "prior")}
        return {**zeros, "exponent": torch.ones(self.exponent.shape)}

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (B, n, D) -> modes (B, K, 2, D) of W x + b, b being the same everywhere, of mean square 1."""
        modes = extent_modes(x, self.num_modes, mask)
        W = self.proj.weight
        modes = nn.functional.linear(modes.to(W.dtype), W).to(modes.dtype)
        bias = nn.functional.pad(self.proj.bias.to(modes.dtype)[None, None], (0, 0, 0, 1, 0, self.num_modes - 1))
        modes = modes + bias  # (K, 2, D), of k = 0 alone
        energy = band_energies(modes, [0] * self.num_modes)  # (B, 1)
        return modes * (energy + self.eps).rsqrt()[..., None, None]


class PairAlignment(nn.Module):
    """How strongly two modalities pull at each other's phase in each band, and which lag is expected."""

    def __init__(self, num_bands: int) -> None:
        super().__init__()
        self.coupling = nn.Parameter(torch.zeros(num_bands))
        self.lag = nn.Parameter(torch.zeros(num_bands))

    def initial_values(self) -> dict[str, Tensor]:
        return {"coupling": torch.zeros(self.coupling.shape), "lag": torch.zeros(self.lag.shape)}


class SpectralFusion(Fusion):
    """The tokens of each modality -> the first K modes of each, fused band by band -> one vector.

        F_m     K Fourier coefficients of W_m x_m + b_m over its own extent, scaled to mean square 1
        E_m,j   its energy in band j of J, log-spaced                                 (``ops.fusion`` for all of these)
        γ_m,j = 2σ( Σ_i A_m,ji log(E_m,i + ε) + a_m,j )                               gates
        w_m,j   softmax over the modalities present of p_m,j log(E_m,j + ε) + c_m,j   importance; at first E's shares
        φ_m,j   from the phase of m towards those of the others                       alignment, by pairs
        Z_k   = Σ_m w_m,j(k) γ_m,j(k) e^{iφ_m,j(k)} F_m,k
        z(s)  = Re Σ_k (2 − δ_k) Z_k e^{2πi k s} at 2K points,   output = norm( mean_s( z + mlp(norm(z)) ) )

    (MATH §7.) So a sentence, a picture read row by row and a sound are aligned by their extents, not their tokens, and
    a fused signal of 2K points stands for them all. Without the mlp, where modes meet, its mean would be Z_0. Alone, a
    modality has w = 1 and φ = 0.

    K = ``config.num_modes``, J = ``config.num_bands``, fewer where K is. Padding changes nothing, wherever it stands.
    Cost O(K·n·D) a modality, and an MLP on 2K points.

    Sources: modes of an extent as in FNO (Li et al. 2021); mixing by Fourier coefficients as in FNet (Lee-Thorp et al.
    2022); phases that pull at each other as in Kuramoto 1975. The combination is ours.
    """

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config, SpectralSlot)
        self.num_modes = config.num_modes
        self.bands = log_bands(config.num_modes, config.num_bands)
        order = [name for name in MODALITIES if name in self.modalities]
        pairs = [f"{m}_{n}" for i, m in enumerate(order) for n in order[i + 1 :]]
        self.pairs = nn.ModuleDict({pair: PairAlignment(self.bands[-1] + 1) for pair in pairs})
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLPS[config.mlp](config.hidden_size, config.intermediate_size)

    def fuse_modes(
        self,
        inputs: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | None] | None = None,
        present: Present = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Z (B, K, 2, D), w (B, M, J), 0 where absent, and φ (B, M, J). Arguments as :meth:`forward`."""
        active, here = self._present(inputs, present, 3)
        masks = masks or {}
        for name, mask in masks.items():
            if mask is not None and (name not in inputs or mask.shape != inputs[name].shape[:2]):
                shape = tuple(inputs[name].shape[:2]) if name in inputs else "left out, as is the input"
                raise ValueError(f"mask of {name}, of shape {tuple(mask.shape)}: must be {shape}")
        slots = [slot for slot in (self.slots[name] for name in active) if isinstance(slot, SpectralSlot)]
        terms = []
        for i, (name, slot) in enumerate(zip(active, slots, strict=True)):
            x = inputs[name].masked_fill(~here[:, i, None, None], 0)  # whatever stood there
            terms.append(slot(x, masks.get(name)))
        modes = torch.stack(terms, dim=1)  # (B, A, K, 2, D)
        energy = band_energies(modes, self.bands)  # (B, A, J)
        weight, bias, exponent, prior = (
            torch.stack([getattr(slot, name) for slot in slots]).to(energy.dtype)
            for name in ("gate_weight", "gate_bias", "exponent", "prior")
        )
        scores = exponent * (energy + ENERGY_FLOOR).log() + prior
        weights = masked_softmax(scores, here[..., None], dim=1)
        pairs = [[self._pair(m, n, energy) for n in active] for m in active]
        coupling, lag = (torch.stack([torch.stack([p[i] for p in row]) for row in pairs]) for i in range(2))
        angle = phase_alignment(modes, weights, coupling, lag, self.bands).masked_fill(~here[..., None], 0)
        scale = (weights * band_gates(energy, weight, bias))[..., self.bands]  # (B, A, K)
        fused = (scale[..., None, None] * rotate_modes(modes, angle, self.bands)).sum(1)
        columns = torch.tensor([self.modalities.index(name) for name in active], device=fused.device)
        empty = weights.new_zeros(len(weights), len(self.modalities), weights.shape[2])
        return fused, empty.index_copy(1, columns, weights), empty.index_copy(1, columns, angle)

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        masks: Mapping[str, Tensor | None] | None = None,
        present: Present = None,
    ) -> Tensor:
        """Fuse sequences of tokens.

        Args:
            inputs: (B, n, D) by modality, each with its own n. Where an example has none, anything; a modality may also
                be left out.
            masks: (B, n) by modality, False or 0 at padding, anywhere in a row; None or left out means no padding.
            present: (B, M) bool in the order of ``config.modalities``, or (B) by name; None means all given.

        Returns:
            (B, D) in float32 or wider.

        Raises:
            ValueError: an unknown modality, other shapes, an example without any modality.
        """
        modes, _, _ = self.fuse_modes(inputs, masks, present)
        z = extent_signal(modes, 2 * self.num_modes)
        z = z + self.mlp(self.mlp_norm(z).to(self.norm.weight.dtype)).to(z.dtype)
        return self._out(z.mean(1))

    def _pair(self, m: str, n: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """s_mn = s_nm and ℓ_mn = −ℓ_nm, each (J); both 0 of one modality with itself."""
        zero = like.new_zeros(self.bands[-1] + 1)
        if m == n:
            return zero, zero
        forwards = f"{m}_{n}" in self.pairs
        pair = self.pairs[f"{m}_{n}" if forwards else f"{n}_{m}"]
        assert isinstance(pair, PairAlignment)
        lag = pair.lag.to(like.dtype)
        return STRONGEST * pair.coupling.to(like.dtype).sigmoid(), lag if forwards else -lag


FUSIONS: dict[str, type[HolographicFusion] | type[SpectralFusion]] = {
    "holographic": HolographicFusion,
    "spectral": SpectralFusion,
}
