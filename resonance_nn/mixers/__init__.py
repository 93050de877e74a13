"""Sequence mixers: (B, L, D) -> (B, L, D). A new one is a file here and a line in MIXERS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resonance_nn.mixers.attention import AttentionMixer, SlidingAttentionMixer
from resonance_nn.mixers.base import Mixer, RightPadding, State
from resonance_nn.mixers.global_filter import GlobalFilterMixer
from resonance_nn.mixers.holographic import HolographicMixer
from resonance_nn.mixers.hrr import HRRMixer
from resonance_nn.mixers.multi_scale import PREFIX as MULTI_SCALE
from resonance_nn.mixers.multi_scale import MultiScaleMixer
from resonance_nn.mixers.resolvent import BidirectionalResolventMixer, ResolventMixer
from resonance_nn.mixers.resonance import ResonanceMixer
from resonance_nn.mixers.reversal import PREFIX as REVERSED
from resonance_nn.mixers.reversal import ReversedMixer
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


WRAPPERS: dict[str, type[MultiScaleMixer] | type[ReversedMixer]] = {  # named before a causal mixer
    MULTI_SCALE: MultiScaleMixer,
    REVERSED: ReversedMixer,
}


def build_mixer(name: str, config: ResonanceConfig, layer_idx: int = 0) -> Mixer:
    """The mixer that an entry of ``config.mixers`` names."""
    wrapper, mixer = _wrapper(name), mixer_class(name)
    return mixer(config, layer_idx) if wrapper is None else WRAPPERS[wrapper](config, layer_idx, mixer)


def mixer_class(name: str) -> type[Mixer]:
    """The class in ``MIXERS`` that an entry of ``config.mixers`` names, by itself or after "multi_scale:" or
    "reversed:", where it must be a causal one. Raises ValueError."""
    if name in MIXERS:
        return MIXERS[name]
    wrapper = _wrapper(name)
    if wrapper is None:
        raise ValueError(
            f"{name!r} is unknown; choose from {', '.join(MIXERS)}, or {' or '.join(WRAPPERS)} before a causal one"
        )
    wrapped = name.removeprefix(wrapper)
    if wrapped not in MIXERS:
        raise ValueError(f"{name!r}: after {wrapper} must stand one of {', '.join(_causal())}, once")
    if not MIXERS[wrapped].causal:
        why = {
            MULTI_SCALE: "blocks of tokens are released one by one as they finish",
            REVERSED: "there is no other direction to read in",
        }
        raise ValueError(
            f"{name!r}: {wrapped} sees the future (causal = False), and {why[wrapper]}; after {wrapper} use "
            f"{', '.join(_causal())}"
        )
    return MIXERS[wrapped]


def is_causal(name: str) -> bool:
    """Whether an entry of ``config.mixers`` may build a language model."""
    return mixer_class(name).causal and _wrapper(name) != REVERSED


def _wrapper(name: str) -> str | None:
    return next((prefix for prefix in WRAPPERS if isinstance(name, str) and name.startswith(prefix)), None)


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
    "ReversedMixer",
    "RightPadding",
    "SlidingAttentionMixer",
    "SpectralGateMixer",
    "State",
    "build_mixer",
    "is_causal",
    "mixer_class",
]
