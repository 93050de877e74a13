"""Pure functions on real tensors. Each fast form has its ``_reference`` beside it."""

from resonance_nn.ops.continued_fraction import (
    continued_fraction,
    continued_fraction_reference,
    squared_couplings,
    two_sided_fractions,
    two_sided_green,
)
from resonance_nn.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, logits_cross_entropy
from resonance_nn.ops.elementwise import (
    add_rms_norm,
    rms_norm,
    rms_norm_reference,
    short_conv,
    short_conv_reference,
    silu_gate,
    squared_relu,
    swiglu,
    unit,
)
from resonance_nn.ops.fft_conv import causal_conv_reference, fft_conv
from resonance_nn.ops.holographic import (
    bind,
    hrr_chunked,
    hrr_reference,
    hrr_step,
    key_spectrum,
    random_unitary,
    unbind,
    unit_spectrum,
    unitary,
)
from resonance_nn.ops.prime_bump import prime_bump, prime_bump_reference
from resonance_nn.ops.resolvent import (
    Hamiltonian,
    ResolventState,
    resolvent_chunked,
    resolvent_reference,
    resolvent_step,
    two_sided_reference,
    two_sided_solve,
)
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
from resonance_nn.ops.spectral_theory import (
    birman_schwinger,
    limiting_absorption_report,
    mourre_matrices,
    mourre_report,
    spectral_report,
)
from resonance_nn.ops.spectrum import (
    octave_bands,
    spectral_filter,
    spectral_filter_reference,
)
from resonance_nn.ops.spectrum_2d import spectral_filter_2d, spectral_filter_2d_reference
from resonance_nn.ops.window_attention import window_attention, window_attention_reference

__all__ = [
    "Hamiltonian",
    "ResolventState",
    "Resonators",
    "add_rms_norm",
    "bind",
    "birman_schwinger",
    "causal_conv_reference",
    "continued_fraction",
    "continued_fraction_reference",
    "fft_conv",
    "hrr_chunked",
    "hrr_reference",
    "hrr_step",
    "impulse_response",
    "key_spectrum",
    "limiting_absorption_report",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "logits_cross_entropy",
    "mourre_matrices",
    "mourre_report",
    "octave_bands",
    "prime_bump",
    "prime_bump_reference",
    "random_unitary",
    "resolvent_chunked",
    "resolvent_reference",
    "resolvent_step",
    "resonator_chunked",
    "resonator_fft",
    "resonator_reference",
    "resonator_step",
    "rms_norm",
    "rms_norm_reference",
    "rotate",
    "semiseparable_chunked",
    "semiseparable_reference",
    "semiseparable_step",
    "short_conv",
    "short_conv_reference",
    "silu_gate",
    "spectral_filter",
    "spectral_filter_2d",
    "spectral_filter_2d_reference",
    "spectral_filter_reference",
    "spectral_report",
    "squared_couplings",
    "squared_relu",
    "swiglu",
    "two_sided_fractions",
    "two_sided_green",
    "two_sided_reference",
    "two_sided_solve",
    "unbind",
    "unit",
    "unit_spectrum",
    "unitary",
    "window_attention",
    "window_attention_reference",
]
