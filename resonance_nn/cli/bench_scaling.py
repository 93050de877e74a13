"""`resonance bench scaling`: the exponent of a forward pass's time over the length."""

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
    title_of,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, wide_view


def scaling(
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", help="Tokens, separated by commas, ascending.", show_default="1024,4096,16384,65536"),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Lengths to 262,144 and 1,048,576 too.")] = False,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens that ours reads at once, carrying its state.")] = 8192,
    whole: Annotated[bool, typer.Option("--whole", help="Ours reads a sequence in one call.")] = False,
    peer_max_length: Annotated[
        int, typer.Option("--peer-max-length", help="The longest sequence of Llama; 0 leaves it out.")
    ] = 8192,
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
    """Time of a forward pass over the length, and the fitted exponent with its 95% interval, beside Llama's."""
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
    from resonance_nn.bench import scaling as suite

    options = suite.ScalingOptions(
        **models,
        lengths=given or (suite.FULL_LENGTHS if full else suite.ScalingOptions.lengths),
        chunk=chunk,
        whole=whole,
        peer_max_length=peer_max_length,
        repeats=repeats,
    )
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    from resonance_nn.bench.common import number, spread
    from resonance_nn.bench.peers import PEER

    options = payload["options"]
    how = "in one call" if options["whole"] else f"in chunks of {options['chunk']:,}"
    view = Table(title=title_of(payload, options["dtype"], how), highlight=False)
    for heading in ("length", "tokens/s", PEER, "ratio", "min – max", "local exponent"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        peer = "–" if row["peer"] is None else f"{row['peer']:,.0f}"
        local = f"{row['local_exponent']:.3f}" if "local_exponent" in row else ""
        view.add_row(f"{row['length']:,}", f"{row['ours']:,.0f}", peer, number(row["ratio"]), spread(row), local)
    wide_view(out).print(view)
    for key, label in (("ours", "ours"), ("peer", PEER)):
        if (fit := payload["fits"][key]) is not None:
            lengths = [row["length"] for row in payload["rows"] if row[key] is not None]
            interval = "" if fit["low"] is None else f" (95%: {fit['low']:.3f} to {fit['high']:.3f})"
            span = f"{fit['points']} points at {lengths[0]:,} to {lengths[-1]:,} tokens"
            out.print(f"{label}: time ~ length^{fit['exponent']:.3f}{interval}, {span}")
