"""What an associative memory can hold, as theory: the curves that ``HolographicMemory.capacity_report`` and
``resonance bench capacity`` draw over what they measure.

Letters: P channels of a value, N reals of a key, R traces, K pairs stored, C entries of the codebook. Keys and values
are independent and random; an error is E|y − v|² / |v|² of the recall y. docs/holographic_memory.md derives all of it.
"""

from __future__ import annotations

import math

import torch


def recall_accuracy(dimension: int, noise: float, codebook_size: int) -> float:
    """Share of recalls y = v + n whose nearest entry of a random codebook is v, where n is isotropic, independent of
    the codebook, and |n|² = noise · |v|²:

        ∫ φ(x) Φ( (P + x √(P·noise)) / √(P(1 + noise)) )^{C−1} dx

    The true entry's score is N(P, P·noise) for entries of norm √P, each wrong one's N(0, P(1 + noise)) given y. The
    integral is a trapezoid sum in float64 over |x| ≤ 9, its error below 1e-12.
    """
    P, C = _positive(dimension=dimension), _positive(codebook_size=codebook_size)
    if not noise >= 0:
        raise ValueError(f"noise = {noise}: must be ≥ 0, the energy of the crosstalk over that of a value")
    x = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    margin = (math.sqrt(P) + x * math.sqrt(noise)) / math.sqrt(1 + noise)
    return torch.trapezoid(density * torch.exp((C - 1) * torch.special.log_ndtr(margin)), x).item()


def hrr_accuracy(dimension: int, pairs: int, codebook_size: int, num_traces: int = 1) -> float:
    """:func:`recall_accuracy` of a Hebbian HRR memory with unitary keys, whose crosstalk is (K − 1)/R."""
    return recall_accuracy(dimension, hrr_error(pairs, num_traces), codebook_size)


def hrr_error(pairs: int, num_traces: int = 1) -> float:
    """(K − 1)/R: every other pair, unbound with the wrong key, keeps its norm (R = 1) and looks like noise."""
    return (_positive(pairs=pairs) - 1) / _positive(num_traces=num_traces)


def hrr_snr(dimension: int, pairs: int) -> float:
    """Mean over standard deviation of the matched filter v·y: √(P/(K − 1)), infinite for one pair."""
    P, K = _positive(dimension=dimension), _positive(pairs=pairs)
    return math.sqrt(P / (K - 1)) if K > 1 else math.inf


def hebbian_error(pairs: int, key_size: int) -> float:
    """Outer products, S = Σ k vᵀ: (K − 1)/N, since E(k·k')² = 1/N."""
    return (_positive(pairs=pairs) - 1) / _positive(key_size=key_size)


def delta_error(pairs: int, key_size: int) -> float:
    """Outer products, one pass of the delta rule (β = 1, no decay), mean over the pairs, for large N and x = K/N:

        err² = (2 − e^{−x}) (1 − (1 − e^{−x})/x) = 2 − e^{−x} − ((e^x − 1)/x)(2e^{−x} − e^{−2x})

    about x/2 for few pairs; at most 2, where a recall is worth nothing. A pair that u·N later writes have gone over
    has the error (2 − e^{−x})(1 − e^{−u}) and has kept the share e^{−u} of its value.
    """
    x = _positive(pairs=pairs) / _positive(key_size=key_size)
    return (2 - math.exp(-x)) * (1 + math.expm1(-x) / x)


def lstsq_error(pairs: int, key_size: int) -> float:
    """Outer products, S = K⁺V: 0 up to N pairs, then 1 − N/K, the share of V outside the keys' N dimensions."""
    return max(0.0, 1 - _positive(key_size=key_size) / _positive(pairs=pairs))


def stored_bits(accuracy: float, pairs: int, codebook_size: int) -> float:
    """Bits that K recalls of a given accuracy tell about K independent, uniform choices among C entries, at least:

    K · max(0, log₂ C − h(p) − p log₂(C − 1)),  p = 1 − accuracy, h the binary entropy     (Fano's inequality)
    """
    K, C = _positive(pairs=pairs), _positive(codebook_size=codebook_size)
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy = {accuracy}: must be in [0, 1]")
    p = 1 - accuracy
    unknown = -sum(q * math.log2(q) for q in (p, accuracy) if q > 0) + (p * math.log2(C - 1) if C > 1 else 0.0)
    return K * max(0.0, math.log2(C) - unknown)


def optical_capacity(area: float, wavelength: float, snr: float) -> float:
    """Bits of a planar optical hologram at most: A/λ² resolution cells, each a complex amplitude that carries
    log₂(1 + snr) bits.

        A/λ² · log₂(1 + snr)

    Args:
        area: A, square metres.
        wavelength: λ, metres.
        snr: signal over noise power in a cell, a plain ratio (20 dB is 100).

    Returns:
        Bits. 1 cm² at 532 nm and 20 dB: 2.35e9.
    """
    for name, value, unit in (("area", area, "square metres"), ("wavelength", wavelength, "metres")):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} = {value}: must be positive and finite, in {unit}")
    if not (snr >= 0 and math.isfinite(snr)):
        raise ValueError(f"snr = {snr}: must be ≥ 0 and finite, a ratio of powers (decibels d are 10^(d/10))")
    return area / wavelength**2 * math.log2(1 + snr)


def _positive(**named: int) -> int:
    ((name, value),) = named.items()
    if not value >= 1:
        raise ValueError(f"{name} = {value}: must be ≥ 1")
    return value
