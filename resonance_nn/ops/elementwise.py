"""What stands between the matmuls, with derivatives written out: normalisation, gating, a short causal convolution.

Composed of PyTorch's operators each of these would save every intermediate tensor and pass over all of them again in
the backward pass; here a function keeps its inputs, and RMSNorm a number a row. Sums add up in float32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resonance_nn.ops.precision import wide_dtype, without_autocast


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """The definition. Arguments as :func:`rms_norm`."""
    wide = x.to(wide_dtype(x))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(wide.dtype)).to(dtype or x.dtype)


@without_autocast
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / √(mean(x²) + eps) ∘ weight over the last dimension (Zhang & Sennrich 2019), in float32 or wider.

    Args:
        x: (…, D).
        weight: (D).
        eps: what is added to the mean square.
        dtype: of the result; None is x's.
    """
    if not torch.is_grad_enabled() and weight.dtype == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype or x.dtype)
    result = _RMSNorm.apply(x, weight, eps, dtype or x.dtype)
    assert isinstance(result, Tensor)
    return result


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / √(Σx² + eps) over the last dimension (…, K), in x's dtype."""
    K = x.shape[-1]
    if not torch.is_grad_enabled():
        return F.rms_norm(x, (K,), None, eps / K).mul_(K**-0.5)
    return rms_norm(x, x.new_full((K,), K**-0.5, dtype=wide_dtype(x)), eps / K)


class _RMSNorm(torch.autograd.Function):
    """With r = 1/√(mean(x²) + eps), x̂ = r x and h = w ∘ dy: dx = r (h − x̂ mean(h ∘ x̂)), which is the gradient of a
    layer norm whose mean is 0, but for the term −r mean(h) that the mean's own dependence on x adds there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = wide_dtype(x)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        r = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, weight, r)
        ctx.dtype = x.dtype
        y = x.to(wide) * r
        return y.mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        grad, x, w = grad.to(r.dtype).contiguous(), x.to(r.dtype).contiguous(), weight.to(r.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            zero = torch.zeros_like(r)
            dx = torch.ops.aten.native_layer_norm_backward(grad, x, w.shape, zero, r, w, None, [True, False, False])[0]
            dx = dx.add_((grad @ w)[..., None].mul_(r).div_(w.shape[0])).to(ctx.dtype)
        if ctx.needs_input_grad[1]:  # not by that kernel: there it would depend on the number of threads
            dw = torch.mul(grad, x).mul_(r).view(-1, w.shape[0]).sum(0).to(weight.dtype)
        return dx, dw, None, None


def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x ∘ silu(gate), silu(z) = z σ(z), of tensors of one shape; in the gate's dtype."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(x)
    result = _SiluGate.apply(x.to(gate.dtype), gate)
    assert isinstance(result, Tensor)
    return result


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return F.silu(gate).mul_(x)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, gate = ctx.saved_tensors
        return F.silu(gate).mul_(grad), torch.ops.aten.silu_backward(grad * x, gate)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ∘ up of ``[gate | up]`` (…, 2I) -> (…, I) (Shazeer 2020)."""
    result = _SwiGLU.apply(gate_up)
    assert isinstance(result, Tensor)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        d_gate, d_up = result.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        return result


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al. 2021, Primer). Keeps nothing but its result, which the matmul after it keeps anyway."""
    result = _SquaredReLU.apply(x)
    assert isinstance(result, Tensor)
    return result


class _SquaredReLU(torch.autograd.Function):
    """dx = 2 max(x, 0) dy, with max(x, 0) = √y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.relu().square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return y.sqrt().mul_(grad).mul_(2)


def short_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """The definition, a lag at a time. Arguments as :func:`short_conv`."""
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for lag in range(min(weight.shape[0], x.shape[1])):
        past = F.pad(x, (0, 0, lag, 0))[:, : x.shape[1]]
        y = y + weight[lag] * (past if reset is None else past.masked_fill(_crossed(reset, lag)[..., None], 0))
    return y


@without_autocast
def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """Causal depthwise convolution of width W: y_t = Σ_{j<W} w_j ∘ x_{t−j} (+ bias), with zeros before the first token.

    Args:
        x: (B, L, C).
        weight: (W, C); weight[j] multiplies x_{t−j}.
        bias: (C).
        reset: (B, L) bool, True where a document begins: what was before is not seen from there on.

    Returns:
        (B, L, C) in x's dtype.
    """
    result = _ShortConv.apply(x, weight, bias, reset)
    assert isinstance(result, Tensor)
    return result


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, reset: Tensor | None) -> Tensor:
        x = x.contiguous()  # often a slice of a projection, which every pass over it would pay for
        ctx.save_for_backward(x, weight, bias, reset)
        w, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if _has_kernel(x, reset):
            return _correlate(x, w.flip(0), bias)[:, : x.shape[1]]
        y = x * w[0] if bias is None else torch.addcmul(bias, x, w[0])
        for lag in range(1, min(len(w), x.shape[1])):
            y[:, lag:].addcmul_(_unless_crossed(x[:, :-lag], reset, lag), w[lag])
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, reset = ctx.saved_tensors
        w = weight.to(grad.dtype)
        by_kernel = _has_kernel(grad, reset)
        dx = _correlate(grad, w)[:, len(w) - 1 :] if by_kernel else grad * w[0]
        dw = torch.zeros_like(weight)
        dw[0] = (grad * x).sum((0, 1))
        for lag in range(1, min(len(w), x.shape[1])):
            later = _unless_crossed(grad[:, lag:], reset, lag)
            if not by_kernel:
                dx[:, :-lag].addcmul_(later, w[lag])
            dw[lag] = (later * x[:, :-lag]).sum((0, 1))
        return dx, dw, None if bias is None else grad.sum((0, 1)).to(bias.dtype), None


def _has_kernel(x: Tensor, reset: Tensor | None) -> bool:
    """Whether PyTorch has a depthwise kernel worth calling: on a CPU 2.5 times as fast as a pass a lag, but for float64
    many times slower. Where documents begin a pass a lag is needed."""
    return reset is None and x.dtype in (torch.float32, torch.bfloat16) and x.device.type != "meta"


def _correlate(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = Σ_j w_j ∘ x_{t−(W−1)+j} (+ bias), zeros outside: x (B, L, C), weight (W, C) -> (B, L + W − 1, C)."""
    W, C = weight.shape
    kernel = weight.T.reshape(C, 1, W, 1)
    y = F.conv2d(x.unsqueeze(2).permute(0, 3, 1, 2), kernel, bias, padding=(W - 1, 0), groups=C)  # channels last
    return y.squeeze(-1).transpose(1, 2)


def _unless_crossed(x: Tensor, reset: Tensor | None, lag: int) -> Tensor:
    """x (B, L − lag, C), with 0 where a document begins between a token and the one ``lag`` tokens later."""
    return x if reset is None else x.masked_fill(_crossed(reset, lag)[:, lag:, None], 0)


def _crossed(reset: Tensor, lag: int) -> Tensor:
    """(B, L), True where a document begins in (t − lag, t]."""
    begun = torch.zeros_like(reset)
    for j in range(lag):
        begun = begun | F.pad(reset, (j, 0))[:, : reset.shape[1]]
    return begun
