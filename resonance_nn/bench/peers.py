"""transformers' models that ours is measured beside, by name, each in its plain PyTorch form.

All have our width, vocabulary and tied embeddings, and parameters within ``TOLERANCE`` of a given number. The published
shape of each is kept but for one size, which is chosen to come nearest to that number; a note says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from resonance_nn.config import ResonanceConfig, usual_heads

TOLERANCE = 0.02
STEP = 8  # the chosen size is a multiple of it
Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """A model of transformers'.

    Args:
        label: its name in tables.
        make: (fields that all share, our configuration, layers, the chosen size, the longest sequence) -> model.
        sized_by: what the chosen size is, for people.
        layers: for one of ours, of which it may have fewer so that the size is not below ``least``.
        least: of the chosen size, where it is published.
    """

    label: str
    make: Callable[[Shape, ResonanceConfig, int, int, int], PreTrainedModel]
    sized_by: str
    layers: int = 1
    least: int = STEP


def _llama(shape: Shape, ours: ResonanceConfig, layers: int, size: int, max_length: int) -> PreTrainedModel:
    fields: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": usual_heads(ours.hidden_size),
        "intermediate_size": size,
        "max_position_embeddings": max_length,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**shape, **fields))


def _mamba2(shape: Shape, ours: ResonanceConfig, layers: int, size: int, max_length: int) -> PreTrainedModel:
    heads = usual_heads(ours.hidden_size)
    config = Mamba2Config(
        **shape,
        num_hidden_layers=layers,
        expand=2,  # the configuration takes whole numbers only, so that the inner width cannot be the chosen size
        num_heads=2 * heads,
        head_dim=ours.hidden_size // heads,
        n_groups=1,
        state_size=size,
    )
    return Mamba2ForCausalLM(config)


def _mamba(shape: Shape, ours: ResonanceConfig, layers: int, size: int, max_length: int) -> PreTrainedModel:
    config = MambaConfig(**shape, num_hidden_layers=layers)
    config.intermediate_size = size  # derived from a whole multiple of the width otherwise
    return MambaForCausalLM(config)


def _rwkv(shape: Shape, ours: ResonanceConfig, layers: int, size: int, max_length: int) -> PreTrainedModel:
    if layers < 2:
        raise ValueError("layers = 1: transformers' RWKV needs two or more")
    config = RwkvConfig(
        **shape,
        num_hidden_layers=layers,
        intermediate_size=size,
        context_length=max_length,
        rescale_every=0,  # halves weights in evaluation, against overflow in fp16; no other effect
    )
    return RwkvForCausalLM(config)


def _gated_delta(shape: Shape, ours: ResonanceConfig, layers: int, size: int, max_length: int) -> PreTrainedModel:
    heads = usual_heads(ours.hidden_size)
    head_size = ours.hidden_size // heads
    config = Qwen3NextConfig(
        **shape,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
        mlp_only_layers=list(range(layers)),  # no experts
        intermediate_size=size,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_size,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=head_size,
        linear_value_head_dim=head_size,
        max_position_embeddings=max_length,
    )
    return Qwen3NextForCausalLM(config)


PEERS: dict[str, Peer] = {
    "llama": Peer("Llama (SDPA)", _llama, "intermediate size {}"),
    "mamba2": Peer("Mamba-2", _mamba2, "without MLP, a group, state size {}", layers=2, least=64),  # published: 128
    "mamba": Peer("Mamba", _mamba, "without MLP, inner width {}", layers=2),
    "rwkv": Peer("RWKV-4", _rwkv, "intermediate size {}"),
    "gated_delta": Peer("Qwen3-Next (gated delta)", _gated_delta, "all linear, intermediate size {}"),
}
PEER = PEERS["llama"].label


def build_peer(
    name: str, ours: ResonanceConfig, parameters: int, max_length: int, device: str = "cpu"
) -> tuple[PreTrainedModel, str]:
    """A model of ``PEERS`` beside one of ours with this configuration and number of parameters.

    Returns:
        The model, in float32, and a note on its shape.

    Raises:
        ValueError: no such peer, none of this depth, or none within 2% of ``parameters``.
    """
    check_peers((name,))
    peer = PEERS[name]
    shape = {"vocab_size": ours.vocab_size, "hidden_size": ours.hidden_size, "tie_word_embeddings": True}
    layers = size = 0
    for layers in range(peer.layers * ours.num_hidden_layers, 0, -1):
        with torch.device("meta"):
            smallest, next_one = (count(peer.make(shape, ours, layers, n * STEP, max_length)) for n in (1, 2))
        size = STEP + STEP * max(0, round((parameters - smallest) / (next_one - smallest)))
        if size >= peer.least:
            break
    with torch.device(device):
        model = peer.make(shape, ours, layers, size, max_length)
    if abs(count(model) / parameters - 1) > TOLERANCE:
        raise ValueError(
            f"hidden_size = {ours.hidden_size}: no {peer.label} within {TOLERANCE:.0%} of our {parameters:,} "
            f"parameters (the nearest has {count(model):,}); use a larger width"
        )
    return model, f"{layers} layers, {peer.sized_by.format(f'{size:,}')}"


def check_peers(names: Sequence[str]) -> None:
    """Raise ValueError if one of the names is not in ``PEERS``, or comes twice."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peers = {','.join(names)}: {name!r} is not one of {', '.join(PEERS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"peers = {','.join(names)}: each at most once")


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())
