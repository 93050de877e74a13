"""What ``bench quality`` compares: models by name, budgets, and the runs that they make."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resonance_nn.bench.models import sized
from resonance_nn.bench.peers import PEERS
from resonance_nn.bench.runs import Plan
from resonance_nn.config import RECIPES, ResonanceConfig
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.unread import check_read

DEFAULT = "default"
WARMUP = 0.05  # of the steps
AS_PUBLISHED = {"mixers": ("holographic",), "key_groups": None, "output_gate": "silu", "initial_recall": 0.0}
OURS: dict[str, dict[str, Any]] = {  # fields of ours; the MLP's width makes parameters equal to the default's
    **RECIPES,
    "complex_ssd": {"mixers": ("spectral_gate",), "rotation": "step", "trapezoidal": True, "activate_values": True},
    "erase_write": {**AS_PUBLISHED, "decay": "channel", "erase": "gated"},
}
NOTES = {
    "mamba2": "its scan computed by our operator, equal to transformers' in tests/test_mamba2.py",
    "gated_delta": "its scan computed by our operator, equal to transformers' in tests/test_ops_delta_rule.py",
    "complex_ssd": "as Mamba-3: turning modes, the trapezoidal rule; our backbone",
    "erase_write": "as Gated DeltaNet-2: a decay a key channel, gates to erase and to write; our backbone",
}
MODELS = (*OURS, *(name for name in PEERS if name not in OURS))


@dataclass(frozen=True)
class Budget:
    """A size of comparison."""

    hidden_size: int
    layers: int
    vocab_size: int
    tokens: int
    lengths: tuple[int, ...]
    seeds: int
    tokens_per_batch: int = 4096


BUDGETS = {
    "XS": Budget(hidden_size=128, layers=4, vocab_size=2048, tokens=1_000_000, lengths=(512,), seeds=1),
    "S": Budget(hidden_size=192, layers=6, vocab_size=2048, tokens=4_000_000, lengths=(512, 2048), seeds=3),
    "M": Budget(hidden_size=320, layers=6, vocab_size=8192, tokens=8_000_000, lengths=(2048,), seeds=1),
}


@dataclass(frozen=True)
class QualityOptions:
    """What to run. ``fields`` are added to those of our default, for a recipe under test; the finished models are
    judged on ``texts`` and ``pairs`` too. A model of ``rates`` is trained with that rate, others are tuned."""

    models: tuple[str, ...] = (DEFAULT, "llama", "mamba2", "gated_delta")
    budget: Budget = BUDGETS["S"]
    data: tuple[str, ...] = ("stdlib",)
    output_dir: Path = Path("runs/bench-quality")
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    plan: Plan = field(default_factory=lambda: Plan(steps=1, cooldown=1.0))
    fields: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 20
    texts: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name in ("models", "lrs"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} = {values}: must be one or more, each once")
        for model in self.models:
            if model not in MODELS:
                raise ValueError(f"models: {model!r} is unknown; choose from {', '.join(MODELS)}")
            if twice := [name for name in self.fields if name in OURS.get(model, {})]:
                raise ValueError(f"fields: {model} has a {twice[0]} of its own; leave it out, or set it on {DEFAULT}")
        for name, value in asdict(self.budget).items():
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{name} = {value}: must be ≥ 1")
        if sorted(set(self.budget.lengths)) != list(self.budget.lengths):
            raise ValueError(f"lengths = {self.budget.lengths}: must be ascending, each once")
        for model in self.rates:
            if model not in self.models:
                raise ValueError(f"rates: {model!r} is not one of the models, {', '.join(self.models)}")
        for model, lr in self.rates.items():
            if not 0 < lr < math.inf:
                raise ValueError(f"rates: {model} = {lr}: must be > 0")
        for lr in self.lrs:
            self.plan_of(Case(1, self.models[0], lr, 0)).check()
        ours = [name for name in self.models if name in OURS]
        check_read(self.fields, [(ResonanceForCausalLM, self.config(name)) for name in ours])

    def tried(self, model: str) -> tuple[float, ...]:
        """The rates a model is trained with at the first length and seed."""
        return (self.rates[model],) if model in self.rates else self.lrs

    def plan_of(self, case: Case) -> Plan:
        """How a run learns."""
        budget = self.budget
        steps = max(1, budget.tokens // budget.tokens_per_batch)
        return Plan(
            **{
                **asdict(self.plan),
                "lr": case.lr,
                "seed": case.seed,
                "steps": steps,
                "warmup": max(1, round(WARMUP * steps)),
                "tokens_per_batch": budget.tokens_per_batch,
                "eval_every": max(1, steps // self.evaluations),
            }
        )

    def config(self, model: str) -> ResonanceConfig:
        """Ours under this name, of the default's size."""
        budget = self.budget
        common = {"vocab_size": budget.vocab_size, "hidden_size": budget.hidden_size}
        common |= {"num_hidden_layers": budget.layers}
        return sized({**common, **self.fields}, OURS[model], OURS[DEFAULT])


@dataclass(frozen=True, order=True)
class Case:
    """One run."""

    length: int
    model: str
    lr: float
    seed: int

    @property
    def title(self) -> str:
        return f"{self.model}, {self.length:,} tokens, rate {self.lr:g}, seed {self.seed}"

    @property
    def folder(self) -> str:
        return f"{self.length}/{self.model}/lr-{self.lr:g}-seed-{self.seed}"
