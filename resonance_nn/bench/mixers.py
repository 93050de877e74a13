"""Every causal mixer beside ``spectral_gate``: training speed, decoding latency and state, in language models that
differ in nothing but the mixer."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench.common import Progress, Row, figure, interleaved, no_progress, rate_row, ratios, result
from resonance_nn.bench.contestants import state_bytes
from resonance_nn.bench.inference import dtype_name
from resonance_nn.bench.models import ModelOptions, autocast, check_causal, count, training_step
from resonance_nn.config import ResonanceConfig
from resonance_nn.mixers import MIXERS
from resonance_nn.models import ResonanceForCausalLM

BASE = "spectral_gate"
OPTIONS: dict[str, Mapping[str, Any]] = {  # options that change the cost
    "spectral_gate, complex": {"mixers": (BASE,), "rotation": "step", "num_groups": None},
    "holographic, turning": {"mixers": ("holographic",), "rotation": "token"},
    "holographic, gates and channel decays": {"mixers": ("holographic",), "erase": "gated", "decay": "channel"},
    "holographic, hermitian": {"mixers": ("holographic",), "erase": "hermitian", "rotation": "token"},
    "hrr, 2 traces": {"mixers": ("hrr",), "num_traces": 2},
    "multi_scale:spectral_gate": {"mixers": ("multi_scale:spectral_gate",)},
}


@dataclass(frozen=True)
class MixerSpeedOptions:
    """What to measure. A training batch has ``tokens_per_batch`` tokens, or one sequence if that is longer."""

    length: int = 2048
    hidden_size: int = 512
    layers: int = 2
    vocab_size: int = 8192
    repeats: int = 5
    decode_tokens: int = 64
    tokens_per_batch: int = 8192
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name in ("hidden_size", "layers", "vocab_size", "repeats", "decode_tokens", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be ≥ 1")
        if self.length < 2:
            raise ValueError(f"length = {self.length}: must be ≥ 2")


def run(options: MixerSpeedOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Time a training step and a decoding step of each, in turns. ``progress`` is told the rounds done and all."""
    options.check()
    kept = options.device == "cpu" and keep_freed_memory()
    models = {name: _model(options, fields) for name, fields in contestants().items()}
    for model in models.values():
        check_causal(model, options.vocab_size)
    total, done = 2 * len(models) * (options.repeats + 1), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    batch = max(1, options.tokens_per_batch // options.length)
    ids = torch.randint(options.vocab_size, (batch, options.length), device=options.device)
    steps = ModelOptions(dtype=options.dtype, device=options.device)
    trained = interleaved({n: training_step(m, ids, steps) for n, m in models.items()}, options.repeats, advance)
    decoded = interleaved({n: _decoding(m, ids, options, steps) for n, m in models.items()}, options.repeats, advance)
    rows: list[Row] = []
    for name, model in models.items():
        more = {
            "parameters": count(model),
            "state_bytes": state_bytes(model, options.length),
            "decode_ms": 1e3 * statistics.median(decoded[name]) / options.decode_tokens,
            "decode_ratio": statistics.median(ratios(decoded[name], decoded[BASE])),
        }
        tokens = batch * options.length
        rows.append(rate_row(name, "training tokens/s", tokens, trained[name], trained[BASE], BASE, **more))
    described = {"length": options.length, "batch": batch, "hidden_size": options.hidden_size, "layers": options.layers}
    described |= {"vocab_size": options.vocab_size, "dtype": dtype_name(options.dtype)}
    return result("mixers", rows, options.device, options=described, keeps_freed_memory=kept)


def contestants() -> dict[str, Mapping[str, Any]]:
    """Fields by name: every causal mixer as it comes, and ``OPTIONS``."""
    return {**{name: {"mixers": (name,)} for name, mixer in MIXERS.items() if mixer.causal}, **OPTIONS}


def _model(options: MixerSpeedOptions, fields: Mapping[str, Any]) -> ResonanceForCausalLM:
    config = ResonanceConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        **fields,
    )
    with torch.device(options.device):
        return ResonanceForCausalLM(config).train()


def _decoding(
    model: ResonanceForCausalLM, ids: Tensor, options: MixerSpeedOptions, steps: ModelOptions
) -> Callable[[], None]:
    """One sequence, token by token, after a prompt of ``length`` tokens."""
    with torch.no_grad(), autocast(steps):
        prompt = model.eval()(ids[:1], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def step() -> None:
        model.eval()
        cache = copy.deepcopy(prompt)
        with autocast(steps):
            for token in ids[:1, : options.decode_tokens].split(1, dim=1):
                model(token, past_key_values=cache, use_cache=True)

    return step


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Training tokens/s and milliseconds a decoded token, a bar a mixer."""
    rows = payload["rows"][::-1]
    with figure(path, payload, panels=2, size=(6, 1 + 0.28 * len(rows))) as panels:
        shown = {"ours": "training tokens/s", "decode_ms": "decoding, ms a token"}
        for axes, (key, label) in zip(panels, shown.items(), strict=True):
            axes.barh([row["case"] for row in rows], [row[key] for row in rows])
            axes.set_xlabel(label)
