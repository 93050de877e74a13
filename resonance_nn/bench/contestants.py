"""The models that `bench recall` and `bench tracking` compare, by name: ours, and peers of equal width and depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from resonance_nn.bench.models import ModelOptions, build_alone
from resonance_nn.bench.peers import PEER
from resonance_nn.config import ResonanceConfig, usual_heads
from resonance_nn.models import ResonanceForCausalLM


@dataclass(frozen=True)
class Shape:
    """What all models of a comparison share.

    Args:
        hidden_size: width D.
        layers: blocks.
        vocab_size: of the task.
        length: the longest sequence, in tokens.
        state_size: K, what a layer remembers in reals for each of the D channels: the rows of the K × P matrix of a
            head. A model of inner width 2D has half of them, so equal K means equal bytes.
        num_heads: H of ours; None means heads of 64 channels.
        initializer_range: standard deviation of all linear maps and embeddings at first. At width 128 the usual 0.02
            makes small activations: with it the gated delta rule had not begun to recall after 1,400 steps, with 0.06
            it was at 92% after 600 (docs/bench_recall.md).
        initial_context: of ours: the longest time constants, and the slowest frequencies, at first, in tokens; None
            means ``length``.
        shortest_context: the shortest ones; None means as long as the longest. With the config's 4, one of two heads
            keeps next to nothing at first, and the gated delta rule of K = 32 was at 1% in recall at step 800, in place
            of 62% (docs/experiments.md, 4).
    """

    hidden_size: int = 128
    layers: int = 2
    vocab_size: int = 512
    length: int = 512
    state_size: int = 64
    num_heads: int | None = None
    initializer_range: float = 0.06
    initial_context: int | None = None
    shortest_context: int | None = None


@dataclass(frozen=True)
class Contestant:
    """A model by name: ``fields`` of our config, None for transformers' Llama; ``note`` is what a reader must know."""

    fields: Mapping[str, Any] | None
    note: str = ""

    @property
    def has_state_size(self) -> bool:
        """Whether the state's size can be chosen. Keys and values of attention grow with the context instead."""
        return self.fields is not None and self.fields["mixers"] != ("attention",)

    def build(self, shape: Shape) -> PreTrainedModel:
        """The model, in float32, from the global seed.

        Raises:
            ValueError: no such shape of this model.
        """
        if self.fields is None:
            fields = {"mlp": MLP, **{name: value for name, value in COMPLEX.items() if name != "mixers"}}
            options = ModelOptions(
                hidden_size=shape.hidden_size,
                layers=shape.layers,
                vocab_size=shape.vocab_size,
                mixers=COMPLEX["mixers"],
                overrides=fields,
            )
            llama = build_alone("llama", options, shape.length)
            head = llama.get_output_embeddings()  # its weight is the embedding's
            for module in llama.modules():
                if isinstance(module, nn.Linear | nn.Embedding) and module is not head:
                    with torch.no_grad():
                        module.weight.mul_(shape.initializer_range / llama.config.initializer_range)
            return llama
        return ResonanceForCausalLM(self.config(shape))

    def config(self, shape: Shape) -> ResonanceConfig:
        """Ours in this shape."""
        assert self.fields is not None
        expand = self.fields.get("expand", 1)
        modes, rest = divmod(shape.state_size, 2 * expand)
        if modes < 1 or rest:
            raise ValueError(f"state_size = {shape.state_size}: must be a multiple of {2 * expand}")
        heads = shape.num_heads or usual_heads(shape.hidden_size)
        return ResonanceConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            initial_context=shape.initial_context or shape.length,
            shortest_context=shape.shortest_context or shape.initial_context or shape.length,
            num_heads=heads * expand,  # so that heads are of one size
            initializer_range=shape.initializer_range,
            num_modes=modes,
            mlp=MLP,
            **self.fields,
        )


def state_bytes(model: PreTrainedModel, length: int) -> int:
    """What a sequence of ``length`` tokens leaves to remember, in all layers, in float32."""
    if isinstance(model, ResonanceForCausalLM):
        return sum(block.mixer.state_bytes(length) for block in model.model.backbone.blocks)  # type: ignore[union-attr]
    config = model.config
    size = torch.finfo(torch.float32).bits // 8
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length * size


MLP = "swiglu"  # of all of ours, as Llama's
EQUAL = "trained through our operator, equal to transformers' in "
SPECTRAL_GATE: dict[str, Any] = {  # b and c a head
    "mixers": ("spectral_gate",),
    "num_groups": None,
    "activate_values": True,
    "output_norm": "head",
}
COMPLEX = {**SPECTRAL_GATE, "rotation": "step"}  # the form whose size Llama has
MAMBA2 = {
    **SPECTRAL_GATE,
    "rotation": "none",
    "num_groups": 1,
    "normalize_gates": False,
    "activate_values": True,
    "output_norm": "gated",
    "conv_bias": True,
    "expand": 2,
    "norm_eps": 1e-5,
}
HOLOGRAPHIC: dict[str, Any] = {
    "mixers": ("holographic",),
    "key_groups": None,
    "output_gate": "silu",
    "initial_recall": 0.0,
    "erase": "delta",
    "decay": "head",
    "rotation": "none",
    "max_beta": 1.0,
}
CHANNEL = {**HOLOGRAPHIC, "decay": "channel"}
CONTESTANTS: dict[str, Contestant] = {
    "llama": Contestant(None, f"{PEER}; parameters within 2% of spectral_gate's at K = 64"),
    "attention": Contestant({"mixers": ("attention",)}, "ours"),
    "mamba2": Contestant(MAMBA2, EQUAL + "tests/test_mamba2.py; decays and steps begin as spectral_gate's"),
    "mamba2_own_start": Contestant({**MAMBA2, "initial_step": (0.001, 0.1)}, "decays and steps begin as transformers'"),
    "gated_delta": Contestant(HOLOGRAPHIC, EQUAL + "tests/test_ops_delta_rule.py"),
    "resonance": Contestant({"mixers": ("resonance",), "filters": "channel"}, "constant filters"),
    "spectral_gate": Contestant(COMPLEX),
    "spectral_gate_token": Contestant({**SPECTRAL_GATE, "rotation": "token"}, "modes turn by tokens' angles too"),
    "spectral_gate_real": Contestant({**SPECTRAL_GATE, "rotation": "none"}, "real decays only"),
    "holographic": Contestant({"mixers": ("holographic",)}, "as it comes"),
    "holographic_hebbian": Contestant({**HOLOGRAPHIC, "erase": "none"}, "nothing is erased"),
    "holographic_reflecting": Contestant({**HOLOGRAPHIC, "max_beta": 2.0}, "β up to 2"),
    "holographic_channel": Contestant(CHANNEL, "a decay a key channel"),
    "holographic_gated": Contestant({**CHANNEL, "erase": "gated"}, "erase and write gates a channel"),
    "holographic_turning": Contestant({**HOLOGRAPHIC, "rotation": "token"}, "half of the heads turn by roots of unity"),
    "holographic_turning_only": Contestant(
        {**HOLOGRAPHIC, "rotation": "token", "conv_size": 1}, "as holographic_turning, without short convolutions"
    ),
    "holographic_rotating": Contestant(
        {**CHANNEL, "erase": "hermitian", "rotation": "token"}, "complex keys, gates a channel, roots of unity"
    ),
}
