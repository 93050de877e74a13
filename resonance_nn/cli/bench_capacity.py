"""`resonance bench capacity`: what associative memories hold, with the theory beside it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from resonance_nn.cli.common import JsonOption, check_output, console_for, numbers, stderr_console, write_json


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
    plot: Annotated[str | None, typer.Option("--plot", metavar="FILE", help="Write a plot as PNG.")] = None,
) -> None:
    """Associative memories: HRR's accuracy, delta-rule and least-squares exactness, bits; each beside its theory."""
    given: dict[str, Any] = {
        "dims": None if dims is None else numbers("--dims", dims),
        "pairs": None if pairs is None else numbers("--pairs", pairs),
        "trials": trials,
    }
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    from rich.progress import Progress

    from resonance_nn.bench import capacity as suite

    make = suite.CapacityOptions.full if full else suite.CapacityOptions
    options = make(seed=seed, **{name: value for name, value in given.items() if value is not None})
    with Progress(console=stderr_console, transient=True, disable=not stderr_console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)
        payload = suite.run(options, lambda done, total: bar.update(task, completed=done, total=total))
    out = console_for(json_path)
    for table in suite.tables(payload):
        out.print(table)
    out.print(
        f"HRR: at most {payload['largest_difference_points']:.2f} points from theory; "
        f"within 5 points: {'yes' if payload['within_5_points'] else 'NO'}. "
        f"Recalls that should be exact are: {'yes' if payload['exact'] else 'NO'}."
    )
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        suite.plot(payload, plot)
