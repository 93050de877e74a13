"""`resonance bench memory`: peak memory of a training step beside transformers' models of equal size."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import (
    DtypeOption,
    HiddenSizeOption,
    LayersOption,
    MixersOption,
    PeersOption,
    PlotOption,
    SetOption,
    SizeOption,
    VocabSizeOption,
    WeightsSeedOption,
    check_outputs,
    measure,
    model_options,
    numbers,
    readable_bytes,
    title_of,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, names_or_none, wide_view


def memory(
    lengths: Annotated[str, typer.Option("--lengths", help="Tokens of a sequence, separated by commas.")] = "2048,8192",
    tokens_per_batch: Annotated[int, typer.Option("--tokens-per-batch", help="Tokens of a step.")] = 8192,
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
    dtype: DtypeOption = None,
    seed: WeightsSeedOption = 0,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Peak memory of a training step, each model at each length in a process of its own."""
    given = numbers("--lengths", lengths)
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
    from resonance_nn.bench import memory as suite

    options = suite.MemoryOptions(
        **models,
        peers=names_or_none(peers),
        lengths=given,
        tokens_per_batch=tokens_per_batch,
        gradient_checkpointing=gradient_checkpointing,
    )
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    from resonance_nn.bench.common import number

    view = Table("case", "model", title=title_of(payload, payload["options"]["dtype"]), highlight=False)
    for heading in ("above weights", "in all", "ratio"):
        view.add_column(heading, justify="right")
    shown = None
    for row in payload["rows"]:
        if row["case"] != shown:
            shown = row["case"]
            view.add_row(shown, "ours", readable_bytes(row["ours"]), readable_bytes(row["whole"]), "")
        if row["peer_name"] is not None:
            figures = readable_bytes(row["peer"]), readable_bytes(row["peer_whole"]), number(row["ratio"])
            view.add_row("", row["peer_name"], *figures)
    wide_view(out).print(view)
    out.print(
        "above weights: above the process with its model, before the first step; ratio > 1: ours takes less",
        soft_wrap=True,
    )
    for row in payload["rows"]:
        for name, reason in (("ours", row["reason"]), (row["peer_name"], row["peer_reason"])):
            if reason is not None:
                out.print(f"{row['case']}: {name} not measured: {reason}", soft_wrap=True)
