"""`resonance bench context`: speed and memory of long contexts."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli.bench_common import MixersOption, PlotOption, measuring, names, numbers, one_dtype, size
from resonance_nn.cli.common import DeviceOption, JsonOption, check_output, console_for, wide_view, write_json


def context(
    task: Annotated[
        str, typer.Option("--task", help="prefill (read in chunks), train (a step on one sequence), or both.")
    ] = "prefill,train",
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens, separated by commas. [prefill: 262144,1048576, train: 262144]"),
    ] = None,
    model_size: Annotated[str, typer.Option("--size", help="Width and depth: tiny, small, base, …")] = "tiny",
    hidden_size: Annotated[int | None, typer.Option("--hidden-size", help="Width, in place of the size's.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Depth, in place of the size's.")] = None,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Vocabulary.")] = 8192,
    mixers: MixersOption = None,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens of a prefill in one forward pass.")] = 8192,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing", help="Keep blocks' inputs only, compute again."
        ),
    ] = True,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of a prefill's weights and a step's matmuls: fp32, bf16 or fp16.")
    ] = "bf16",
    seed: Annotated[int, typer.Option("--seed", help="Of weights and tokens.")] = 0,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Tokens/s and peak memory of reading long contexts in chunks, and of a training step on one long sequence."""
    given, chosen = numbers("--lengths", lengths), one_dtype(dtype)
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    from rich.table import Table

    from resonance_nn.bench import context as suite
    from resonance_nn.evaluation import resolve_device

    options = suite.ContextOptions(
        tasks=names(task) or (),
        lengths=given,
        size=model_size,
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        mixers=names(mixers),
        chunk=chunk,
        gradient_checkpointing=gradient_checkpointing,
        dtype=chosen,
        device=resolve_device(device),
        seed=seed,
    )
    with measuring() as progress:
        payload = suite.run(options, progress)
    out, machine = console_for(json_path), payload["machine"]
    view = Table(title=f"{machine['cpu']}, {machine['threads']} threads, {dtype}", highlight=False)
    for heading in ("task", "tokens", "seconds", "tokens/s", "peak above weights", "weights", "state"):
        view.add_column(heading, justify="left" if heading == "task" else "right")
    for row in payload["rows"]:
        state = "–" if row["state_bytes"] is None else size(row["state_bytes"])
        view.add_row(
            *(row["task"], f"{row['length']:,}", f"{row['seconds']:,.1f}", f"{row['ours']:,.0f}"),
            *(size(row["peak_bytes"]), size(row["weight_bytes"]), state),
        )
    wide_view(out).print(view)
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        suite.plot(payload, plot)
