"""`resonance bench passkey`: one sentence remembered through a long text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from resonance_nn.cli.bench_common import PlotOption, SetOption, check_outputs, numbers, one_precision, use_threads
from resonance_nn.cli.bench_learning import (
    BatchTokens,
    Cooldown,
    Dtype,
    EvalEvery,
    OutputDir,
    Overwrite,
    Resume,
    Threads,
    WeightDecay,
    showing,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, config_fields, console_for, names, wide_view, write_json


def passkey(
    models: Annotated[str, typer.Option(help="By commas, as of `bench quality`.")] = "memory",
    data: Annotated[
        list[str] | None,
        typer.Option(help="Of the tokenizer and --filler text: file, folder, glob or stdlib.", show_default="stdlib"),
    ] = None,
    filler: Annotated[
        str, typer.Option(help="Around keys: sentences (the same five over and over) or text.")
    ] = "sentences",
    train_lengths: Annotated[
        str, typer.Option(help="Of training sequences, by commas.")
    ] = "64,128,256,512,1024,2048,4096",
    lengths: Annotated[str, typer.Option(help="Of sequences to be asked at, by commas.")] = "4096,16384,65536,262144",
    peer_max_length: Annotated[int, typer.Option(help="The longest that transformers' models are asked at.")] = 16_384,
    needles: Annotated[int, typer.Option(help="Keys in a sequence; of 2 or more each has a name, one is asked.")] = 1,
    sequences: Annotated[int, typer.Option(help="Held-out sequences a length, at depths spread evenly.")] = 40,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width.")] = 128,
    layers: Annotated[int, typer.Option(help="Depth.")] = 2,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer.")] = 2048,
    steps: Annotated[int, typer.Option(help="Of each run, at most.")] = 1200,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    seed: Annotated[int, typer.Option(help="Of weights and sequences.")] = 0,
    cooldown: Cooldown = 0.2,
    weight_decay: WeightDecay = 0.1,
    tokens_per_batch: BatchTokens = 4096,
    eval_every: EvalEvery = 100,
    target: Annotated[float, typer.Option(help="Share that ends a run when found twice; above 1: never.")] = 2.0,
    config: SetOption = None,
    dtype: Dtype = None,
    threads: Threads = None,
    device: DeviceOption = "cpu",
    output_dir: OutputDir = "runs/bench-passkey",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Train on short texts with a key of five digits in them, ask for it after texts of up to 262,144 tokens.

    Example: resonance bench passkey --models memory,llama --plot passkey.png
    """
    check_outputs(json_path, plot)
    use_threads(threads)
    trained, asked = numbers("--train-lengths", train_lengths), numbers("--lengths", lengths)

    from resonance_nn.bench import passkey as suite
    from resonance_nn.bench.runs import Plan
    from resonance_nn.evaluation import resolve_device

    options = suite.PasskeyOptions(
        models=names(models),
        data=tuple(data or ["stdlib"]),
        filler=filler,
        output_dir=Path(output_dir),
        train_lengths=trained,
        lengths=asked,
        peer_max_length=peer_max_length,
        needles=needles,
        sequences=sequences,
        hidden_size=hidden_size,
        layers=layers,
        vocab_size=vocab_size,
        plan=Plan(
            lr=lr,
            optimizer=optimizer,
            seed=seed,
            steps=steps,
            tokens_per_batch=tokens_per_batch,
            cooldown=cooldown,
            weight_decay=weight_decay,
            eval_every=eval_every,
            target=target,
            precision=one_precision(dtype, device),
            device=resolve_device(device),
        ),
        fields=config_fields(config),
    )
    with showing(_state) as report:
        payload = suite.run(options, resume=resume, overwrite=overwrite, progress=report)
    _show(payload, json_path)
    if plot is not None:
        suite.plot(payload, plot)
    if json_path is not None:
        write_json(json_path, payload)


def _state(line: Mapping[str, Any]) -> str:
    """One line of the log for people."""
    if not line:
        return ""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.3f}"
    found = ", ".join(f"{figures['accuracy']:.0%} of keys at {cell}" for cell, figures in line["cells"].items())
    return f"step {line['step']:,}, loss {loss}, {found}"


def _show(payload: Mapping[str, Any], json_path: str | None) -> None:
    from rich.table import Table

    options = payload["options"]
    sentences = "one key" if options["needles"] == 1 else f"{options['needles']} keys, one asked for"
    trained = f"{options['train_lengths'][0]:,} to {options['train_lengths'][-1]:,}"
    view = Table("case", title=f"{sentences}, in {options['filler']}; trained at {trained} tokens", highlight=False)
    for heading in ("keys found", "95%", "of", "parameters", "steps", "minutes"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        view.add_row(
            *(row["case"], f"{row['ours']:.1%}", f"{row['low']:.0%}–{row['high']:.0%}", str(len(row["found"]))),
            *(f"{row['parameters']:,}", f"{row['steps']:,}", f"{row['training_seconds'] / 60:.1f}"),
        )
    wide_view(console_for(json_path)).print(view)
