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

from resonance_nn.ops.blocks import in_blocks, row_blocks
from resonance_nn.ops.precision import wide_dtype, without_autocast

SMALL_ELEMENTS = 1 << 12  # of which an op's call takes longer than its work


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """The definition. Arguments as :func:`rms_norm`."""
    wide = x.to(wide_dtype(x))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(wide.dtype)).to(dtype or x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / √(mean(x²) + eps) ∘ weight over the last dimension (Zhang & Sennrich 2019), in float32 or wider.

    Args:
        x: (…, D).
        weight: (D).
        eps: what is added to the mean square.
        dtype: of the result; None is x's.
    """
    return add_rms_norm(x, None, weight, eps, dtype)[1]


@without_autocast
def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x + y and its :func:`rms_norm`: a residual stream after the branch y (…, D), or None, and what the next branch
    sees of it. In x's dtype the first, in ``dtype`` the second. The gradients of both are added as they are formed."""
    if not torch.is_grad_enabled() and weight.dtype == x.dtype and not in_blocks(x):
        x = x if y is None else torch.add(x, y.to(x.dtype))
        normed = _rms_norm(x, weight, eps)
        return x, normed if dtype is None else normed.to(dtype)
    result = _AddRMSNorm.apply(x, y, weight, eps, dtype or x.dtype)
    assert isinstance(result, tuple)
    return result


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / √(Σx² + eps) over the last dimension (…, K), in x's dtype."""
    K = x.shape[-1]
    if not torch.is_grad_enabled():
        return _rms_norm(x, None, eps / K).mul_(K**-0.5)
    return rms_norm(x, x.new_full((K,), K**-0.5, dtype=wide_dtype(x)), eps / K)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """PyTorch's RMSNorm; of few rows on a CPU, where that is nine ops of no work each, its LayerNorm of [x | −x], which
    has mean 0 and x's mean square for variance, and is one."""
    D = x.shape[-1]
    if x.numel() > SMALL_ELEMENTS or x.device.type != "cpu":
        return F.rms_norm(x, (D,), weight, eps)
    weight = None if weight is None else torch.cat((weight, weight))
    return torch.layer_norm(torch.cat((x, -x), dim=-1), (2 * D,), weight, None, eps)[..., :D]


class _AddRMSNorm(torch.autograd.Function):
    """With r = 1/√(mean(x²) + eps), x̂ = r x and h = w ∘ dy: dx = r (h − x̂ mean(h ∘ x̂)), dw = Σ dy ∘ x̂."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total = x if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        normed = torch.empty(x.shape, dtype=dtype, device=x.device)
        r = torch.empty(*x.shape[:-1], 1, dtype=wide_dtype(x), device=x.device)
        for x_, y_, total_, normed_, r_ in row_blocks(x, y, total, normed, r):
            if y_ is not None:
                torch.add(x_, y_.to(x.dtype), out=total_)
            torch.linalg.vector_norm(total_, dim=-1, keepdim=True, dtype=r.dtype, out=r_)
            r_.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            normed_.copy_((total_.to(r.dtype) * r_).mul_(weight))
        ctx.save_for_backward(total, weight, r)
        ctx.dtypes = x.dtype, None if y is None else y.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        of_x, of_y = ctx.dtypes
        if grad is None:
            return grad_total, None if grad_total is None or of_y is None else grad_total.to(of_y), None, None, None
        w, D = weight.to(r.dtype), weight.shape[0]
        dx = torch.empty(x.shape, dtype=of_x, device=x.device)
        dy = dx if of_y == of_x else None if of_y is None else torch.empty_like(dx, dtype=of_y)
        dw = torch.zeros_like(w) if ctx.needs_input_grad[2] else None
        for x_, r_, grad_, total_, dx_, dy_ in row_blocks(x, r, grad, grad_total, dx, dy):
            x_, h = x_.to(r.dtype), grad_.to(r.dtype, copy=True)
            p = torch.mul(h, x_).mul_(r_)  # dy ∘ x̂
            if dw is not None:
                dw += p.sum(0)
            pull = (p @ w)[:, None].mul_(r_).mul_(r_).div_(-D)  # −r² mean(h ∘ x̂)
            h.mul_(w)
            if total_ is None:
                dx_.copy_(h.mul_(r_).addcmul_(x_, pull))
            else:
                dx_.copy_(torch.addcmul(total_, x_, pull).addcmul_(h, r_))
            if dy_ is not None and dy is not dx:
                dy_.copy_(dx_)
        return dx, dy, None if dw is None else dw.to(weight.dtype), None, None


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


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x ∘ 2σ(gate), x itself at 0, of tensors of one shape; in the gate's dtype."""
    if not torch.is_grad_enabled():
        return gate.sigmoid().mul_(x).mul_(2)
    result = _SigmoidGate.apply(x.to(gate.dtype), gate)
    assert isinstance(result, Tensor)
    return result


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        opened = gate.sigmoid()
        ctx.save_for_backward(x, opened)
        return (opened * x).mul_(2)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, opened = ctx.saved_tensors
        grad = 2 * grad
        return opened * grad, torch.ops.aten.sigmoid_backward(grad * x, opened)


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
    if not torch.is_grad_enabled():
        return x.relu().square_()
    result = _SquaredReLU.apply(x)
    assert isinstance(result, Tensor)
    return result


class _SquaredReLU(torch.autograd.Function):
    """dx = 2 max(x, 0) dy, with max(x, 0) = √y; for float32 and wider 2 dy / y^(−1/2), 0 at y = 0, because there
    PyTorch's √ is MKL's, on some CPUs twelve times as slow."""

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
        if y.element_size() < 4:  # √ is exact to the last bit in most places, 1/√ is not
            return torch.addcmul(y.new_zeros(()), y.sqrt(), grad, value=2)
        return torch.addcdiv(y.new_zeros(()), grad, y.rsqrt(), value=2)


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
