"""`resonance generate --infill` and `resonance eval --infill`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from resonance_nn.cli.common import COMPLETION, PROMPT, stderr_console, write_bytes, write_text

if TYPE_CHECKING:
    from resonance_nn.generation import Sampling

MARKER = "<|fill|>"
InfillOrderOption = Annotated[
    str,
    typer.Option(
        "--infill-order", metavar="ORDER", help="What --infill reads last: spm, what is before the hole; psm, after it."
    ),
]
InfillContextOption = Annotated[
    int | None,
    typer.Option(
        "--infill-context", metavar="N", help="Tokens that --infill reads on either side of the hole. Default: all."
    ),
]


def read_hole(path: str, marker: str) -> tuple[bytes, bytes]:
    """What stands before and after the marker in a file, or in standard input if ``path`` is "-"."""
    if not marker:
        raise ValueError("--marker '': must not be empty")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"--infill {path!r}: {error.strerror}") from error
    parts = data.split(os.fsencode(marker))
    if len(parts) != 2:
        raise ValueError(
            f"--infill {path!r}: the marker {marker!r} must stand in it once, where the hole is; it is there "
            f"{len(parts) - 1} times (--marker names another)"
        )
    return parts[0], parts[1]


def fill_hole(
    lm: Any,
    tokenizer: Any,
    hole: tuple[bytes, bytes],
    sampling: Sampling,
    out: Console,
    *,
    order: str,
    context: int | None,
    middle_only: bool,
    stream: bool,
) -> list[dict[str, Any]]:
    """Fill the hole and print the text; as rows."""
    from resonance_nn.generation import complete
    from resonance_nn.infilling import infill_prompt, of_hole

    def write(text: str) -> None:
        write_text(out, text, COMPLETION)

    prompt = infill_prompt(lm, tokenizer, *hole, order, context)
    prefix, suffix = (b"", b"") if middle_only else hole
    if stream:
        write_bytes(out, prefix, PROMPT)
    (completions,) = complete(lm, tokenizer, [prompt], of_hole(sampling), write=write if stream else None)
    rows: list[dict[str, Any]] = []
    for number, completion in enumerate(completions, 1):
        if len(completions) > 1:
            write_text(out, f"[completion {number} of {len(completions)}]\n", PROMPT)
        if not stream:
            write_bytes(out, prefix, PROMPT)
            write(completion.text)
        write_bytes(out, suffix, PROMPT)
        if middle_only or len(completions) > 1:
            write_text(out, "\n")
        if completion.finish_reason == "length":
            stderr_console.print(f"cut off after {len(completion.ids)} tokens: see --max-new-tokens", style="dim")
        row = {
            "prompt_tokens": len(prompt),
            "completion": completion.text,
            "new_tokens": len(completion.ids),
            "finish_reason": completion.finish_reason,
        }
        rows.append(row)
    return rows


def show_infilling(result: dict[str, Any], out: Console) -> list[dict[str, Any]]:
    """The figures on hidden lines for people; as rows."""
    from resonance_nn.evaluation import row

    sides, left = _share(result, ""), _share(result, "left_")
    out.print(
        f"{sides} of {result['lines']:,} hidden lines filled in exactly, of {result['documents']:,} documents; "
        f"from what stands left of them alone {left}"
    )
    out.print(
        f"{result['bits_per_byte']:.3f} bits per byte of these lines given both sides, "
        f"{result['left_bits_per_byte']:.3f} given the left"
    )
    view = Table("characters", box=None)
    for name in ("lines", "both sides", "left"):
        view.add_column(name, justify="right")
    for group in result["by_length"]:
        shares = (f"{group[f'{side}exact_match']:.1%}" for side in ("", "left_"))
        view.add_row(group["characters"], f"{group['lines']:,}", *shares)
    out.print(view)
    peer = "the left alone"
    rows = [
        row("infill", name, result[name], result[f"left_{name}"], peer) for name in ("exact_match", "bits_per_byte")
    ]
    for group in result["by_length"]:
        case = f"infill, {group['characters']} characters"
        rows.append(row(case, "exact_match", group["exact_match"], group["left_exact_match"], peer))
    return rows


def _share(result: dict[str, Any], side: str) -> str:
    low, high = result[f"{side}exact_match_interval"]
    return f"{result[f'{side}exact_match']:.1%} ({low:.1%} to {high:.1%})"
