"""`resonance bench all`: the suites one after the other, each as the command that its row names."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from resonance_nn.cli.common import JsonOption, check_output, console_for, names, stderr_console, wide_view, write_json


class Preset(NamedTuple):
    """Arguments of a suite's command, and those of ``--full``. What they leave out is the command's default."""

    short: str = ""
    full: str = ""


PRESETS: dict[str, Preset] = {
    "speed": Preset(full="--full --peers llama,mamba2"),
    "memory": Preset(),
    "decode": Preset(full="--full"),
    "context": Preset("--prefill 65536 --train 32768"),
    "ops": Preset(),
    "scaling": Preset(full="--full"),
    "throughput": Preset(),
    "mixers": Preset(),
    "capacity": Preset(full="--full"),
}


def run_all(
    output_dir: Annotated[
        str, typer.Option("--output-dir", help="Where SUITE.json, SUITE.png and summary.md go.")
    ] = "runs/bench-all",
    full: Annotated[bool, typer.Option("--full", help="The long lengths too; hours.")] = False,
    only: Annotated[
        str | None, typer.Option("--only", help=f"Suites, separated by commas: {', '.join(PRESETS)}.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the suites whose JSON is there, of the same command.")
    ] = False,
    json_path: JsonOption = None,
) -> None:
    """Every suite one after the other, sized for 30 minutes on 2 cores; a table of all figures at the end.

    A suite that fails is named with its reason, the others still run, and the exit code is 1.
    """
    chosen = tuple(PRESETS) if only is None else names(only)
    for name in chosen:
        if name not in PRESETS:
            raise ValueError(f"--only {only!r}: {name!r} is not one of {', '.join(PRESETS)}")
    check_output(json_path, "--json")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    from resonance_nn.bench import summary
    from resonance_nn.bench.common import result

    suites: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(dict.fromkeys(chosen), 1):
        arguments = ["bench", name, *(PRESETS[name].full if full else PRESETS[name].short).split()]
        command = " ".join(["resonance", *arguments])
        file = folder / f"{name}.json"
        done = _finished(file, command) if resume else None
        _say(f"{number} of {len(chosen)}: {command}{', done before' if done else ''}")
        error = None if done else _run(arguments, command, folder / name, to_stderr=json_path == "-")
        if error is not None:
            _say(f"{name} failed: {error}")
        else:
            done = done or json.loads(file.read_text(encoding="utf-8"))
            rows += [{"suite": name, "command": command, **figure} for figure in summary.figures(done)]
        suites.append({"suite": name, "command": command, "seconds": (done or {}).get("seconds"), "error": error})
        _write_summary(folder, rows, suites)
    out = console_for(json_path)
    wide_view(out).print(summary.table(rows))
    out.print(summary.RATIOS, soft_wrap=True)
    for each in suites:
        if each["error"] is not None:
            out.print(f"{each['command']} failed: {each['error']}", soft_wrap=True, markup=False)
    out.print(f"summary.md, and the JSON and plot of each suite: {folder}", soft_wrap=True, markup=False)
    if json_path is not None:
        write_json(json_path, result("all", rows, suites=suites))
    if any(each["error"] is not None for each in suites):
        raise typer.Exit(1)


def _run(arguments: Sequence[str], command: str, path: Path, *, to_stderr: bool) -> str | None:
    """Run a suite's command; it writes ``path`` with .json and .png. The line that says why it failed, None if not."""
    from resonance_nn.bench.peak import in_own_process

    file = path.with_suffix(".json")
    file.unlink(missing_ok=True)
    files = ["--json", str(file), "--plot", str(path.with_suffix(".png"))]
    start = time.perf_counter()
    try:
        in_own_process(run_command, [*arguments, *files], to_stderr)
    except (ValueError, OSError, RuntimeError) as error:  # its own, or the end of its process
        return " ".join(str(error).split())
    payload = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {"command": command, "seconds": time.perf_counter() - start, **payload})
    return None


def run_command(arguments: Sequence[str], to_stderr: bool) -> None:
    """A command of ours, in this process; what it prints goes to standard error on request."""
    from resonance_nn.cli import app
    from resonance_nn.cli.common import quiet_libraries

    quiet_libraries()
    with redirect_stdout(sys.stderr) if to_stderr else nullcontext():
        typer.main.get_command(app).main(args=list(arguments), prog_name="resonance", standalone_mode=False)


def _finished(file: Path, command: str) -> dict[str, Any] | None:
    """The payload that this command has written; None if there is none, or only a part."""
    try:
        payload = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return payload if isinstance(payload, dict) and payload.get("command") == command else None


def _write_summary(folder: Path, rows: Sequence[Mapping[str, Any]], suites: Sequence[Mapping[str, Any]]) -> None:
    from resonance_nn.bench import summary
    from resonance_nn.files import atomic_path
    from resonance_nn.machine import machine_info, versions

    machine, made = machine_info(), versions()
    title = (
        f"{machine['cpu']}, {machine['threads']} threads, PyTorch {made['torch']}, resonance-nn {made['resonance-nn']}"
    )
    failures = {each["command"]: each["error"] for each in suites if each["error"] is not None}
    with atomic_path(folder / "summary.md") as target:
        target.write_text(summary.markdown([dict(each) for each in rows], title, failures), encoding="utf-8")


def _say(text: str) -> None:
    stderr_console.print(text, soft_wrap=True, markup=False)
