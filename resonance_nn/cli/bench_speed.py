"""`resonance bench speed` and `resonance bench throughput`: tokens/s beside transformers' models of equal size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resonance_nn.cli.bench_options import (
    AllocatorOption,
    CompileOption,
    DtypeOption,
    FloorOption,
    HiddenSizeOption,
    LayersOption,
    MaxSecondsOption,
    MixersOption,
    PeersOption,
    RepeatsOption,
    SetOption,
    SizeOption,
    VocabSizeOption,
    model_options,
)
from resonance_nn.cli.common import (
    DeviceOption,
    JsonOption,
    PlotOption,
    check_output,
    console_for,
    measuring,
    numbers,
    wide_view,
    write_json,
)

if TYPE_CHECKING:
    from resonance_nn.bench.child import Progress

DEFAULT_LENGTHS = "512,2048,8192"


def speed(
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens of a sequence, separated by commas.", show_default=DEFAULT_LENGTHS),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Lengths 512, 1024, ... 65536.")] = False,
    tokens_per_batch: Annotated[int, typer.Option("--tokens-per-batch", help="Tokens of a step.")] = 8192,
    forward_only: Annotated[bool, typer.Option("--forward-only", help="The loss without its gradient.")] = False,
    size: SizeOption = None,
    hidden_size: HiddenSizeOption = None,
    layers: LayersOption = None,
    vocab_size: VocabSizeOption = 8192,
    mixers: MixersOption = None,
    config: SetOption = None,
    peers: PeersOption = "llama",
    dtype: DtypeOption = "bf16",
    repeats: RepeatsOption = 5,
    floor: FloorOption = True,
    compile: CompileOption = False,
    allocator: AllocatorOption = "keep",
    max_seconds: MaxSecondsOption = 120,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Training tokens/s over the length, beside transformers' models of equal width, vocabulary and parameters."""
    if full and lengths is not None:
        raise ValueError("--full and --lengths: --full is a list of lengths; give one")
    given = None if full else numbers("--lengths", DEFAULT_LENGTHS if lengths is None else lengths)
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    models = model_options(size, hidden_size, layers, vocab_size, mixers, config, peers, dtype, device)
    from resonance_nn.bench import speed as suite

    options = suite.SpeedOptions(
        **models,
        lengths=suite.FULL_LENGTHS if given is None else given,
        tokens_per_batch=tokens_per_batch,
        forward_only=forward_only,
        repeats=repeats,
        floor=floor,
        compile=compile,
        allocator=allocator,  # type: ignore[arg-type]
        max_seconds=max_seconds,
    )
    _measure(lambda progress: suite.run(options, progress), json_path, plot, "length")


def throughput(
    batches: Annotated[
        str, typer.Option("--batches", help="Numbers of sequences, separated by commas.")
    ] = "1,2,4,8,16",
    length: Annotated[int, typer.Option("--length", help="Tokens of a sequence.")] = 512,
    size: SizeOption = None,
    hidden_size: HiddenSizeOption = None,
    layers: LayersOption = None,
    vocab_size: VocabSizeOption = 8192,
    mixers: MixersOption = None,
    config: SetOption = None,
    peers: PeersOption = "llama",
    dtype: DtypeOption = "bf16",
    repeats: RepeatsOption = 5,
    floor: FloorOption = True,
    compile: CompileOption = False,
    allocator: AllocatorOption = "keep",
    max_seconds: MaxSecondsOption = 120,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Training and forward tokens/s over the batch size, beside transformers' models of equal size."""
    given = numbers("--batches", batches)
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    models = model_options(size, hidden_size, layers, vocab_size, mixers, config, peers, dtype, device)
    from resonance_nn.bench import throughput as suite

    options = suite.ThroughputOptions(
        **models,
        batches=given,
        length=length,
        repeats=repeats,
        floor=floor,
        compile=compile,
        allocator=allocator,  # type: ignore[arg-type]
        max_seconds=max_seconds,
    )
    _measure(lambda progress: suite.run(options, progress), json_path, plot, "batch")


def _measure(run: Callable[[Progress], dict[str, Any]], json_path: str | None, plot: str | None, x: str) -> None:
    """Run with a bar, print the table, write the files."""
    from resonance_nn.bench import common

    with measuring() as progress:
        payload = run(progress)
    machine, options, out = payload["machine"], payload["options"], console_for(json_path)
    title = f"{machine['cpu']}, {machine['threads']} threads, {options['dtype']}"
    wide_view(out).print(common.table(payload, title))
    sizes = ", ".join(f"{name} {count:,}" for name, count in payload["parameters"].items())
    out.print(f"parameters: {sizes}; ratio > 1: ours is faster", soft_wrap=True)
    for name, note in payload["peers"].items():
        out.print(f"{name}: {note}", soft_wrap=True)
    if options["floor"]:
        out.print(
            "over own matmuls: a step's time over that of its matmuls alone; those inside fused attention are not told",
            soft_wrap=True,
        )
    for row in payload["rows"]:
        if row["reason"] is not None:
            out.print(f"{row['case']}: {row['peer_name']} not timed: {row['reason']}", soft_wrap=True)
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        common.plot(payload, plot, x)
