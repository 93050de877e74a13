"""What the fields of a configuration may be."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from resonance_nn.mixers import MIXERS, mixer_class
from resonance_nn.ops.fla_backend import BACKENDS

if TYPE_CHECKING:
    from resonance_nn.config import ResonanceConfig

FORMAT_VERSION = 4
DERIVED: Any = None  # a field left out: the configuration derives it from others
CHOICES: dict[str, tuple[str, ...]] = {  # fields that take one of a few words
    "filters": ("head", "channel"),
    "output_norm": ("head", "gated", "none"),
    "mlp": ("relu2", "swiglu"),
    "erase": ("delta", "gated", "hermitian", "none"),
    "decay": ("head", "channel", "none"),
    "gates": ("soft", "hard"),
    "output_gate": ("sigmoid", "silu"),
    "rotation": ("none", "step", "token"),
    "backend": BACKENDS,
    "pooling": ("mean", "last", "first"),
    "front_end": ("waveform", "log_mel"),
    "bridge": ("memory", "spectral"),
    "fusion": ("holographic", "spectral"),
}
STACKS = ("mixers", "encoder_mixers", "image_mixers", "audio_mixers")  # fields that name mixers
MODALITIES = ("text", "image", "audio")
NAMES = {**dict.fromkeys(STACKS, ("spectral_gate",)), "modalities": ("text", "image")}  # fields of names, such as these


def as_names(field: str, value: Any) -> tuple[str, ...]:
    """A field of ``NAMES``, given as one name or several, as a tuple. Raises ValueError."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field} = {value!r}: must be names, such as {NAMES[field]!r}")
    return tuple(names)


def check_fields(config: ResonanceConfig) -> None:
    """Raise ValueError naming the field, its value, what is allowed and the likely fix."""
    config = cast("ResonanceConfig", SimpleNamespace(**vars(config)))  # a check is no use of a field

    def check(condition: bool, field: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{field} = {getattr(config, field)!r}: must be {allowed}")

    for field, minimum in (
        ("vocab_size", 2),
        ("hidden_size", 8),
        ("num_hidden_layers", 1),
        ("num_heads", 1),
        ("conv_size", 1),
        ("chunk_size", 1),
        ("initial_context", 2),
        ("expand", 1),
        ("num_traces", 1),
        ("prime_bump_limit", 1),
        ("num_bands", 1),
        ("sliding_window", 1),
        *((name, 1) for name in ("patch_size", "num_channels", "sampling_rate", "frame_size", "num_mel_bins")),
    ):
        value = getattr(config, field)
        check(type(value) is int and value >= minimum, field, f"an integer ≥ {minimum}")
    for field, none in (
        *(
            (name, "None to derive")
            for name in (
                "intermediate_size",
                "num_modes",
                "shortest_context",
                "num_encoder_layers",
                "window_size",
                "hop_size",
            )
        ),
        *((name, "None for a group a head") for name in ("num_groups", "key_groups")),
    ):
        value = getattr(config, field)
        check(value is DERIVED or (type(value) is int and value >= 1), field, f"an integer ≥ 1, or {none}")
    width, of_width = config.hidden_size, "hidden_size"
    if config.expand > 1 and set(config.mixers) == {"spectral_gate"}:  # the only mixer that expands
        width, of_width = config.expand * config.hidden_size, "expand · hidden_size"
    if width % config.num_heads or width // config.num_heads < 8:
        fits = [h for h in range(1, width // 8 + 1) if width % h == 0]
        raise ValueError(
            f"num_heads = {config.num_heads}: must divide {of_width} = {width} into heads of at least 8 "
            f"channels; {', '.join(map(str, fits))} do"
        )
    for stack in STACKS:
        names = getattr(config, stack)
        check(len(names) > 0, stack, f"one or more of {', '.join(MIXERS)}")
        for name in names:
            try:
                mixer_class(name)
            except ValueError as error:
                raise ValueError(f"{stack} = {names!r}: {error}") from None
    kinds = config.modalities
    some = len(kinds) > 0 and len(set(kinds)) == len(kinds) and set(kinds) <= set(MODALITIES)
    check(some, "modalities", f"one or more of {', '.join(MODALITIES)}, each once")
    size, patch = config.image_size, config.patch_size
    sizes = size if isinstance(size, tuple | list) and len(size) == 2 else (size,)
    fits = all(type(s) is int and s >= patch and s % patch == 0 for s in sizes)
    check(size is None or fits, "image_size", f"None, or one or two multiples of patch_size = {patch}")
    orders = config.orders if isinstance(config.orders, tuple | list) else ()
    check(len(orders) > 0 and all(type(p) is int and p >= 2 for p in orders), "orders", "one or more integers ≥ 2")
    if config.rotation == "token" and config.num_heads < 2 and any("holographic" in name for name in config.mixers):
        raise ValueError("num_heads = 1 with rotation = 'token': half of the heads turn; give 2 or more")
    lengths = config.scales if isinstance(config.scales, tuple | list) else ()
    ascending = len(lengths) > 0 and all(type(s) is int and s >= 2 for s in lengths)
    ascending = ascending and all(a < b for a, b in itertools.pairwise(lengths))
    check(ascending, "scales", "one or more integers ≥ 2, ascending, such as (4, 16)")
    for field in ("num_groups", "key_groups"):
        groups = getattr(config, field)
        check(groups is None or config.num_heads % groups == 0, field, f"a divisor of num_heads = {config.num_heads}")
    for field, choices in CHOICES.items():
        check(getattr(config, field) in choices, field, " or ".join(map(repr, choices)))
    without = [name for name in config.mixers if config.backend not in mixer_class(name).backends]
    if without:
        having = [name for name, mixer in MIXERS.items() if config.backend in mixer.backends]
        raise ValueError(
            f"backend = {config.backend!r} with mixers = {config.mixers!r}: only {' and '.join(having)} run on it, "
            f"{without[0]} does not; use backend = 'torch'"
        )
    size = config.filter_size
    sizes = size if isinstance(size, tuple | list) and len(size) == 2 else (size,)
    check(size is DERIVED or all(type(s) is int and s >= 1 for s in sizes), "filter_size", "an integer ≥ 1 or two")
    for field, low, allowed in (("time_step_limit", 0.0, "0 ≤ low"), ("initial_step", 1e-30, "0 < low")):
        value = getattr(config, field)
        pair = isinstance(value, tuple | list) and len(value) == 2 and low <= value[0] <= value[1]
        check(value is None or pair, field, f"None or (low, high) with {allowed} ≤ high")
    for field in ("mode_fraction", "max_beta"):
        value, high = getattr(config, field), 1 if field == "mode_fraction" else 2
        check(isinstance(value, int | float) and 0 < value <= high, field, f"in (0, {high}]")
    value = config.min_damping
    positive = isinstance(value, int | float) and 0 < value < math.inf
    check(value is DERIVED or positive, "min_damping", "> 0, or None")
    for field, low, high, allowed in (
        ("dropout", 0, 1, "in [0, 1)"),
        ("modality_dropout", 0, 1, "in [0, 1)"),
        ("label_smoothing", 0, 1, "in [0, 1)"),
        ("z_loss_weight", 0, math.inf, "≥ 0"),
        ("mode_noise", 0, math.inf, "≥ 0"),
        ("initial_recall", 0, math.inf, "≥ 0"),
        ("entropy_weight", 0, math.inf, "≥ 0"),
        ("fim_rate", 0, 1 + 1e-12, "in [0, 1]"),
        ("norm_eps", 1e-30, 1, "in (0, 1)"),
        ("initializer_range", 1e-30, math.inf, "> 0"),
        ("rope_theta", 1e-30, math.inf, "> 0"),
        ("max_coupling", 1e-30, math.inf, "> 0"),
        ("prime_bump_epsilon", 0, math.inf, "≥ 0"),
    ):
        value = getattr(config, field)
        check(isinstance(value, int | float) and low <= value < high, field, allowed)
    for field in (
        *("normalize_gates", "conv_bias", "frequency_mixing", "trapezoidal", "prime_bump"),
        *("tie_word_embeddings", "use_cache", "activate_values"),
    ):
        check(isinstance(getattr(config, field), bool), field, "True or False")
    check(isinstance(config.format_version, int), "format_version", "an integer")
    if config.format_version > FORMAT_VERSION:
        raise ValueError(
            f"format_version = {config.format_version}: this release of resonance-nn reads up to {FORMAT_VERSION}; "
            "upgrade it to load this checkpoint"
        )
