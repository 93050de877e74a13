"""``attention`` and ``sliding_attention``: softmax attention with rotary positions, over a document or a window of it.

The baseline, and members of hybrids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.mixers.base import Mixer, State, document_begin
from resonance_nn.ops.precision import phase_dtype, reduce_angle, wide_dtype
from resonance_nn.ops.semiseparable import rotate
from resonance_nn.ops.window_attention import window_attention

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig


class AttentionMixer(Mixer):
    """y = W_o softmax( q k^T / √P + causal ) v, q and k rotated by their position in the document (RoPE, Su et al.
    2021), by PyTorch's scaled_dot_product_attention.

    State, the keys and values of each row's current document, left-aligned: ``key`` and ``value`` (B, S, H, P),
    ``length`` (B) of S slots in use. It grows with the context: ``constant_state`` is False.
    """

    constant_state = False
    state_names = ("key", "value", "length")

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.rope_theta = config.rope_theta
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def mix(
        self,
        x: Tensor,
        *,
        length: Tensor | None = None,
        reset: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        B, L, D = x.shape
        past = torch.zeros(B, dtype=torch.long, device=x.device) if state is None else state["length"]
        q, k, v, begin = self._project(x, past, reset)
        S = 0
        if state is not None:
            S = state["key"].shape[1]
            k = torch.cat((state["key"].to(k.dtype), k), dim=1)
            v = torch.cat((state["value"].to(v.dtype), v), dim=1)
        dense = reset is None and (state is None or bool((past == S).all()))  # nothing to hide but the future
        if dense and S == 0:
            y = _attend(q, k, v, None, is_causal=True)
        else:
            visible = None
            if not dense or L > 1:
                steps = torch.arange(L, device=x.device)
                own = (steps <= steps[:, None]) & (steps >= begin[..., None])  # (B, L, L)
                old = (torch.arange(S, device=x.device) < past[:, None])[:, None] & (begin < 0)[..., None]  # (B, L, S)
                visible = torch.cat((old.expand(B, L, S), own), dim=-1)[:, None]
            y = _attend(q, k, v, visible, is_causal=False)
        y = self.out_proj(y.reshape(B, L, D))
        if not return_state:
            return y, None
        if length is None and dense:
            return y, {"key": k, "value": v.clone(), "length": past + L}  # v is a view
        return y, self._keep_last_document(k, v, S, past, begin, torch.full_like(past, L) if length is None else length)

    def _project(self, x: Tensor, past: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k (rotated) and v, (B, L, H, P) each, and where each token's document begins (B, L): at a reset, or, with
        ``past`` (B) tokens before this call, at −past."""
        B, L, _ = x.shape
        q, k, v = self.qkv_proj(x).view(B, L, 3, self.num_heads, self.head_dim).unbind(2)
        steps, begin = document_begin(x, past, reset)
        position, half = steps - begin, self.head_dim // 2
        exact = phase_dtype(x)
        inverse = self.rope_theta ** (-torch.arange(half, device=x.device, dtype=exact) / half)
        angle = reduce_angle(position[..., None].to(exact) * inverse, wide_dtype(x))[:, :, None]  # (B, L, 1, P/2)
        cos, sin = angle.cos(), angle.sin()
        return _rotary(q, cos, sin), _rotary(k, cos, sin), v, begin

    @staticmethod
    def _keep_last_document(k: Tensor, v: Tensor, S: int, past: Tensor, begin: Tensor, length: Tensor) -> State:
        """Left-align what later tokens may see: slots of the old state (first S, ``past`` in use) and real new ones."""
        last = _last_begin(begin, length, past)
        kept_old = torch.where(last < 0, past, 0)
        total = kept_old + length - last.clamp(min=0)
        slots = torch.arange(int(total.max()) if total.device.type != "meta" else k.shape[1], device=k.device)
        from_new = S + last.clamp(min=0)[:, None] + slots - kept_old[:, None]
        index = torch.where(slots < kept_old[:, None], slots, from_new)
        index = index.clamp(max=k.shape[1] - 1)[..., None, None].expand(-1, -1, *k.shape[2:])
        return {"key": k.gather(1, index), "value": v.gather(1, index), "length": total}


class SlidingAttentionMixer(AttentionMixer):
    """``attention`` to the last W = ``config.sliding_window`` tokens of the document, the query's own among them:

        y_t = W_o Σ_s softmax_s( q_t · k_s / √P ) v_s,   s from max(t − W + 1, the document's first token) to t

    by ``ops.window_attention``, O(L·W). State, whatever the context: ``key`` (rotated) and ``value`` (B, W, H, P) of
    the last W tokens, right-aligned, zeros where the document is shorter, and ``length`` (B), tokens of the document.
    """

    constant_state = True

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.window = config.sliding_window

    def mix(
        self,
        x: Tensor,
        *,
        length: Tensor | None = None,
        reset: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, State | None]:
        B, L, D = x.shape
        past = torch.zeros(B, dtype=torch.long, device=x.device) if state is None else state["length"]
        q, k, v, begin = self._project(x, past, reset)
        if state is None:
            old = [k.new_zeros(B, self.window, self.num_heads, self.head_dim)] * 2
        else:
            old = [state["key"].to(k.dtype), state["value"].to(v.dtype)]
        k, v = (torch.cat((o[:, 1:], new), dim=1) for o, new in zip(old, (k, v), strict=True))  # (B, W − 1 + L, H, P)
        y = self.out_proj(window_attention(q, k, v, begin, self.window).reshape(B, L, D))
        if not return_state:
            return y, None
        if length is None and reset is None:
            k, v = (t if L == 1 else t[:, L - 1 :].clone() for t in (k, v))  # a view would keep all of them alive
            return y, {"key": k, "value": v, "length": past + L}
        real = torch.full_like(past, L) if length is None else length
        last = _last_begin(begin, real, past)
        slots = torch.arange(self.window, device=x.device)
        keep = (slots >= self.window - (real - last)[:, None])[..., None, None]  # of the last document
        index = (real[:, None] + slots)[..., None, None].expand(-1, -1, self.num_heads, self.head_dim)
        k, v = (
            torch.cat((o[:, :1], t), dim=1).gather(1, index).masked_fill(~keep, 0)
            for o, t in zip(old, (k, v), strict=True)
        )
        return y, {"key": k, "value": v, "length": real - last}


def _last_begin(begin: Tensor, length: Tensor, past: Tensor) -> Tensor:
    """Where the document of each row's last real token begins, (B)."""
    last = begin.gather(1, (length - 1).clamp(min=0)[:, None]).squeeze(1)
    return torch.where(length > 0, last, -past)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, L, H, P) by the angles of (B, L, 1, P/2); an odd last channel stays."""
    even = 2 * cos.shape[-1]
    rotated = rotate(x[..., :even], cos, sin).to(x.dtype)
    return rotated if even == x.shape[-1] else torch.cat((rotated, x[..., even:]), dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, P)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal).transpose(1, 2)
