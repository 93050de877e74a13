"""`resonance bench context`: speed and memory of long contexts."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import (
    FASTEST,
    MODELS,
    MixersOption,
    PlotOption,
    SetOption,
    SizeOption,
    VocabSizeOption,
    WeightsSeedOption,
    check_outputs,
    measure,
    model_options,
    numbers_or_none,
    readable_bytes,
    title_of,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, wide_view


def context(
    prefill: Annotated[
        str, typer.Option("--prefill", help="Tokens of prompts to read in chunks, separated by commas; or none.")
    ] = "262144,1048576",
    train: Annotated[
        str, typer.Option("--train", help="Tokens of a sequence to train on, separated by commas; or none.")
    ] = "262144",
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens of a prompt in one forward pass.")] = 8192,
    keep_activations: Annotated[
        bool, typer.Option("--no-gradient-checkpointing", help="In training, keep all that the backward pass needs.")
    ] = False,
    size: SizeOption = None,
    hidden_size: Annotated[
        int | None, typer.Option("--hidden-size", help="Width.", show_default="256", rich_help_panel=MODELS)
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", help="Depth.", show_default="6", rich_help_panel=MODELS)
    ] = None,
    vocab_size: VocabSizeOption = 8192,
    mixers: MixersOption = None,
    config: SetOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of a prompt's weights and a step's matmuls: fp32, bf16 or fp16.",
            show_default=FASTEST,
            rich_help_panel=MODELS,
        ),
    ] = None,
    seed: WeightsSeedOption = 0,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Tokens/s and peak memory of reading long contexts in chunks, and of a training step on one long sequence."""
    prompts, sequences = numbers_or_none("--prefill", prefill), numbers_or_none("--train", train)
    check_outputs(json_path, plot)
    model = model_options(
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
    from resonance_nn.bench import context as suite

    options = suite.ContextOptions(
        **model,
        prefill=prompts,
        train=sequences,
        chunk=chunk,
        gradient_checkpointing=not keep_activations,
    )
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    view = Table(title=title_of(payload, payload["options"]["dtype"]), highlight=False)
    for heading in ("task", "tokens", "seconds", "tokens/s", "peak above weights", "weights", "state"):
        view.add_column(heading, justify="left" if heading == "task" else "right")
    for row in payload["rows"]:
        view.add_row(
            *(row["task"], f"{row['length']:,}", f"{row['seconds']:,.1f}", f"{row['ours']:,.0f}"),
            *(readable_bytes(row[name]) for name in ("peak_bytes", "weight_bytes", "state_bytes")),
        )
    wide_view(out).print(view)
