"""Plots: the loss curve of a training run, and inputs with what a model says of them."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

RIGHT = "#12873f"  # the colour of what is right


def plot_loss(
    history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "", unit: str = "nats a token"
) -> None:
    """Training and held-out loss over steps, and the learning rate below, as a PNG.

    Args:
        history: the Trainer's log: mappings with ``step`` and ``loss`` and ``learning_rate``, or ``eval_loss``.
        path: the file to write.
        title: one line above.
        unit: of the losses.
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
    loss.set_ylabel(f"loss ({unit})")
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


def plot_pictures(pictures: Sequence[tuple[Any, str, bool]], path: str | os.PathLike[str]) -> None:
    """A grid of pictures (rows, columns, 1 or 3) of bytes, a line above each, red where it is wrong, as a PNG."""
    from matplotlib.figure import Figure

    across = min(8, len(pictures))
    down = -(-len(pictures) // across)
    figure = Figure(figsize=(1.5 * across, 1.7 * down), dpi=120, layout="constrained")
    for axes in (grid := figure.subplots(down, across, squeeze=False)).flat:
        axes.axis("off")
    for axes, (pixels, line, wrong) in zip(grid.flat, pictures, strict=False):
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(line, fontsize=7, color="#c00000" if wrong else "#222222", parse_math=False)
    figure.savefig(path, format="png")


def plot_events(
    sounds: Sequence[tuple[str, Any, Sequence[Mapping[str, Any]]]], sampling_rate: int, path: str | os.PathLike[str]
) -> None:
    """The spectrogram of each sound (name, samples, events), its events as bars above, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4 * len(sounds)), dpi=120, layout="constrained")
    labels = sorted({event["label"] for _, _, events in sounds for event in events})
    colours = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    for axes, (name, samples, events) in zip(figure.subplots(len(sounds), 1, squeeze=False).flat, sounds, strict=True):
        window = min(256, len(samples))
        axes.specgram(samples + 1e-9, NFFT=window, Fs=sampling_rate, noverlap=window // 2, cmap="magma")
        top = sampling_rate / 2
        for event in events:
            axes.axvspan(event["start"], event["end"], color=colours[event["label"]], alpha=0.25)
            middle = (event["start"] + event["end"]) / 2
            axes.text(middle, 0.94 * top, event["label"], color="white", ha="center", va="top", parse_math=False)
        axes.set_xlim(0, len(samples) / sampling_rate)
        axes.set_ylabel("Hz")
        axes.set_title(name[-80:], fontsize="small", parse_math=False)
        axes.set_xlabel("seconds")
    figure.savefig(path, format="png")


def plot_retrieval(
    queries: Sequence[tuple[Any, int | None, Sequence[tuple[Any, float, bool]]]], path: str | os.PathLike[str]
) -> None:
    """A row for each query, a text or a picture: it, the place of what belongs to it (None: not known), and its best
    matches (text or picture, score, whether it is the right one, which has a green frame), as a PNG."""
    from matplotlib.figure import Figure

    across = max(len(matches) for _, _, matches in queries)
    figure = Figure(figsize=(2.9 + 1.35 * across, 0.1 + 1.6 * len(queries)), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.0, hspace=0.0)  # type: ignore[union-attr]
    grid = figure.subplots(len(queries), 1 + across, squeeze=False, width_ratios=[2.0, *[1.0] * across])
    for row, (query, rank, matches) in zip(grid, queries, strict=True):
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        _show(row[0], query, 0.0, width=30, fontsize=10)
        row[0].set_anchor("W")
        if rank is not None:
            place = "right one first" if rank == 1 else f"right one at place {rank}"
            row[0].set_xlabel(place, fontsize=8, color=RIGHT if rank == 1 else "#777777", loc="left")
        for axes, (match, score, right) in zip(row[1:], matches, strict=False):
            _show(axes, match, 0.06, width=14, fontsize=8)
            axes.set_box_aspect(1)
            axes.spines[:].set(visible=True, color=RIGHT if right else "#cccccc", linewidth=3.5 if right else 0.8)
            axes.set_title(f"{score:.2f}", fontsize=8.5, color=RIGHT if right else "#444444", pad=4)
    figure.savefig(path, format="png")


def _show(axes: Any, shown: Any, x: float, *, width: int, fontsize: float) -> None:
    """A picture of bytes, or from x on a text in lines of so many characters."""
    if not isinstance(shown, str):
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255)
        return
    text = "\n".join(textwrap.wrap(shown, width, max_lines=6, placeholder=" …"))
    axes.text(x, 0.5, text, va="center", fontsize=fontsize, transform=axes.transAxes, parse_math=False)
