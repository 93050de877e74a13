"""`resonance bench spectrum`: what a model's resonators do on real text."""

from __future__ import annotations

from typing import Annotated

import typer

from resonance_nn.cli.bench_common import PlotOption, check_outputs, measuring
from resonance_nn.cli.common import DeviceOption, JsonOption, ModelArgument, console_for, write_json


def spectrum(
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Text to read: file, folder, glob, stdlib, or hub:org/name; repeatable. Default: stdlib.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to read, of documents in random order.")] = 16_384,
    window: Annotated[int, typer.Option("--window", help="Tokens of a document, from its beginning.")] = 1024,
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """A model's resonators: periods, decay times and use of every mode, over real text."""
    check_outputs(json_path, plot)

    import torch

    from resonance_nn.bench import spectrum as suite
    from resonance_nn.data import find_documents
    from resonance_nn.evaluation import resolve_device
    from resonance_nn.loading import load_model

    lm, tokenizer = load_model(model, dtype=torch.float32, device=resolve_device(device))
    documents = find_documents(data or ["stdlib"], leave_out=model)
    with measuring("reading") as progress:
        payload = suite.run(lm, tokenizer, documents, tokens=tokens, window=window, progress=progress)
    payload |= {"model": model, "data": data or ["stdlib"]}
    out = console_for(json_path)
    for table in suite.tables(payload):
        out.print(table)
    out.print(
        f"{payload['tokens']:,} tokens in {payload['windows']} windows. Periods and decay times in tokens; by use: the "
        "decay time, a mean over the modes weighted by their share of the energy read."
    )
    if payload["without"]:
        out.print(f"Layers without resonators: {', '.join(payload['without'])}.")
    if json_path is not None:
        write_json(json_path, payload)
    if plot is not None:
        suite.plot(payload, plot)
