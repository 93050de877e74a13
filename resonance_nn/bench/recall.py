"""Multi-query associative recall: what a state of so many bytes can hold, beside attention."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from resonance_nn.bench.common import result
from resonance_nn.bench.sweep import MARKERS, Sweep, axes_for, best, mean, rows, save_figure
from resonance_nn.bench.tasks import LENGTHS, PAIRS, Task, recall_cell, recall_task


@dataclass(frozen=True)
class RecallOptions:
    """The task, as :func:`resonance_nn.bench.tasks.recall_task` makes it."""

    vocab_size: int = 512
    lengths: Sequence[int] = LENGTHS
    pairs: Sequence[int] = PAIRS
    watched: tuple[int, int] = (256, 32)
    fillers: str = "unused"
    test_lengths: Sequence[int] = ()

    def task(self) -> Task:
        """Raises ValueError where the options do not fit together."""
        return recall_task(self.vocab_size, self.lengths, self.pairs, self.watched, self.fillers, self.test_lengths)


def run(sweep: Sweep, options: RecallOptions, report: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    """Train what is not trained yet; what is written as JSON. Memories begin as long as the longest sequence of
    training, whatever is asked beyond."""
    if options.test_lengths:
        sweep = replace(sweep, shape=replace(sweep.shape, initial_context=max(options.lengths)))
    runs = sweep.run({"recall": (options.task(), asdict(options))}, report)
    return result("recall", rows(runs), sweep.plan.device, options=asdict(options), runs=runs)


def shown(payload: Mapping[str, Any]) -> list[str]:
    """The cells of a narrow table: the easiest, the watched, the hardest, and the watched pairs at other lengths."""
    first = payload["runs"][0]
    cells = list(first["cells"])
    further = {recall_cell(n, payload["options"]["watched"][1]) for n in payload["options"]["test_lengths"]}
    trained = [cell for cell in cells if int(cell.split("/")[0]) in payload["options"]["lengths"]]
    return list(
        dict.fromkeys([trained[0], *first["watched"], trained[-1], *(cell for cell in cells if cell in further)])
    )


def plot(payload: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Accuracy at the watched cell over the state's bytes; each point at its best learning rate, the mean of seeds."""
    (cell,) = payload["runs"][0]["watched"]
    length, pairs = cell.split("/")
    figure, axes = axes_for(
        f"recall, vocabulary {payload['options']['vocab_size']}",
        "bytes of state a sequence (float32)",
        f"accuracy at length {length} with {pairs} pairs",
    )
    chosen = best(payload["runs"], cell)
    for i, model in enumerate(dict.fromkeys(run["model"] for run in payload["runs"])):
        points = sorted((size, mean(group, cell)) for (name, size), group in chosen.items() if name == model)
        axes.plot(*zip(*points, strict=True), marker=MARKERS[i % len(MARKERS)], label=model)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    save_figure(figure, path)


__all__ = ["RecallOptions", "plot", "recall_cell", "run", "shown"]
