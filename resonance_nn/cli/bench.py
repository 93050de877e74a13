"""`resonance bench SUITE`: measurements beside a peer, in turns."""

from __future__ import annotations

import typer

from resonance_nn.cli import (
    bench_ablation,
    bench_all,
    bench_capacity,
    bench_context,
    bench_decode,
    bench_learning,
    bench_long_text,
    bench_memory,
    bench_mixers,
    bench_ops,
    bench_passkey,
    bench_quality,
    bench_scaling,
    bench_spectrum,
    bench_speed,
    bench_task,
)

bench = typer.Typer(name="bench")


@bench.callback(invoke_without_command=True)
def suites(context: typer.Context) -> None:
    """Measure beside a peer, in turns."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


bench.command("all")(bench_all.run_all)
bench.command()(bench_ablation.ablation)
bench.command()(bench_capacity.capacity)
bench.command()(bench_context.context)
bench.command()(bench_decode.decode)
bench.command()(bench_long_text.longtext)
bench.command()(bench_memory.memory)
bench.command()(bench_mixers.mixers)
bench.command()(bench_ops.ops)
bench.command()(bench_scaling.scaling)
bench.command()(bench_passkey.passkey)
bench.command()(bench_quality.quality)
bench.command()(bench_learning.recall)
bench.command()(bench_spectrum.spectrum)
bench.command()(bench_speed.speed)
bench.command()(bench_task.task)
bench.command()(bench_speed.throughput)
bench.command()(bench_learning.tracking)
