"""What a mixer's modes do with given inputs: how they decay and turn, and which of them its outputs are read from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.mixers.base import Mixer
from resonance_nn.mixers.holographic import HolographicMixer
from resonance_nn.mixers.hrr import HRRMixer
from resonance_nn.mixers.resolvent import ResolventMixer
from resonance_nn.mixers.resonance import ResonanceMixer
from resonance_nn.mixers.spectral_gate import SpectralGateMixer, modulus
from resonance_nn.ops.precision import wide_linear
from resonance_nn.ops.semiseparable import to_heads
from resonance_nn.ops.spectral_theory import spectral_report

SAMPLE_EVERY = 32  # tokens between two looks at a memory


class Reading(NamedTuple):
    """What a mixer does with inputs (B, L, D): of H heads with M modes, over n = L tokens or fewer."""

    decay: Tensor  # (B, n, H, M | 1) nats a token
    angle: Tensor  # (B, n, H, M | 1) radians a token
    energy: Tensor  # (H, M), summed over samples
    gates: dict[str, Tensor] = {}  # (B, n, H), by name  # noqa: RUF012
    constants: dict[str, Tensor] = {}  # (B, H), by name  # noqa: RUF012


def _resonance(mixer: ResonanceMixer, x: Tensor) -> Reading:
    """h = Σ_n g_n e^{iφ_n} λ_n^τ: the filters of a head's channels count as modes of the head."""
    H = mixer.num_heads
    decay, angle = (p.view(1, 1, H, -1) for p in (F.softplus(mixer.damping), mixer.frequency))
    looks = [_mode_energy(S, mixer.num_modes) for _, S in _memories(mixer, x, "resonators")]  # (B, F, N) each
    energy = mixer.gain.square() * torch.stack(looks).sum((0, 1))
    return Reading(decay, angle, energy.view(H, -1))


def _spectral_gate(mixer: SpectralGateMixer, x: Tensor) -> Reading:
    """c_t read as the mixer reads it, mixed and selected; real modes (rotation "none") do not turn."""
    delta, log_decay, angle = mixer._transition(x)
    vbc, _ = mixer.conv(mixer.in_proj(x).split(mixer.sizes, dim=-1)[0])
    K = 2 * mixer.num_modes
    c = F.silu(vbc[..., -mixer.num_groups * K :]).unflatten(-1, (-1, K))
    c = mixer._read(F.normalize(c, dim=-1, eps=1e-6) if mixer.normalize_gates else c)
    c = to_heads(c, mixer.num_heads)  # (B, L, H, K)
    if angle is None:
        angle = torch.zeros_like(log_decay)[..., None]
    elif mixer.rotation == "step":
        angle = angle[..., None] * mixer.frequency
    return Reading(-log_decay[..., None], angle, _energy_read(mixer, x, c, mixer.modes), {"step": delta})


def _holographic(mixer: HolographicMixer, x: Tensor) -> Reading:
    """Modes are key channels, in complex pairs if all of the memory turns: their decay is what is forgotten unasked. In
    turning heads both channels of a pair have its λ, and the write gate is 1 − |λ|², a mean over the pairs."""
    K, G = 2 * mixer.num_modes, mixer.gated_heads
    modes = mixer.num_modes if mixer.rotation == "step" or mixer.hermitian else K
    log_decay, angle = mixer._transition(x)
    log_decay = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    angle = torch.zeros_like(log_decay) if angle is None else angle
    qkv, _ = mixer.conv(mixer.in_proj(x).split(mixer.sizes, dim=-1)[0])
    q = F.normalize(F.silu(qkv[..., : mixer.key_groups * K]).unflatten(-1, (-1, K)), dim=-1)
    q = to_heads(q, mixer.num_heads)
    if mixer.erase in ("delta", "none"):
        gates = {"beta": mixer.max_beta * mixer.gate(mixer.beta_proj(x))}
    else:
        e, w = mixer.gate(mixer.gates_proj(x)).unflatten(-1, (G, -1)).tensor_split([mixer.erase_channels], dim=-1)
        gates = {"erase": e.mean(-1), "write": w.mean(-1)}
    if mixer.turning_heads:
        log_modulus, turn = mixer._roots(x)
        room = -torch.expm1(2 * log_modulus).mean(-1)
        gates = {
            name: torch.cat((room if name != "erase" else torch.zeros_like(room), gate), dim=2)
            for name, gate in gates.items()
        }
        copies = modes // mixer.num_modes
        log_decay, angle = (
            torch.cat((own.repeat(1, 1, 1, copies), of_gated.expand(*of_gated.shape[:3], modes)), dim=2)
            for own, of_gated in ((log_modulus, log_decay), (turn, angle))
        )
    return Reading(-log_decay, angle, _energy_read(mixer, x, q, modes), gates)


def _hrr(mixer: HRRMixer, x: Tensor) -> Reading:
    """One mode a head: the trace, which decays and does not turn. Its own frequencies are not those of time."""
    delta = F.softplus(wide_linear(x, mixer.step_proj.weight) + mixer.step_bias)
    decay = (delta * F.softplus(mixer.damping))[..., None]
    gates = {"step": delta, "beta": mixer.max_beta * torch.sigmoid(mixer.beta_proj(x))}
    return Reading(decay, torch.zeros_like(decay), torch.ones(mixer.num_heads, 1), gates)


def _resolvent(mixer: ResolventMixer, x: Tensor) -> Reading:
    """One mode a head: the wave of energy E, of wave number arccos((E − ā)/2b̄) in the band, decaying at the measured
    rate of the kernel."""
    hamiltonian = mixer.hamiltonian(x)
    report = spectral_report(*hamiltonian)
    a, b = hamiltonian.potential.mean(1), hamiltonian.log_coupling.exp().mean(1)  # (B, H)
    number = torch.acos(((report.energy - a) / (2 * b)).clamp(-1, 1))
    constants = {"energy": report.energy, "eta": report.eta}
    constants |= {"damping_bound": report.damping_bound, "disorder_bound": report.disorder_bound}
    decay, angle = (t[:, None, :, None].to(x.dtype) for t in (1 / report.memory, number))
    gates = {"potential": hamiltonian.potential.to(x.dtype), "coupling": hamiltonian.log_coupling.exp().to(x.dtype)}
    return Reading(decay, angle, torch.ones(mixer.num_heads, 1), gates, constants)


READERS: dict[type[Mixer], Callable[[Any, Tensor], Reading]] = {
    ResonanceMixer: _resonance,
    SpectralGateMixer: _spectral_gate,
    HolographicMixer: _holographic,
    HRRMixer: _hrr,
    ResolventMixer: _resolvent,
}


def _memories(mixer: Mixer, x: Tensor, name: str) -> Iterable[tuple[int, Tensor]]:
    """The state ``name`` after every ``SAMPLE_EVERY``-th token, or after the last one of a shorter input."""
    state, t = None, -1
    for piece in x.split(SAMPLE_EVERY, dim=1):
        t += piece.shape[1]
        if piece.shape[1] == SAMPLE_EVERY or state is None:
            _, state = mixer.mix(piece, state=state, return_state=True)
            assert state is not None
            yield t, state[name]


def _mode_energy(S: Tensor, modes: int) -> Tensor:
    """‖S_n‖² of memories (B, H, K, P), K = modes or 2·modes for complex ones: (B, H, modes)."""
    energy = S.square().sum(-1)
    return energy if energy.shape[-1] == modes else energy[..., :modes] + energy[..., modes:]


def _energy_read(mixer: Mixer, x: Tensor, c: Tensor, modes: int) -> Tensor:
    """Σ |c_t,n|² ‖S_t,n‖² over batch and samples (H, modes), of read vectors c (B, L, H, K)."""
    looks = [modulus(c[:, t], modes).square() * _mode_energy(S, modes) for t, S in _memories(mixer, x, "memory")]
    return torch.stack(looks).sum((0, 1))
