"""What the commands share: consoles, JSON output, option types. Light: no torch at import."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from resonance_nn.files import atomic_path

if TYPE_CHECKING:
    import torch

console = Console(highlight=False)  # results, on standard output
stderr_console = Console(stderr=True, highlight=False)
PROMPT, COMPLETION = "2", "1;36"  # ANSI styles: dim; bold cyan
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TABLE_WIDTH = 160  # where there is no terminal


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a bundled name, or hub:org/name.", show_default=False)
]
DefaultedModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a bundled name, or hub:org/name.")
]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output.", show_default=False),
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, mps or xpu.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Makes the random choices repeatable.")]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision", metavar="PRECISION", help="Of the weights: auto (as they were saved), fp32, bf16, fp16."
    ),
]


def console_for(json_path: str | None) -> Console:
    """Where people read: standard output, or standard error while JSON goes to standard output."""
    return stderr_console if json_path == "-" else console


def wide_view(out: Console) -> Console:
    """Where a table is printed: ``out`` on a terminal, otherwise one wide enough that no column is cut."""
    return out if out.is_terminal else Console(file=out.file, width=TABLE_WIDTH, highlight=False)


def write_text(out: Console, text: str, style: str = "") -> None:
    """Text as it is; on a terminal in a style, and without control characters that would act on it."""
    if out.is_terminal:
        text = CONTROL.sub("·", text)
        if style and text and out.color_system is not None:
            text = f"\x1b[{style}m{text}\x1b[0m"
    out.file.write(text)
    out.file.flush()


def write_bytes(out: Console, data: bytes, style: str = "") -> None:
    """Bytes as they are, into a file or a pipe; on a terminal as text."""
    buffer = None if out.is_terminal else getattr(out.file, "buffer", None)
    if buffer is None:
        write_text(out, data.decode("utf-8", errors="replace"), style)
    else:
        out.file.flush()
        buffer.write(data)
        buffer.flush()


def write_json(path: str | os.PathLike[str], payload: Any) -> None:
    """Write ``payload`` to a file, whole or not at all, or to standard output if ``path`` is "-"."""
    text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        with atomic_path(path) as target:
            target.write_text(text, encoding="utf-8")
    except OSError as error:  # a full disk does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_output(path: str | os.PathLike[str] | None, flag: str) -> None:
    """Refuse an output file that cannot be written before any work is done for it."""
    if path is None or str(path) == "-":
        return
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "is a folder" if Path(path).is_dir() else f"the folder {str(folder)!r} does not exist or is read-only"
        raise ValueError(f"{flag} {str(path)!r}: {reason}")


def config_fields(given: Sequence[str] | None) -> dict[str, Any]:
    """Those of --set FIELD=VALUE: the value as JSON where it is some, else as a string."""
    fields: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {text!r}: must be FIELD=VALUE, as in --set conv_size=8")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def names(text: str) -> tuple[str, ...]:
    """Those of "a,b"."""
    return tuple(name.strip() for name in text.split(","))


def names_or_none(text: str) -> tuple[str, ...]:
    """Those of "a,b"; none of "none"."""
    return () if text == "none" else names(text)


def dtype_of(precision: str) -> torch.dtype | None:
    """The dtype of "fp32", "bf16" or "fp16"; None for "auto"."""
    import torch

    dtypes = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision = {precision!r}: must be one of {', '.join(dtypes)}")
    return dtypes[precision]


def quiet_libraries() -> None:
    """No advice of transformers' in the middle of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
