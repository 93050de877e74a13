"""`resonance bench ops`: each op against its floor."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli.bench_common import PlotOption, RepeatsOption, measuring, names, one_dtype
from resonance_nn.cli.common import DeviceOption, JsonOption, check_output, console_for, wide_view, write_json


def ops(
    chosen_ops: Annotated[
        str | None, typer.Option("--ops", help="Beginnings of their names, separated by commas; default: all.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Of a batch.")] = 8192,
    length: Annotated[int, typer.Option("--length", help="Tokens of a sequence.")] = 2048,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width.")] = 512,
    heads: Annotated[int, typer.Option("--heads", help="Heads.")] = 8,
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Vocabulary of the cross-entropy.")] = 8192,
    repeats: RepeatsOption = 5,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the inputs: fp32, bf16 or fp16.")] = "bf16",
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs.")] = 0,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Each op, forward and backward, beside the time its bytes or operations need on this machine."""
    chosen = one_dtype(dtype)
    check_output(json_path, "--json")
    check_output(plot, "--plot")
    from rich.table import Table

    from resonance_nn.bench import ops as suite
    from resonance_nn.evaluation import resolve_device

    options = suite.OpsOptions(
        ops=names(chosen_ops),
        tokens=tokens,
        length=length,
        hidden_size=hidden_size,
        heads=heads,
        vocab_size=vocab_size,
        repeats=repeats,
        dtype=chosen,
        device=resolve_device(device),
        seed=seed,
    )
    with measuring() as progress:
        payload = suite.run(options, progress)
    out, machine, rates = console_for(json_path), payload["machine"], payload["rates"]
    view = Table("op", "pass", title=f"{machine['cpu']}, {machine['threads']} threads, {dtype}", highlight=False)
    for heading in ("ms", "floor ms", "of", "ratio", "min – max", "ns an element"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        view.add_row(
            *(row["case"], row["metric"].removesuffix(" ms"), f"{row['ours']:.3f}", f"{row['peer']:.3f}"),
            *(row["bound"], f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f} – {row['ratio_max']:.2f}"),
            f"{row['ns_per_element']:.3f}",
        )
    wide_view(out).print(view)
    out.print(
        f"floor: bytes at {rates['bytes_per_second'] / 1e9:.1f} GB/s (a large copy) or operations at "
        f"{rates['matmul_operations_per_second'] / 1e9:,.0f} GFLOP/s (a large matmul in {dtype}; FFTs at "
        f"{rates['matmul_float32_operations_per_second'] / 1e9:,.0f} in fp32), whichever is longer"
    )
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        suite.plot(payload, plot)
