"""`resonance bench ops`: each op against its floor."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import (
    FASTEST,
    PlotOption,
    RepeatsOption,
    check_outputs,
    measure,
    one_dtype,
    title_of,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, names, wide_view


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
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the inputs: fp32, bf16 or fp16.", show_default=FASTEST)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs.")] = 0,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Each op, forward and backward, beside the time its bytes or operations need on this machine."""
    chosen = one_dtype(dtype, device)
    check_outputs(json_path, plot)
    from resonance_nn.bench import ops as suite
    from resonance_nn.evaluation import resolve_device

    options = suite.OpsOptions(
        ops=None if chosen_ops is None else names(chosen_ops),
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
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    from resonance_nn.bench.common import spread

    rates, dtype = payload["rates"], payload["options"]["dtype"]
    view = Table("op", "pass", title=title_of(payload, dtype), highlight=False)
    for heading in ("ms", "floor ms", "of", "ratio", "min – max", "ns an element"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        view.add_row(
            *(row["case"], row["metric"].removesuffix(" ms"), f"{row['ours']:.3f}", f"{row['peer']:.3f}"),
            *(row["bound"], f"{row['ratio']:.2f}", spread(row), f"{row['ns_per_element']:.3f}"),
        )
    wide_view(out).print(view)
    out.print(
        f"floor: bytes at {rates['bytes_per_second'] / 1e9:.1f} GB/s (a large copy) or operations at "
        f"{rates['matmul_operations_per_second'] / 1e9:,.0f} GFLOP/s (a large matmul in {dtype}; FFTs at "
        f"{rates['matmul_float32_operations_per_second'] / 1e9:,.0f} in fp32), whichever is longer"
    )
