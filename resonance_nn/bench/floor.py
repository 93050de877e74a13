"""The floor under a step's time: its own matmuls, recorded in one step and then run alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resonance_nn.bench.inference import synchronize

aten = torch.ops.aten
# What every matmul, linear map and einsum comes to. Fused kernels (attention, convolutions) hide theirs.
MATMULS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addmm_, aten.baddbmm_}


class Operand(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: str | torch.device) -> Tensor:
        """One like it, of normal random values: zeros and denormals have speeds of their own."""
        elements = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return torch.randn(elements, device=device).to(self.dtype).as_strided(self.shape, self.stride)


class Matmul(NamedTuple):
    """(M, K) times (K, N), or a batch of them. What addmm adds to is left out."""

    left: Operand
    right: Operand

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * math.prod(self.left.shape) * self.right.shape[-1]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.matmuls: list[Matmul] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in MATMULS:
            operands = [Operand(tuple(t.shape), t.stride(), t.dtype) for t in args if isinstance(t, Tensor)]
            self.matmuls.append(Matmul(*operands[-2:]))
        return func(*args, **(kwargs or {}))


def record(step: Callable[[], None]) -> list[Matmul]:
    """Run the step once, and return its matmuls in their order, those of the backward pass too."""
    with _Recorder() as recorder:
        step()
    return recorder.matmuls


def replay(matmuls: Sequence[Matmul], device: str | torch.device = "cpu") -> Callable[[], None]:
    """A call that runs them alone and waits for them. Operands are made now; those that look alike share memory."""
    made: dict[tuple[str, Operand], Tensor] = {}
    calls: list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]] = []
    for matmul in matmuls:
        left, right = (
            made.setdefault(key, made[key] if key in made else key[1].make(device))
            for key in (("left", matmul.left), ("right", matmul.right))
        )
        calls.append((torch.mm if left.dim() == 2 else torch.bmm, left, right))

    @torch.no_grad()
    def run() -> None:
        for multiply, left, right in calls:
            multiply(left, right)
        synchronize(str(device))

    return run
