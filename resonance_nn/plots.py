"""Plots: the loss curve of a training run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any


def plot_loss(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Training and held-out loss over steps, and the learning rate below, as a PNG.

    Args:
        history: the Trainer's log: mappings with ``step`` and ``loss`` and ``learning_rate``, or ``eval_loss``.
        path: the file to write.
        title: one line above.
    """
    from matplotlib.figure import Figure

    def series(key: str) -> tuple[list[float], list[float]]:
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        return [p[0] for p in points], [p[1] for p in points]

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    loss.plot(*series("loss"), color="#1f77b4", linewidth=1.3, label="training")
    steps, values = series("eval_loss")
    if steps:
        loss.plot(steps, values, color="#d62728", marker="o", markersize=4, label="held out")
        loss.annotate(
            f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(0, 8), textcoords="offset points", ha="right"
        )
    loss.set_ylabel("loss (nats a token)")
    loss.set_title(title)
    loss.legend()
    rate.plot(*series("learning_rate"), color="#555555", linewidth=1.3)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_xlabel("step")
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png")
