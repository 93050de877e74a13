"""One flat, validated configuration for every model of the package."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from resonance_nn.mixers import MIXERS

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 6},
    "small": {"hidden_size": 512, "num_hidden_layers": 12},
    "base": {"hidden_size": 768, "num_hidden_layers": 12},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24},
    "large": {"hidden_size": 1536, "num_hidden_layers": 32},
    "xlarge": {"hidden_size": 2048, "num_hidden_layers": 40},
}
FORMAT_VERSION = 1
DERIVED: Any = None  # a field left out: __post_init__ derives it from the width
Filters = Literal["head", "channel"]


class ResonanceConfig(PreTrainedConfig):
    """Configuration of a backbone and the models on it.

    Args:
        vocab_size: entries of the vocabulary, ≥ 2.
        hidden_size: width D.
        num_hidden_layers: blocks.
        num_heads: heads H of every mixer, a divisor of D with D/H ≥ 8; None means heads of 64 channels, or of as many
            as divide D. ``num_attention_heads`` is an alias.
        intermediate_size: inner width of the SwiGLU; None means 8/3·D rounded up to a multiple of 64.
        mixers: names from ``MIXERS``, tiled over the layers: ("spectral_gate", "attention") alternates them.
        num_modes: complex modes N a head (``spectral_gate``) or a filter (``resonance``); None means D/(2H), so that a
            head keeps as many reals a channel as it has channels.
        filters: ``resonance`` only: one filter a "head" or a "channel".
        conv_size: width of the short causal convolutions; 1 turns them into a scale.
        chunk_size: tokens T that ``spectral_gate`` takes in one masked matmul.
        initial_context: the longest memory at initialisation, in tokens. It bounds nothing.
        rope_theta: base of the rotary frequencies of ``attention``.
        norm_eps: epsilon of the RMSNorms.
        dropout: on the output of each mixer and MLP, while training.
        initializer_range: standard deviation of the linear maps at initialisation.
        tie_word_embeddings: whether the output head is the embedding.
        label_smoothing: auxiliary term of the training loss, ε in [0, 1).
        z_loss_weight: auxiliary term of the training loss, ζ · mean(lse²).
        use_cache: whether a forward pass in evaluation without labels returns a cache.
        format_version: of this file; a later version keeps old checkpoints as they were.

    Raises:
        ValueError: naming the field, its value, what is allowed and the likely fix.
    """

    model_type = "resonance"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (the base class's type)
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32_768
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_heads: int = DERIVED
    intermediate_size: int = DERIVED
    mixers: tuple[str, ...] = ("spectral_gate",)
    num_modes: int = DERIVED
    filters: str = "head"
    conv_size: int = 4
    chunk_size: int = 64
    initial_context: int = 2048
    rope_theta: float | int = 10_000.0
    norm_eps: float = 1e-6
    dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    label_smoothing: float | int = 0.0
    z_loss_weight: float | int = 0.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        alias = kwargs.pop("num_attention_heads", DERIVED)
        if self.num_heads is DERIVED:
            self.num_heads = alias
        elif alias not in (DERIVED, self.num_heads):
            raise ValueError(f"num_heads = {self.num_heads!r} and num_attention_heads = {alias!r}: one field; give one")
        if not isinstance(self.mixers, str | tuple | list):
            raise ValueError(f"mixers = {self.mixers!r}: must be names, such as ('spectral_gate',)")
        self.mixers = (self.mixers,) if isinstance(self.mixers, str) else tuple(self.mixers)
        if self.num_heads is DERIVED:
            self.num_heads = _default_heads(self.hidden_size)
        self._validate()
        if self.intermediate_size is DERIVED:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.num_modes is DERIVED:
            self.num_modes = self.hidden_size // self.num_heads // 2
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, name: str, **overrides: Any) -> ResonanceConfig:
        """A named size with any fields overridden; what is left out is derived from the overridden width."""
        if name not in SIZES:
            raise ValueError(f"size = {name!r}: must be one of {', '.join(SIZES)}")
        unknown = set(overrides) - set(cls.__dataclass_fields__) - set(cls.attribute_map)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no such field of ResonanceConfig")
        return cls(**{**SIZES[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Overrides of fields go through the constructor, so that they are checked and derived from like others."""
        own = set(cls.__dataclass_fields__) | set(cls.attribute_map)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        if overrides.keys() & {"num_heads", "num_attention_heads"}:
            config_dict = {k: v for k, v in config_dict.items() if k not in ("num_heads", "num_attention_heads")}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.num_hidden_layers))

    def _validate(self) -> None:
        def check(condition: bool, field: str, allowed: str) -> None:
            if not condition:
                raise ValueError(f"{field} = {getattr(self, field)!r}: must be {allowed}")

        for field, minimum in (
            ("vocab_size", 2),
            ("hidden_size", 8),
            ("num_hidden_layers", 1),
            ("num_heads", 1),
            ("conv_size", 1),
            ("chunk_size", 1),
            ("initial_context", 2),
        ):
            value = getattr(self, field)
            check(type(value) is int and value >= minimum, field, f"an integer ≥ {minimum}")
        for field in ("intermediate_size", "num_modes"):
            value = getattr(self, field)
            check(value is DERIVED or (type(value) is int and value >= 1), field, "an integer ≥ 1, or None to derive")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads < 8:
            fits = [h for h in range(1, self.hidden_size // 8 + 1) if self.hidden_size % h == 0]
            raise ValueError(
                f"num_heads = {self.num_heads}: must divide hidden_size = {self.hidden_size} into heads of at least 8 "
                f"channels; {', '.join(map(str, fits))} do"
            )
        check(len(self.mixers) > 0, "mixers", f"one or more of {', '.join(MIXERS)}")
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(f"mixers = {self.mixers!r}: {name!r} is unknown; choose from {', '.join(MIXERS)}")
        check(self.filters in get_args(Filters), "filters", " or ".join(map(repr, get_args(Filters))))
        for field, low, high, allowed in (
            ("dropout", 0, 1, "in [0, 1)"),
            ("label_smoothing", 0, 1, "in [0, 1)"),
            ("z_loss_weight", 0, math.inf, "≥ 0"),
            ("norm_eps", 1e-30, 1, "in (0, 1)"),
            ("initializer_range", 1e-30, math.inf, "> 0"),
            ("rope_theta", 1e-30, math.inf, "> 0"),
        ):
            value = getattr(self, field)
            check(isinstance(value, int | float) and low <= value < high, field, allowed)
        for field in ("tie_word_embeddings", "use_cache"):
            check(isinstance(getattr(self, field), bool), field, "True or False")
        check(isinstance(self.format_version, int), "format_version", "an integer")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format_version = {self.format_version}: this release of resonance-nn reads up to {FORMAT_VERSION}; "
                "upgrade it to load this checkpoint"
            )


def _default_heads(hidden_size: int) -> int:
    """Heads of 64 channels, else of the largest number of channels ≤ 128 and ≥ 8 that divides the width."""
    for channels in (64, *range(63, 7, -1), *range(65, 129)):
        if isinstance(hidden_size, int) and hidden_size % channels == 0:
            return hidden_size // channels
    return 1
