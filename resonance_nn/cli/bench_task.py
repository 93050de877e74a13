"""`resonance bench task`: ours beside transformers' models of equal size on images, sounds and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import SetOption, check_outputs, numbers, use_threads
from resonance_nn.cli.bench_learning import OutputDir, Overwrite, Rates, Resume, Threads, WeightDecay
from resonance_nn.cli.common import (
    DeviceOption,
    JsonOption,
    config_fields,
    console_for,
    names,
    names_or_none,
    stderr_console,
    wide_view,
    write_json,
)


def task(
    data: Annotated[list[str], typer.Option("--data", help="As of `resonance train`; repeatable.")],
    name: Annotated[str, typer.Option("--task", help="As of `resonance train`.")] = "image-classification",
    models: Annotated[str, typer.Option(help="By commas: resonance, vit, bert, ast, wav2vec2, marian.")] = "resonance",
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:FIELD=VALUE", help="Ours with another field, beside the models; repeatable."),
    ] = None,
    eval_data: Annotated[list[str] | None, typer.Option("--eval-data", help="Held out; default: 5%.")] = None,
    hold_out: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the tables: hold out each of its values in turn.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.", show_default="the task's")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of epochs.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.", show_default="the task's")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Of the tokenizer to train.", show_default="the task's")
    ] = None,
    config: SetOption = None,
    mixers: Annotated[str | None, typer.Option(help="Of ours, by commas.", show_default="the task's")] = None,
    dropout: Annotated[float | None, typer.Option(help="In [0, 1), of all models.", show_default="the task's")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(help="In [0, 1), of all models.", show_default="the task's")
    ] = None,
    r_drop: Annotated[float, typer.Option(help="As of `resonance train`.")] = 0.0,
    augment: Annotated[str | None, typer.Option(help="As of `resonance train`.", show_default="the task's")] = None,
    lrs: Rates = "1e-3,3e-3",
    seeds: Annotated[int, typer.Option(help="Of weights and batches.")] = 3,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw or muon, of all models.")] = "adamw",
    weight_decay: WeightDecay = 0.1,
    precision: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32, of the matmuls.")] = "auto",
    threads: Threads = None,
    device: DeviceOption = "cpu",
    output_dir: OutputDir = "runs/bench-task",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_path: JsonOption = None,
) -> None:
    """Train models of equal size from scratch on a task, each at its best rate, and compare.

    Example: resonance bench task --task image-classification --data photos --models resonance,vit --epochs 5
    """
    check_outputs(json_path, None)
    use_threads(threads)
    rates, fields = numbers("--lrs", lrs, float), config_fields(config)

    from resonance_nn.arguments import TrainArguments
    from resonance_nn.bench import tasks_quality as suite

    arguments = TrainArguments(
        data=data,
        output_dir=output_dir,
        task=name,
        eval_data=eval_data or (),
        config=fields,
        mixers=None if mixers is None else names(mixers),
        dropout=dropout,
        label_smoothing=label_smoothing,
        vocab_size=vocab_size,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        weight_decay=weight_decay,
        precision=precision,
        device=device,
        r_drop=r_drop,
        augment=None if augment is None else names_or_none(augment),
    )
    options = suite.TaskOptions(
        arguments, names(models), variant_fields(variant), rates, seeds, hold_out, Path(output_dir)
    )

    def report(number: int, total: int, case: suite.Case) -> None:
        stderr_console.print(f"{number}/{total} {case.title}", markup=False)

    payload = suite.run(options, resume=resume, overwrite=overwrite, progress=report)
    _show(payload, console_for(json_path))
    if json_path is not None:
        write_json(json_path, payload)


def variant_fields(given: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Those of --variant NAME:FIELD=VALUE by name, which may come several times."""
    variants: dict[str, dict[str, Any]] = {}
    for text in given or ():
        name, _, setting = text.partition(":")
        if not setting.partition("=")[0] or "=" not in setting:
            raise ValueError(f"--variant {text!r}: must be NAME:FIELD=VALUE, as in --variant deep:num_hidden_layers=8")
        variants.setdefault(name, {}).update(config_fields([setting]))
    return variants


def _show(payload: Mapping[str, Any], out: Console) -> None:
    from rich.table import Table

    from resonance_nn.bench.common import number

    machine = payload["machine"]
    title = f"{payload['options']['task']}, {payload['options']['seeds']} seeds; {machine['cpu']}"
    if payload["options"]["hold_out"] is not None:
        title = f"{title}; each {payload['options']['hold_out']} held out in turn"
    view = Table("model", "figure", title=title, highlight=False)
    for heading in ("parameters", "rate", "mean", "± 95%", "less peer", "± 95%", "minutes"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        view.add_row(
            *(row["case"], row["metric"], f"{row['parameters']:,}", f"{row['lr']:g}"),
            *(number(row["ours"], ".4f"), number(row["interval"], ".4f")),
            *(number(row["difference"], "+.4f"), number(row["difference_interval"], ".4f")),
            f"{row['minutes']:.1f}",
        )
        for group, means in row["held_out"].items():
            held_out = number(means["ours"], ".4f"), "", number(means["difference"], "+.4f")
            view.add_row(f"  without {group}", "", "", "", *held_out)
    wide_view(out).print(view)
