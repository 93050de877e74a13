"""Caches of the models that ``decode`` times: checked token by token, and Llama's filled with a context."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache


@torch.no_grad()
def check_decoding(model: PreTrainedModel, caches: Mapping[str, Callable[[], Cache]], length: int = 64) -> None:
    """Token by token after ``length`` tokens, with each cache, a model must give the logits of one pass. Raises
    RuntimeError otherwise."""
    model.eval()
    ids = torch.randint(model.config.vocab_size, (2, length + 4), device=model.device)
    expected = model(ids).logits[:, length:]
    for name, make in caches.items():
        cache = make()
        model(ids[:, :length], past_key_values=cache, use_cache=True)
        tokens = ids[:, length:].split(1, dim=1)
        logits = torch.cat([model(t, past_key_values=cache, use_cache=True).logits for t in tokens], dim=1)
        if not (logits - expected).abs().max() <= 1e-3 * expected.abs().max():
            raise RuntimeError(f"decoding with {name} gives other logits than one pass: nothing is measured")


def kv_bytes(model: LlamaForCausalLM, context: int, batch_size: int) -> int:
    """Of the keys and values of all layers, in the model's dtype."""
    return 2 * model.config.num_hidden_layers * math.prod(_kv_shape(model, context, batch_size)) * model.dtype.itemsize


def filled_caches(
    model: LlamaForCausalLM, context: int, batch_size: int, room: int
) -> tuple[DynamicCache, StaticCache]:
    """Both caches with random keys and values of ``context`` tokens; the static one has room for ``room`` more."""
    noise = torch.randn(_kv_shape(model, context, batch_size), dtype=model.dtype, device=model.device)
    dynamic = DynamicCache(config=model.config)
    static = StaticCache(config=model.config, max_cache_len=context + room)
    for i in range(model.config.num_hidden_layers):
        dynamic.update(noise, noise, i)
        static.update(noise, noise, i)
    return dynamic, static


def _kv_shape(model: LlamaForCausalLM, context: int, batch_size: int) -> tuple[int, int, int, int]:
    config: Any = model.config
    return batch_size, config.num_key_value_heads, context, config.head_dim
