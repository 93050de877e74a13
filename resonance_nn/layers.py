"""The small layers every block shares: RMSNorm, SwiGLU, a causal short convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.ops.precision import wide_dtype


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension, in float32 or wider (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(wide_dtype(x))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class GroupedRMSNorm(RMSNorm):
    """RMSNorm of each of G equal groups of the last dimension by itself, with one weight a channel."""

    def __init__(self, size: int, num_groups: int, eps: float = 1e-6) -> None:
        super().__init__(size, eps)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        groups = x.to(wide_dtype(x)).unflatten(-1, (self.num_groups, -1))
        normed = F.rms_norm(groups, groups.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight.to(normed.dtype)).to(x.dtype)


class SwiGLU(nn.Module):
    """W_down( silu(W_gate x) ∘ W_up x ), (B, L, D) -> (B, L, D) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ShortConv(nn.Module):
    """Causal depthwise convolution of width W: y_t = Σ_{j<W} w_j ∘ x_{t−j} (+ bias), (B, L, C) -> (B, L, C).

    The state is the tail, the last W − 1 inputs (B, W − 1, C), zeros before the first token. A reset hides everything
    before it.
    """

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels))  # weight[j] multiplies x_{t−j}
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        with torch.no_grad():
            for name, value in self.initial_values().items():
                self.get_parameter(name).copy_(value)

    def initial_values(self) -> dict[str, Tensor]:
        W, C = self.weight.shape
        values = {"weight": torch.empty(W, C).uniform_(-(W**-0.5), W**-0.5)}
        return values if self.bias is None else {**values, "bias": torch.zeros(C)}

    def forward(
        self, x: Tensor, tail: Tensor | None = None, *, reset: Tensor | None = None, length: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, C), tail (B, W − 1, C) or None, reset (B, L) bool, length (B) real tokens of right-padded rows
        -> y (B, L, C) and the tail after each row's last real token."""
        B, L, C = x.shape
        W = self.weight.shape[0]
        weight = self.weight.to(x.dtype)
        tail = x.new_zeros(B, W - 1, C) if tail is None else tail.to(x.dtype)
        window = torch.cat((tail, x), dim=1)  # window[:, W − 1 + t] is x_t
        y = x * weight[0] if self.bias is None else torch.addcmul(self.bias.to(x.dtype), x, weight[0])
        for j in range(1, W):
            y = y + self._same_document(window[:, W - 1 - j : W - 1 - j + L], reset, j) * weight[j]
        if length is None:
            new_tail = window[:, L:].clone()  # a view would keep all of the window alive
            document_begins = None if reset is None else F.pad(reset, (W - 1, 0))[:, L:]
        else:
            index = length[:, None] + torch.arange(W - 1, device=x.device)  # (B, W − 1), into window
            new_tail = window.gather(1, index[..., None].expand(-1, -1, C))
            document_begins = None if reset is None else F.pad(reset, (W - 1, 0)).gather(1, index)
        if document_begins is not None:  # the tail keeps only the last document's inputs
            later = document_begins.flip(1).cumsum(1).flip(1) - document_begins.long()
            new_tail = new_tail * (later == 0)[..., None]
        return y, new_tail

    @staticmethod
    def _same_document(x: Tensor, reset: Tensor | None, lag: int) -> Tensor:
        """Zero x_{t−lag} where a document begins in (t − lag, t]."""
        if reset is None:
            return x
        begun = torch.zeros_like(reset)
        for j in range(lag):
            begun = begun | F.pad(reset, (j, 0))[:, : reset.shape[1]]
        return x.masked_fill(begun[..., None], 0)
