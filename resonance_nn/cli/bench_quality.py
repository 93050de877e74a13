"""`resonance bench quality`: loss a token, a second and a parameter beside peers of equal size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from resonance_nn.cli.bench_common import PlotOption, SetOption, check_outputs, numbers, one_precision, use_threads
from resonance_nn.cli.bench_learning import (
    BatchTokens,
    Cooldown,
    Dtype,
    OutputDir,
    Overwrite,
    Rates,
    Resume,
    Threads,
    WeightDecay,
    showing,
)
from resonance_nn.cli.common import DeviceOption, JsonOption, config_fields, console_for, names, wide_view, write_json


def quality(
    models: Annotated[
        str,
        typer.Option(help="By commas: default, complex_ssd, erase_write, llama, mamba2, gated_delta, mamba, rwkv."),
    ] = "default,llama,mamba2,gated_delta",
    budget: Annotated[str, typer.Option(help="XS, S (3M parameters, 4M tokens, 3 seeds) or M (10M, 8M, 1).")] = "S",
    data: Annotated[
        list[str] | None,
        typer.Option(help="File, folder, glob, stdlib or hub:org/name; repeats.", show_default="stdlib"),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="As --data: texts the finished models are judged on; repeats.", show_default=False),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(help="JSONL of minimal pairs, or a folder of them, to judge on; repeats.", show_default=False),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a window, by commas.", show_default="the budget's")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="To train on, of each run.", show_default="the budget's")] = None,
    seeds: Annotated[int | None, typer.Option(help="Of weights and batches.", show_default="the budget's")] = None,
    lrs: Rates = "1e-3,2e-3,4e-3,8e-3",
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL=RATE", help="A model's rate, which is then not tuned; repeats.", show_default=False
        ),
    ] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw or muon, of all models.")] = "adamw",
    cooldown: Cooldown = 1.0,
    weight_decay: WeightDecay = 0.1,
    tokens_per_batch: BatchTokens = 4096,
    config: SetOption = None,
    dtype: Dtype = None,
    threads: Threads = None,
    device: DeviceOption = "cpu",
    output_dir: OutputDir = "runs/bench-quality",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Train models of equal size from scratch on the same batches, each at its best rate.

    Example: resonance bench quality --budget XS --models default,llama --plot quality.png
    """
    check_outputs(json_path, plot)
    use_threads(threads)
    rates, fields = numbers("--lrs", lrs, float), config_fields(config)
    given = dict(map(_model_rate, rate or ()))
    if len(given) < len(rate or ()):
        raise ValueError(f"--rate {' '.join(rate or ())}: one for each model")
    chosen = {"tokens": tokens, "seeds": seeds, "tokens_per_batch": tokens_per_batch}
    chosen["lengths"] = None if lengths is None else numbers("--lengths", lengths)

    from resonance_nn.bench import quality as suite
    from resonance_nn.bench.quality_options import BUDGETS, QualityOptions
    from resonance_nn.bench.quality_plot import plot as draw
    from resonance_nn.bench.runs import Plan
    from resonance_nn.evaluation import resolve_device

    if budget not in BUDGETS:
        raise ValueError(f"budget = {budget!r}: must be one of {', '.join(BUDGETS)}")
    options = QualityOptions(
        models=names(models),
        budget=replace(BUDGETS[budget], **{name: value for name, value in chosen.items() if value is not None}),
        data=tuple(data or ["stdlib"]),
        output_dir=Path(output_dir),
        lrs=rates,
        plan=Plan(
            steps=1,
            optimizer=optimizer,
            cooldown=cooldown,
            weight_decay=weight_decay,
            precision=one_precision(dtype, device),
            device=resolve_device(device),
        ),
        fields=fields,
        texts=tuple(text or ()),
        pairs=tuple(pairs or ()),
        rates=given,
    )
    with showing(_state) as report:
        payload = suite.run(options, resume=resume, overwrite=overwrite, progress=report)
    _show(payload, console_for(json_path))
    if plot is not None:
        draw(payload, plot)
    if json_path is not None:
        write_json(json_path, payload)


def _model_rate(text: str) -> tuple[str, float]:
    """The two of MODEL=RATE."""
    model, _, rate = text.partition("=")
    try:
        return model, float(rate)
    except ValueError:
        raise ValueError(f"--rate {text!r}: must be MODEL=RATE, as in --rate llama=2e-3") from None


def _state(line: Mapping[str, Any]) -> str:
    """One line of the log for people."""
    if not line:
        return ""
    trained, held_out = line["loss"], next(iter(line["cells"].values()))["loss"]
    shown = ["not finite" if loss is None else f"{loss:.3f}" for loss in (trained, held_out)]
    return f"step {line['step']:,}, loss {shown[0]}, held out {shown[1]}"


def _show(payload: Mapping[str, Any], out: Console) -> None:
    """The table and its notes."""
    from rich.table import Table

    from resonance_nn.bench.quality import LOSS

    machine, rows = payload["machine"], payload["rows"]
    losses, elsewhere = ([row for row in rows if (row["metric"] == LOSS) == kind] for kind in (True, False))
    seeds = payload["options"]["budget"]["seeds"]
    title = f"held-out loss, nats a token; {payload['options']['budget']['tokens']:,} tokens a run, {seeds} seeds; "
    view = Table("case", title=title + f"{machine['cpu']}, {machine['threads']} threads", highlight=False)
    for heading in ("parameters", "rate", "loss", "± 95%", "less Llama", "± 95%", "bits/byte"):
        view.add_column(heading, justify="right")
    for heading in ("meets Llama: tokens", "seconds", "minutes"):
        view.add_column(heading, justify="right")

    for row in losses:
        view.add_row(
            *(row["case"], f"{row['parameters']:,}", f"{row['lr']:g}" + "*" * row["lr_at_edge"]),
            *("diverged" if row["ours"] is None else _number(row["ours"]), _number(row["interval"])),
            *(*_difference(row), _number(row["bits_per_byte"])),
            *(_number(row["share_of_tokens"], ".0%"), _number(row["share_of_seconds"], ".0%")),
            f"{row['training_seconds'] / 60:.1f}",
        )
    wide_view(out).print(view)
    if any(row["lr_at_edge"] for row in losses):
        out.print("* the best rate is the least or the largest tried: --lrs may go further", markup=False)
    if any(row["peer_name"] for row in rows):
        out.print(
            "meets Llama: where the curve is first at Llama's final loss, as a share of Llama's tokens and of its "
            "training seconds; none: never",
            markup=False,
            soft_wrap=True,
        )
    for model, note in {row["model"]: row["note"] for row in losses if row["note"]}.items():
        out.print(f"{model}: {note}", markup=False, soft_wrap=True)
    if elsewhere:
        view = Table("case", "metric", title="elsewhere", highlight=False)
        for heading in ("figure", "± 95%", "less Llama", "± 95%"):
            view.add_column(heading, justify="right")
        for row in elsewhere:
            figures = (_number(row["ours"]), _number(row["interval"]))
            view.add_row(row["case"], row["metric"], *figures, *_difference(row))
        wide_view(out).print(view)


def _number(value: float | None, form: str = ".4f") -> str:
    from resonance_nn.bench.common import number

    return number(value, form)


def _difference(row: Mapping[str, Any]) -> tuple[str, str]:
    return _number(row["difference"], "+.4f"), _number(row["difference_interval"])
