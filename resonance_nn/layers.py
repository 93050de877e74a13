"""The small layers every block shares: RMSNorm, the MLPs, a causal short convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.ops.elementwise import add_rms_norm, rms_norm, short_conv, squared_relu, swiglu
from resonance_nn.ops.precision import autocast_dtype, wide_dtype


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last dimension, in float32 or wider (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, autocast_dtype(x))


class ResidualRMSNorm(RMSNorm):
    """The next step of a residual stream: x + y, in x's dtype, and its RMSNorm; y is what the branch before returned,
    None at the start."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return add_rms_norm(x, y, self.weight, self.eps, autocast_dtype(x))


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
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class SquaredReLU(nn.Module):
    """W_down max(W_up x, 0)², (B, L, D) -> (B, L, D) (So et al. 2021)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(squared_relu(self.up_proj(x)))


MLPS: dict[str, type[SwiGLU] | type[SquaredReLU]] = {"relu2": SquaredReLU, "swiglu": SwiGLU}


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
        if tail is None:
            y, window = short_conv(x, self.weight, self.bias, reset), x
        else:
            window = torch.cat((tail.to(x.dtype), x), dim=1)
            if x.shape[1] == 1 and reset is None and length is None:  # decoding
                y = (window * self.weight.to(x.dtype).flip(0)).sum(1, keepdim=True)
                return y if self.bias is None else y + self.bias.to(x.dtype), window[:, 1:]
            begins = None if reset is None else F.pad(reset, (tail.shape[1], 0))
            y = short_conv(window, self.weight, self.bias, begins)[:, tail.shape[1] :]
        return y, self._tail(window, x.shape[1], reset, length)

    def _tail(self, window: Tensor, L: int, reset: Tensor | None, length: Tensor | None) -> Tensor:
        """The last W − 1 real inputs of ``window``, which ends with the L of this call; only the last document's."""
        n = self.weight.shape[0] - 1
        missing = max(0, n + (L if length is not None else 0) - window.shape[1])
        window = F.pad(window, (0, 0, missing, 0)) if missing else window
        begins = None if reset is None else F.pad(reset, (window.shape[1] - L, 0))
        if length is None:
            start = window.shape[1] - n
            tail = window[:, start:].clone()  # a view would keep all of the window alive
            begins = None if begins is None else begins[:, start:]
        else:
            index = length[:, None] + torch.arange(n, device=window.device) + window.shape[1] - L - n  # (B, W − 1)
            tail = window.gather(1, index[..., None].expand(-1, -1, window.shape[2]))
            begins = None if begins is None else begins.gather(1, index)
        if begins is None:
            return tail
        later = begins.flip(1).cumsum(1).flip(1) - begins.long()
        return tail * (later == 0)[..., None]
