"""Pure functions on real tensors. Each fast form has its ``_reference`` beside it."""

from resonance_nn.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, logits_cross_entropy
from resonance_nn.ops.fft_conv import causal_conv_reference, fft_conv
from resonance_nn.ops.resonator import (
    Resonators,
    impulse_response,
    resonator_chunked,
    resonator_fft,
    resonator_reference,
    resonator_step,
)
from resonance_nn.ops.semiseparable import (
    rotate,
    semiseparable_chunked,
    semiseparable_reference,
    semiseparable_step,
)

__all__ = [
    "Resonators",
    "causal_conv_reference",
    "fft_conv",
    "impulse_response",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "logits_cross_entropy",
    "resonator_chunked",
    "resonator_fft",
    "resonator_reference",
    "resonator_step",
    "rotate",
    "semiseparable_chunked",
    "semiseparable_reference",
    "semiseparable_step",
]
