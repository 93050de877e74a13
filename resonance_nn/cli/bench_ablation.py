"""`resonance bench ablation`: what each option of a mixer is worth in language modelling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resonance_nn.cli.bench_common import one_precision, use_threads
from resonance_nn.cli.bench_learning import Dtype, say_how_to_resume
from resonance_nn.cli.common import (
    DeviceOption,
    JsonOption,
    check_output,
    console_for,
    names,
    stderr_console,
    wide_view,
    write_json,
)


def ablation(
    ablations: Annotated[
        str, typer.Option(help="Questions, by commas: spectral_gate, prime_bump, holographic.")
    ] = "spectral_gate,prime_bump",
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder, glob, stdlib or hub:org/name; repeats.", show_default="stdlib"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="To train on, of each run.")] = 1_000_000,
    seeds: Annotated[
        int | None, typer.Option(help="Of weights and batches.", show_default="3; 5 for prime_bump")
    ] = None,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of all models.")] = 128,
    layers: Annotated[int, typer.Option(help="Depth of all models.")] = 4,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer trained on the data.")] = 2048,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    lr: Annotated[float, typer.Option(help="Peak learning rate, the same for all.")] = 3e-3,
    dtype: Dtype = None,
    threads: Annotated[int | None, typer.Option(help="Of PyTorch's CPU kernels. Default: PyTorch's.")] = None,
    device: DeviceOption = "cpu",
    output_dir: Annotated[str, typer.Option(help="A folder a run in this one.")] = "runs/bench-ablation",
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs, go on with the others.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the runs that are asked for.")] = False,
    json_path: JsonOption = None,
) -> None:
    """Held-out loss of language models of equal size that differ in one option, on the same batches, seed by seed."""
    check_output(json_path, "--json")
    use_threads(threads)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from resonance_nn.bench import ablation as suite
    from resonance_nn.progress import TrainingInterrupted

    options = suite.AblationOptions(
        names=names(ablations),
        output_dir=Path(output_dir),
        data=tuple(data or ["stdlib"]),
        tokens=tokens,
        seeds=seeds,
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        seq_len=seq_len,
        lr=lr,
        precision=one_precision(dtype, device),
        device=device,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr_console, transient=True, disable=not stderr_console.is_terminal) as bar:
        shown = bar.add_task("text", total=1.0)
        try:
            payload = suite.run(
                options,
                resume=resume,
                overwrite=overwrite,
                progress=lambda share, what: bar.update(shown, completed=share, description=what),
            )
        except TrainingInterrupted as interrupted:
            bar.stop()
            say_how_to_resume(interrupted.step)
            raise
    out = console_for(json_path)
    view = Table("case", title=f"held-out loss, nats a token; {tokens:,} tokens a run", highlight=False)
    for heading in ("parameters", "loss", "less base", "± 95%", "seeds", "minutes"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        interval = "" if row["interval"] is None else f"{row['interval']:.4f}"
        loss = "diverged" if row["ours"] is None else f"{row['ours']:.4f}"
        difference = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        view.add_row(
            *(row["case"], f"{row['parameters']:,}", loss, difference, interval),
            *(str(len(row["losses"])), f"{row['seconds'] / 60:.1f}"),
        )
    wide_view(out).print(view)
    if json_path is not None:
        write_json(json_path, payload)
