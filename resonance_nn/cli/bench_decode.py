"""`resonance bench decode`: time and state of a token over the context."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli.bench_common import (
    MixersOption,
    PlotOption,
    RepeatsOption,
    measuring,
    names,
    numbers,
    one_dtype,
    size,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, check_output, console_for, wide_view, write_json


def decode(
    contexts: Annotated[
        str | None, typer.Option("--contexts", help="Tokens already read, separated by commas. [1024,4096,16384]")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Contexts to 65,536, 262,144 and 1,048,576 too.")] = False,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", help="Sequences decoded at once, separated by commas.")
    ] = "1,16",
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of both models.")] = 512,
    layers: Annotated[int, typer.Option("--layers", help="Depth of both models.")] = 4,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Vocabulary of both models.")] = 8192,
    mixers: MixersOption = None,
    tokens: Annotated[
        int, typer.Option("--tokens", help="Decoded in a timed call; the peer, at long contexts, decodes fewer.")
    ] = 32,
    repeats: RepeatsOption = 5,
    peer_max_context: Annotated[
        int, typer.Option("--peer-max-context", help="The longest context of the peer; 0 leaves it out.")
    ] = 65_536,
    read_tokens: Annotated[
        int | None,
        typer.Option("--read-tokens", help="Of a context really read by ours, at most; default: all.", min=1),
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Time transformers' generate() end to end too.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights: fp32, bf16 or fp16.")] = "bf16",
    seed: Annotated[int, typer.Option("--seed", help="Of weights and tokens.")] = 0,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Milliseconds a token and bytes of state over the context, beside Llama with the better of its KV caches."""
    given, batches, chosen = numbers("--contexts", contexts), numbers("--batch-sizes", batch_sizes), one_dtype(dtype)
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    from rich.table import Table

    from resonance_nn.bench import decode as suite
    from resonance_nn.evaluation import resolve_device

    options = suite.DecodeOptions(
        contexts=given or (suite.FULL_CONTEXTS if full else suite.DecodeOptions.contexts),
        batch_sizes=batches or (),
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        mixers=names(mixers),
        tokens=tokens,
        repeats=repeats,
        peer_max_context=peer_max_context,
        read_tokens=read_tokens,
        generate=generate,
        dtype=chosen,
        device=resolve_device(device),
        seed=seed,
    )
    with measuring() as progress:
        payload = suite.run(options, progress)
    out, machine = console_for(json_path), payload["machine"]
    view = Table(title=f"ms a token: {machine['cpu']}, {machine['threads']} threads, {dtype}", highlight=False)
    headings = ("ours", "Llama", "its cache", "ratio", "min – max", "× weights", "× first", "tok/s", "gain")
    for heading in ("context", "batch", *headings, "state", "KV cache"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        timed = (f"{row['ours']:.2f}", "–", "–", "–", "–")
        if row["peer"] is not None:
            spread = f"{row['ratio_min']:.2f} – {row['ratio_max']:.2f}"
            cache = row["peer_name"].rsplit(" ", 1)[1]
            timed = (f"{row['ours']:.2f}", f"{row['peer']:.2f}", cache, f"{row['ratio']:.2f}", spread)
        more = ("", "", "generate()", "", "", "")
        if row["metric"] == "ms a token":
            more = (
                *(f"{row['over_weights']:.2f}", f"{row['over_first_context']:.3f}"),
                *(f"{row['tokens_per_second']:,.0f}", f"{row['batch_gain']:.2f}"),
                *(size(row["state_bytes"]), size(row["peer_state_bytes"])),
            )
        view.add_row(f"{row['context']:,}", str(row["batch_size"]), *timed, *more)
    wide_view(out).print(view)
    out.print(
        f"ratio > 1: ours is faster. × weights: over the time to read {size(payload['weight_bytes'])} of weights once. "
        f"× first: over the time at context {options.contexts[0]:,}, in the same rounds. gain: tokens/s over those of "
        f"batch {options.batch_sizes[0]}"
    )
    for row in payload["rows"]:
        if row.get("peer_skipped"):
            out.print(f"no Llama at {row['case']}: {row['peer_skipped']}")
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        suite.plot(payload, plot)
