"""`resonance eval`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from resonance_nn.cli.common import JsonOption, ModelArgument, check_output, console_for, write_json


def evaluate(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Option("--data", help="File, folder, glob, stdlib, or hub:org/name; repeatable.", show_default=False),
    ],
    window: Annotated[int, typer.Option(help="Tokens in one forward pass; changes the speed only.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Documents at a time; changes the speed only.")] = 8,
    precision: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32, of the matmuls.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps or xpu.")] = "auto",
    text_field: Annotated[str, typer.Option(help="Field of JSONL and hub rows that holds the text.")] = "text",
    binary: Annotated[bool, typer.Option("--binary", help="Take files that are not text, byte for byte.")] = False,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only what `resonance train` holds out of the same --data.")
    ] = False,
    lzma: Annotated[bool, typer.Option("--lzma/--no-lzma", help="Compress the same text with xz -9e.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Loss, perplexity and bits per byte on whole texts, beside lzma's.

    Each document is read once from a fresh state, which is carried from window to window.
    """
    check_output(json_file, "--json")

    import torch

    from resonance_nn.data import find_documents, split_documents
    from resonance_nn.evaluation import evaluate_documents, report, resolve_device, resolve_precision, row
    from resonance_nn.loading import load_model
    from resonance_nn.packing import pack_weights

    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    lm, tokenizer = load_model(model, dtype=torch.float32, device=device)
    if precision == "fp32":
        pack_weights(lm)
    documents = find_documents(data, text_field=text_field, binary=binary, leave_out=model)
    if held_out:
        documents = split_documents(documents)[1]
    result = evaluate_documents(
        lm,
        tokenizer,
        documents,
        window=window,
        batch_size=batch_size,
        precision=precision,
        lzma=lzma,
        progress=sys.stderr.isatty(),
    )
    out = console_for(json_file)
    out.print(
        f"{result['bits_per_byte']:.4f} bits per byte   loss {result['loss']:.4f} nats a token   "
        f"perplexity {result['perplexity']:.2f}"
    )
    out.print(
        f"{result['documents']:,} documents, {result['bytes']:,} bytes, {result['tokens']:,} tokens, "
        f"{result['tokens_per_second']:,.0f} tokens/s ({precision} on {device})"
    )
    if lzma:
        out.print(result["verdict"])
    if json_file is not None:
        rows = [row("eval", "bits_per_byte", result["bits_per_byte"], result["lzma_bits_per_byte"], "lzma (xz -9e)")]
        metrics = ("loss", "perplexity", "bits_per_token", "tokens_per_second")
        rows += [row("eval", name, result[name]) for name in metrics]
        write_json(json_file, report("eval", device, rows, {"model": model, "data": data, **result}))
