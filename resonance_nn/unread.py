"""Fields of a configuration that a model would not read: a setting without effect is a mistake."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from resonance_nn.config import ResonanceConfig

READ_LATER = {  # fields of a configuration that models read when they are used, if not when they are built
    *("pooling", "label_smoothing", "z_loss_weight", "modality_dropout", "fim_rate", "use_cache", "initializer_range"),
    *("initial_context", "chunk_size", "backend", "vocab_size", "sampling_rate", "format_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
}


def unread_fields(architecture: type[PreTrainedModel], config: ResonanceConfig, given: Iterable[str]) -> list[str]:
    """Which of some fields a model of this configuration is built without reading: they would change nothing."""
    read: set[str] = set()

    class Recorded(ResonanceConfig):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    recorded = copy.copy(config)
    recorded.__class__ = Recorded
    recorded.num_hidden_layers = min(config.num_hidden_layers, len(config.mixers))  # each kind of layer once
    with torch.device("meta"):
        architecture(recorded)
    own = ResonanceConfig.own_fields() - READ_LATER - read
    return [name for name in given if ResonanceConfig.attribute_map.get(name, name) in own]


def check_read(given: Mapping[str, Any], models: Sequence[tuple[type[PreTrainedModel], ResonanceConfig]]) -> None:
    """Raise ValueError where a given field is read by none of some models (a class and its configuration each)."""
    names = list(given)
    for architecture, config in models:
        names = unread_fields(architecture, config, names)
    if names and models:
        raise ValueError(
            f"{names[0]} = {given[names[0]]!r} changes nothing: no part of the model reads it; leave it out, or choose "
            "the mixer or other part that it is for (help(resonance_nn.ResonanceConfig) tells)"
        )
