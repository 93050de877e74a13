"""`resonance bench scaling`: the exponent of a forward pass's time over the length."""

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
)
from resonance_nn.cli.common import DeviceOption, JsonOption, check_output, console_for, wide_view, write_json


def scaling(
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Tokens, separated by commas. [1024,4096,16384,65536]")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Lengths to 262,144 and 1,048,576 too.")] = False,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of both models.")] = 512,
    layers: Annotated[int, typer.Option("--layers", help="Depth of both models.")] = 4,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Vocabulary of both models.")] = 8192,
    mixers: MixersOption = None,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens that ours reads at once, carrying its state.")] = 8192,
    whole: Annotated[bool, typer.Option("--whole", help="Ours reads a sequence in one call.")] = False,
    peer_max_length: Annotated[
        int, typer.Option("--peer-max-length", help="The longest sequence of the peer; 0 leaves it out.")
    ] = 8192,
    repeats: RepeatsOption = 5,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights: fp32, bf16 or fp16.")] = "bf16",
    seed: Annotated[int, typer.Option("--seed", help="Of weights and tokens.")] = 0,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time of a forward pass over the length, and the fitted exponent with its 95% interval, beside Llama's."""
    given, chosen = numbers("--lengths", lengths), one_dtype(dtype)
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    from rich.table import Table

    from resonance_nn.bench import scaling as suite
    from resonance_nn.evaluation import resolve_device

    options = suite.ScalingOptions(
        lengths=given or (suite.FULL_LENGTHS if full else suite.ScalingOptions.lengths),
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        mixers=names(mixers),
        chunk=chunk,
        whole=whole,
        peer_max_length=peer_max_length,
        repeats=repeats,
        dtype=chosen,
        device=resolve_device(device),
        seed=seed,
    )
    with measuring() as progress:
        payload = suite.run(options, progress)
    out, machine = console_for(json_path), payload["machine"]
    how = "in one call" if whole else f"in chunks of {chunk:,}"
    view = Table(title=f"{machine['cpu']}, {machine['threads']} threads, {dtype}, {how}", highlight=False)
    for heading in ("length", "tokens/s", suite.PEER, "ratio", "min – max", "local exponent"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        beside = ("–", "–", "–")
        if row["peer"] is not None:
            spread = f"{row['ratio_min']:.2f} – {row['ratio_max']:.2f}"
            beside = (f"{row['peer']:,.0f}", f"{row['ratio']:.2f}", spread)
        local = f"{row['local_exponent']:.3f}" if "local_exponent" in row else ""
        view.add_row(f"{row['length']:,}", f"{row['ours']:,.0f}", *beside, local)
    wide_view(out).print(view)
    for name, label, fitted in (("ours", "ours", options.lengths), ("peer", suite.PEER, options.peer_lengths)):
        if (fit := payload["fits"][name]) is not None:
            interval = "" if fit["low"] is None else f" (95%: {fit['low']:.3f} to {fit['high']:.3f})"
            span = f"{fit['points']} points at {fitted[0]:,} to {fitted[-1]:,} tokens"
            out.print(f"{label}: time ~ length^{fit['exponent']:.3f}{interval}, {span}")
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        suite.plot(payload, plot)
