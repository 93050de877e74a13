"""The optimizers that models here are trained with: AdamW, and Muon with AdamW for what is not a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from resonance_nn.arguments import check_optimizer

BETAS = (0.9, 0.95)
LEAST_RANK = 16  # a matrix with a shorter side is a few vectors, which there is little to make orthogonal of


def build_optimizer(model: nn.Module, name: str = "adamw", *, lr: float = 1e-3, weight_decay: float = 0.1) -> Optimizer:
    """An optimizer of all the parameters of a model; weight decay on linear maps and embeddings only.

    "adamw": Loshchilov & Hutter 2019, (β₁, β₂) = (0.9, 0.95).
    "muon": the linear maps between hidden layers by Muon (Jordan et al. 2024), updates made orthogonal by five steps of
    Newton–Schulz and scaled to the size of AdamW's, 0.2 √(larger side) (Liu et al. 2025), so that the same rate suits
    both; embeddings, the output head, vectors and maps to fewer than 16 channels by AdamW.

    Raises:
        ValueError: no such optimizer.
    """
    check_optimizer(name)
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    outer = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # and a tied head's
    head = getattr(model, "lm_head", None)
    outer |= {head.weight} if isinstance(head, nn.Linear) else set()
    inner = {p for p in linear - outer if name == "muon" and min(p.shape) >= LEAST_RANK}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p in (linear | outer) - inner], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p not in linear | outer], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters)
    adamw = AdamW([group for group in groups if group["params"]], lr=lr, betas=BETAS, fused=fused)
    matrices = [p for p in parameters if p in inner]
    if not matrices:
        return adamw
    return Together(Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"), adamw)


class Together(Optimizer):
    """Several optimizers of different parameters as one: their groups and states are its own."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on these groups and this state."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
