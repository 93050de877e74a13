"""Sequence mixers: (B, L, D) -> (B, L, D). A new one is a file here and a line in MIXERS."""

from resonance_nn.mixers.attention import AttentionMixer
from resonance_nn.mixers.base import Mixer, RightPadding, State
from resonance_nn.mixers.resonance import ResonanceMixer
from resonance_nn.mixers.spectral_gate import SpectralGateMixer

MIXERS: dict[str, type[Mixer]] = {
    "resonance": ResonanceMixer,
    "spectral_gate": SpectralGateMixer,
    "attention": AttentionMixer,
}

__all__ = ["MIXERS", "AttentionMixer", "Mixer", "ResonanceMixer", "RightPadding", "SpectralGateMixer", "State"]
