"""What the commands of `resonance bench` share: their options, lists of numbers, a bar. Light: no torch at import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from resonance_nn.cli.common import (
    check_output,
    config_fields,
    console_for,
    dtype_of,
    names,
    stderr_console,
    write_json,
)

if TYPE_CHECKING:
    import torch

Number = TypeVar("Number", int, float)
MODELS, TIMING = "Models", "Timing"


def _models(*flags: str, help: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=MODELS, **more)


def _timing(*flags: str, help: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=TIMING)


SizeOption = Annotated[
    str | None, _models("--size", help="Width and depth of ours by name: tiny, small, base, medium, large or xlarge.")
]
HiddenSizeOption = Annotated[int | None, _models("--hidden-size", help="Width of all models.", show_default="512")]
LayersOption = Annotated[int | None, _models("--layers", help="Depth of ours.", show_default="4")]
VocabSizeOption = Annotated[int, _models("--vocab-size", help="Vocabulary of all models.")]
MixersOption = Annotated[
    str | None, _models("--mixers", help="Mixers of ours, separated by commas; default: the package's.")
]
SetOption = Annotated[
    list[str] | None, _models("--set", metavar="FIELD=VALUE", help="Any field of our configuration; repeatable.")
]
PeersOption = Annotated[
    str, _models("--peers", help="Beside ours, by commas: llama, mamba2, mamba, rwkv, gated_delta; or none.")
]
FASTEST = "bf16 where the device computes in it, else fp32"  # where --dtype is left out
DtypeOption = Annotated[
    str | None, _models("--dtype", help="Of the matmuls (autocast): fp32, bf16 or fp16.", show_default=FASTEST)
]
WeightsDtypeOption = Annotated[
    str | None, _models("--dtype", help="Of the weights: fp32, bf16 or fp16.", show_default=FASTEST)
]
WeightsSeedOption = Annotated[int, _models("--seed", help="Of weights and tokens.")]
RepeatsOption = Annotated[int, _timing("--repeats", help="Timed rounds, after one to warm up.")]
FloorOption = Annotated[bool, _timing("--floor/--no-floor", help="Time each model's matmuls alone as well.")]
CompileOption = Annotated[bool, _timing("--compile", help="All models under torch.compile; needs a C++ compiler.")]
AllocatorOption = Annotated[
    str, _timing("--allocator", help="keep: freed memory stays in the process, as in training; default: as it comes.")
]
MaxSecondsOption = Annotated[
    float, _timing("--max-seconds", help="A peer with a slower first step is not timed, nor in larger cases.")
]
PlotOption = Annotated[
    str | None, typer.Option("--plot", metavar="FILE", help="Write a plot as PNG.", show_default=False)
]


def model_options(
    *,
    size: str | None,
    hidden_size: int | None,
    layers: int | None,
    vocab_size: int,
    mixers: str | None,
    config: list[str] | None,
    dtype: str | None,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Fields of ``ModelOptions``, those left out not among them. Imports torch."""
    from resonance_nn.config import SIZES
    from resonance_nn.evaluation import resolve_device

    given: dict[str, Any] = {"hidden_size": hidden_size, "layers": layers}
    given = {name: value for name, value in given.items() if value is not None}
    if size is not None:
        if given:
            raise ValueError(f"size and {next(iter(given))}: a size is both width and depth; give one")
        if size not in SIZES:
            raise ValueError(f"size = {size!r}: must be one of {', '.join(SIZES)}")
        given = {"hidden_size": SIZES[size]["hidden_size"], "layers": SIZES[size]["num_hidden_layers"]}
    return {
        **given,
        "vocab_size": vocab_size,
        "mixers": None if mixers is None else names(mixers),
        "overrides": config_fields(config),
        "dtype": one_dtype(dtype, device),
        "seed": seed,
        "device": resolve_device(device),
    }


def numbers(flag: str, text: str, kind: Callable[[str], Number] = int) -> tuple[Number, ...]:
    """Those of "512,2048", each once, in order."""
    try:
        return tuple(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{flag} {text!r}: must be numbers separated by commas, such as 512,2048") from None


def numbers_or_none(flag: str, text: str) -> tuple[int, ...]:
    """Those of "512,2048"; none of "none"."""
    return () if text == "none" else numbers(flag, text)


def chosen_numbers(flag: str, text: str | None, *, full: bool) -> tuple[int, ...] | None:
    """Those of an option that --full stands in for; None if it is left out."""
    if full and text is not None:
        raise ValueError(f"--full and {flag}: --full is a list of its own; give one")
    return None if text is None else numbers(flag, text)


def one_precision(precision: str | None, device: str) -> str:
    """What is given; if nothing is, "bf16" where the device computes in it, else "fp32"."""
    from resonance_nn.evaluation import resolve_device, resolve_precision

    return resolve_precision("auto", resolve_device(device)) if precision is None else precision


def one_dtype(precision: str | None, device: str) -> torch.dtype:
    """The dtype of :func:`one_precision`; "auto" means nothing in a measurement."""
    chosen = dtype_of(one_precision(precision, device))
    if chosen is None:
        raise ValueError("dtype = 'auto': must be one of fp32, bf16, fp16")
    return chosen


def use_threads(threads: int | None) -> None:
    """Of PyTorch's CPU kernels; None leaves PyTorch's own number. Raises ValueError below 1."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads = {threads}: must be ≥ 1")
    import torch

    torch.set_num_threads(threads)


def check_outputs(json_path: str | None, plot: str | None) -> None:
    """Refuse files that cannot be written before anything is measured."""
    check_output(json_path, "--json")
    check_output(plot, "--plot")


def measure(
    suite: Any, options: Any, show: Callable[[dict[str, Any], Console], None], json_path: str | None, plot: str | None
) -> None:
    """Run a suite of ``resonance_nn.bench`` with a bar, write the JSON and the plot, ``show`` the result to people."""
    with measuring() as progress:
        payload = suite.run(options, progress)
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        suite.plot(payload, plot)
    show(payload, console_for(json_path))


@contextmanager
def measuring(what: str = "measuring") -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal: the function it gives is told what is done, and of how much."""
    from rich.progress import Progress

    with Progress(console=stderr_console, transient=True, disable=not stderr_console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def title_of(payload: dict[str, Any], *more: str) -> str:
    """A table's: the machine, and what else is given."""
    machine = payload["machine"]
    return ", ".join((machine["cpu"], f"{machine['threads']} threads", *more))


def readable_bytes(count: float | None) -> str:
    """1,234,567 -> "1.2 MB"; nothing of None."""
    if count is None:
        return ""
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
