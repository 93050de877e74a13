"""Log-mel spectra: how the power of a sound spreads over bands of pitch, frame by frame.

    X_ik = Σ_{j<W} w_j x_{iS+j} e^{−2πi jk/F}        w_j = ½ − ½ cos(2πj/W), the periodic Hann window
    y_im = log max( Σ_k |X_ik|² M_km, floor )

W samples a window, S from one to the next (the hop), F ≥ W the length of the DFT, zeros after the window, M of shape
(F/2+1, bins) the filters. Frame i begins at sample iS and ends within the sound, so no frame reads what follows it:
padding cannot change one. n samples give 1 + ⌊max(0, n − W)/S⌋ frames, and the last ones, fewer than S, are in none; a
sound shorter than a window has one frame, with zeros after it (the window's first weight is 0: a single sample is
silence).

This is `transformers.audio_utils.spectrogram` with ``center=False, power=2, log_mel="log"``.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.blocks import BLOCK_ELEMENTS
from resonance_nn.ops.precision import wide_dtype, without_autocast

_Count = TypeVar("_Count", int, Tensor)


def mel_frames(samples: _Count, window_size: int, hop_size: int) -> _Count:
    """Frames that so many samples give, an integer or a tensor of them; none for none."""
    return (samples > 0) * (1 + (samples > window_size) * (samples - window_size) // hop_size)


@without_autocast
def log_mel_reference(
    samples: Tensor, filters: Tensor, *, window_size: int, hop_size: int, floor: float, length: Tensor | None = None
) -> Tensor:
    """The definition, by the matrix of the DFT. Arguments as :func:`log_mel`."""
    samples = _whole_windows(samples.to(wide_dtype(samples)), window_size, length)
    filters = filters.to(samples)
    j, k = (torch.arange(size, device=samples.device).to(samples) for size in (window_size, len(filters)))
    window = torch.ones_like(j) if window_size == 1 else 0.5 - 0.5 * torch.cos(2 * math.pi / window_size * j)
    angle = (j[:, None] * k) * (2 * math.pi / (2 * (len(filters) - 1)))  # (W, F/2+1)
    spectra: list[Tensor] = []
    for start in range(0, samples.shape[1] - window_size + 1, hop_size):
        frame = samples[:, start : start + window_size] * window
        power = (frame @ torch.cos(angle)).square() + (frame @ torch.sin(angle)).square()
        spectra.append((power @ filters).clamp(min=floor).log())
    return torch.stack(spectra, dim=1)


@without_autocast
def log_mel(
    samples: Tensor, filters: Tensor, *, window_size: int, hop_size: int, floor: float, length: Tensor | None = None
) -> Tensor:
    """The log-mel spectra of sounds.

    Args:
        samples: (B, n), n ≥ 1.
        filters: (F/2+1, bins), weights of the power at the frequencies of a DFT of even length F ≥ ``window_size``.
        window_size: W, samples.
        hop_size: S, samples.
        floor: of the power in a band, > 0: what counts as silence.
        length: (B) samples of each row that are real; None means all. A row's first :func:`mel_frames` frames are then
            its own, whatever follows it; the others are to be masked.

    Returns:
        (B, frames, bins) in float32 or wider. Blocks of frames bound the memory.
    """
    samples = _whole_windows(samples.to(wide_dtype(samples)), window_size, length)
    filters = filters.to(samples)
    fft_size = 2 * (len(filters) - 1)
    window = torch.hann_window(window_size, periodic=True, dtype=samples.dtype, device=samples.device)
    frames = samples.unfold(1, window_size, hop_size)  # (B, frames, W), a view
    step = max(1, BLOCK_ELEMENTS // (len(samples) * fft_size))
    blocks = (frames,) if torch.compiler.is_compiling() else frames.split(step, dim=1)
    spectra: list[Tensor] = []
    for block in blocks:
        spectrum = torch.view_as_real(torch.fft.rfft(block * window, n=fft_size))
        spectra.append((spectrum.square().sum(-1) @ filters).clamp(min=floor).log())
    return torch.cat(spectra, dim=1)


def _whole_windows(samples: Tensor, window_size: int, length: Tensor | None) -> Tensor:
    """With zeros at padding, and at the end of a row shorter than a window."""
    n = samples.shape[1]
    if length is not None:
        samples = samples.masked_fill(torch.arange(n, device=samples.device) >= length[:, None], 0)
    return F.pad(samples, (0, max(0, window_size - n)))
