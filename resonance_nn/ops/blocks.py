"""Chains of elementwise operations a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 20  # that such a chain takes at once on a CPU, to find its temporaries in the cache


def in_blocks(x: Tensor) -> bool:
    """Whether operations on x are better done in blocks."""
    return x.device.type == "cpu" and x.numel() > BLOCK_ELEMENTS and not torch.compiler.is_compiling()


def row_blocks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors (…, ·) of equal leading dimensions as matrices, on a CPU some rows at a time, as many as the first one's
    width allows: a chain of operations whose temporaries stay in the cache is twice as fast. What comes are views where
    a tensor has them, and None for None."""
    tensors = (first, *others)
    matrices = [None if x is None else x.reshape(-1, x.shape[-1]) for x in tensors]
    rows = first.numel() // max(1, first.shape[-1])
    step = max(1, BLOCK_ELEMENTS // first.shape[-1]) if in_blocks(first) else max(1, rows)
    for i in range(0, rows, step):
        yield tuple(None if x is None else x[i : i + step] for x in matrices)
