"""`resonance bench recall` and `resonance bench tracking`: suites that train models on tasks with an answer."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resonance_nn.cli.bench_common import FASTEST, PlotOption, check_outputs, numbers, one_precision, use_threads
from resonance_nn.cli.common import DeviceOption, JsonOption, console_for, names, stderr_console, wide_view, write_json

if TYPE_CHECKING:
    from resonance_nn.bench.sweep import Sweep

LINE_SECONDS = 10.0  # between two lines where there is no terminal

StateSizes = Annotated[str, typer.Option(help="Reals of state for each channel of the width, by commas.")]
Rates = Annotated[str, typer.Option(help="Peak learning rates, by commas.")]
Seeds = Annotated[str, typer.Option(help="Of weights and batches, by commas.")]
Steps = Annotated[int | None, typer.Option(help="Of each run, at most.", show_default=False)]
Minutes = Annotated[float | None, typer.Option(help="Of each run, at most.", show_default="40 without --steps")]
Width = Annotated[int, typer.Option("--hidden-size", help="Width of all models.")]
Layers = Annotated[int, typer.Option(help="Depth of all models.")]
Heads = Annotated[int | None, typer.Option(help="Of our models. Default: of 64 channels.", show_default=False)]
InitStd = Annotated[float, typer.Option("--init-std", help="Of all linear maps and embeddings at first.")]
ShortestContext = Annotated[
    int | None,
    typer.Option(help="Shortest time constants of ours at first, in tokens. Default: the longest.", show_default=False),
]
Cooldown = Annotated[float, typer.Option(help="Share of the budget in which the rate falls to 0.")]
WeightDecay = Annotated[float, typer.Option(help="On linear maps and embeddings.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens of a step.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between two evaluations.")]
Target = Annotated[float, typer.Option(help="Accuracy that ends a run when reached twice in a row; above 1: never.")]
Dtype = Annotated[str | None, typer.Option(help="Of the matmuls (autocast): fp32 or bf16.", show_default=FASTEST)]
Threads = Annotated[int | None, typer.Option(help="Of PyTorch's CPU kernels. Default: PyTorch's.", show_default=False)]
Fillers = Annotated[str, typer.Option(help="Tokens without a part: unused (never a key) or any, see the docs.")]
Watch = Annotated[str, typer.Option(metavar="LENGTH/PAIRS", help="The cell that is measured while training.")]
Pairs = Annotated[str, typer.Option(help="Numbers of key-value pairs, by commas.")]
OutputDir = Annotated[str, typer.Option(help="A folder a run in this one.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep finished runs, go on with the others.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the runs that are asked for.")]


def recall(
    models: Annotated[
        str, typer.Option(help="By commas.")
    ] = "llama,mamba2,gated_delta,resonance,spectral_gate,holographic",
    state_sizes: StateSizes = "64",
    lrs: Rates = "1e-3,3e-3",
    seeds: Seeds = "0",
    steps: Steps = None,
    minutes: Minutes = None,
    full: Annotated[bool, typer.Option("--full", help="A vocabulary of 8,192.")] = False,
    vocab_size: Annotated[int, typer.Option(help="Half of it keys, half values.")] = 512,
    lengths: Annotated[str, typer.Option(help="Of sequences, by commas.")] = "64,128,256,512",
    test_lengths: Annotated[str, typer.Option(help="Asked at too, beyond those trained on, by commas.")] = "",
    pairs: Pairs = "4,8,16,32,64",
    watch: Watch = "256/32",
    fillers: Fillers = "unused",
    hidden_size: Width = 128,
    layers: Layers = 2,
    heads: Heads = None,
    init_std: InitStd = 0.06,
    shortest_context: ShortestContext = None,
    cooldown: Cooldown = 0.2,
    weight_decay: WeightDecay = 0.1,
    tokens_per_batch: BatchTokens = 4096,
    eval_every: EvalEvery = 100,
    target: Target = 0.995,
    dtype: Dtype = None,
    threads: Threads = None,
    device: DeviceOption = "cpu",
    output_dir: OutputDir = "runs/bench-recall",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Train on multi-query associative recall; accuracy over bytes of state.

    Example: resonance bench recall --models llama,gated_delta --minutes 40 --threads 1 --plot recall.png
    """
    check_outputs(json_path, plot)
    sizes = numbers("--lengths", lengths), numbers("--pairs", pairs)
    watched = watched_cell(watch)
    tested = numbers("--test-lengths", test_lengths) if test_lengths else ()
    sweep = sweep_of(locals())
    from resonance_nn.bench import recall as suite

    options = suite.RecallOptions(8192 if full else vocab_size, *sizes, watched, fillers, tested)
    with showing() as report:
        payload = suite.run(sweep, options, report)
    finish(payload, suite.shown(payload), json_path)
    if plot is not None:
        suite.plot(payload, plot)


def tracking(
    tasks: Annotated[
        str, typer.Option(help="By commas: parity, sum3, sum5, s3, s5, copy, or both: recall and parity in one model.")
    ] = "parity,sum5",
    models: Annotated[
        str, typer.Option(help="By commas.")
    ] = "llama,gated_delta,spectral_gate_real,spectral_gate,holographic_turning,holographic_turning_only",
    state_sizes: StateSizes = "64",
    lrs: Rates = "1e-3,3e-3",
    seeds: Seeds = "0",
    steps: Steps = None,
    minutes: Minutes = None,
    train_lengths: Annotated[str, typer.Option(help="Of training sequences, by commas.")] = "8,16,32,64",
    lengths: Annotated[str, typer.Option(help="Of sequences to be asked at, by commas.")] = "64,128,256,512",
    vocab_size: Annotated[int, typer.Option(help="Of the recall in both.")] = 512,
    pairs: Pairs = "4,8,16,32,64",
    watch: Watch = "256/32",
    fillers: Fillers = "unused",
    hidden_size: Width = 128,
    layers: Layers = 2,
    heads: Heads = None,
    init_std: InitStd = 0.06,
    shortest_context: ShortestContext = None,
    cooldown: Cooldown = 0.2,
    weight_decay: WeightDecay = 0.1,
    tokens_per_batch: BatchTokens = 4096,
    eval_every: EvalEvery = 100,
    target: Target = 0.995,
    dtype: Dtype = None,
    threads: Threads = None,
    device: DeviceOption = "cpu",
    output_dir: OutputDir = "runs/bench-tracking",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Train on state tracking at short lengths; accuracy at longer ones.

    Example: resonance bench tracking --tasks parity --models llama,holographic_turning --minutes 5 --plot parity.png
    """
    check_outputs(json_path, plot)
    trained, asked = numbers("--train-lengths", train_lengths), numbers("--lengths", lengths)
    recalled = numbers("--pairs", pairs), watched_cell(watch)
    sweep = sweep_of(locals())
    from resonance_nn.bench import tracking as suite
    from resonance_nn.bench.recall import RecallOptions

    options = suite.TrackingOptions(names(tasks), trained, asked, RecallOptions(vocab_size, asked, *recalled, fillers))
    with showing() as report:
        payload = suite.run(sweep, options, report)
    finish(payload, suite.shown(payload), json_path)
    if plot is not None:
        suite.plot(payload, plot)


def watched_cell(text: str) -> tuple[int, int]:
    length, _, pairs = text.partition("/")
    if not (length.isdecimal() and pairs.isdecimal()):
        raise ValueError(f"--watch {text!r}: must be LENGTH/PAIRS, such as 256/32")
    return int(length), int(pairs)


def sweep_of(values: Mapping[str, Any]) -> Sweep:
    """The runs that a command's arguments ask for."""
    lrs, seeds = numbers("--lrs", values["lrs"], float), numbers("--seeds", values["seeds"])
    state_sizes = numbers("--state-sizes", values["state_sizes"])
    steps, minutes = values["steps"], values["minutes"]
    use_threads(values["threads"])
    from resonance_nn.bench.contestants import Shape
    from resonance_nn.bench.runs import Plan
    from resonance_nn.bench.sweep import Sweep
    from resonance_nn.evaluation import resolve_device

    return Sweep(
        models=names(values["models"]),
        state_sizes=state_sizes,
        lrs=lrs,
        seeds=seeds,
        shape=Shape(
            values["hidden_size"],
            values["layers"],
            num_heads=values["heads"],
            initializer_range=values["init_std"],
            shortest_context=values["shortest_context"],
        ),
        plan=Plan(
            steps=steps,
            minutes=40.0 if steps is None and minutes is None else minutes,
            cooldown=values["cooldown"],
            weight_decay=values["weight_decay"],
            tokens_per_batch=values["tokens_per_batch"],
            eval_every=values["eval_every"],
            target=values["target"],
            precision=one_precision(values["dtype"], values["device"]),
            device=resolve_device(values["device"]),
        ),
        output_dir=values["output_dir"],
        resume=values["resume"],
        overwrite=values["overwrite"],
    )


@contextmanager
def showing(state_of: Callable[[Mapping[str, Any]], str] | None = None) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, otherwise a line now and then, on standard error; after Ctrl-C, how to go on. ``state_of``
    says a line of the log to people."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from resonance_nn.progress import TrainingInterrupted

    state_of = state_of or accuracies
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    terminal = stderr_console.is_terminal
    with Progress(*columns, console=stderr_console, transient=True, disable=not terminal) as bar:
        shown = bar.add_task("", total=1.0, state="")
        last: tuple[Any, float] = (None, 0.0)

        def report(number: int, total: int, case: Any, spent: float, line: dict[str, Any]) -> None:
            nonlocal last
            title, state = f"{number + 1}/{total} {case.title}", state_of(line)
            bar.update(shown, description=title, completed=spent, state=state)
            now = time.monotonic()
            if not terminal and line and last[0] != (number, line["step"]) and now - last[1] >= LINE_SECONDS:
                last = ((number, line["step"]), now)
                stderr_console.print(f"{title}: {state}, {spent:.0%} of the budget", markup=False, soft_wrap=True)

        try:
            yield report
        except TrainingInterrupted as interrupted:
            bar.stop()
            say_how_to_resume(interrupted.step)
            raise


def say_how_to_resume(step: int) -> None:
    """After Ctrl-C in the middle of a run."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    command = shlex.join(["resonance", *words, "--resume"])
    text = f"stopped after step {step:,} of a run; a checkpoint was saved\nGo on with: {command}"
    stderr_console.print(text, markup=False, soft_wrap=True)


def accuracies(line: Mapping[str, Any]) -> str:
    """One line of the log for people."""
    if not line:
        return ""
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.3f}"
    cells = ", ".join(f"{100 * min(values.values()):.1f}% at {cell}" for cell, values in line["cells"].items())
    return f"step {line['step']:,}, loss {loss}, {cells}"


def finish(payload: dict[str, Any], cells: list[str], json_path: str | None) -> None:
    """The table and its notes, and the JSON."""
    from resonance_nn.bench import sweep

    out, machine = console_for(json_path), payload["machine"]
    title = f"accuracy in percent; {machine['cpu']}, {machine['threads']} threads"
    wide_view(out).print(sweep.table(payload["runs"], cells, title))
    for note in sweep.notes(payload["runs"]):
        out.print(note, markup=False, soft_wrap=True)
    if json_path is not None:
        write_json(json_path, payload)
