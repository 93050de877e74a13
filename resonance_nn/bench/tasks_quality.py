"""Ours and transformers' models of equal size on one task: the same data, batches, steps and loop, every model with the
learning rate that suits it best of those tried, several seeds.

output_dir/MODEL/lr-RATE-seed-N/   a run of ``resonance train --task``; can be resumed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from resonance_nn.arguments import TrainArguments
from resonance_nn.bench.common import Row, result
from resonance_nn.bench.fit import confidence95
from resonance_nn.bench.task_peers import TASK_PEERS, build_task_peer, trained
from resonance_nn.config import ResonanceConfig
from resonance_nn.evaluation import resolve_device
from resonance_nn.tasks import TASKS
from resonance_nn.training import train

OURS = "resonance"


@dataclass(frozen=True)
class TaskOptions:
    """What to run. ``arguments`` are those of ``resonance train``, but for the folder, the seed and the rate."""

    arguments: TrainArguments
    models: tuple[str, ...] = (OURS,)
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    seeds: int = 3
    output_dir: Path = Path("runs/bench-task")

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        task = self.arguments.task
        if task not in TASKS:
            raise ValueError(f"task = {task!r}: must be one of {', '.join(TASKS)}")
        fitting = [OURS, *(name for name, peer in TASK_PEERS.items() if task in peer.tasks)]
        for name in self.models:
            if name not in fitting:
                raise ValueError(f"models: {name!r} is none for {task}; choose from {', '.join(fitting)}")
        for name, values in (("models", self.models), ("lrs", self.lrs)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} = {list(values)}: must be one or more, each once")
        if self.seeds < 1:
            raise ValueError(f"seeds = {self.seeds}: must be ≥ 1")
        for lr in self.lrs:
            replace(self.arguments, lr=lr, output_dir=self.output_dir).check()


@dataclass(frozen=True, order=True)
class Case:
    """One run."""

    model: str
    lr: float
    seed: int

    @property
    def title(self) -> str:
        return f"{self.model}, rate {self.lr:g}, seed {self.seed}"


def build(options: TaskOptions, model: str, config: ResonanceConfig) -> PreTrainedModel:
    """The model of a run, from the global seed, by what the task knows of the data."""
    ours = TASKS[options.arguments.task].architecture
    if model == OURS:
        return ours(config)
    with torch.device("meta"):
        parameters = trained(ours(config))
    return build_task_peer(model, config, parameters)


def run(
    options: TaskOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, Case], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train what is missing in ``output_dir``; what is written as JSON.

    ``progress`` is told the number of each run before it, how many there are, and which it is.

    Raises:
        ValueError: as :meth:`TaskOptions.check`; a folder with runs and neither flag.
    """
    options.check()
    total = len(options.models) * (len(options.lrs) + options.seeds - 1)
    outcomes: dict[Case, dict[str, Any]] = {}
    for case in _cases(options, outcomes):
        progress(len(outcomes) + 1, total, case)
        folder = options.output_dir / case.model / f"lr-{case.lr:g}-seed-{case.seed}"
        begun = (folder / "data" / "run.json").is_file()
        arguments = replace(
            options.arguments,
            output_dir=folder,
            lr=case.lr,
            seed=case.seed,
            resume=begun and resume,
            overwrite=overwrite,
        )
        outcomes[case] = train(arguments, partial(build, options, case.model))["summary"]
    return result(
        "task",
        _rows(options, outcomes),
        resolve_device(options.arguments.device),
        options={"task": options.arguments.task, "models": options.models, "lrs": options.lrs, "seeds": options.seeds},
        runs=[{"model": c.model, "lr": c.lr, "seed": c.seed, **summary} for c, summary in outcomes.items()],
    )


def _cases(options: TaskOptions, outcomes: dict[Case, dict[str, Any]]) -> Iterator[Case]:
    """All rates with the first seed, model by model; then the best with the other seeds."""
    for lr in options.lrs:
        for model in options.models:
            yield Case(model, lr, 0)
    best = {model: best_rate(options, outcomes, model) for model in options.models}
    for seed in range(1, options.seeds):
        for model in options.models:
            yield Case(model, best[model], seed)


def best_rate(options: TaskOptions, outcomes: dict[Case, dict[str, Any]], model: str) -> float:
    """By the task's own figure with the first seed: the larger the better, but for a loss. A run without it, which
    diverged, is the worst."""
    metric = TASKS[options.arguments.task].metric

    def merit(lr: float) -> float:
        value = outcomes[Case(model, lr, 0)].get(metric)
        if value is None:
            return -math.inf
        return -value if metric.endswith("loss") else value

    return max(options.lrs, key=merit)


def _rows(options: TaskOptions, outcomes: dict[Case, dict[str, Any]]) -> list[Row]:
    """A row of each model and figure, over the seeds at its best rate; the peer is the first that is not ours."""
    groups = {
        model: [outcomes[Case(model, best_rate(options, outcomes, model), seed)] for seed in range(options.seeds)]
        for model in options.models
    }
    metrics = dict.fromkeys((TASKS[options.arguments.task].metric, "eval_loss"))  # each once
    other = next((model for model in options.models if model != OURS), None)
    made: list[Row] = []
    for metric in metrics:
        theirs = None if other is None else _values(groups[other], metric)
        for model, group in groups.items():
            values = _values(group, metric)
            compared = theirs is not None and model != other
            differences = [a - b for a, b in zip(values, theirs, strict=True)] if compared and theirs else []
            made.append(
                {
                    "case": model,
                    "metric": metric.removeprefix("eval_"),
                    "ours": fmean(values),
                    "peer": fmean(theirs) if compared and theirs else None,
                    "peer_name": TASK_PEERS[other].label if compared and other else None,
                    "ratio": None,
                    "values": values,
                    "interval": confidence95(values),
                    "difference": fmean(differences) if differences else None,
                    "difference_interval": confidence95(differences),
                    "lr": best_rate(options, outcomes, model),
                    "parameters": group[0]["parameters"],
                    "minutes": fmean([summary["seconds"] for summary in group]) / 60,
                }
            )
    return made


def _values(group: Sequence[dict[str, Any]], metric: str) -> list[float]:
    return [float("nan") if summary.get(metric) is None else summary[metric] for summary in group]
