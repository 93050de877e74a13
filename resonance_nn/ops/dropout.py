"""Dropout whose random bits cost a CPU little."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 1 << 16  # of an integer of 16 random bits


def dropout(x: Tensor, p: float) -> Tensor:
    """x with each element zero by a chance of p in [0, 1), the others times 1/(1 − p): of mean x.

    On a CPU, whose generator is most of PyTorch's dropout, one draw of 64 bits serves four elements, so that p is met
    to 2⁻¹⁷. The draws are others than PyTorch's, and as repeatable. In x's dtype.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    least = min(round(p * LEVELS), LEVELS - 1) - LEVELS // 2
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= least
    return x * kept.to(x.dtype).mul_(1 / (1 - p))
