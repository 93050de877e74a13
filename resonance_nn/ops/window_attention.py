"""Softmax attention over a window of W tokens that ends at the query, in O(L·W).

    y_t = Σ_s softmax_s( q_t · k_s / √P ) v_s,   s from max(t − W + 1, begin_t) to t

Letters: B batch, L length, H heads, P channels a head, W window, T chunk length.
Keys and values come with the W − 1 that stood before the first query, so that a sequence can be split anywhere.

    window_attention_reference   the (L, W − 1 + L) matrix of all scores, masked         O(L²)
    window_attention             chunks of T queries, each against its W − 1 + T keys     O(L·(W + T))

Source: the banded attention of Longformer (Beltagy et al. 2020), causal side only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.precision import wide_dtype, without_autocast


@without_autocast
def window_attention_reference(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, window: int) -> Tensor:
    """The definition, by one matrix of scores in float32 or wider. Arguments as :func:`window_attention`."""
    L, wide = q.shape[1], wide_dtype(q)
    steps = torch.arange(L, device=q.device)
    source = torch.arange(1 - window, L, device=q.device)  # the token of each key
    visible = (source <= steps[:, None]) & (source > steps[:, None] - window) & (source >= begin[..., None])
    scores = torch.einsum("blhp,bshp->bhls", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhls,bshp->blhp", weights, v.to(wide)).to(q.dtype)


@without_autocast
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, window: int, *, chunk_size: int | None = None
) -> Tensor:
    """Attend in chunks by PyTorch's scaled_dot_product_attention: T queries see their own T keys and the W − 1 before.

    Args:
        q: queries (B, L, H, P).
        k, v: keys and values (B, W − 1 + L, H, P): row W − 1 + t is token t's, the first W − 1 those of tokens
            −(W − 1) … −1.
        begin: (B, L) or (1, L) integers, the first token that each query may see, its document's first; negative
            where the document began before this call.
        window: W ≥ 1.
        chunk_size: T; None means W/2, at least 64.

    Returns:
        y (B, L, H, P). A query always sees its own token.
    """
    B, L, H, P = q.shape
    W = window
    if k.shape[1] != W - 1 + L:
        raise ValueError(f"k of {k.shape[1]} tokens: must be window − 1 + L = {W - 1 + L}, those before the first too")
    T = min(L, max(W // 2, 64) if chunk_size is None else chunk_size)
    C, padding = -(-L // T), -L % T
    steps = torch.arange(T, device=q.device)
    keys = torch.arange(W - 1 + T, device=q.device)
    band = (keys >= steps[:, None]) & (keys <= steps[:, None] + W - 1)  # (T, W − 1 + T)
    source = keys + (torch.arange(C, device=q.device) * T)[:, None] - (W - 1)  # (C, W − 1 + T): the token of each key
    visible = band & (source[:, None] >= F.pad(begin, (0, padding)).view(-1, C, T, 1))  # (B | 1, C, T, W − 1 + T)
    visible = visible.expand(B, -1, -1, -1).reshape(B * C, 1, T, W - 1 + T)
    q = F.pad(q, (0, 0, 0, 0, 0, padding)).view(B * C, T, H, P).transpose(1, 2)  # (B·C, H, T, P)
    k, v = (_windows(F.pad(x, (0, 0, 0, 0, 0, padding)), W - 1 + T, T) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return y.transpose(1, 2).reshape(B, C * T, H, P)[:, :L]


def _windows(x: Tensor, size: int, step: int) -> Tensor:
    """(B, ·, H, P) -> (B·C, H, size, P), a window at every ``step``-th token."""
    return x.unfold(1, size, step).permute(0, 1, 4, 2, 3).flatten(0, 1).transpose(1, 2)
