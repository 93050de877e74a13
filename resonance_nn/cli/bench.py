"""`resonance bench SUITE`: measurements beside a peer in one process."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli import (
    bench_ablation,
    bench_capacity,
    bench_context,
    bench_decode,
    bench_learning,
    bench_mixers,
    bench_ops,
    bench_scaling,
    bench_spectrum,
)
from resonance_nn.cli.common import (
    DeviceOption,
    JsonOption,
    check_output,
    console_for,
    dtype_of,
    stderr_console,
    write_json,
)

bench = typer.Typer(name="bench")


@bench.callback(invoke_without_command=True)
def suites(context: typer.Context) -> None:
    """Measure beside a peer, in one process and in turns."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


bench.command()(bench_ablation.ablation)
bench.command()(bench_capacity.capacity)
bench.command()(bench_context.context)
bench.command()(bench_decode.decode)
bench.command()(bench_mixers.mixers)
bench.command()(bench_ops.ops)
bench.command()(bench_scaling.scaling)
bench.command()(bench_learning.recall)
bench.command()(bench_spectrum.spectrum)
bench.command()(bench_learning.tracking)


@bench.command()
def speed(
    lengths: Annotated[
        str, typer.Option("--lengths", help="Tokens of a sequence, separated by commas.")
    ] = "512,2048,8192",
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of both models.")] = 512,
    layers: Annotated[int, typer.Option("--layers", help="Depth of both models.")] = 4,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Vocabulary of both models.")] = 8192,
    mixers: Annotated[
        str | None, typer.Option("--mixers", help="Mixers of ours, separated by commas; default: the package's.")
    ] = None,
    tokens_per_batch: Annotated[int, typer.Option("--tokens-per-batch", help="Tokens of a step.")] = 8192,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds, after one to warm up.")] = 5,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the matmuls (autocast): fp32, bf16 or fp16.")] = "bf16",
    forward_only: Annotated[bool, typer.Option("--forward-only", help="The loss without its gradient.")] = False,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Write a plot as PNG.")] = None,
) -> None:
    """Training tokens/s beside transformers' Llama (SDPA) of equal width, depth, vocabulary and parameters."""
    try:
        numbers = tuple(int(part) for part in lengths.split(","))
    except ValueError:
        raise ValueError(f"--lengths {lengths!r}: must be numbers separated by commas, such as 512,2048") from None
    chosen = dtype_of(dtype)
    if chosen is None:
        raise ValueError("dtype = 'auto': must be one of fp32, bf16, fp16")
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    from rich.progress import Progress

    from resonance_nn.bench import common
    from resonance_nn.bench.speed import PEER, SpeedOptions, run
    from resonance_nn.evaluation import resolve_device

    options = SpeedOptions(
        lengths=numbers,
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        mixers=None if mixers is None else tuple(name.strip() for name in mixers.split(",")),
        repeats=repeats,
        dtype=chosen,
        tokens_per_batch=tokens_per_batch,
        forward_only=forward_only,
        device=resolve_device(device),
    )
    with Progress(console=stderr_console, transient=True, disable=not stderr_console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)
        payload = run(options, lambda done, total: bar.update(task, completed=done, total=total))
    sizes, machine = payload["parameters"], payload["machine"]
    out = console_for(json_path)
    out.print(common.table(payload, f"{machine['cpu']}, {machine['threads']} threads, {dtype}"))
    out.print(f"parameters: ours {sizes['ours']:,}, {PEER} {sizes['peer']:,}; ratio > 1: ours is faster")
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        common.plot(payload, plot, "length")
