"""`resonance predict`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resonance_nn.cli.common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    PrecisionOption,
    check_output,
    console_for,
    wide_view,
    write_json,
)

SHOWN = 40  # rows of the table


def predict(
    model: ModelArgument,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[INPUT]...", help="Files or folders: pictures, sounds, tables; texts by lines."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text itself; repeatable.")] = None,
    top: Annotated[
        int | None, typer.Option(help="How many labels, tokens or neighbours to name. Default: 3, or 5 matches.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Inputs at a time; changes the speed only.")] = 32,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    picture: Annotated[
        str | None,
        typer.Option("--picture", metavar="FILE", help="A PNG of images, sounds or matches and what is said of them."),
    ] = None,
) -> None:
    """What a trained classifier, encoder or retriever says of files and texts.

    Example: resonance predict runs/pictures photos/ --picture sheet.png
    """
    check_output(json_file, "--json")
    check_output(picture, "--picture")
    if (top is not None and top < 1) or batch_size < 1:
        raise ValueError(f"top = {top}, batch_size = {batch_size}: must be ≥ 1")

    from resonance_nn.evaluation import report, resolve_device, resolve_precision, row
    from resonance_nn.prediction import find_inputs, load_predictor

    where = resolve_device(device)
    predictor = load_predictor(model, device=where, top=top)
    if picture is not None and not predictor.can_draw:
        raise ValueError(
            f"--picture {picture!r}: this model gives {predictor.kind} of {predictor.what}; --json keeps them"
        )
    found = predictor(
        list(find_inputs(predictor, inputs or [], text or [])),
        batch_size=batch_size,
        precision=resolve_precision(precision, where),
        progress=sys.stderr.isatty(),
    )
    out = console_for(json_file)
    _show(found, predictor.kind, out)
    figures = predictor.figures(found)
    rows = [row("predict", figure.metric, figure.value) for figure in figures if figure.value is not None]
    for figure in figures:
        if figure.sentence:
            out.print(figure.sentence, markup=False, highlight=False, soft_wrap=True)
    if picture is not None:
        predictor.draw(found, picture)
    if json_file is not None:
        write_json(
            json_file, {**report("predict", where, rows, {"model": model, "inputs": len(found)}), "found": found}
        )


def _show(found: list[dict[str, Any]], kind: str, out: Console) -> None:
    view = Table("input", kind, box=None)
    scored = any(one.get("score") is not None for one in found)
    if scored:
        view.add_column("score", justify="right")
    for one in found[:SHOWN]:
        text = one["input"] if len(one["input"]) <= 70 else f"{one['input'][:30]}…{one['input'][-39:]}"
        score = [] if not scored else ["" if one.get("score") is None else f"{one['score']:.3f}"]
        view.add_row(escape(text), escape(str(one["label"])), *score)
    wide_view(out).print(view)
    if len(found) > SHOWN:
        out.print(f"… and {len(found) - SHOWN:,} more; --json FILE has all")
