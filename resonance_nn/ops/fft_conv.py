"""Causal convolution by FFT, direct and by overlap-add, with a carried tail.

    y_t = Σ_{τ=0..min(t, K−1)} h_τ u_{t−τ}  +  tail_t

A pointwise product of two spectra is a circular convolution, in which position 0 sees position L−1. Zero-padding both
to n ≥ L + K − 1 makes it linear, hence causal. The ``tail`` is what inputs of an earlier call still owe to the outputs
of this one, so a sequence may be cut into calls of any lengths.

Layout: channels first, u (..., L) and h (..., K), broadcast against each other in the leading dimensions.
FFTs run in float32, float64 for float64 (``rfft`` refuses half precision).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.precision import wide_dtype, without_autocast

DIRECT_MAX_LENGTH = 16_384  # one FFT up to here; above, blocks, so that memory stays O(block)
BLOCK_SIZE = 8_192


def fft_length(n: int) -> int:
    """The smallest 2^k or 3·2^k that is ≥ n: FFT libraries are fastest there."""
    power = 1 << max(n - 1, 0).bit_length()
    return 3 * power // 4 if 3 * power // 4 >= n else power


def causal_conv_reference(u: Tensor, h: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, as a sum over filter taps: O(L·K). Arguments as :func:`fft_conv`."""
    L, K = u.shape[-1], h.shape[-1]
    wide = torch.promote_types(wide_dtype(u), h.dtype)
    padded = F.pad(u.to(wide), (0, K - 1))  # (..., L + K − 1)
    full = sum(h[..., k, None].to(wide) * F.pad(padded, (k, 0))[..., : L + K - 1] for k in range(K))
    assert isinstance(full, Tensor)
    return _add_tail(full, L, K, tail, u.dtype)


@without_autocast
def fft_conv(u: Tensor, h: Tensor, tail: Tensor | None = None, *, block_size: int | None = None):
    """Causal convolution of u (..., L) with h (..., K), in O(L log L).

    Args:
        u: inputs (..., L).
        h: filter taps (..., K).
        tail: (..., K − 1) as returned by the call before; None is zeros.
        block_size: length of the overlap-add blocks; None takes one FFT up to ``DIRECT_MAX_LENGTH`` and blocks of
            ``BLOCK_SIZE`` above.

    Returns:
        y (..., L) in u's dtype, and the tail (..., K − 1) in float32 or wider: the contributions of all inputs so
        far to the K − 1 outputs that follow.
    """
    L, K = u.shape[-1], h.shape[-1]
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size = {block_size}: must be a positive integer or None")
    if block_size is None:
        block_size = L if L <= DIRECT_MAX_LENGTH else BLOCK_SIZE
    wide = torch.promote_types(wide_dtype(u), h.dtype)
    block = min(block_size, L)
    n = fft_length(block + K - 1)
    spectrum = torch.fft.rfft(h.to(wide), n=n)
    outputs = []
    for piece in u.split(block, dim=-1):
        length = piece.shape[-1]
        full = torch.fft.irfft(torch.fft.rfft(piece.to(wide), n=n) * spectrum, n=n)[..., : length + K - 1]
        y, tail = _add_tail(full, length, K, tail, u.dtype)
        outputs.append(y)
    assert tail is not None
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)), tail


def _add_tail(full: Tensor, L: int, K: int, tail: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split a full convolution (..., L + K − 1) into outputs and tail, adding what earlier inputs owe."""
    if tail is not None:
        full = full + F.pad(tail.to(full.dtype), (0, L))
    return full[..., :L].to(dtype), full[..., L:]
