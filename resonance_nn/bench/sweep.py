"""Runs of models × state sizes × learning rates × seeds on one or more tasks, one after the other, in one folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table

from resonance_nn.bench.common import Row
from resonance_nn.bench.contestants import CONTESTANTS, Shape, state_bytes
from resonance_nn.bench.learning import learn
from resonance_nn.bench.peers import PEER
from resonance_nn.bench.runs import Plan, described, prepare
from resonance_nn.bench.tasks import Task
from resonance_nn.evaluation import row
from resonance_nn.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^v<>PXhpd*"


class Case(NamedTuple):
    """One run. ``state_size`` is None where a model has no choice of it."""

    task: str
    model: str
    state_size: int | None
    lr: float
    seed: int

    @property
    def title(self) -> str:
        size = "" if self.state_size is None else f" K={self.state_size}"
        return f"{self.task} {self.model}{size} lr={self.lr:g} seed={self.seed}"

    @property
    def folder(self) -> str:
        return self.title.replace(" ", "-").replace("=", "")


@dataclass(frozen=True)
class Sweep:
    """What to run, how, and where. ``plan``'s rate and seed and ``shape``'s state size and vocabulary are replaced."""

    models: Sequence[str]
    state_sizes: Sequence[int] = (64,)
    lrs: Sequence[float] = (1e-3, 3e-3)
    seeds: Sequence[int] = (0,)
    shape: Shape = field(default_factory=Shape)
    plan: Plan = field(default_factory=Plan)
    output_dir: str | os.PathLike[str] = "runs/bench"
    resume: bool = False
    overwrite: bool = False

    def cases(self, tasks: Sequence[str]) -> Iterator[Case]:
        """Every run, with the models in turn inside everything else: what ends early covers all of them."""
        for task in tasks:
            for seed in self.seeds:
                for lr in self.lrs:
                    for i, size in enumerate(self.state_sizes):
                        for model in self.models:
                            if CONTESTANTS[model].has_state_size:
                                yield Case(task, model, size, lr, seed)
                            elif i == 0:
                                yield Case(task, model, None, lr, seed)

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name in ("models", "state_sizes", "lrs", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} = {values}: must be one or more, each once")
        for model in self.models:
            if model not in CONTESTANTS:
                raise ValueError(f"models: {model!r} is unknown; choose from {', '.join(CONTESTANTS)}")
        if not 0 < self.shape.initializer_range < math.inf:
            raise ValueError(f"init_std = {self.shape.initializer_range}: must be > 0")
        if self.shape.shortest_context is not None and self.shape.shortest_context < 1:
            raise ValueError(f"shortest_context = {self.shape.shortest_context}: must be ≥ 1 token")
        for lr in self.lrs:
            replace(self.plan, lr=lr).check()
        for seed in self.seeds:
            replace(self.plan, seed=seed).check()

    def run(
        self,
        tasks: Mapping[str, tuple[Task, dict[str, Any]]],
        report: Callable[[int, int, Case, float, dict[str, Any]], None] = lambda *_: None,
    ) -> list[dict[str, Any]]:
        """Do what is not done yet; a result of every run, with its case, model size and state bytes.

        Args:
            tasks: by name, each with the settings that made it.
            report: told the number of this run, how many there are, its case, the share of its budget used and the last
                line of its log.

        Raises:
            ValueError: as :meth:`check`; a model that cannot be built; a folder that holds runs, or other ones.
        """
        self.check()
        folder = Path(self.output_dir)
        cases = list(self.cases(list(tasks)))
        plans = {case: replace(self.plan, lr=case.lr, seed=case.seed) for case in cases}
        settings, sizes = {}, {}
        for case in cases:  # everything is checked before anything is written
            task, made_from = tasks[case.task]
            shape, contestant = self._shape(case, task), CONTESTANTS[case.model]
            settings[case] = {"task": made_from, "model": {"name": case.model, "fields": contestant.fields}}
            settings[case]["shape"] = asdict(shape)
            with torch.device("meta"):
                model = contestant.build(shape)
            sizes[case] = state_bytes(model, max(task.cells[cell].length for cell in task.watched))
        runs = {case.folder: described(settings[case], plans[case]) for case in cases}
        prepare(folder, runs, resume=self.resume, overwrite=self.overwrite)
        results = []
        for i, case in enumerate(cases):
            task = tasks[case.task][0]
            shape = self._shape(case, task)
            result = learn(
                folder / case.folder,
                task,
                lambda case=case, shape=shape: CONTESTANTS[case.model].build(shape),
                plans[case],
                settings[case],
                resume=True,
                report=lambda spent, line, i=i, case=case: report(i, len(cases), case, spent, line),
            )
            told = {"case": case.title, **case._asdict(), "state_bytes": sizes[case], "watched": list(task.watched)}
            results.append({**told, "note": CONTESTANTS[case.model].note, **result})
        return results

    def _shape(self, case: Case, task: Task) -> Shape:
        length = max(draw.length for draw in (*task.training, *task.cells.values()))
        size = self.shape.state_size if case.state_size is None else case.state_size
        return replace(self.shape, vocab_size=task.vocab_size, state_size=size, length=length)


def rows(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row of each run and watched cell. ``peer`` is the best Llama of the same task, where one was trained."""
    made = []
    for run in runs:
        for cell in run["watched"]:
            peers = [r["cells"][cell]["accuracy"] for r in runs if (r["task"], r["model"]) == (run["task"], "llama")]
            accuracy = run["cells"][cell]["accuracy"]
            entry = row(run["case"], f"accuracy at {cell}", accuracy, max(peers, default=None), PEER if peers else "")
            fields = (*Case._fields, "state_bytes", "parameters", "steps", "seconds", "stopped", "note", "cells")
            made.append({**entry, "cell": cell, **{name: run[name] for name in fields}})
    return made


def best(runs: Sequence[Mapping[str, Any]], cell: str, measure: str = "accuracy") -> dict[tuple[str, int], Any]:
    """Of each (model, state bytes) the runs, one a seed, at the learning rate with the best mean ``measure`` at a
    cell."""
    groups: dict[tuple[str, int, float], list[Mapping[str, Any]]] = {}
    for run in runs:
        if cell in run["cells"]:
            groups.setdefault((run["model"], run["state_bytes"], run["lr"]), []).append(run)
    chosen: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for (model, size, _), group in groups.items():
        known = chosen.get((model, size))
        if known is None or mean(group, cell, measure) > mean(known, cell, measure):
            chosen[model, size] = group
    return chosen


def mean(runs: Sequence[Mapping[str, Any]], cell: str, measure: str = "accuracy") -> float:
    """Of a cell's figure over runs."""
    return sum(run["cells"][cell][measure] for run in runs) / len(runs)


def table(runs: Sequence[Mapping[str, Any]], cells: Sequence[str], title: str) -> Table:
    """The runs for people: accuracies at ``cells`` in percent, and after a stroke those of the last quarter."""
    several = [name for name in ("task", "seed") if len({run[name] for run in runs}) > 1]
    view = Table(title=title, highlight=False, box=SIMPLE, padding=(0, 1))
    view.add_column("model", overflow="fold")
    for heading in (*several, "K", "state", "parameters", "rate", "steps", "minutes", "ended", *cells):
        view.add_column(heading, justify="right", overflow="fold")
    for run in runs:
        shown = [" / ".join(f"{100 * v:.2f}" for v in run["cells"].get(cell, {}).values()) for cell in cells]
        view.add_row(
            *(run["model"], *(str(run[name]) for name in several), str(run["state_size"] or "–")),
            *(f"{run['state_bytes'] / 1024:,.1f} KB", f"{run['parameters'] / 1e6:.3f}M", f"{run['lr']:g}"),
            *(f"{run['steps']:,}", f"{run['seconds'] / 60:.1f}", run["stopped"], *shown),
        )
    return view


def notes(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the table must know of each model."""
    return [f"{model}: {note}" for model, note in {run["model"]: run["note"] for run in runs}.items() if note]


def axes_for(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty plot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="small")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """As PNG, whole or not at all; the legend stands beside the plot, where it hides nothing."""
    figure.gca().legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
