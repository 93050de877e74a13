"""Cross-entropy of a linear head without the (M, V) logits.

    ℓ_m = lse_m − x_m·w_{y_m}                      lse_m = log Σ_j exp(x_m·w_j)
    objective = Σ_m (1 − ε) ℓ_m + ε (lse_m − mean_j x_m·w_j) + ζ lse_m²

with label smoothing ε and z-loss weight ζ. Tokens are taken a chunk at a time; the gradient of a chunk's logits,

    ∂/∂logit_mj = p_mj (1 + 2ζ lse_m) − (1 − ε) [j = y_m] − ε/V,

is formed in the forward pass while they are at hand and turned into the gradients of x and W, so of the logits only
(chunk, V) elements ever exist. Sources: Liger kernel (Hsu et al. 2024), cut cross-entropy (Wijmans et al. 2025), z-loss
from PaLM (Chowdhery et al. 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resonance_nn.ops.blocks import row_blocks
from resonance_nn.ops.precision import autocast_dtype, wide_dtype

CHUNK_ELEMENTS = 1 << 24  # logits alive at once, 32 MB in bfloat16; more where 64 tokens already have more


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same from the full logits. Arguments as :func:`linear_cross_entropy`."""
    return logits_cross_entropy(
        hidden @ weight.T,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss_weight=z_loss_weight,
    )


def logits_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Summed objective and summed plain cross-entropy of logits (M, V), for heads that are not one linear map."""
    logits = logits.to(wide_dtype(logits))
    plain = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    smoothed = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
    )
    z_loss = (logits.logsumexp(-1).square() * (targets != ignore_index)).sum()
    return smoothed + z_loss_weight * z_loss, plain.detach()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed objective and summed plain cross-entropy, in nats, over the targets that are not ignored.

    Args:
        hidden: (M, D). Under autocast the logits are computed in its dtype, else in hidden's.
        weight: the head (V, D).
        targets: (M) class indices, or ``ignore_index``.
        ignore_index: targets that count for nothing.
        label_smoothing: ε in [0, 1).
        z_loss_weight: ζ ≥ 0.
        chunk_size: tokens at a time; None keeps (chunk, V) near 16 million elements and below a quarter of (M, V), with
            64 tokens or more.

    Returns:
        Two float32 (or wider) scalars: the objective, differentiable once in hidden and weight, and Σ ℓ, detached.
        Divide by the number of targets for means.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing = {label_smoothing}: must be in [0, 1)")
    if z_loss_weight < 0.0:
        raise ValueError(f"z_loss_weight = {z_loss_weight}: must be ≥ 0")
    dtype = autocast_dtype(hidden)
    chunk = chunk_size or max(64, min(CHUNK_ELEMENTS // weight.shape[0], hidden.shape[0] // 4))
    result = _LinearCrossEntropy.apply(
        hidden, weight, targets, ignore_index, label_smoothing, z_loss_weight, chunk, dtype, torch.is_grad_enabled()
    )
    assert isinstance(result, tuple)
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        smoothing: float,
        z_weight: float,
        chunk: int,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        V = weight.shape[0]
        wide = wide_dtype(hidden)
        needs_hidden, needs_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        objective = torch.zeros((), dtype=wide, device=hidden.device)
        plain = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            for begin in range(0, hidden.shape[0], chunk):
                x = hidden[begin : begin + chunk].to(dtype)  # (m, D)
                y = targets[begin : begin + chunk]
                keep = (y != ignore_index)[:, None]
                index = y[:, None].masked_fill(~keep, 0)
                logits = x @ w.T  # (m, V)
                for logits_, index_, keep_ in row_blocks(logits, index, keep):
                    p = logits_.softmax(-1, dtype=wide)
                    lse = _normaliser(logits_, p, index_)
                    nll = lse - logits_.gather(1, index_)  # (·, 1)
                    total = nll
                    if smoothing:
                        total = (1 - smoothing) * nll + smoothing * (lse - logits_.mean(-1, keepdim=True, dtype=wide))
                    if z_weight:
                        total = total + z_weight * lse.square()
                    plain += torch.where(keep_, nll, 0).sum()
                    objective += torch.where(keep_, total, 0).sum()
                    if not (needs_hidden or needs_weight):
                        continue
                    if z_weight:
                        p *= 1 + 2 * z_weight * lse
                    p.scatter_add_(1, index_, torch.full_like(nll, smoothing - 1))
                    if smoothing:
                        p -= smoothing / V
                    logits_.copy_(p)  # from here on their gradient
                if grad_hidden is not None:
                    grad_hidden[begin : begin + chunk] = (logits @ w) * keep
                if grad_weight is not None:
                    grad_weight += (logits.T @ (x * keep)).to(wide)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(plain)
        return objective, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_objective: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if g is None else g * grad_objective.to(g.dtype) for g in (grad_hidden, grad_weight)]
        return *scaled, None, None, None, None, None, None, None


def _normaliser(logits: Tensor, p: Tensor, index: Tensor) -> Tensor:
    """log Σ_j exp(logit_mj) (m, 1) of p = softmax(logits), from a column whose p is far from underflow: that of index
    as a rule, which saves two passes for the largest; where there is one, the largest."""
    at = p.gather(1, index)
    if p.device.type == "cpu" and not torch.compiler.is_compiling() and bool((at > torch.finfo(p.dtype).tiny).all()):
        return logits.gather(1, index) - at.log()
    return logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
