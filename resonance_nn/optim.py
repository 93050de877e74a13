"""The optimizers that models here are trained with: AdamW, and Muon with AdamW for what is not a matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from resonance_nn.arguments import check_optimizer
from resonance_nn.ops.precision import computes_in_bf16

BETAS = (0.9, 0.95)
LEAST_RANK = 16  # a matrix with a shorter side is a few vectors, which there is little to make orthogonal of
AT_ONCE = 2**22  # elements of matrices that are made orthogonal together, which takes some five times their memory


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
    return Together(BatchedMuon(matrices, lr=lr, weight_decay=weight_decay), adamw)


def _loss_of(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class BatchedMuon(Muon):
    """``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, with the matrices of one shape, upright or lying,
    made orthogonal together, and in float32 on a device that does not compute in bfloat16. There, torch's takes longer
    than the rest of a small model's step."""

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = _loss_of(closure)
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[tuple(sorted(p.shape)), p.device, p.dtype].append(p)
            for parameters in alike.values():
                count = max(1, AT_ONCE // parameters[0].numel())
                for begin in range(0, len(parameters), count):
                    self._move(parameters[begin : begin + count], group)
        return loss

    def _move(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        momentum, lr = group["momentum"], float(group["lr"])
        updates = []
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if "momentum_buffer" not in state:  # as torch.optim.Muon names it
                state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
            average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(average, momentum) if group["nesterov"] else average
            updates.append(update if p.shape[0] <= p.shape[1] else update.mT)
        dtype = torch.bfloat16 if computes_in_bf16(parameters[0].device.type) else torch.float32
        turned = orthogonalised(
            torch.stack(updates).to(dtype), group["ns_coefficients"], group["ns_steps"], eps=group["eps"]
        )
        rate = lr * 0.2 * math.sqrt(max(parameters[0].shape))
        for p, update in zip(parameters, turned, strict=True):
            p.mul_(1 - lr * group["weight_decay"])
            p.add_(update if p.shape[0] <= p.shape[1] else update.mT, alpha=-rate)


def orthogonalised(x: Tensor, coefficients: Sequence[float], steps: int = 5, *, eps: float = 1e-7) -> Tensor:
    """Matrices (n, r, c), r ≤ c, with their singular values σ > 0 brought near 1: with X₀ = X/‖X‖_F, each step takes
    X to a X + (b A + c A²) X of A = X Xᵀ (Newton–Schulz of degree 5; Jordan et al. 2024)."""
    a, b, c = coefficients
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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
        loss = _loss_of(closure)
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()
