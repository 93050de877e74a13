"""One flat, validated configuration for every model of the package."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from resonance_nn.config_checks import DERIVED, FORMAT_VERSION, NAMES, as_names, check_fields

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 6},
    "small": {"hidden_size": 512, "num_hidden_layers": 12},
    "base": {"hidden_size": 768, "num_hidden_layers": 12},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24},
    "large": {"hidden_size": 1536, "num_hidden_layers": 32},
    "xlarge": {"hidden_size": 2048, "num_hidden_layers": 40},
}
RECIPES: dict[str, dict[str, Any]] = {  # named settings, each measured: docs/results.md says for what
    "default": {},
    "spectral": {"mixers": ("spectral_gate",)},  # the fastest to train
    "hybrid": {"mixers": ("holographic", "holographic", "holographic", "spectral_gate")},  # as good, faster to train
    "memory": {"mixers": ("holographic",), "decay": "none", "gates": "hard"},  # forgets nothing but what it overwrites
}
TRAINING_FIELDS = {  # without effect in evaluation
    *("dropout", "initializer_range", "initial_context", "shortest_context", "initial_step", "initial_recall"),
    *("label_smoothing", "z_loss_weight", "entropy_weight", "mode_noise", "modality_dropout", "fim_rate"),
    "format_version",
}


class ResonanceConfig(PreTrainedConfig):
    """Configuration of a backbone and the models on it.

    Args:
        vocab_size: entries of the vocabulary, ≥ 2.
        hidden_size: width D.
        num_hidden_layers: blocks.
        num_heads: heads H of every mixer, a divisor of D with D/H ≥ 8; None means heads of 64 channels, of 256 for
            "memories", which is what we call a model whose mixers are all ``holographic`` with keys that are shared
            (``key_groups`` 1) and do not turn, or of fewer that divide D. ``num_attention_heads`` is an alias.
        mlp: "relu2", W_down max(W_up x, 0)², or "swiglu", W_down (silu(W_gate x) ∘ W_up x).
        intermediate_size: inner width of the MLP; None means 4·D of "relu2" and 8/3·D of "swiglu", which has a third
            matrix, rounded up to a multiple of 64.
        mixers: names from ``MIXERS``, tiled over the layers: ("spectral_gate", "attention") alternates them.
            "multi_scale:" before a causal one adds coarse copies of it, see ``scales``.
        num_modes: complex modes N a head (``spectral_gate``, 2N real ones with ``rotation`` "none") or a filter
            (``resonance``); None means D/(2H), so that a head keeps as many reals a channel as it has channels, and for
            memories D/8, but at least 32 and at most 128 or D/(2H).
        filters: ``resonance`` and ``global_filter``: one filter a "head" or a "channel".
        filter_size: ``global_filter``: where its filter is learned, tokens, or (rows, columns) of images; at other
            sizes it is interpolated. None means ``initial_context`` tokens.
        num_bands: ``global_filter``: octave bands (of each axis) that its gate tells apart, fewer where the filter is
            too small for them.
        rotation: what turns the modes of ``spectral_gate`` and ``holographic``: "none" (real modes), "step" (ω_n times
            the step δ_t) or "token": in ``spectral_gate`` by an angle of each token's own too, in ``holographic``
            half of the heads by roots of unity that a token chooses, the others not at all.
        orders: ``holographic`` with ``rotation`` "token": the orders p of those roots, in turn over the modes. Modes of
            order p can count modulo p.
        expand: inner width of ``spectral_gate`` over D.
        num_groups: ``spectral_gate``: G groups of heads that share the gates b and c; None means a group a head.
        normalize_gates: ``spectral_gate``: whether b and c have norm 1.
        activate_values: ``spectral_gate``: whether the values v pass through silu, as b and c do.
        output_norm: ``spectral_gate``: RMSNorm a "head", then the gate silu(z), or the "gated" output normalised
            in groups, as in Mamba-2, or "none".
        conv_bias: ``spectral_gate``: whether the short convolution has a bias.
        time_step_limit: ``spectral_gate``: (low, high), bounds of the step δ; None for none.
        initial_step: ``spectral_gate``: (low, high), bounds of δ at initialisation, log-uniform over the heads as in
            Mamba-2, whose damping a = 1 … H goes with it; None for δ = 1 and time constants up to ``initial_context``.
        frequency_mixing: ``spectral_gate``: read c^H (I + C) S with a learned complex matrix C a head, 0 at first.
        mode_fraction: ``spectral_gate``: ρ in (0, 1], the share of modes that a token reads, those of largest score.
        mode_noise: ``spectral_gate``: scale of the Gumbel noise on those scores in training.
        entropy_weight: ``spectral_gate``: weight λ of λ(log N − H(p)) in the loss, p the modes' share of energy.
        trapezoidal: ``spectral_gate``: whether a token writes a learned mean of its input and the one before.
        key_groups: ``holographic``: G groups of heads that share keys and queries; None means a group a head.
        erase: ``holographic``: what a write erases first: "delta" (β of what its key recalls), "gated" (erase and write
            gates a channel), "hermitian" (the complex form of "gated") or "none" (Hebbian).
        decay: ``holographic``: forgetting by one factor a "head", one a key "channel", or "none".
        gates: ``holographic``: how its gates to write and erase depend on their scores: "soft", σ, never quite shut, or
            "hard", clamp(1.2σ − 0.1, 0, 1), which can be.
        max_beta: ``holographic``: upper bound of β, in (0, 2]; above 1 a write can reflect.
        output_gate: ``holographic``: what its output is multiplied by: "sigmoid", 2σ(z), 1 at first, or "silu", z σ(z).
        num_traces: ``hrr``: traces R a head; with 2 or more a write erases first.
        max_coupling: ``resolvent``: upper bound b_max of the couplings b_t, the unit of energy; half of it at first.
        min_damping: ``resolvent``: lower bound η_min of η; None means max_coupling/(2·initial_context), half of η at
            first.
        prime_bump: ``resolvent``: whether the potential has learned multiples of the prime bumps, at the positions of a
            document that are prime powers less 1.
        prime_bump_limit: ``resolvent``: tokens beyond which there are none.
        prime_bump_epsilon: ``resolvent``: ε of their weights (log p) p^{−k(1/2+ε)}.
        conv_size: width of the short causal convolutions; 1 turns them into a scale.
        chunk_size: tokens T that the chunked operators take in one masked matmul.
        backend: what computes the chunked operators of ``spectral_gate`` and ``holographic``: "torch", or "fla", the
            kernels of fla-core on an NVIDIA GPU (docs/backend.md). Of the machine, not of the model: it is not saved.
        initial_context: the longest memory at initialisation, in tokens. It bounds nothing.
        shortest_context: ``spectral_gate``, ``holographic`` and ``hrr``: the shortest one; the heads' are log-spaced
            between them. None means 4, and for memories ``initial_context``/16.
        initial_recall: ``holographic``: how strongly a layer at first recalls what followed the last token like the
            present one (an induction head), where keys do not turn; 0 for random maps.
        scales: ``multi_scale:…``: lengths of the blocks in tokens, ascending, each ≥ 2.
        sliding_window: ``sliding_attention``: tokens W that one sees, itself among them.
        rope_theta: base of the rotary frequencies of ``attention`` and ``sliding_attention``.
        norm_eps: epsilon of the RMSNorms.
        dropout: on the tokens' vectors and on the output of each mixer and MLP, while training.
        initializer_range: standard deviation of the linear maps at initialisation.
        pooling: of a text, image or sound to one vector: the "mean" of its tokens, the "last" or the "first".
        image_size: rows and columns of pixels that images are trained at, or one number for both; None where there are
            none. A multiple of ``patch_size``. ``filter_size`` is then that of their patches unless it is given.
        patch_size: pixels of a square patch's side, a token.
        num_channels: of images: 1 is grey, 3 red, green and blue.
        sampling_rate: samples a second of sounds.
        front_end: from samples to tokens: "waveform", frames of ``frame_size`` of them, or "log_mel".
        frame_size: samples that a token of "waveform" holds.
        window_size: samples of the window of "log_mel"; None means 25 ms.
        hop_size: samples from one such window to the next; None means 10 ms.
        num_mel_bins: bands of "log_mel".
        encoder_mixers: as ``mixers``, of the encoder of texts in models that have more than one stack.
        num_encoder_layers: blocks of each encoder in such models; None means ``num_hidden_layers``.
        bridge: from the encoder to the decoder, a "memory" or a "spectral" one, of ``num_heads`` and ``num_modes``; the
            memory has convolutions of ``conv_size``.
        decoder_start_token_id: what a target begins with; None means ``bos_token_id``.
        modalities: what a multimodal model takes, of "text", "image" and "audio".
        fusion: of modalities, "holographic" or "spectral".
        modality_dropout: while training, the chance of each modality of an example to be left out, if others are there.
        image_mixers: as ``mixers``, of the encoder of images beside others.
        audio_mixers: as ``mixers``, of the encoder of sounds beside others.
        tie_word_embeddings: whether the output head is the embedding.
        label_smoothing: auxiliary term of the training loss, ε in [0, 1).
        z_loss_weight: auxiliary term of the training loss, ζ · mean(lse²).
        fim_rate: of a language model: the share of its training documents whose middle it learned to fill in
            (``resonance_nn.data.fim``); 0 means that it cannot.
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
    mlp: str = "relu2"
    intermediate_size: int = DERIVED
    mixers: tuple[str, ...] = ("holographic",)
    num_modes: int = DERIVED
    filters: str = "head"
    filter_size: int | tuple[int, int] | None = DERIVED
    num_bands: int = 8
    rotation: str = "none"
    orders: tuple[int, ...] = (2, 3, 5, 7)
    expand: int = 1
    num_groups: int | None = 1
    normalize_gates: bool = True
    activate_values: bool = False
    output_norm: str = "head"
    conv_bias: bool = False
    time_step_limit: tuple[float, float] | None = None
    initial_step: tuple[float, float] | None = None
    frequency_mixing: bool = False
    mode_fraction: float | int = 1.0
    mode_noise: float | int = 0.0
    entropy_weight: float | int = 0.0
    trapezoidal: bool = False
    key_groups: int | None = 1
    erase: str = "delta"
    decay: str = "head"
    gates: str = "soft"
    max_beta: float | int = 1.0
    output_gate: str = "sigmoid"
    num_traces: int = 1
    max_coupling: float | int = 1.0
    min_damping: float | int = DERIVED
    prime_bump: bool = False
    prime_bump_limit: int = 65_536
    prime_bump_epsilon: float | int = 0.0
    conv_size: int = 4
    chunk_size: int = 64
    backend: str = "torch"
    initial_context: int = 2048
    shortest_context: int = DERIVED
    initial_recall: float | int = 1.0
    scales: tuple[int, ...] = (4, 16)
    sliding_window: int = 256
    rope_theta: float | int = 10_000.0
    norm_eps: float = 1e-6
    dropout: float | int = 0.0
    initializer_range: float = 0.02
    pooling: str = "mean"
    image_size: int | tuple[int, int] | None = None
    patch_size: int = 4
    num_channels: int = 3
    sampling_rate: int = 16_000
    front_end: str = "log_mel"
    frame_size: int = 32
    window_size: int = DERIVED
    hop_size: int = DERIVED
    num_mel_bins: int = 64
    encoder_mixers: tuple[str, ...] = ("spectral_gate", "reversed:spectral_gate")
    num_encoder_layers: int = DERIVED
    bridge: str = "memory"
    modalities: tuple[str, ...] = ("text", "image", "audio")
    fusion: str = "holographic"
    modality_dropout: float | int = 0.0
    image_mixers: tuple[str, ...] = ("global_filter",)
    audio_mixers: tuple[str, ...] = ("global_filter",)
    tie_word_embeddings: bool = True
    label_smoothing: float | int = 0.0
    z_loss_weight: float | int = 0.0
    fim_rate: float | int = 0.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        alias = kwargs.pop("num_attention_heads", DERIVED)
        if self.num_heads is DERIVED:
            self.num_heads = alias
        elif alias not in (DERIVED, self.num_heads):
            raise ValueError(f"num_heads = {self.num_heads!r} and num_attention_heads = {alias!r}: one field; give one")
        for name in NAMES:
            setattr(self, name, as_names(name, getattr(self, name)))
        memories = {name.removeprefix("reversed:") for name in self.mixers} == {"holographic"}  # and nothing else
        memories = memories and self.key_groups == 1 and self.rotation == "none"
        if self.num_heads is DERIVED:
            self.num_heads = usual_heads(self.hidden_size, 256 if memories else 64)
        check_fields(self)
        if self.intermediate_size is DERIVED:
            inner = 4 * self.hidden_size if self.mlp == "relu2" else -(-8 * self.hidden_size // 3)
            self.intermediate_size = -(-inner // 64) * 64
        if self.num_modes is DERIVED:
            half = max(1, self.hidden_size // self.num_heads // 2)
            self.num_modes = min(max(32, self.hidden_size // 8), 128, half) if memories else half
        if self.shortest_context is DERIVED:
            self.shortest_context = max(4, self.initial_context // 16) if memories else 4
        if self.num_groups is None:
            self.num_groups = self.num_heads
        if self.key_groups is None:
            self.key_groups = self.num_heads
        if self.min_damping is DERIVED:
            self.min_damping = self.max_coupling / (2 * self.initial_context)
        if self.time_step_limit is not None:
            self.time_step_limit = (float(self.time_step_limit[0]), float(self.time_step_limit[1]))
        if self.initial_step is not None:
            self.initial_step = (float(self.initial_step[0]), float(self.initial_step[1]))
        self.scales, self.orders = tuple(self.scales), tuple(self.orders)
        if isinstance(self.image_size, int):
            self.image_size = (self.image_size, self.image_size)
        elif self.image_size is not None:
            self.image_size = (self.image_size[0], self.image_size[1])
        if self.window_size is DERIVED:
            self.window_size = max(1, round(0.025 * self.sampling_rate))
        if self.hop_size is DERIVED:
            self.hop_size = max(1, round(0.01 * self.sampling_rate))
        if self.num_encoder_layers is DERIVED:
            self.num_encoder_layers = self.num_hidden_layers
        if self.filter_size is DERIVED:
            self.filter_size = self.initial_context if self.image_size is None else self.patch_grid
        elif isinstance(self.filter_size, tuple | list):
            self.filter_size = (self.filter_size[0], self.filter_size[1])
        super().__post_init__(**kwargs)

    @classmethod
    def from_size(cls, name: str, *, recipe: str = "default", **overrides: Any) -> ResonanceConfig:
        """A named size and recipe with any fields overridden; what is left out is derived from the overridden width."""
        if name not in SIZES:
            raise ValueError(f"size = {name!r}: must be one of {', '.join(SIZES)}")
        if recipe not in RECIPES:
            raise ValueError(f"recipe = {recipe!r}: must be one of {', '.join(RECIPES)}")
        unknown = set(overrides) - set(cls.__dataclass_fields__) - set(cls.attribute_map)
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: no such field of ResonanceConfig")
        return cls(**{**SIZES[name], **RECIPES[recipe], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Overrides of fields go through the constructor, so that they are checked and derived from like others."""
        own = set(cls.__dataclass_fields__) | set(cls.attribute_map)
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        if overrides.keys() & {"num_heads", "num_attention_heads"}:
            config_dict = {k: v for k, v in config_dict.items() if k not in ("num_heads", "num_attention_heads")}
        return super().from_dict({**_upgraded(config_dict), **overrides}, **kwargs)

    @classmethod
    def own_fields(cls) -> set[str]:
        """The fields that are ours, not those of every `transformers` config."""
        return set(cls.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)

    @classmethod
    def architecture(cls) -> set[str]:
        """The fields that change what a model with given weights computes in evaluation."""
        return (
            cls.own_fields()
            - TRAINING_FIELDS
            - {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
            - {"use_cache", "chunk_size", "backend"}
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields but ``backend``: a model saved on one machine loads on any."""
        return {name: value for name, value in super().to_dict().items() if name != "backend"}

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``."""
        assert isinstance(self.image_size, tuple)
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.num_hidden_layers))


def usual_heads(hidden_size: int, most: int = 64) -> int:
    """Heads of the largest number of channels from 8 to ``most`` that divides the width, else of a few more."""
    for channels in (*range(most, 7, -1), *range(most + 1, 2 * most + 1)):
        if isinstance(hidden_size, int) and hidden_size % channels == 0:
            return hidden_size // channels
    return 1


def _upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration of an earlier format as one of this, which has fields for what was fixed before."""
    version = fields.get("format_version")
    if version not in (1, 2, 3):
        return fields
    defaults = {"mixers": ("spectral_gate",), "shortest_context": 4, "output_gate": "silu", "initial_recall": 0.0}
    fields = {**defaults, **fields, "format_version": FORMAT_VERSION}
    if version == 3:
        return fields
    fields = {"key_groups": None, **fields}
    if version == 2:
        return fields
    fields = {"mlp": "swiglu", "activate_values": True, "num_groups": None, **fields}
    if fields.get("rotation") is None:  # it was "step" in one mixer and "none" in the other
        mixers = str(fields.get("mixers", "spectral_gate"))
        if "spectral_gate" in mixers and "holographic" in mixers:
            raise ValueError(
                "rotation = None in a configuration of format 1 with both spectral_gate and holographic: it meant "
                "'step' in the one and 'none' in the other, which one field cannot say; train it anew"
            )
        fields["rotation"] = "step" if "spectral_gate" in mixers else "none"
    return fields
