"""Loss a token, a second and a parameter: language models of equal size from scratch on the same batches, every model
with the learning rate that suits it best.

output_dir/  data/                          the tokenizer and the encoded corpus
             LENGTH/MODEL/lr-RATE-seed-N/   a run, see ``learning``; can be resumed

First every model is trained with every rate at the first length and seed, then with its best one at the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from resonance_nn.bench.accelerated import accelerate, accelerated_delta_rule
from resonance_nn.bench.common import Row, figure, result
from resonance_nn.bench.fit import confidence95
from resonance_nn.bench.learning import Plan, described, learn, prepare
from resonance_nn.bench.models import sized
from resonance_nn.bench.peers import PEERS, build_peer, count
from resonance_nn.bench.text import HELD_OUT, TextTask, text_task
from resonance_nn.config import ResonanceConfig
from resonance_nn.data import find_documents
from resonance_nn.evaluation import resolve_device
from resonance_nn.models import ResonanceForCausalLM

OURS = "default"
WARMUP = 0.05  # of the steps
RECIPES: dict[str, dict[str, Any]] = {  # fields of ours; the MLP's width makes parameters equal to the default's
    OURS: {},
    "complex_ssd": {"rotation": "step", "trapezoidal": True, "activate_values": True},
    "erase_write": {"mixers": ("holographic",), "decay": "channel", "erase": "gated"},
}
NOTES = {
    "mamba2": "its scan computed by our operator, equal to transformers' in tests/test_mamba2.py",
    "gated_delta": "its scan computed by our operator, equal to transformers' in tests/test_ops_delta_rule.py",
    "complex_ssd": "as Mamba-3: turning modes, the trapezoidal rule; our backbone",
    "erase_write": "as Gated DeltaNet-2: a decay a key channel, gates to erase and to write; our backbone",
}
MODELS = (*RECIPES, *(name for name in PEERS if name not in RECIPES))


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
    """What to run. ``fields`` are added to those of our default, for a recipe under test."""

    models: tuple[str, ...] = (OURS, "llama", "mamba2", "gated_delta")
    budget: Budget = BUDGETS["S"]
    data: tuple[str, ...] = ("stdlib",)
    output_dir: Path = Path("runs/bench-quality")
    lrs: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    plan: Plan = field(default_factory=lambda: Plan(steps=1, cooldown=1.0))
    fields: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 20

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name in ("models", "lrs"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} = {values}: must be one or more, each once")
        for model in self.models:
            if model not in MODELS:
                raise ValueError(f"models: {model!r} is unknown; choose from {', '.join(MODELS)}")
        for name, value in asdict(self.budget).items():
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{name} = {value}: must be ≥ 1")
        if sorted(set(self.budget.lengths)) != list(self.budget.lengths):
            raise ValueError(f"lengths = {self.budget.lengths}: must be ascending, each once")
        for lr in self.lrs:
            self.plan_of(Case(1, self.models[0], lr, 0)).check()

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
        return sized({**common, **self.fields}, RECIPES[model], RECIPES[OURS])


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


Outcomes = Mapping[Case, Mapping[str, Any]]


def build(options: QualityOptions, case: Case) -> PreTrainedModel:
    """The model of a run, from the global seed."""
    if case.model in RECIPES:
        return ResonanceForCausalLM(options.config(case.model))
    reference = options.config(OURS)
    with torch.device("meta"):
        parameters = count(ResonanceForCausalLM(reference))
    return accelerate(build_peer(case.model, reference, parameters, case.length)[0])


def run(
    options: QualityOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, Case, float, Mapping[str, Any]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train what is missing in ``output_dir``; what is written as JSON.

    ``progress`` is told the number of this run, how many there are, its case, the share of its budget used and the last
    line of its log.

    Raises:
        ValueError: as :meth:`QualityOptions.check`; a folder with runs and neither flag, or with other ones.
    """
    options.check()
    budget, folder = options.budget, options.output_dir
    documents = find_documents(list(options.data), leave_out=folder)
    outcomes: dict[Case, dict[str, Any]] = {}
    total = len(options.models) * (len(options.lrs) + len(budget.lengths) * budget.seeds - 1)
    tasks: dict[int, TextTask] = {}

    def train(cases: Sequence[Case], resume: bool) -> None:
        settings = {case: _settings(options, case) for case in cases}
        runs = {case.folder: described(settings[case], options.plan_of(case)) for case in cases}
        prepare(folder, runs, resume=resume, overwrite=overwrite)
        for case in cases:
            if case.length not in tasks:
                tasks[case.length] = text_task(documents, folder / "data", case.length, budget.vocab_size)
            outcomes[case] = learn(
                folder / case.folder,
                replace(tasks[case.length], order=case.seed),
                lambda case=case: build(options, case),
                options.plan_of(case),
                settings[case],
                resume=True,
                report=lambda spent, line, case=case: progress(len(outcomes), total, case, spent, line),
            )

    with accelerated_delta_rule():
        train(list(_all_rates(options)), resume)
        train(list(_at_best_rates(options, outcomes)), not overwrite)
    return result(
        "quality",
        rows(options, outcomes),
        resolve_device(options.plan.device),
        options={**asdict(options), "output_dir": str(options.output_dir)},
        runs=[{**asdict(case), **_kept(outcome)} for case, outcome in outcomes.items()],
    )


def _all_rates(options: QualityOptions) -> Iterator[Case]:
    for lr in options.lrs:
        for model in options.models:
            yield Case(options.budget.lengths[0], model, lr, 0)


def _at_best_rates(options: QualityOptions, outcomes: Outcomes) -> Iterator[Case]:
    """What is left when all rates have been tried."""
    best = {model: best_rate(outcomes, model) for model in options.models}
    for seed in range(options.budget.seeds):
        for length in options.budget.lengths:
            for model in options.models:
                case = Case(length, model, best[model], seed)
                if case not in outcomes:
                    yield case


def best_rate(outcomes: Outcomes, model: str) -> float:
    """The rate with the least final loss at the first length and seed, where all have been tried."""
    first = min(case for case in outcomes if case.model == model)
    tried = {
        case.lr: final_loss(outcome)
        for case, outcome in outcomes.items()
        if (case.length, case.model, case.seed) == (first.length, model, 0)
    }
    return min(tried, key=tried.__getitem__)


def final_loss(outcome: Mapping[str, Any]) -> float:
    """Held-out nats a token of a finished run; infinite if it was lost."""
    loss = outcome["cells"][HELD_OUT]["loss"]
    return math.inf if loss is None or outcome["stopped"] == "diverged" else loss


def _settings(options: QualityOptions, case: Case) -> dict[str, Any]:
    """What a run depends on beside its plan. A peer's shape follows from the default's."""
    config = options.config(case.model if case.model in RECIPES else OURS)
    fields = {name: getattr(config, name) for name in sorted(ResonanceConfig.own_fields())}
    return {"data": list(options.data), "length": case.length, "model": case.model, "config": fields}


def _kept(outcome: Mapping[str, Any]) -> dict[str, Any]:
    names = ("parameters", "steps", "tokens", "seconds", "training_seconds", "stopped", "cells", "curve")
    return {name: outcome[name] for name in names}


def rows(options: QualityOptions, outcomes: Outcomes) -> list[Row]:
    """A row of each model and length, at its best rate; ``peer`` is Llama where there is one."""
    made: list[Row] = []
    for length in options.budget.lengths:
        groups = {model: _seeds(outcomes, length, model) for model in options.models}
        peer = groups.get("llama")
        for model, group in groups.items():
            losses = [final_loss(outcome) for outcome in group]
            differences = [] if peer is None else [a - final_loss(b) for a, b in zip(losses, peer, strict=True)]
            tokens, seconds = crossing(group, peer) if peer is not None else (None, None)
            rate = best_rate(outcomes, model)
            made.append(
                {
                    "case": f"{model}, {length:,} tokens",
                    "metric": "held-out loss, nats a token",
                    "ours": _finite(_mean(losses)),
                    "peer": None if peer is None else _finite(_mean([final_loss(outcome) for outcome in peer])),
                    "peer_name": None if peer is None else PEERS["llama"].label,
                    "ratio": None,
                    "model": model,
                    "length": length,
                    "lr": rate,
                    "lr_at_edge": len(options.lrs) > 2 and rate in (min(options.lrs), max(options.lrs)),
                    "losses": [_finite(loss) for loss in losses],
                    "interval": confidence95(losses),
                    "difference": _finite(_mean(differences)) if differences else None,
                    "difference_interval": confidence95(differences),
                    "bits_per_byte": _finite(_mean([_bits(outcome) for outcome in group])),
                    "share_of_tokens": tokens,
                    "share_of_seconds": seconds,
                    "parameters": group[0]["parameters"],
                    "training_seconds": _mean([outcome["training_seconds"] for outcome in group]),
                    "note": NOTES.get(model, ""),
                }
            )
    return made


def _seeds(outcomes: Outcomes, length: int, model: str) -> list[Mapping[str, Any]]:
    rate = best_rate(outcomes, model)
    return [outcomes[case] for case in sorted(outcomes) if (case.length, case.model, case.lr) == (length, model, rate)]


def crossing(
    group: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """After which share of the peer's tokens, and of its training seconds, the held-out curve of these runs is at the
    peer's final loss or below, from evaluation to evaluation along a line; means over the seeds, each against the
    peer's run of the same seed. None if one never is."""
    shares: list[tuple[float, float]] = []
    for ours, theirs in zip(group, peer, strict=True):
        reached = _reached(ours["curve"], final_loss(theirs))
        if reached is None:
            return None, None
        step, seconds = reached
        shares.append((step / theirs["steps"], seconds / theirs["training_seconds"]))
    return _mean([a for a, _ in shares]), _mean([b for _, b in shares])


def _reached(curve: Sequence[Mapping[str, Any]], target: float) -> tuple[float, float] | None:
    before: tuple[float, float, float] | None = None
    for line in curve:
        loss = line["cells"][HELD_OUT]["loss"]
        if loss is None:
            return None
        now = (float(line["step"]), float(line["training_seconds"]), loss)
        if loss <= target:
            if before is None:
                return now[:2]
            share = (before[2] - target) / (before[2] - loss)
            return before[0] + share * (now[0] - before[0]), before[1] + share * (now[1] - before[1])
        before = now
    return None


def _bits(outcome: Mapping[str, Any]) -> float:
    bits = outcome["cells"][HELD_OUT]["bits_per_byte"]
    return math.inf if bits is None else bits


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Held-out loss over tokens and over training seconds, two panels a length; the band is from the least to the
    largest of the seeds. The first fifth of the budget, where all losses are large, may be cut off."""
    lengths = payload["options"]["budget"]["lengths"]
    best = {(row["length"], row["model"]): row["lr"] for row in payload["rows"]}
    with figure(path, payload, panels=2 * len(lengths)) as panels:
        for i, axes in enumerate(panels):
            length, by_tokens = lengths[i // 2], i % 2 == 0
            late: list[float] = []
            for model in payload["options"]["models"]:
                chosen = (length, model, best[length, model])
                runs = [run for run in payload["runs"] if (run["length"], run["model"], run["lr"]) == chosen]
                late += _plot_curve(axes, runs, model, by_tokens)
            if late:
                axes.set_ylim(min(late) - 0.05, max(late) + 0.05)
            axes.set_xlabel("training tokens, millions" if by_tokens else "training minutes")
            axes.set_ylabel("held-out loss, nats a token")
            axes.set_title(f"windows of {length:,} tokens", fontsize="small")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")


def _plot_curve(axes: Any, runs: Sequence[Mapping[str, Any]], model: str, by_tokens: bool) -> list[float]:
    """Draw the mean of some runs and their spread; the losses after a fifth of the budget."""
    curves = [[line for line in run["curve"] if line["cells"][HELD_OUT]["loss"] is not None] for run in runs]
    points = list(zip(*curves, strict=False))
    a_step = runs[0]["tokens"] / runs[0]["steps"] / 1e6
    losses = [[line["cells"][HELD_OUT]["loss"] for line in point] for point in points]
    means = [_mean(each) for each in losses]
    x = [_mean([line["step"] * a_step if by_tokens else line["training_seconds"] / 60 for line in p]) for p in points]
    (drawn,) = axes.plot(x, means, label=model)
    axes.fill_between(x, list(map(min, losses)), list(map(max, losses)), alpha=0.2, color=drawn.get_color())
    return means[len(means) // 5 :]
