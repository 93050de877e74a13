"""`resonance generate` and `resonance chat`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resonance_nn.bundled import DEFAULT_MODEL
from resonance_nn.cli.common import (
    COMPLETION,
    PROMPT,
    DefaultedModelArgument,
    DeviceOption,
    JsonOption,
    PrecisionOption,
    SeedOption,
    check_output,
    console,
    console_for,
    dtype_of,
    stderr_console,
    write_json,
    write_text,
)
from resonance_nn.cli.infill import MARKER, InfillContextOption, InfillOrderOption, fill_hole, read_hole

if TYPE_CHECKING:
    from resonance_nn.generation import Sampling

CHAT_HELP = "/reset  /save FILE  /load FILE  /quit;  Ctrl-C stops a reply, Ctrl-D leaves"

_SAMPLING, _STATE, _OUTPUT = "Choice of the next token", "Saved state", "Output"
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate at most.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help="Below 1 is safer, above bolder. [default: the model's, or 0.8]",
        rich_help_panel=_SAMPLING,
    ),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", help="Only the K likeliest tokens.", rich_help_panel=_SAMPLING)
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", help="Only the likeliest tokens of this total probability.", rich_help_panel=_SAMPLING),
]
MinPOption = Annotated[
    float | None,
    typer.Option("--min-p", help="Only tokens this likely relative to the likeliest.", rich_help_panel=_SAMPLING),
]
PenaltyOption = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="Above 1 makes repetition less likely.", rich_help_panel=_SAMPLING),
]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.", rich_help_panel=_SAMPLING)]


def generate(
    model: DefaultedModelArgument = DEFAULT_MODEL,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to continue.")] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", metavar="FILE", help="File to continue, byte for byte; - is standard input."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            help='The prompt file has one prompt a line (.jsonl: field "prompt"); continue N at a time.',
        ),
    ] = None,
    infill: Annotated[
        str | None,
        typer.Option(
            "--infill", metavar="FILE", help="File with a hole to fill, where the marker stands; - is standard input."
        ),
    ] = None,
    marker: Annotated[str, typer.Option("--marker", metavar="TEXT", help="Stands for the hole of --infill.")] = MARKER,
    middle_only: Annotated[bool, typer.Option("--middle-only", help="Of --infill print only what fills it.")] = False,
    infill_order: InfillOrderOption = "spm",
    infill_context: InfillContextOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    greedy: GreedyOption = False,
    num_beams: Annotated[
        int, typer.Option("--num-beams", help="Beam search with so many beams.", rich_help_panel=_SAMPLING)
    ] = 1,
    num_return_sequences: Annotated[
        int, typer.Option("--num-return-sequences", help="Completions of each prompt.", rich_help_panel=_SAMPLING)
    ] = 1,
    seed: SeedOption = None,
    save_state: Annotated[
        str | None,
        typer.Option(
            "--save-state",
            metavar="FILE",
            help="Save the state after the prompt, to continue from later.",
            rich_help_panel=_STATE,
        ),
    ] = None,
    load_state: Annotated[
        str | None,
        typer.Option(
            "--load-state",
            metavar="FILE",
            help="Continue from a saved state; a prompt is appended to it.",
            rich_help_panel=_STATE,
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Show the text as it comes. [default: for one sequence]"),
    ] = None,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """Continue a text: --prompt, --prompt-file, or standard input; or fill a hole in one (--infill)."""
    if infill is not None:
        for flag, value in (
            *(("--prompt", prompt), ("--prompt-file", prompt_file), ("--batch", batch)),
            *(("--save-state", save_state), ("--load-state", load_state)),
        ):
            if value is not None:
                raise ValueError(f"{flag} and --infill exclude each other: the file is the prompt")
    elif middle_only or marker != MARKER or infill_order != "spm" or infill_context is not None:
        raise ValueError("--marker, --middle-only, --infill-order and --infill-context go with --infill FILE")
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt-file exclude each other")
    if batch is not None:
        if batch < 1:
            raise ValueError(f"--batch {batch}: must be ≥ 1")
        if prompt_file is None:
            raise ValueError("--batch needs --prompt-file, with one prompt a line")
        for flag, value in (("--save-state", save_state), ("--load-state", load_state), ("--stream", stream)):
            if value:
                raise ValueError(f"{flag} is for a single prompt; leave out --batch")
    if stream and (num_beams > 1 or num_return_sequences > 1):
        raise ValueError("--stream is for one sequence without beams; leave it out")
    if max_new_tokens == 0 and save_state is None:
        raise ValueError("--max-new-tokens 0: must be ≥ 1, or go with --save-state to read a prompt only")
    check_output(save_state, "--save-state")
    check_output(json_path, "--json")
    hole = None if infill is None else read_hole(infill, marker)
    prompts = [] if hole else _read_prompts(prompt, prompt_file, batch is not None, optional=load_state is not None)

    from resonance_nn import generation
    from resonance_nn.data.tokenizer import encode_bytes
    from resonance_nn.healing import cut_space
    from resonance_nn.machine import machine_info, versions

    sampling = generation.Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        greedy=greedy,
        seed=seed,
        stop=tuple(stop or ()),
    )
    sampling.check()
    lm, tokenizer = _load(model, precision, device)
    cache = None
    if load_state is None:
        ids = [generation.encode_prompt(tokenizer, p) for p in prompts]
    else:
        cache, known = generation.load_state(load_state, lm)
        ids = [known + encode_bytes(tokenizer, prompts[0])]

    sampling = _seed_once(sampling)
    out = console_for(json_path)
    start = time.perf_counter()
    if save_state is not None:
        import torch

        # the white space at the end stays unread, for what is generated now or later to spell it anew
        read = cut_space(tokenizer, ids[0], max(2, 0 if cache is None else cache.get_seq_length() + 1))[0]
        cache = generation.prefill(lm, torch.tensor([read], device=lm.device), cache=cache)
        generation.save_state(save_state, lm, cache, ids[0])
        stderr_console.print(
            f"saved the state after {len(ids[0]):,} tokens ({cache.num_bytes():,} bytes) to {save_state}",
            soft_wrap=True,
            markup=False,
        )
    streams = len(prompts) <= 1 and num_beams == num_return_sequences == 1 and stream is not False
    rows: list[dict[str, Any]] = []
    if hole is not None:
        how = {"order": infill_order, "context": infill_context, "middle_only": middle_only, "stream": streams}
        rows = fill_hole(lm, tokenizer, hole, sampling, out, **how)
    size = batch or 1
    for i in range(0, len(ids) if max_new_tokens else 0, size):
        if streams:
            write_text(out, _text(prompts[0]), PROMPT)
        write = (lambda text: write_text(out, text, COMPLETION)) if streams else None
        results = generation.complete(lm, tokenizer, ids[i : i + size], sampling, cache=cache, write=write, heal=True)
        for k, completions in enumerate(results, i):
            for number, completion in enumerate(completions, 1):
                if not streams:
                    if len(ids) * len(completions) > 1:
                        write_text(out, f"[prompt {k + 1}, completion {number} of {len(completions)}]\n", PROMPT)
                    write_text(out, _text(prompts[k]), PROMPT)
                    write_text(out, completion.text, COMPLETION)
                write_text(out, "\n")
                row = {
                    "prompt": _text(prompts[k]),
                    "prompt_tokens": len(ids[k]),
                    "completion": completion.text,
                    "new_tokens": len(completion.ids),
                    "finish_reason": completion.finish_reason,
                }
                rows.append(row)
    seconds = time.perf_counter() - start
    if json_path is not None:
        head = {"suite": "generate", "machine": machine_info(str(lm.device)), "versions": versions(), "model": model}
        payload = {**head, "seed": seed, "seconds": round(seconds, 4), "rows": rows}
        write_json(json_path, payload)


def chat(
    model: DefaultedModelArgument = DEFAULT_MODEL,
    system: Annotated[str, typer.Option("--system", help="System prompt that opens the conversation.")] = "",
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
    precision: PrecisionOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Talk with a model; its state is kept between turns. Each line of standard input is a turn."""
    from resonance_nn import generation

    sampling = generation.Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        greedy=greedy,
        seed=seed,
    )
    sampling.check()
    if max_new_tokens == 0:
        raise ValueError("--max-new-tokens 0: must be ≥ 1")
    session = generation.Chat(*_load(model, precision, device), system)
    sampling = _seed_once(sampling)
    interactive = sys.stdin.isatty()
    if interactive:
        stderr_console.print(CHAT_HELP, style="dim")
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if not line.strip():
            continue
        if line.startswith("/"):
            try:
                if not _command(session, line):
                    return
            except (ValueError, OSError) as error:
                stderr_console.print(f"error: {error}", soft_wrap=True, markup=False)
            continue
        with _ctrl_c() as interrupted:
            session.reply(line, sampling, write=lambda t: write_text(console, t, COMPLETION), interrupted=interrupted)
        write_text(console, "\n")


def _command(session: Any, line: str) -> bool:
    """Run a chat command; False to leave."""
    name, _, argument = line.strip().partition(" ")
    if name == "/quit":
        return False
    if name == "/reset":
        session.reset()
        stderr_console.print("the conversation is forgotten", style="dim")
    elif name in ("/save", "/load") and argument:
        session.save(argument) if name == "/save" else session.load(argument)
        done = {"/save": "saved to", "/load": "loaded from"}[name]
        stderr_console.print(f"{done} {argument}: {len(session.ids):,} tokens", soft_wrap=True, markup=False)
    else:
        raise ValueError(f"{name}: the commands are {CHAT_HELP}")
    return True


def _load(name: str, precision: str, device: str) -> tuple[Any, Any]:
    from resonance_nn.evaluation import resolve_device
    from resonance_nn.loading import load_model
    from resonance_nn.packing import pack_weights

    model, tokenizer = load_model(name, dtype=dtype_of(precision), device=resolve_device(device))
    pack_weights(model)
    return model, tokenizer


def _seed_once(sampling: Sampling) -> Sampling:
    """Seed for the whole command, so that batches and turns do not all draw the same numbers."""
    if sampling.seed is not None:
        import torch

        torch.manual_seed(sampling.seed)
    return replace(sampling, seed=None)


def _read_prompts(prompt: str | None, prompt_file: str | None, batch: bool, *, optional: bool) -> list[bytes]:
    """The prompts as bytes; ``optional`` where a saved state may stand alone."""
    if prompt is not None:
        return [os.fsencode(prompt)]
    if prompt_file is None and optional:
        return [b""]
    if prompt_file is None or prompt_file == "-":
        if sys.stdin.isatty() and prompt_file is None:
            raise ValueError("no prompt: give --prompt or --prompt-file, or pipe a text in")
        data = sys.stdin.buffer.read()
    else:
        try:
            data = Path(prompt_file).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(f"--prompt-file {prompt_file!r}: {error.strerror}") from error
    if not batch:
        return [data]
    lines = [line for line in data.split(b"\n") if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {prompt_file!r}: there is no prompt in it")
    if not str(prompt_file).endswith(".jsonl"):
        return [line.removesuffix(b"\r") for line in lines]
    try:
        return [json.loads(line)["prompt"].encode() for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'--prompt-file {prompt_file!r}: each line must be a JSON object with a "prompt"') from error


def _text(prompt: bytes) -> str:
    return prompt.decode("utf-8", errors="replace")


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only sets what the given function returns; a second one interrupts as usual."""
    pressed = False

    def handler(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: pressed
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
