"""transformers' Mamba-2 and Qwen3-Next with their scans computed by our operators, which are tested to be equal: the
same models, weights and starts, trained in a fraction of the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Mamba2ForCausalLM, PreTrainedModel
from transformers.models.qwen3_next import modeling_qwen3_next

from resonance_nn.models.mamba2 import load_mamba2_layer
from resonance_nn.ops.delta_rule import delta_rule_chunked


class FastMamba2(nn.Module):
    """A ``Mamba2Mixer`` computed by ``spectral_gate``, for whole sequences."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.mixer = load_mamba2_layer(layer)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.mixer(hidden_states)[0]


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """``torch_chunk_gated_delta_rule`` of transformers by :func:`delta_rule_chunked`; the same arguments."""
    query, key = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    query, key = query.to(value.dtype), key.to(value.dtype)
    y, state = delta_rule_chunked(value, key, query, beta, g, state=initial_state)
    return y, state if output_final_state else None


def accelerate(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its Mamba-2 layers computed by ours; others as they are."""
    if isinstance(model, Mamba2ForCausalLM):
        for block in model.backbone.layers:
            block.mixer = FastMamba2(block.mixer)  # type: ignore[union-attr]
    return model


@contextmanager
def accelerated_delta_rule() -> Iterator[None]:
    """While it lasts, Qwen3-Next's gated delta rule is computed by ours."""
    original = modeling_qwen3_next.torch_chunk_gated_delta_rule
    modeling_qwen3_next.torch_chunk_gated_delta_rule = gated_delta_rule
    try:
        yield
    finally:
        modeling_qwen3_next.torch_chunk_gated_delta_rule = original
