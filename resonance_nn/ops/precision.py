"""Where precision is decided: what must not be computed in half precision is computed in ``wide_dtype``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@lru_cache
def computes_in_bf16(device: str) -> bool:
    """Whether devices of this type are known to multiply bfloat16 matrices faster than float32 ones: CPUs with AVX-512
    bf16 or AMX, NVIDIA's and AMD's GPUs that do not emulate it, Intel's. Not asked of Arm's CPUs and Apple's MPS."""
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "xpu" or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32, or x's dtype where that is wider: never narrower than the input."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What matmuls of x run in: autocast's dtype where it is on (float64 stays as it is), else x's."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def phase_dtype(x: Tensor) -> torch.dtype:
    """Where angles add up before they are reduced modulo 2π: float64, except on Apple's MPS, which has none."""
    return wide_dtype(x) if x.device.type == "mps" else torch.float64


def reduce_angle(angle: Tensor, dtype: torch.dtype) -> Tensor:
    """An accumulated angle modulo 2π, in ``dtype``: its cosine keeps full precision however large the angle was."""
    return torch.remainder(angle, 2 * math.pi).to(dtype)


def without_autocast(op: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Run an op with autocast off, on the device of its first tensor: the op chooses its own dtypes. A derivative too,
    which autocast would reach where ``backward`` is called inside of it."""

    @wraps(op)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None or first.device.type == "meta":  # shapes only; autocast knows no such device
            return op(*args, **kwargs)
        if not torch.is_autocast_enabled(first.device.type):  # a context costs as much as a small op
            return op(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return op(*args, **kwargs)

    return run


@without_autocast
def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ bias) in float32 or wider, whatever autocast says: for the few outputs that are summed over tokens."""
    wide = wide_dtype(x)
    return torch.nn.functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
