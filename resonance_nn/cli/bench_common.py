"""What the commands of `resonance bench` share: lists of numbers, dtypes, a bar. Light: no torch at import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from resonance_nn.cli.common import dtype_of, stderr_console

if TYPE_CHECKING:
    import torch

PlotOption = Annotated[
    str | None, typer.Option("--plot", metavar="FILE", help="Write a plot as PNG.", show_default=False)
]
MixersOption = Annotated[
    str | None, typer.Option("--mixers", help="Mixers of ours, separated by commas; default: the package's.")
]
RepeatsOption = Annotated[int, typer.Option("--repeats", help="Timed rounds, after one to warm up.")]


def numbers(flag: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of an option; None if it is left out."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} {text!r}: must be numbers separated by commas, such as 1024,4096") from None


def names(text: str | None) -> tuple[str, ...] | None:
    """The names of an option; None if it is left out."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def one_dtype(precision: str) -> torch.dtype:
    """The dtype of "fp32", "bf16" or "fp16"; "auto" means nothing in a measurement."""
    chosen = dtype_of(precision)
    if chosen is None:
        raise ValueError("dtype = 'auto': must be one of fp32, bf16, fp16")
    return chosen


@contextmanager
def measuring() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, and the call that moves it: (done, total)."""
    from rich.progress import Progress

    with Progress(console=stderr_console, transient=True, disable=not stderr_console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(bytes_: float) -> str:
    """1,234,567 -> "1.2 MB"."""
    value, unit = float(bytes_), "B"
    for larger in ("KB", "MB", "GB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
