"""`resonance eval`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from resonance_nn.cli.common import JsonOption, ModelArgument, check_output, console_for, write_json
from resonance_nn.cli.infill import InfillContextOption, InfillOrderOption, show_infilling


def evaluate(
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="File, folder, glob, stdlib, or hub:org/name; repeatable.", show_default=False),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(help="JSONL of minimal pairs, or a folder of them, as BLiMP's; repeatable.", show_default=False),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens in one forward pass; changes the speed only.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Documents at a time; changes the speed only.")] = 8,
    precision: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32, of the matmuls.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps or xpu.")] = "auto",
    text_field: Annotated[str, typer.Option(help="Field of JSONL and hub rows that holds the text.")] = "text",
    binary: Annotated[bool, typer.Option("--binary", help="Take files that are not text, byte for byte.")] = False,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only what `resonance train` holds out of the same --data.")
    ] = False,
    infill: Annotated[
        int | None,
        typer.Option(
            "--infill", metavar="N", help="Hide N lines of --data, one at a time, and count those filled in exactly."
        ),
    ] = None,
    infill_order: InfillOrderOption = "spm",
    infill_context: InfillContextOption = None,
    seed: Annotated[int, typer.Option(help="Of the lines that --infill hides.")] = 0,
    lzma: Annotated[bool, typer.Option("--lzma/--no-lzma", help="Compress the same text with xz -9e.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Loss, perplexity and bits per byte on whole texts, beside lzma's; accuracy on minimal pairs; hidden lines.

    Each document is read once from a fresh state, which is carried from window to window. Of a pair the acceptable
    sentence should be the more probable one. With --infill it is hidden lines of --data that count, not all of it.
    """
    check_output(json_file, "--json")
    if not (data or pairs):
        raise ValueError("give --data, --pairs, or both")
    if infill is not None and not data:
        raise ValueError("--infill hides lines of --data: name some")
    if infill is None and (seed or infill_order != "spm" or infill_context is not None):
        raise ValueError("--seed, --infill-order and --infill-context go with --infill N")
    if infill is not None and infill < 1:
        raise ValueError(f"--infill {infill}: must be ≥ 1 lines")

    import torch

    from resonance_nn.data import Document, find_documents, split_documents
    from resonance_nn.evaluation import autocast, evaluate_documents, report, resolve_device, resolve_precision
    from resonance_nn.infilling import evaluate_infilling
    from resonance_nn.loading import load_model
    from resonance_nn.minimal_pairs import read_pairs, score_pairs
    from resonance_nn.packing import pack_weights

    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    read = read_pairs(pairs) if pairs else None
    lm, tokenizer = load_model(model, dtype=torch.float32, device=device)
    if precision == "fp32":
        pack_weights(lm)
    out = console_for(json_file)
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"model": model, "data": data or [], "pairs": pairs or []}
    documents: list[Document] = []
    if data:
        documents = find_documents(data, text_field=text_field, binary=binary, leave_out=model)
        if held_out:
            documents = split_documents(documents)[1]
    if documents and infill is not None:
        how = {"lines": infill, "seed": seed, "order": infill_order, "context": infill_context}
        result = evaluate_infilling(lm, tokenizer, documents, precision=precision, **how, progress=sys.stderr.isatty())
        rows += show_infilling(result, out)
        summary["infill"] = result
    elif documents:
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
        rows += _show_texts(result, device, out)
        summary |= result
    if read is not None:
        with autocast(precision, device):
            result = score_pairs(lm, tokenizer, read, progress=sys.stderr.isatty())
        rows += _show_pairs(result, out)
        summary["minimal_pairs"] = result
    if json_file is not None:
        write_json(json_file, report("eval", device, rows, summary))


def _show_texts(result: dict[str, Any], device: str, out: Console) -> list[dict[str, Any]]:
    """The figures on texts for people; as rows."""
    from resonance_nn.evaluation import row

    out.print(
        f"{result['bits_per_byte']:.4f} bits per byte   loss {result['loss']:.4f} nats a token   "
        f"perplexity {result['perplexity']:.2f}"
    )
    out.print(
        f"{result['documents']:,} documents, {result['bytes']:,} bytes, {result['tokens']:,} tokens, "
        f"{result['tokens_per_second']:,.0f} tokens/s ({result['precision']} on {device})"
    )
    if result["verdict"] is not None:
        out.print(result["verdict"])
    rows = [row("eval", "bits_per_byte", result["bits_per_byte"], result["lzma_bits_per_byte"], "lzma (xz -9e)")]
    return rows + [
        row("eval", name, result[name]) for name in ("loss", "perplexity", "bits_per_token", "tokens_per_second")
    ]


def _show_pairs(result: dict[str, Any], out: Console) -> list[dict[str, Any]]:
    """The figures on minimal pairs for people; as rows."""
    from resonance_nn.evaluation import row

    view = Table("minimal pairs", box=None)
    view.add_column("right", justify="right")
    accuracies = {**result["phenomena"], f"mean of {len(result['phenomena'])}": result["accuracy"]}
    for name, accuracy in accuracies.items():
        view.add_row(name, f"{accuracy:.1%}")
    out.print(view)
    return [row(name, "accuracy", accuracy, 0.5, "chance") for name, accuracy in accuracies.items()]
