"""Weights in the order a CPU's matmul kernels read them: decoding is bound by reading weights.

PyTorch hands a weight (out, in) to oneDNN as it lies in memory, and for a few tokens the kernel spends more time on
rearranging it than on multiplying. Rearranged once, a bfloat16 weight is read at the speed of memory, twice as fast;
float32 products are two to three times as fast for any number of tokens, where PyTorch would call MKL. The same kernels
serve ``torch.compile`` when it freezes a model's weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_ELEMENTS = 1 << 16  # of a weight: a smaller one is read faster than the kernel is called


def pack_weights(model: nn.Module) -> int:
    """Prepare a model's linear layers for inference on a CPU, in place: each keeps its weight, as a parameter, and a
    copy in the kernels' order, twice the memory.

    What the model computes stays the same but for rounding. Copies follow their weights when these are changed. With
    gradients, under autocast or on another device the layers are as before. Works for any module, transformers' models
    among them.

    Returns:
        How many layers have been prepared: 0 where this PyTorch or processor has no such kernels, or nothing is on a
        CPU in float32 or bfloat16. Layers of other types than ``nn.Linear`` (adapters, quantised ones) stay as they
        are.
    """
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= MIN_ELEMENTS and _can_pack(child.weight):
                setattr(parent, name, PackedLinear(child))
                packed += 1
    return packed


class PackedLinear(nn.Linear):
    """An ``nn.Linear`` with the same parameters and a copy of its weight for inference, see :func:`pack_weights`."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self._copy: Tensor | None = None
        # what the copy is of: the weight, its data, which are kept so that no others take their place, and its version
        self._source: tuple[Tensor, Tensor, int] | None = None
        self._packed_weight()

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        other = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        if other or input.dtype != weight.dtype or (packed := self._packed_weight()) is None:
            return F.linear(input, weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")

    def _packed_weight(self) -> Tensor | None:
        """The copy, made anew if the weight has changed; None if it has become one that cannot be packed."""
        weight = self.weight
        if self._source is not None:
            source, data, version = self._source
            if weight is source and weight.data_ptr() == data.data_ptr() and weight._version == version:
                return self._copy
        if not _can_pack(weight):
            self._copy = self._source = None
            return None
        self._source = weight, weight.detach(), weight._version
        self._copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        return self._copy

    def __getstate__(self) -> dict[str, Any]:  # the copy cannot be copied or saved, and need not be
        return {**self.__dict__, "_copy": None, "_source": None}


def _can_pack(weight: Tensor) -> bool:
    """A plain tensor (not a quantised one), on a CPU, that counts its changes (as none of inference mode does)."""
    plain = type(weight.data) is Tensor and weight.is_cpu and not weight.is_inference()
    return plain and _has_kernels(weight.dtype)


@lru_cache
def _has_kernels(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        weight = torch.eye(16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(weight, packed, None, "none", [], ""), weight)
    except (AttributeError, RuntimeError):  # another version of PyTorch, or a processor without them
        return False
