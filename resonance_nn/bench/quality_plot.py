"""Pictures of ``quality``: held-out loss over tokens and over seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from resonance_nn.bench.common import figure
from resonance_nn.bench.quality import LOSS
from resonance_nn.bench.text import HELD_OUT


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Held-out loss over tokens and over training seconds, two panels a row, a row a length; the band is from the least
    to the largest of the seeds. The first fifth of the budget, where all losses are large, may be cut off."""
    lengths = payload["options"]["budget"]["lengths"]
    best = {(row["length"], row["model"]): row["lr"] for row in payload["rows"] if row["metric"] == LOSS}
    with figure(path, payload, panels=2 * len(lengths), rows=len(lengths)) as panels:
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
    """Draw the mean of some runs and their spread; the losses to be in view: means after a fifth of the budget and the
    least at the end."""
    curves = [[line for line in run["curve"] if line["cells"][HELD_OUT]["loss"] is not None] for run in runs]
    points = list(zip(*curves, strict=False))
    a_step = runs[0]["tokens"] / runs[0]["steps"] / 1e6
    losses = [[line["cells"][HELD_OUT]["loss"] for line in point] for point in points]
    means = [fmean(each) for each in losses]
    x = [fmean([line["step"] * a_step if by_tokens else line["training_seconds"] / 60 for line in p]) for p in points]
    (drawn,) = axes.plot(x, means, label=model)
    axes.fill_between(x, list(map(min, losses)), list(map(max, losses)), alpha=0.2, color=drawn.get_color())
    return [*means[len(means) // 5 :], *(min(each) for each in losses[-1:])]
