"""The command-line tool `resonance`. Modules here import torch and transformers inside the commands, not on top."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated

import typer

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.cli import bench, evaluate, generate, models, predict, train
from resonance_nn.cli.common import quiet_libraries

app = typer.Typer(
    name="resonance",
    help="Attention-free sequence models: train, evaluate, generate, chat, measure.",
    add_completion=False,
    rich_markup_mode="markdown",  # in "rich", [default: ...] would be taken for a style
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(metadata.version("resonance-nn"))
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(predict.predict)
app.command()(models.models)
app.add_typer(bench.bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 after one line `error: ...`, 130 after Ctrl-C.

    RESONANCE_DEBUG=1 shows the traceback of an error, and the libraries' warnings.
    """
    keep_freed_memory()  # on Linux; the JSON files' "machine" says whether it took effect
    debug = os.environ.get("RESONANCE_DEBUG") == "1"
    if not debug:
        quiet_libraries()
    command = typer.main.get_command(app)
    try:
        code = command.main(args=None if argv is None else list(argv), prog_name="resonance", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        return 1
    except Exception as error:
        message = describe(error)
        if debug or message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def describe(error: Exception) -> str | None:
    """One line for an error that is the user's or the machine's; None for one that is ours."""
    if hasattr(error, "format_message"):  # click's errors: a wrong or missing argument
        context = getattr(error, "ctx", None)
        advice = f" (see {context.command_path} --help)" if context is not None else ""
        text = error.format_message().rstrip(".") + advice  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (ValueError, OSError)) or type(error).__name__ == "SafetensorError":  # a full disk
        text = str(error)
    else:
        return None
    return " ".join(text.split())
