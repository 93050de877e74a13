"""Ours and transformers' models of equal size on one task: the same data, batches, steps and loop, every model with the
learning rate that suits it best of those tried, several seeds.

output_dir/MODEL/lr-RATE-seed-N/                  a run of ``resonance train --task``; can be resumed
output_dir/MODEL/held-out-VALUE/lr-RATE-seed-N/   one where the rows with a value of a column are held out
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import torch
from transformers import PreTrainedModel

from resonance_nn.arguments import TrainArguments
from resonance_nn.bench.common import Row, result
from resonance_nn.bench.fit import confidence95
from resonance_nn.bench.task_peers import TASK_PEERS, build_task_peer, trained
from resonance_nn.config import ResonanceConfig
from resonance_nn.data.documents import DataError
from resonance_nn.evaluation import finite, resolve_device
from resonance_nn.tasks import TASKS
from resonance_nn.tasks.augment import CHANGES
from resonance_nn.tasks.base import ExamplesTask
from resonance_nn.training import train
from resonance_nn.unread import refuse_unread

OURS = "resonance"


@dataclass(frozen=True)
class TaskOptions:
    """What to run. ``arguments`` are those of ``resonance train``, but for the folder, the seed and the rate.

    ``variants``, by name, are ours with further fields of the configuration, each a contestant beside ``models``.
    """

    arguments: TrainArguments
    models: tuple[str, ...] = (OURS,)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    seeds: int = 3
    hold_out: str | None = None  # a column of the data, each value of which is held out in turn
    output_dir: Path = Path("runs/bench-task")

    @property
    def contestants(self) -> tuple[str, ...]:
        return (*self.models, *self.variants)

    @property
    def reference(self) -> str | None:
        """Whom the others are compared with: the first that is not ours, else the first, if there are others."""
        others = [name for name in self.models if name in TASK_PEERS]
        return others[0] if others else self.contestants[0] if len(self.contestants) > 1 else None

    def arguments_of(self, model: str, **more: Any) -> TrainArguments:
        """Those of a contestant's run: without changes of modalities that a variant leaves out, and without fields
        shared by all that this one does not read."""
        a, own = self._with_fields(model), self.variants.get(model, {})
        unread = TASKS[a.task](a).unread()
        config = {name: value for name, value in a.config.items() if name in own or name not in unread}
        gone = [name for kind in CHANGES if kind not in config.get("modalities", CHANGES) for name in CHANGES[kind]]
        augment = a.augment and [name for name in a.augment if name not in gone]
        return replace(a, config=config, augment=augment, **more)

    def _with_fields(self, model: str) -> TrainArguments:
        """All that were set, for all and for this contestant."""
        return replace(self.arguments, config={**self.arguments.config, **self.variants.get(model, {})})

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
        if self.hold_out is not None and (not self.hold_out or "=" in self.hold_out):
            raise ValueError(f"hold_out = {self.hold_out!r}: must be a column, each value of which is then held out")
        for lr in self.lrs:
            hold_out = None if self.hold_out is None else f"{self.hold_out}="
            for name in self.contestants:
                a = replace(self._with_fields(name), lr=lr, output_dir=self.output_dir, hold_out=hold_out)
                a.check()
        shared = self.arguments.config
        used = {field for name in self.contestants for field in self.arguments_of(name).config}
        refuse_unread(shared, [field for field in shared if field not in used])
        for name in self.contestants:
            TASKS[task](self.arguments_of(name)).initial()
        for name in self.variants:
            if name in (OURS, *TASK_PEERS) or not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"variant = {name!r}: must be a name of its own, of letters, digits, _, - and .")


@dataclass(frozen=True, order=True)
class Case:
    """One run."""

    model: str
    lr: float
    seed: int
    held_out: str = ""

    @property
    def title(self) -> str:
        without = f", without {self.held_out}" if self.held_out else ""
        return f"{self.model}, rate {self.lr:g}, seed {self.seed}{without}"

    @property
    def folder(self) -> Path:
        group = f"held-out-{quote(self.held_out, safe=' ')}" if self.held_out else ""
        return Path(self.model, group, f"lr-{self.lr:g}-seed-{self.seed}")


def build(options: TaskOptions, model: str, config: ResonanceConfig) -> PreTrainedModel:
    """The model of a run, from the global seed, by what the task knows of the data."""
    ours = TASKS[options.arguments.task].architecture
    if model not in TASK_PEERS:
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
        ValueError: as :meth:`TaskOptions.check`; a column that the data lack, or of one value; a folder with runs and
            neither flag.
    """
    options.check()
    groups = held_out_groups(options)
    total = len(options.contestants) * (len(options.lrs) + options.seeds * len(groups) - 1)
    outcomes: dict[Case, dict[str, Any]] = {}
    for case in _cases(options, groups, outcomes):
        progress(len(outcomes) + 1, total, case)
        folder = options.output_dir / case.folder
        begun = (folder / "data" / "run.json").is_file()
        arguments = options.arguments_of(
            case.model,
            output_dir=folder,
            hold_out=None if options.hold_out is None else f"{options.hold_out}={case.held_out}",
            lr=case.lr,
            seed=case.seed,
            resume=begun and resume,
            overwrite=overwrite,
        )
        outcomes[case] = train(arguments, partial(build, options, case.model))["summary"]
    chosen = {name: getattr(options, name) for name in ("models", "variants", "lrs", "seeds", "hold_out")}
    return result(
        "task",
        _rows(options, groups, outcomes),
        resolve_device(options.arguments.device),
        options={"task": options.arguments.task, **chosen},
        runs=[{**asdict(case), **summary} for case, summary in outcomes.items()],
    )


def held_out_groups(options: TaskOptions) -> list[str]:
    """The values of the column to hold out; [""] without one. Raises ValueError where there is no such column, or only
    one value, or where without one of them a label is not learned."""
    column = options.hold_out
    if column is None:
        return [""]
    task = TASKS[options.arguments.task](options.arguments)
    assert isinstance(task, ExamplesTask)  # TrainArguments.check refuses the others
    groups = task.values(column)
    if len(groups) < 2:
        raise ValueError(f"hold_out = {column!r}: has one value, {groups[0]!r}; to hold each out takes two or more")
    for group in groups:
        part = TASKS[options.arguments.task](replace(options.arguments, hold_out=f"{column}={group}"))
        assert isinstance(part, ExamplesTask)
        try:
            part.check_labels(*part.read())
        except DataError as error:
            raise DataError(f"hold_out = {column!r}: without {group!r}, {error}") from error
    return groups


def _cases(options: TaskOptions, groups: Sequence[str], outcomes: dict[Case, dict[str, Any]]) -> Iterator[Case]:
    """All rates with the first seed and group, model by model; then the best with the other groups and seeds."""
    for lr in options.lrs:
        for model in options.contestants:
            yield Case(model, lr, 0, groups[0])
    best = {model: best_rate(options, outcomes, model, groups[0]) for model in options.contestants}
    for seed in range(options.seeds):
        for group in groups[1:] if seed == 0 else groups:
            for model in options.contestants:
                yield Case(model, best[model], seed, group)


def best_rate(options: TaskOptions, outcomes: dict[Case, dict[str, Any]], model: str, group: str = "") -> float:
    """By the task's own figure with the first seed and group: the larger the better, but for a loss. A run without it,
    which diverged, is the worst."""
    metric = TASKS[options.arguments.task].metric

    def merit(lr: float) -> float:
        value = outcomes[Case(model, lr, 0, group)].get(metric)
        if value is None:
            return -math.inf
        return -value if metric.endswith("loss") else value

    return max(options.lrs, key=merit)


def _rows(options: TaskOptions, groups: Sequence[str], outcomes: dict[Case, dict[str, Any]]) -> list[Row]:
    """A row of each model and figure, the task's own first, over the groups and seeds at its best rate; the peer is
    ``options.reference``."""
    rates = {model: best_rate(options, outcomes, model, groups[0]) for model in options.contestants}
    pairs = [(group, seed) for group in groups for seed in range(options.seeds)]
    runs = {
        model: [outcomes[Case(model, rates[model], seed, group)] for group, seed in pairs]
        for model in options.contestants
    }
    figures = [name for name in runs[options.contestants[0]][0] if name.startswith("eval_") and name != "eval_loss"]
    metrics = dict.fromkeys((TASKS[options.arguments.task].metric, *figures, "eval_loss"))  # each once
    other = options.reference
    label = TASK_PEERS[other].label if other in TASK_PEERS else other
    made: list[Row] = []
    for metric in metrics:
        for model in options.contestants:
            values, theirs = _values(runs[model], metric), None
            if other is not None and model != other:
                theirs = _values(runs[other], metric)
            differences = [a - b for a, b in zip(values, theirs or (), strict=theirs is not None)]
            row = {
                "case": model,
                "metric": metric.removeprefix("eval_"),
                "ours": fmean(values),
                "peer": fmean(theirs) if theirs else None,
                "peer_name": label if theirs else None,
                "ratio": None,
                "values": [value if math.isfinite(value) else None for value in values],
                "interval": confidence95(values),
                "difference": fmean(differences) if differences else None,
                "difference_interval": confidence95(differences),
                "lr": rates[model],
                "parameters": runs[model][0]["parameters"],
                "minutes": fmean([summary["seconds"] for summary in runs[model]]) / 60,
            }
            made.append({**finite(row), "held_out": _by_group(options, groups, values, differences)})
    return made


def _by_group(
    options: TaskOptions, groups: Sequence[str], values: Sequence[float], differences: Sequence[float]
) -> dict[str, Row]:
    """Of each held-out group the means over the seeds; none without groups."""
    if options.hold_out is None:
        return {}
    found: dict[str, Row] = {}
    for i, group in enumerate(groups):
        part = slice(i * options.seeds, (i + 1) * options.seeds)
        difference = fmean(differences[part]) if differences else None
        found[group] = finite({"ours": fmean(values[part]), "difference": difference})
    return found


def _values(runs: Sequence[dict[str, Any]], metric: str) -> list[float]:
    return [float("nan") if summary.get(metric) is None else summary[metric] for summary in runs]
