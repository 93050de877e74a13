"""`resonance bench capacity`: what associative memories hold, with the theory beside it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import PlotOption, check_outputs, measure, numbers
from resonance_nn.cli.common import JsonOption


def capacity(
    dims: Annotated[
        str | None, typer.Option("--dims", help="Channels of HRR values, separated by commas. [256,512,1024]")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="Pairs to store, separated by commas. [1,2,4,...,256]")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Recalls a figure rests on, at least. [4096]")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of keys, values and codebooks.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="To 4,096 channels and 1,024 pairs, 16,384 recalls a figure.")
    ] = False,
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Associative memories: HRR's accuracy, delta-rule and least-squares exactness, bits; each beside its theory."""
    given: dict[str, Any] = {
        "dims": None if dims is None else numbers("--dims", dims),
        "pairs": None if pairs is None else numbers("--pairs", pairs),
        "trials": trials,
    }
    check_outputs(json_path, plot)
    from resonance_nn.bench import capacity as suite

    make = suite.CapacityOptions.full if full else suite.CapacityOptions
    options = make(seed=seed, **{name: value for name, value in given.items() if value is not None})
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from resonance_nn.bench.capacity import tables

    for table in tables(payload):
        out.print(table)
    out.print(
        f"HRR: at most {payload['largest_difference_points']:.2f} points from theory; "
        f"within 5 points: {'yes' if payload['within_5_points'] else 'NO'}. "
        f"Recalls that should be exact are: {'yes' if payload['exact'] else 'NO'}."
    )
