"""`resonance bench speed` and `resonance bench throughput`: tokens/s beside transformers' models of equal size."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import (
    AllocatorOption,
    CompileOption,
    DtypeOption,
    FloorOption,
    HiddenSizeOption,
    LayersOption,
    MaxSecondsOption,
    MixersOption,
    PeersOption,
    PlotOption,
    RepeatsOption,
    SetOption,
    SizeOption,
    VocabSizeOption,
    WeightsSeedOption,
    check_outputs,
    chosen_numbers,
    measure,
    model_options,
    numbers,
    title_of,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, names_or_none, wide_view


def speed(
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens of a sequence, separated by commas.", show_default="512,2048,8192"),
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
    dtype: DtypeOption = None,
    seed: WeightsSeedOption = 0,
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
    given = chosen_numbers("--lengths", lengths, full=full)
    check_outputs(json_path, plot)
    models = model_options(
        size=size,
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        mixers=mixers,
        config=config,
        dtype=dtype,
        seed=seed,
        device=device,
    )
    from resonance_nn.bench import speed as suite

    options = suite.SpeedOptions(
        **models,
        peers=names_or_none(peers),
        lengths=given or (suite.FULL_LENGTHS if full else suite.SpeedOptions.lengths),
        tokens_per_batch=tokens_per_batch,
        forward_only=forward_only,
        repeats=repeats,
        floor=floor,
        compile=compile,
        allocator=allocator,  # type: ignore[arg-type]
        max_seconds=max_seconds,
    )
    measure(suite, options, _show, json_path, plot)


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
    dtype: DtypeOption = None,
    seed: WeightsSeedOption = 0,
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
    check_outputs(json_path, plot)
    models = model_options(
        size=size,
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        mixers=mixers,
        config=config,
        dtype=dtype,
        seed=seed,
        device=device,
    )
    from resonance_nn.bench import throughput as suite

    options = suite.ThroughputOptions(
        **models,
        peers=names_or_none(peers),
        batches=given,
        length=length,
        repeats=repeats,
        floor=floor,
        compile=compile,
        allocator=allocator,  # type: ignore[arg-type]
        max_seconds=max_seconds,
    )
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from resonance_nn.bench.common import rate_table

    options = payload["options"]
    wide_view(out).print(rate_table(payload, title_of(payload, options["dtype"])))
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
