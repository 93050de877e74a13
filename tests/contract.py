"""The contracts of a mixer and of a causal model, as functions, so that a mixer that breaks one can be shown to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.mixers import MIXERS, Mixer, build_mixer

STACKS = {  # what builds a language model: every causal mixer alone, and hybrids
    **{name: (name,) for name, mixer in MIXERS.items() if mixer.causal},
    "hybrid_attention": ("spectral_gate", "attention"),
    "hybrid_resonance": ("resonance", "spectral_gate"),
    "hybrid_sliding": ("spectral_gate", "sliding_attention"),
    "multi_scale": ("multi_scale:spectral_gate",),
    "hybrid_multi_scale": ("multi_scale:resonance", "attention"),
}


MAMBA2 = dict(
    rotation="none",
    normalize_gates=False,
    activate_values=True,
    output_norm="gated",
    expand=2,
    conv_bias=True,
    time_step_limit=(0.01, 1.5),
)
VARIANTS: list[tuple[str, dict[str, Any]]] = [  # every causal mixer as it comes, and its options that change the state
    *((name, {}) for name, mixer in MIXERS.items() if mixer.causal),
    ("resonance", {"filters": "channel"}),
    ("spectral_gate", {"rotation": "step", "num_groups": None, "output_norm": "none"}),
    ("spectral_gate", MAMBA2),
    ("spectral_gate", {"rotation": "token", "frequency_mixing": True, "expand": 2}),
    ("spectral_gate", {"num_groups": None, "frequency_mixing": True, "mode_fraction": 0.4, "entropy_weight": 0.1}),
    ("spectral_gate", {"rotation": "step", "num_groups": None, "mode_fraction": 0.4, "trapezoidal": True}),
    ("spectral_gate", {**MAMBA2, "rotation": "token", "mode_fraction": 0.4, "trapezoidal": True}),
    ("holographic", {"key_groups": None}),
    ("holographic", {"rotation": "token", "max_beta": 2.0}),
    ("holographic", {"erase": "gated", "decay": "channel"}),
    ("holographic", {"erase": "gated", "decay": "channel", "rotation": "step"}),
    ("holographic", {"erase": "hermitian", "decay": "none", "rotation": "step"}),
    ("holographic", {"erase": "hermitian", "decay": "channel"}),
    ("holographic", {"erase": "none"}),
    ("holographic", {"decay": "none", "gates": "hard"}),
    ("hrr", {"num_traces": 3}),
    ("resolvent", {"prime_bump": True, "prime_bump_limit": 100}),
    ("sliding_attention", {"sliding_window": 8}),
    ("multi_scale:spectral_gate", {}),
    ("multi_scale:resonance", {"scales": (3,)}),
]


def cases(values: Iterable[Any], brief: Iterable[Any]) -> list[Any]:
    """(name, overrides, value) for every variant and value. What every mixer is as it comes runs on all values in
    `make test`; a variant's options run on the ``brief`` ones there and on all in `make test-all`."""
    whole = [*MIXERS, "multi_scale:spectral_gate"]
    return [
        pytest.param(
            *(name, overrides, value),
            marks=() if value in brief or (not overrides and name in whole) else pytest.mark.slow,
        )
        for name, overrides in VARIANTS
        for value in values
    ]


def small_config(mixers: tuple[str, ...] = ("spectral_gate",), **overrides) -> ResonanceConfig:
    fields = dict(vocab_size=61, hidden_size=32, num_heads=2, num_hidden_layers=2, initial_context=64, mixers=mixers)
    return ResonanceConfig(**{**fields, **overrides})


def small_model(mixers: tuple[str, ...], **overrides) -> ResonanceForCausalLM:
    torch.manual_seed(0)
    return ResonanceForCausalLM(small_config(mixers, **overrides)).eval()


def make_mixer(name: str, dtype: torch.dtype = torch.float64, **overrides) -> Mixer:
    """A mixer whose parts are large enough for changes to show, those that begin at 0 too."""
    torch.manual_seed(0)
    mixer = build_mixer(name, small_config((name,), **overrides)).to(dtype)
    with torch.no_grad():
        for parameter_name, p in mixer.named_parameters():
            if parameter_name.endswith(("angle_proj.weight", "mixing")):
                p.normal_(std=0.7 if parameter_name.endswith("weight") else 0.1)
            elif parameter_name.endswith("roots"):  # z inside its polygons and outside
                p.normal_(std=0.2)
    return mixer


def assert_causal(model: ResonanceForCausalLM, L: int = 40) -> None:
    """Contract 1, in float64: changing token t leaves every output before t, changes outputs at t and after t."""
    model = model.double().eval()
    ids = torch.randint(0, model.config.vocab_size, (1, L))
    with torch.no_grad():
        before = model(ids).logits
        for t in {0, 1, L // 2, L - 2, L - 1}:
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
            difference = (model(changed).logits - before).abs().amax(-1)[0]
            assert not (difference[:t] > 1e-10).any(), f"token {t} changes outputs before it by {difference[:t].max()}"
            assert difference[t] > 1e-6, f"token {t} does not change its own output"
            assert t == L - 1 or difference[t + 1 :].max() > 1e-8, f"token {t} changes nothing after it"


def iid_loss(mixers: tuple[str, ...], steps: int = 150, **overrides) -> tuple[float, float]:
    """Contract 2: the loss of a small model trained on i.i.d. uniform tokens, over its last fresh batches, and ln V."""
    V = 16
    model = small_model(mixers, vocab_size=V, **overrides).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(7)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, V, (16, 32), generator=generator)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20, math.log(V)


def assert_no_leak(mixers: tuple[str, ...], **overrides) -> None:
    loss, floor = iid_loss(mixers, **overrides)
    assert loss >= floor - 0.02, f"loss {loss:.3f} on i.i.d. tokens, below ln V = {floor:.3f}: it reads its answers"
    assert loss < floor + 0.3, f"loss {loss:.3f} on i.i.d. tokens, far above ln V = {floor:.3f}: it does not train"


def pieces(x: Tensor, sizes: list[int]) -> list[Tensor]:
    assert sum(sizes) == x.shape[1]
    return list(x.split(sizes, dim=1))


def uneven(L: int) -> list[int]:
    """Piece lengths 1, 2, 64, 1, … that add up to L."""
    sizes, cycle = [], [1, 2, 64, 1, 100, 3]
    while L:
        sizes.append(min(cycle[len(sizes) % len(cycle)], L))
        L -= sizes[-1]
    return sizes
