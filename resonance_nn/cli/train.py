"""`resonance train`."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated

import typer

from resonance_nn.cli.common import (
    JsonOption,
    check_output,
    config_fields,
    console_for,
    names_or_none,
    stderr_console,
    write_json,
)

MODEL, BUDGET, OPTIMISER, RUN = "Model", "Budget and batches", "Optimisation", "Run"


def train(
    data: Annotated[
        list[str],
        typer.Option("--data", help="File, folder, glob, stdlib, or hub:org/name; repeatable.", show_default=False),
    ],
    output_dir: Annotated[str, typer.Option(help="Folder for the model and all of the run.", show_default=False)],
    task: Annotated[
        str, typer.Option(help="text-generation, image-classification, translation …: docs/tasks.md has all.")
    ] = "text-generation",
    eval_data: Annotated[
        list[str] | None, typer.Option("--eval-data", help="Held-out text; default: the last 5% of the files.")
    ] = None,
    hold_out: Annotated[
        str | None, typer.Option(metavar="COLUMN=VALUE", help="Rows of the tables of --data to hold out.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSONL and hub rows that holds the text.")] = "text",
    binary: Annotated[bool, typer.Option("--binary", help="Take files that are not text, byte for byte.")] = False,
    size: Annotated[
        str | None,
        typer.Option(
            help="tiny, small, base, medium, large or xlarge. Default: tiny, or the task's.", rich_help_panel=MODEL
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="default, spectral, hybrid or memory: docs/results.md.", rich_help_panel=MODEL)
    ] = None,
    mixers: Annotated[
        str | None, typer.Option(help="Comma-separated, repeated over the layers.", rich_help_panel=MODEL)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Of the tokenizer to train. Default: 8192, or the task's.", rich_help_panel=MODEL)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of a tokenizer to use instead of training one.", rich_help_panel=MODEL)
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Model to go on from: folder, bundled, hub:org/name.", rich_help_panel=MODEL)
    ] = None,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Any field of ResonanceConfig; repeatable.", rich_help_panel=MODEL
        ),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="In [0, 1). Default: 0, or the task's.", rich_help_panel=MODEL)
    ] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="In [0, 1). Default: 0, or the task's.", rich_help_panel=MODEL)
    ] = None,
    z_loss: Annotated[float | None, typer.Option(help="Weight of mean(lse²).", rich_help_panel=MODEL)] = None,
    fim: Annotated[
        float,
        typer.Option(
            metavar="RATE",
            help="Share of the documents to learn to fill in the middle of (--infill); 0.5 is usual.",
            rich_help_panel=BUDGET,
        ),
    ] = 0.0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=BUDGET)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data. Default: 1, or the task's.", rich_help_panel=BUDGET)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.", rich_help_panel=BUDGET)] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window.", rich_help_panel=BUDGET)] = 512,
    batch_size: Annotated[
        int | None,
        typer.Option(help="In one forward pass. Default: 8 windows of text, or the task's.", rich_help_panel=BUDGET),
    ] = None,
    accumulate: Annotated[int, typer.Option(help="Forward passes a step.", rich_help_panel=BUDGET)] = 1,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak. Default: muon 6e-3, adamw 3e-3, times 256 / width if less than 1, times the task's; with "
            "--init a tenth.",
            rich_help_panel=OPTIMISER,
        ),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Below 1 a share of the steps, else steps.", rich_help_panel=OPTIMISER)
    ] = 0.05,
    optimizer: Annotated[str, typer.Option(help="muon or adamw.", rich_help_panel=OPTIMISER)] = "muon",
    weight_decay: Annotated[
        float, typer.Option(help="On linear maps and embeddings.", rich_help_panel=OPTIMISER)
    ] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0: no limit.", rich_help_panel=OPTIMISER)] = 1.0,
    r_drop: Annotated[
        float, typer.Option(help="R-Drop's α: two passes, to agree; 5 is usual.", rich_help_panel=OPTIMISER)
    ] = 0.0,
    augment: Annotated[
        str | None,
        typer.Option(
            help="By commas: changes at random. Default: the task's. Texts: split, drop; images: flip, crop, zoom, "
            "erase; sounds: speed …; none.",
            rich_help_panel=OPTIMISER,
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto, bf16, fp16 or fp32, of the matmuls.", rich_help_panel=OPTIMISER)
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=OPTIMISER),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile: slow to start.", rich_help_panel=OPTIMISER)
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, data order and dropout.", rich_help_panel=OPTIMISER)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps or xpu.", rich_help_panel=RUN)] = "auto",
    save_every: Annotated[
        int | None, typer.Option(help="Steps. Default: a tenth, at most 1000.", rich_help_panel=RUN)
    ] = None,
    keep: Annotated[int, typer.Option(help="Newest checkpoints to keep.", rich_help_panel=RUN)] = 2,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps. Default: a tenth, at most 1000.", rich_help_panel=RUN)
    ] = None,
    log_to: Annotated[str, typer.Option(help="none, tensorboard, trackio or wandb.", rich_help_panel=RUN)] = "none",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, same arguments.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in the output folder.", rich_help_panel=RUN)
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Train a language model, or one for another --task; go on from a model (--init), or with a run (--resume).

    Example: resonance train --data stdlib --output-dir runs/first --steps 300
    """
    check_output(json_file, "--json")
    fields = config_fields(config)

    from resonance_nn.training import TrainArguments, TrainingInterrupted
    from resonance_nn.training import train as run

    arguments = TrainArguments(
        data=data,
        output_dir=output_dir,
        task=task,
        eval_data=eval_data or (),
        hold_out=hold_out,
        text_field=text_field,
        binary=binary,
        size=size,
        recipe=recipe,
        mixers=None if mixers is None else tuple(name.strip() for name in mixers.split(",")),
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        init=init,
        config=fields,
        dropout=dropout,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        fim=fim,
        steps=steps,
        epochs=epochs,
        tokens=tokens,
        seq_len=seq_len,
        batch_size=batch_size,
        accumulate=accumulate,
        lr=lr,
        warmup=warmup,
        optimizer=optimizer,
        weight_decay=weight_decay,
        clip=clip,
        r_drop=r_drop,
        augment=None if augment is None else names_or_none(augment),
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        seed=seed,
        device=device,
        save_every=save_every,
        keep=keep,
        eval_every=eval_every,
        log_to=log_to,
        resume=resume,
        overwrite=overwrite,
    )
    try:
        result = run(arguments)
    except TrainingInterrupted as interrupted:
        words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
        command = shlex.join(["resonance", *words, "--resume"])
        stderr_console.print(f"{interrupted}\nGo on with: {command}", soft_wrap=True, markup=False)
        raise
    if os.environ.get("RANK", "0") != "0":  # under torchrun
        return
    if json_file is not None:
        write_json(json_file, result)
    out, summary = console_for(json_file), result["summary"]
    where = shlex.quote(output_dir)
    if task != "text-generation":
        names = {"loss", *(name for name in summary if name.startswith("eval_"))} - {"eval_loss"}
        figures = ", ".join(f"{name.removeprefix('eval_')} {_number(summary[name])}" for name in sorted(names))
        out.print(
            f"held-out loss {_number(summary['eval_loss'])}; {figures}; {summary['steps']:,} steps", soft_wrap=True
        )
        out.print(f"The model is in {where}.", soft_wrap=True, markup=False)
        return
    out.print(
        f"held-out loss {_number(summary['eval_loss'])} nats a token, "
        f"{_number(summary['eval_bits_per_byte_in_windows'])} bits per byte in windows of {seq_len} tokens; "
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens",
        soft_wrap=True,
    )
    out.print(f"The model is in {where}. Next:", soft_wrap=True, markup=False)
    sources = " ".join(f"--data {shlex.quote(spec)}" for spec in eval_data or data)
    sources += f" --text-field {shlex.quote(text_field)}" if text_field != "text" else ""
    sources += " --binary" if binary else ""
    out.print(f"  resonance eval {where} {sources}{'' if eval_data else ' --held-out'}", soft_wrap=True, markup=False)
    how = "infill FILE" if fim else "prompt ..."
    out.print(f"  resonance generate {where} --{how}", soft_wrap=True, markup=False)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
