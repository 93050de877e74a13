"""Fields of a configuration that a model would not read: a setting without effect is a mistake."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from resonance_nn.config import ResonanceConfig

READ_LATER = {  # fields that are not asked about
    # read when a model is used, if not when it is built
    *("pooling", "label_smoothing", "z_loss_weight", "fim_rate", "use_cache", "initializer_range", "vocab_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "format_version"),
    *("initial_context", "key_groups", "rotation"),  # others are derived from them
    *("chunk_size", "backend"),  # of the machine, not of the model
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
    return [name for name in given if name in own]


def check_read(given: Mapping[str, Any], models: Sequence[tuple[type[PreTrainedModel], ResonanceConfig]]) -> None:
    """Raise ValueError where a given field is read by none of some models (a class and its configuration each)."""
    names = list(given)
    for architecture, config in models:
        names = unread_fields(architecture, config, names)
    refuse_unread(given, names if models else [])


def refuse_unread(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError naming the first of some given fields, if there are any."""
    if names:
        raise ValueError(
            f"{names[0]} = {given[names[0]]!r} changes nothing: no part of the model reads it; leave it out, or choose "
            "the mixer or other part that it is for (help(resonance_nn.ResonanceConfig) tells)"
        )
