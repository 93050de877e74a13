"""`resonance bench longtext`: what a long context is worth to a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli.bench_common import PlotOption, check_outputs, measuring, numbers
from resonance_nn.cli.common import DeviceOption, JsonOption, ModelArgument, console_for, wide_view, write_json


def longtext(
    model: ModelArgument,
    data: Annotated[list[str], typer.Option("--data", help="As of `resonance eval`; repeats.", show_default=False)],
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only what `resonance train` holds out of the same --data.")
    ] = False,
    contexts: Annotated[
        str, typer.Option(help="Tokens before those that are scored, by commas.")
    ] = "1024,8192,32768,65536",
    reference: Annotated[int, typer.Option(help="The context that others are compared with.")] = 8192,
    score: Annotated[int, typer.Option(help="Tokens scored at the end of each window.")] = 1024,
    windows: Annotated[int, typer.Option(help="How many, spread evenly over the text.")] = 50,
    chunk: Annotated[int, typer.Option(help="Tokens in one forward pass; changes the speed only.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Windows at a time; changes the speed only.")] = 4,
    precision: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32, of the matmuls.")] = "auto",
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Predict the same tokens after 1K … 64K others, and all of them by position.

    Example: resonance bench longtext runs/my-model --data stdlib --held-out --plot longtext.png
    """
    check_outputs(json_path, plot)
    asked = numbers("--contexts", contexts)

    import torch
    from rich.table import Table

    from resonance_nn.bench import long_text as suite
    from resonance_nn.bench.common import number
    from resonance_nn.data import find_documents, split_documents
    from resonance_nn.evaluation import resolve_device, resolve_precision
    from resonance_nn.loading import load_model

    device = resolve_device(device)
    options = suite.LongTextOptions(
        contexts=asked,
        score=score,
        windows=windows,
        reference=reference,
        chunk=chunk,
        batch_size=batch_size,
        precision=resolve_precision(precision, device),
    )
    options.check()
    lm, tokenizer = load_model(model, dtype=torch.float32, device=device)
    documents = find_documents(data, leave_out=model)
    if held_out:
        documents = split_documents(documents)[1]
    with measuring("reading") as progress:
        payload = suite.run(lm, tokenizer, documents, options, progress)
    payload["model"], payload["data"] = model, data
    view = Table("case", "metric", title=f"{windows} windows, {payload['tokens']:,} tokens of text", highlight=False)
    for heading in ("nats a token", "± 95%", "windows"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        change = row["metric"].startswith(suite.CHANGE)
        figures = number(row["ours"], "+.4f" if change else ".4f"), number(row["interval"], ".4f")
        view.add_row(row["case"], row["metric"].split(",")[0], *figures, str(row["windows"]))
    wide_view(console_for(json_path)).print(view)
    if plot is not None:
        suite.plot(payload, plot)
    if json_path is not None:
        write_json(json_path, payload)
