"""`resonance bench decode`: time and state of a token over the context."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import (
    HiddenSizeOption,
    LayersOption,
    MixersOption,
    PlotOption,
    RepeatsOption,
    SetOption,
    SizeOption,
    VocabSizeOption,
    WeightsDtypeOption,
    WeightsSeedOption,
    check_outputs,
    chosen_numbers,
    measure,
    model_options,
    numbers,
    readable_bytes,
    title_of,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, wide_view


def decode(
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts", help="Tokens already read, separated by commas, ascending.", show_default="1024,4096,16384"
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Contexts to 65,536, 262,144 and 1,048,576 too.")] = False,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", help="Sequences decoded at once, separated by commas, ascending.")
    ] = "1,16",
    tokens: Annotated[
        int, typer.Option("--tokens", help="Decoded in a timed call; the peer, at long contexts, decodes fewer.")
    ] = 32,
    peer_max_context: Annotated[
        int, typer.Option("--peer-max-context", help="The longest context of Llama; 0 leaves it out.")
    ] = 65_536,
    read_tokens: Annotated[
        int | None,
        typer.Option("--read-tokens", help="Of a context really read by ours, at most; default: all.", min=1),
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Time transformers' generate() end to end too.")] = False,
    packed: Annotated[
        bool,
        typer.Option("--packed/--no-packed", help="Weights of both in the order a CPU's kernels read them."),
    ] = True,
    size: SizeOption = None,
    hidden_size: HiddenSizeOption = None,
    layers: LayersOption = None,
    vocab_size: VocabSizeOption = 8192,
    mixers: MixersOption = None,
    config: SetOption = None,
    dtype: WeightsDtypeOption = None,
    seed: WeightsSeedOption = 0,
    repeats: RepeatsOption = 5,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Milliseconds a token and bytes of state over the context, beside Llama with the better of its KV caches."""
    given, batches = chosen_numbers("--contexts", contexts, full=full), numbers("--batch-sizes", batch_sizes)
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
    from resonance_nn.bench import decode as suite

    options = suite.DecodeOptions(
        **models,
        contexts=given or (suite.FULL_CONTEXTS if full else suite.DecodeOptions.contexts),
        batch_sizes=batches,
        tokens=tokens,
        repeats=repeats,
        peer_max_context=peer_max_context,
        read_tokens=read_tokens,
        generate=generate,
        packed=packed,
    )
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    from resonance_nn.bench.common import spread
    from resonance_nn.bench.decode import METRIC

    view = Table(title=title_of(payload, payload["options"]["dtype"], "ms a token"), highlight=False)
    headings = ("ours", "Llama", "its cache", "ratio", "min – max", "× weights", "× first", "tok/s", "gain")
    for heading in ("context", "batch", *headings, "state", "KV cache"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        timed = (f"{row['ours']:.2f}", "–", "–", "–", "–")
        if row["peer"] is not None:
            cache = row["peer_name"].rsplit(" ", 1)[1]
            timed = (f"{row['ours']:.2f}", f"{row['peer']:.2f}", cache, f"{row['ratio']:.2f}", spread(row))
        more = ("", "", "generate()", "", "", "")
        if row["metric"] == METRIC:
            more = (
                *(f"{row['over_weights']:.2f}", f"{row['over_first_context']:.3f}"),
                *(f"{row['tokens_per_second']:,.0f}", f"{row['batch_gain']:.2f}"),
                *(readable_bytes(row["state_bytes"]), readable_bytes(row["peer_state_bytes"])),
            )
        view.add_row(f"{row['context']:,}", str(row["batch_size"]), *timed, *more)
    wide_view(out).print(view)
    first, smallest = payload["options"]["contexts"][0], payload["options"]["batch_sizes"][0]
    out.print(
        f"ratio > 1: ours is faster. × weights: over the time to read {readable_bytes(payload['weight_bytes'])} of "
        f"weights once. × first: over the time at context {first:,}, in the same rounds. gain: tokens/s over those of "
        f"batch {smallest}"
    )
    for row in payload["rows"]:
        if row.get("peer_skipped"):
            out.print(f"no Llama at {row['case']}: {row['peer_skipped']}")
