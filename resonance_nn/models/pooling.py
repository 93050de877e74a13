"""From the tokens of an input to one vector, and from vectors to losses: what the heads of all encoders share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resonance_nn.config import ResonanceConfig
from resonance_nn.ops.precision import wide_dtype, without_autocast


@without_autocast
def pool(hidden: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """(B, L, D), mask (B, L) or None -> (B, D) in float32 or wider: the "mean" of the real tokens, the "last" or the
    "first" of them. Padding may stand anywhere; a row of padding alone gives 0."""
    hidden = hidden.to(wide_dtype(hidden))
    if mask is None:
        return hidden.mean(1) if how == "mean" else hidden[:, -1 if how == "last" else 0]
    mask = mask.bool()
    if how == "mean":
        count = mask.sum(1, keepdim=True).clamp(min=1)
        return hidden.masked_fill(~mask[..., None], 0).sum(1) / count
    order = mask if how == "first" else mask.flip(1)
    index = order.to(torch.uint8).argmax(1)
    index = index if how == "first" else mask.shape[1] - 1 - index
    chosen = hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)
    return chosen.masked_fill(~mask.any(1, keepdim=True), 0)


def label_head(config: ResonanceConfig) -> nn.Linear:
    """(..., D) -> (..., labels)."""
    assert config.num_labels is not None
    return nn.Linear(config.hidden_size, config.num_labels)


@without_autocast
def classification_loss(logits: Tensor, labels: Tensor, config: ResonanceConfig, training: bool = False) -> Tensor:
    """The loss that ``config.problem_type`` names, as everywhere in ``transformers``; None tells it from the labels.

    "regression" (one label): mean squared error. "single_label_classification" (integer labels): cross-entropy over the
    last dimension of logits (..., K), labels (...); −100 is ignored; smoothed by ``config.label_smoothing`` in
    ``training``. "multi_label_classification" (labels as logits,
    each 0 … 1): binary cross-entropy; where a label is −100 it is ignored.

    Raises:
        ValueError: labels of another shape, or of a class that is not there.
    """
    logits = logits.to(wide_dtype(logits))
    labels = labels.to(logits.device)
    K = logits.shape[-1]
    kind = config.problem_type
    if kind is None:
        kind = "regression" if K == 1 else "multi" if labels.is_floating_point() else "single"
    if kind.startswith("single"):
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}: must be {tuple(logits.shape[:-1])}, a class for each"
            )
        wrong = labels[(labels >= K) | ((labels < 0) & (labels != -100))]
        if wrong.numel():
            raise ValueError(
                f"labels: {int(wrong[0])} is not a class; num_labels = {K} has 0 … {K - 1}, and -100 for none"
            )
        smoothing = config.label_smoothing if training else 0.0
        total = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten().long(), label_smoothing=smoothing, reduction="sum"
        )
        return total / (labels != -100).sum().clamp(min=1)
    if labels.dim() == logits.dim() - 1 and K == 1:
        labels = labels[..., None]
    if labels.shape != logits.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: must be {tuple(logits.shape)}, as the logits")
    values = labels.to(logits.dtype)
    if kind.startswith("regression"):
        return F.mse_loss(logits, values)
    known = labels != -100
    wrong = values[known & ~((values >= 0) & (values <= 1))]
    if wrong.numel():
        raise ValueError(f"labels: {float(wrong[0]):g}; must be 0 … 1 for each label, and -100 for none")
    each = F.binary_cross_entropy_with_logits(logits, values, reduction="none")
    return each.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)


@without_autocast
def contrastive_loss(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of B pairs of unit vectors (B, D): each is to be told from the others of the batch by the
    products e^s ⟨a_i, b_j⟩ (van den Oord et al. 2018; as CLIP, Radford et al. 2021, e^s ≤ 100)."""
    logits = log_scale.clamp(max=4.6052).exp() * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
