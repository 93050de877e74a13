"""Sequence mixers: (B, L, D) -> (B, L, D). A new one is a file here and a line in MIXERS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resonance_nn.mixers.attention import AttentionMixer
from resonance_nn.mixers.base import Mixer, RightPadding, State
from resonance_nn.mixers.holographic import HolographicMixer
from resonance_nn.mixers.resonance import ResonanceMixer
from resonance_nn.mixers.spectral_gate import SpectralGateMixer

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

MIXERS: dict[str, type[Mixer]] = {
    "resonance": ResonanceMixer,
    "spectral_gate": SpectralGateMixer,
    "holographic": HolographicMixer,
    "attention": AttentionMixer,
}


def build_mixer(name: str, config: ResonanceConfig, layer_idx: int = 0) -> Mixer:
    """The mixer that an entry of ``config.mixers`` names."""
    return MIXERS[name](config, layer_idx)


__all__ = [
    "MIXERS",
    "AttentionMixer",
    "HolographicMixer",
    "Mixer",
    "ResonanceMixer",
    "RightPadding",
    "SpectralGateMixer",
    "State",
    "build_mixer",
]
