"""`resonance bench memory`: peak memory beside transformers' models of equal size."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli.bench_options import (
    DtypeOption,
    HiddenSizeOption,
    LayersOption,
    MixersOption,
    PeersOption,
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


def memory(
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of a sequence, separated by commas.")] = "2048,8192",
    tokens_per_batch: Annotated[int, typer.Option("--tokens-per-batch", help="Tokens of a step.")] = 8192,
    task: Annotated[
        str, typer.Option("--task", help="train: forward, loss and backward; prefill: read prompts, in chunks.")
    ] = "train",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute each block in the backward pass.")
    ] = False,
    size: SizeOption = None,
    hidden_size: HiddenSizeOption = None,
    layers: LayersOption = None,
    vocab_size: VocabSizeOption = 8192,
    mixers: MixersOption = None,
    config: SetOption = None,
    peers: PeersOption = "llama",
    dtype: DtypeOption = "bf16",
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Peak memory of a training step or of reading a prompt, each model at each length in a process of its own."""
    given = numbers("--lengths", lengths)
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    models = model_options(size, hidden_size, layers, vocab_size, mixers, config, peers, dtype, device)
    from rich.table import Table

    from resonance_nn.bench import common
    from resonance_nn.bench import memory as suite

    options = suite.MemoryOptions(
        **models,
        lengths=given,
        tokens_per_batch=tokens_per_batch,
        task=task,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing,
    )
    with measuring() as progress:
        payload = suite.run(options, progress)
    out, machine = console_for(json_path), payload["machine"]
    view = Table(
        "case", "model", title=f"{task}: {machine['cpu']}, {machine['threads']} threads, {dtype}", highlight=False
    )
    for heading in ("MB above weights", "MB in all", "ratio"):
        view.add_column(heading, justify="right")
    shown = None
    for row in payload["rows"]:
        if row["case"] != shown:
            shown = row["case"]
            view.add_row(shown, "ours", _megabytes(row["ours"]), _megabytes(row["whole"]), "")
        if row["peer_name"] is not None:
            cells = (_megabytes(row["peer"]), _megabytes(row["peer_whole"]), common.number(row["ratio"]))
            view.add_row("", row["peer_name"], *cells)
    wide_view(out).print(view)
    out.print(
        "above weights: above the process with its model, before the first step; ratio > 1: ours takes less",
        soft_wrap=True,
    )
    for row in payload["rows"]:
        for name, reason in (("ours", row["reason"]), (row["peer_name"], row["peer_reason"])):
            if reason is not None:
                out.print(f"{row['case']}: {name} not measured: {reason}", soft_wrap=True)
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        common.plot(payload, plot, "length")


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"
