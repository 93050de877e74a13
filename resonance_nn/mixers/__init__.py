"""Sequence mixers: (B, L, D) -> (B, L, D). A new one is a file here and a line in MIXERS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resonance_nn.mixers.attention import AttentionMixer, SlidingAttentionMixer
from resonance_nn.mixers.base import Mixer, RightPadding, State
from resonance_nn.mixers.global_filter import GlobalFilterMixer
from resonance_nn.mixers.holographic import HolographicMixer
from resonance_nn.mixers.hrr import HRRMixer
from resonance_nn.mixers.multi_scale import PREFIX, MultiScaleMixer
from resonance_nn.mixers.resolvent import BidirectionalResolventMixer, ResolventMixer
from resonance_nn.mixers.resonance import ResonanceMixer
from resonance_nn.mixers.spectral_gate import SpectralGateMixer

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

MIXERS: dict[str, type[Mixer]] = {
    "resonance": ResonanceMixer,
    "spectral_gate": SpectralGateMixer,
    "holographic": HolographicMixer,
    "hrr": HRRMixer,
    "resolvent": ResolventMixer,
    "attention": AttentionMixer,
    "sliding_attention": SlidingAttentionMixer,
    "global_filter": GlobalFilterMixer,
    "bidirectional_resolvent": BidirectionalResolventMixer,
}


def build_mixer(name: str, config: ResonanceConfig, layer_idx: int = 0) -> Mixer:
    """The mixer that an entry of ``config.mixers`` names."""
    mixer = mixer_class(name)
    return MultiScaleMixer(config, layer_idx, mixer) if name.startswith(PREFIX) else mixer(config, layer_idx)


def mixer_class(name: str) -> type[Mixer]:
    """The class in ``MIXERS`` that an entry of ``config.mixers`` names, by itself or after "multi_scale:", where it
    must be a causal one. Raises ValueError."""
    if name in MIXERS:
        return MIXERS[name]
    wrapped = name.removeprefix(PREFIX) if isinstance(name, str) else name
    if wrapped == name:
        raise ValueError(f"{name!r} is unknown; choose from {', '.join(MIXERS)}, or {PREFIX} before a causal one")
    if wrapped not in MIXERS:
        raise ValueError(f"{name!r}: after {PREFIX} must stand one of {', '.join(_causal())}, once")
    if not MIXERS[wrapped].causal:
        raise ValueError(
            f"{name!r}: {wrapped} sees the future (causal = False), and blocks of tokens are released one by one as "
            f"they finish; after {PREFIX} use {', '.join(_causal())}"
        )
    return MIXERS[wrapped]


def _causal() -> list[str]:
    return [name for name, mixer in MIXERS.items() if mixer.causal]


__all__ = [
    "MIXERS",
    "AttentionMixer",
    "BidirectionalResolventMixer",
    "GlobalFilterMixer",
    "HRRMixer",
    "HolographicMixer",
    "Mixer",
    "MultiScaleMixer",
    "ResolventMixer",
    "ResonanceMixer",
    "RightPadding",
    "SlidingAttentionMixer",
    "SpectralGateMixer",
    "State",
    "build_mixer",
    "mixer_class",
]
