"""`resonance bench mixers`: speed and state of every causal mixer."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import DtypeOption, PlotOption, check_outputs, measure, one_dtype, title_of
from resonance_nn.cli.common import DeviceOption, JsonOption, wide_view


def mixers(
    length: Annotated[int, typer.Option(help="Tokens of a sequence, and of the prompt before decoding.")] = 2048,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of all models.")] = 512,
    layers: Annotated[int, typer.Option(help="Depth of all models.")] = 2,
    repeats: Annotated[int, typer.Option(help="Timed rounds, after one to warm up.")] = 5,
    tokens_per_batch: Annotated[int, typer.Option(help="Tokens of a training step.")] = 8192,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Training tokens/s, decoding latency and state of every causal mixer beside spectral_gate, in turns."""
    chosen = one_dtype(dtype, device)
    check_outputs(json_path, plot)
    from resonance_nn.bench import mixers as suite
    from resonance_nn.evaluation import resolve_device

    options = suite.MixerSpeedOptions(
        length=length,
        hidden_size=hidden_size,
        layers=layers,
        repeats=repeats,
        tokens_per_batch=tokens_per_batch,
        dtype=chosen,
        device=resolve_device(device),
    )
    measure(suite, options, _show, json_path, plot)


def _show(payload: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    options = payload["options"]
    view = Table("mixer", title=title_of(payload, options["dtype"], f"L = {options['length']}"), highlight=False)
    for heading in ("parameters", "training tokens/s", "ratio", "decode ms", "ratio", "state bytes"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        view.add_row(
            *(row["case"], f"{row['parameters']:,}", f"{row['ours']:,.0f}", f"{row['ratio']:.2f}"),
            *(f"{row['decode_ms']:.2f}", f"{row['decode_ratio']:.2f}", f"{row['state_bytes']:,}"),
        )
    wide_view(out).print(view)
    out.print("ratios to spectral_gate: of training speed, higher is faster; of decoding time, lower is faster")
