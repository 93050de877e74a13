"""``attention``: softmax attention with rotary positions. The baseline, and a member of hybrids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.mixers.base import Mixer, State
from resonance_nn.ops.precision import phase_dtype, reduce_angle, wide_dtype
from resonance_nn.ops.semiseparable import rotate

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
        q, k, v = self.qkv_proj(x).view(B, L, 3, self.num_heads, self.head_dim).unbind(2)  # (B, L, H, P)
        steps = torch.arange(L, device=x.device)
        past = steps.new_zeros(B) if state is None else state["length"]
        begin = torch.zeros_like(steps).expand(B, L) - past[:, None]  # where t's document begins: −past or a reset
        if reset is not None:
            begin = torch.where(reset, steps, begin).cummax(1).values
        q, k = self._rotary(q, steps - begin), self._rotary(k, steps - begin)
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
                own = (steps <= steps[:, None]) & (steps >= begin[..., None])  # (B, L, L)
                old = (torch.arange(S, device=x.device) < past[:, None])[:, None] & (begin < 0)[..., None]  # (B, L, S)
                visible = torch.cat((old.expand(B, L, S), own), dim=-1)[:, None]
            y = _attend(q, k, v, visible, is_causal=False)
        y = self.out_proj(y.reshape(B, L, D))
        if not return_state:
            return y, None
        if length is None and dense:
            return y, {"key": k, "value": v.clone(), "length": past + L}  # v is a view
        return y, self._keep_last_document(k, v, S, past, begin, steps.new_full((B,), L) if length is None else length)

    def _rotary(self, x: Tensor, position: Tensor) -> Tensor:
        half = self.head_dim // 2
        exact = phase_dtype(x)
        inverse = self.rope_theta ** (-torch.arange(half, device=x.device, dtype=exact) / half)
        angle = reduce_angle(position[..., None].to(exact) * inverse, wide_dtype(x))[:, :, None]  # (B, L, 1, P/2)
        rotated = rotate(x[..., : 2 * half], angle.cos(), angle.sin()).to(x.dtype)
        return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)

    @staticmethod
    def _keep_last_document(k: Tensor, v: Tensor, S: int, past: Tensor, begin: Tensor, length: Tensor) -> State:
        """Left-align what later tokens may see: slots of the old state (first S, ``past`` in use) and real new ones."""
        last = begin.gather(1, (length - 1).clamp(min=0)[:, None]).squeeze(1)
        last = torch.where(length > 0, last, -past)  # the document each row ends in began here
        kept_old = torch.where(last < 0, past, 0)
        total = kept_old + length - last.clamp(min=0)
        slots = torch.arange(int(total.max()) if total.device.type != "meta" else k.shape[1], device=k.device)
        from_new = S + last.clamp(min=0)[:, None] + slots - kept_old[:, None]
        index = torch.where(slots < kept_old[:, None], slots, from_new)
        index = index.clamp(max=k.shape[1] - 1)[..., None, None].expand(-1, -1, *k.shape[2:])
        return {"key": k.gather(1, index), "value": v.gather(1, index), "length": total}


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, P)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal).transpose(1, 2)
