"""What the suites measure: our model, its peers, and one step of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resonance_nn.bench.inference import dtype_name, synchronize
from resonance_nn.bench.peers import PEERS, build_peer, check_peers, count
from resonance_nn.config import ResonanceConfig
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.unread import check_read

NOT_OVERRIDDEN = {  # options of their own, or what all models share
    *("vocab_size", "hidden_size", "num_hidden_layers", "mixers"),
    *("tie_word_embeddings", "use_cache", "format_version", "fim_rate"),
}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Our model.

    Args:
        hidden_size, layers, vocab_size: of ours; peers have the same width and vocabulary, and as many parameters.
        mixers: of ours; None means the configuration's default.
        overrides: further fields of our configuration.
        dtype: with gradients, of the matmuls, by autocast, and weights are float32; decoding and reading, of the
            weights.
        device: cpu, cuda, ...
        seed: of weights and tokens.
    """

    hidden_size: int = 512
    layers: int = 4
    vocab_size: int = 8192
    mixers: tuple[str, ...] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        self.at_least(1, "hidden_size", "layers", "vocab_size")
        check_read(self.overrides, [(ResonanceForCausalLM, self.config())])

    def at_least(self, minimum: int, *names: str) -> None:
        """Raise ValueError if one of these options is smaller."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} = {value}: must be ≥ {minimum}")

    def config(self) -> ResonanceConfig:
        """Our configuration."""
        for name in self.overrides:
            if name not in ResonanceConfig.own_fields() - NOT_OVERRIDDEN:
                raise ValueError(f"overrides: {name!r} is not a field that can be set here; see ResonanceConfig")
        chosen: dict[str, Any] = {} if self.mixers is None else {"mixers": self.mixers}
        return ResonanceConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            **chosen,
            **self.overrides,
        )

    def described(self) -> dict[str, Any]:
        """The options as JSON, the mixers by name."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"dtype": dtype_name(self.dtype), "overrides": dict(self.overrides)}
        plain["mixers"] = list(self.config().mixers)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


@dataclass(frozen=True, kw_only=True)
class PeerOptions(ModelOptions):
    """Our model, and ``peers`` beside it, names from ``peers.PEERS``."""

    peers: tuple[str, ...] = ("llama",)

    def check(self) -> None:
        super().check()
        check_peers(self.peers)


def build_ours(options: ModelOptions) -> ResonanceForCausalLM:
    """Ours, in float32."""
    with torch.device(options.device):
        return ResonanceForCausalLM(options.config())


def build_beside(
    ours: ResonanceForCausalLM, peers: Sequence[str], max_length: int
) -> tuple[dict[str, PreTrainedModel], dict[str, str]]:
    """The peers for sequences of at most ``max_length`` tokens, and a note on the shape of each, by label."""
    models: dict[str, PreTrainedModel] = {}
    notes: dict[str, str] = {}
    for name in peers:
        label = PEERS[name].label
        models[label], notes[label] = build_peer(name, ours.config, count(ours), max_length, str(ours.device))
    return models, notes


def build_alone(name: str, options: ModelOptions, max_length: int) -> PreTrainedModel:
    """A peer of the size of ours, which is not made."""
    with torch.device("meta"):
        ours = ResonanceForCausalLM(options.config())
    return build_peer(name, ours.config, count(ours), max_length, options.device)[0]


def sized(common: Mapping[str, Any], fields: Mapping[str, Any], reference: Mapping[str, Any]) -> ResonanceConfig:
    """Our config with ``common`` and ``fields``, its MLP as wide as makes the parameters equal to those of ``common``
    and ``reference``."""

    def parameters(config: ResonanceConfig) -> int:
        with torch.device("meta"):
            return count(ResonanceForCausalLM(config))

    config = ResonanceConfig(**{**common, **fields})
    width, size = config.intermediate_size, parameters(config)
    a_channel = parameters(ResonanceConfig(**{**common, **fields, "intermediate_size": width + 1})) - size
    width -= round((size - parameters(ResonanceConfig(**{**common, **reference}))) / a_channel)
    return ResonanceConfig(**{**common, **fields, "intermediate_size": max(1, width)})


@torch.no_grad()
def check_causal(model: nn.Module, vocab_size: int, length: int = 96) -> None:
    """A number is worth nothing if the model reads its own answers: changing a token must leave all logits before it
    as they are, and change some after it. Raises RuntimeError otherwise."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.randint(vocab_size, (1, length), device=device)
    before = model(ids, use_cache=False).logits
    for position in (1, length // 2, length - 1):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % vocab_size
        difference = (model(changed, use_cache=False).logits - before).abs().amax(-1)[0]
        scale = before.abs().max()
        if difference[:position].max() > 1e-4 * scale or difference[position:].max() == 0:
            raise RuntimeError(f"the model is not causal at position {position}: nothing is measured")
    model.train(training)


def autocast(options: ModelOptions) -> torch.autocast:
    """The matmuls' dtype, for a ``with``."""
    kind = torch.device(options.device).type
    return torch.autocast(kind, dtype=options.dtype, enabled=options.dtype != torch.float32)


def training_step(
    model: nn.Module, ids: Tensor, options: ModelOptions, *, forward_only: bool = False
) -> Callable[[], None]:
    """A call that runs a training step on (B, L) tokens, or its forward pass alone, and waits for it."""

    def step() -> None:
        with torch.set_grad_enabled(not forward_only), autocast(options):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if not forward_only:
            loss.backward()
            model.zero_grad(set_to_none=True)
        loss.item()
        synchronize(options.device)

    return step
