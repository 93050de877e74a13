"""`resonance bench mixers`: speed and state of every causal mixer."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli.common import (
    DeviceOption,
    JsonOption,
    check_output,
    console_for,
    dtype_of,
    stderr_console,
    wide_view,
    write_json,
)


def mixers(
    length: Annotated[int, typer.Option(help="Tokens of a sequence, and of the prompt before decoding.")] = 2048,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of all models.")] = 512,
    layers: Annotated[int, typer.Option(help="Depth of all models.")] = 2,
    repeats: Annotated[int, typer.Option(help="Timed rounds, after one to warm up.")] = 5,
    tokens_per_batch: Annotated[int, typer.Option(help="Tokens of a training step.")] = 8192,
    dtype: Annotated[str, typer.Option(help="Of the matmuls (autocast): fp32, bf16 or fp16.")] = "bf16",
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """Training tokens/s, decoding latency and state of every causal mixer beside spectral_gate, in turns."""
    chosen = dtype_of(dtype)
    if chosen is None:
        raise ValueError("dtype = 'auto': must be one of fp32, bf16, fp16")
    check_output(json_path, "--json")
    from rich.progress import Progress
    from rich.table import Table

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
    with Progress(console=stderr_console, transient=True, disable=not stderr_console.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)
        payload = suite.run(options, lambda done, total: bar.update(task, completed=done, total=total))
    out, machine = console_for(json_path), payload["machine"]
    view = Table(
        "mixer", title=f"{machine['cpu']}, {machine['threads']} threads, {dtype}, L = {length}", highlight=False
    )
    for heading in ("parameters", "training tokens/s", "ratio", "decode ms", "ratio", "state bytes"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        view.add_row(
            *(row["case"], f"{row['parameters']:,}", f"{row['ours']:,.0f}", f"{row['ratio']:.2f}"),
            *(f"{row['decode_ms']:.2f}", f"{row['decode_ratio']:.2f}", f"{row['state_bytes']:,}"),
        )
    wide_view(out).print(view)
    out.print("ratios to spectral_gate: of training speed, higher is faster; of decoding time, lower is faster")
    if json_path is not None:
        write_json(json_path, payload)
