"""State tracking: learn a running sum or product at short lengths, be asked at longer ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from resonance_nn.bench.common import result
from resonance_nn.bench.recall import RecallOptions
from resonance_nn.bench.sweep import MARKERS, Sweep, axes_for, best, mean, rows, save_figure
from resonance_nn.bench.tasks import LENGTHS, TRACKING, Task, mixture, tracking_task

BOTH = "both"  # recall and parity in one vocabulary
LAST = "last_quarter"


@dataclass(frozen=True)
class TrackingOptions:
    """Which of ``TRACKING``, or "both"; the lengths of training sequences, and those asked at; the recall in "both"."""

    tasks: Sequence[str] = ("parity", "sum5")
    train_lengths: Sequence[int] = (8, 16, 32, 64)
    lengths: Sequence[int] = LENGTHS
    recall: RecallOptions = field(default_factory=RecallOptions)

    def task(self, name: str) -> Task:
        """Raises ValueError where the options do not fit together."""
        if name == BOTH:
            return mixture(self.recall.task(), tracking_task("parity", self.train_lengths, self.lengths))
        if name not in TRACKING:
            raise ValueError(f"tasks: {name!r} is unknown; choose from {', '.join(TRACKING)}, {BOTH}")
        return tracking_task(name, self.train_lengths, self.lengths)

    def settings(self, name: str) -> dict[str, Any]:
        """What made a task, as JSON."""
        made = {"name": name, "train_lengths": list(self.train_lengths), "test_lengths": list(self.lengths)}
        return {**made, **asdict(self.recall)} if name == BOTH else made


def run(sweep: Sweep, options: TrackingOptions, report: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Train what is not trained yet; what is written as JSON. ``initial_context`` is the longest training sequence: a
    memory that still fills beyond it is in a state that was never trained on."""
    if not options.tasks or len(set(options.tasks)) < len(options.tasks):
        raise ValueError(f"tasks = {list(options.tasks)}: must be one or more, each once")
    tasks = {name: (options.task(name), options.settings(name)) for name in options.tasks}
    context = max([*options.train_lengths, *(options.lengths if BOTH in options.tasks else ())])
    runs = replace(sweep, shape=replace(sweep.shape, initial_context=context)).run(tasks, report)
    return result("tracking", rows(runs), sweep.plan.device, options=asdict(options), runs=runs)


def shown(payload: Mapping[str, Any]) -> list[str]:
    """The cells of a table: every length, and the watched of recall."""
    asked = [
        cell for run in payload["runs"] for cell in run["cells"] if run["task"] != BOTH or _figure(run, cell) == LAST
    ]
    return list(dict.fromkeys([*asked, *(cell for run in payload["runs"] for cell in run["watched"])]))


def _figure(run: Mapping[str, Any], cell: str) -> str:
    """What is plotted of a cell: where every token is asked, the last quarter of them."""
    return LAST if LAST in run["cells"][cell] else "accuracy"


def plot(payload: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Accuracy in the last quarter over the length, a line a task and model, at the learning rate that is best at the
    longest length, the mean of seeds."""
    figure, axes = axes_for("state tracking", "length (tokens)", "accuracy, in the last quarter if asked there")
    for i, task in enumerate(dict.fromkeys(run["task"] for run in payload["runs"])):
        runs = [run for run in payload["runs"] if run["task"] == task]
        cells = [cell for cell in runs[0]["cells"] if task != BOTH or _figure(runs[0], cell) == LAST]
        measure = _figure(runs[0], cells[-1])
        for j, ((model, _), group) in enumerate(best(runs, cells[-1], measure).items()):
            axes.plot(
                [int(cell.split()[-1]) for cell in cells],
                [mean(group, cell, measure) for cell in cells],
                color=f"C{j}",
                marker=MARKERS[j % len(MARKERS)],
                linestyle=("-", "--", ":", "-.")[i % 4],
                label=f"{task}, {model}",
            )
    longest = max(payload["options"]["train_lengths"])
    axes.axvline(longest, color="grey", linewidth=0.8)
    axes.annotate("trained up to here", (longest, 0.02), xytext=(4, 0), textcoords="offset points", fontsize="small")
    axes.set_xscale("log", base=2)
    lengths = list(payload["options"]["lengths"])
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_ylim(0, 1.02)
    save_figure(figure, path)
