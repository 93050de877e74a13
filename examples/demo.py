"""`make demo`: train on Python's own standard library, measure on held-out files, complete a line of source.

About 5 minutes on 2 cores with AMX, for a model of 5.6M parameters; where that would take more than 8, one of 1.3M is
trained (8.5 minutes on 2 cores with AVX2 alone, other jobs beside it at first). Everything here is also a command of
its own; the last lines printed say which.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from resonance_nn.allocator import keep_freed_memory

LARGE = {"hidden_size": 256, "num_hidden_layers": 6}
SMALL = {"hidden_size": 128, "num_hidden_layers": 4}  # five times as fast
TOO_LONG = 8 * 60.0  # seconds
VOCAB_SIZE, SEQ_LEN, BATCH_SIZE = 4096, 512, 8
PROMPT = """class Stack:
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo"))
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens to train on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.perf_counter()
    keep_freed_memory()

    from rich.console import Console
    from rich.text import Text

    from resonance_nn.data import find_documents, split_documents
    from resonance_nn.evaluation import evaluate_documents
    from resonance_nn.files import atomic_path
    from resonance_nn.generation import Sampling, complete, encode_prompt
    from resonance_nn.loading import load_model
    from resonance_nn.rundir import RunFolder
    from resonance_nn.training import TrainArguments, TrainingInterrupted, train

    console, folder = Console(), options.output_dir
    console.print("[bold]1. Train[/] a language model without attention on Python's standard library")
    run = RunFolder(folder)
    unfinished = (folder / "data" / "run.json").exists() and not run.is_finished()
    shape = run.run()["settings"] if unfinished else {"config": fitting_shape(options.tokens, console.print)}
    arguments = TrainArguments(
        data=["stdlib"],
        output_dir=folder,
        size=shape.get("size"),  # of a run begun by an earlier version
        config=shape.get("config", {}),
        vocab_size=VOCAB_SIZE,
        tokens=options.tokens,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        seed=options.seed,
        resume=unfinished,
        overwrite=not unfinished,
    )
    try:
        trained = train(arguments)["summary"]
    except TrainingInterrupted as stopped:
        console.print(f"{stopped}. `make demo` goes on from there.", soft_wrap=True)
        return 130

    console.print("\n[bold]2. Evaluate[/] on files it has not seen, the state carried through each file")
    model, tokenizer = load_model(str(folder))
    _, held_out = split_documents(find_documents(["stdlib"]))
    measured = evaluate_documents(model, tokenizer, held_out, precision=trained["precision"], progress=True)
    console.print(
        f"   {measured['documents']} files, {measured['bytes'] / 1e6:.2f} MB: "
        f"[bold]{measured['bits_per_byte']:.3f} bits per byte[/], lzma -9e {measured['lzma_bits_per_byte']:.3f}"
    )
    console.print(f"   {verdict(measured)}", soft_wrap=True)

    console.print("\n[bold]3. Generate[/]: the prompt is plain, what the model adds is highlighted\n")
    ids = encode_prompt(tokenizer, PROMPT.encode())
    sampling = Sampling(max_new_tokens=80, temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=options.seed)
    completion = complete(model, tokenizer, [ids], sampling)[0][0]
    console.print(Text.assemble(PROMPT, (completion.text, "bold black on bright_green")), soft_wrap=True)

    summary = {
        "seconds": time.perf_counter() - begin,
        "train": trained,
        "eval": measured,
        "prompt": PROMPT,
        "completion": completion.text,
    }
    with atomic_path(folder / "demo.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"\nDone in {summary['seconds'] / 60:.1f} minutes, {trained['tokens_per_second']:,.0f} tokens/s in training. "
        f"Loss curve: {folder / 'loss.png'}, figures: {folder / 'demo.json'}\n\nNext:\n"
        f"  .venv/bin/resonance generate {folder} --prompt 'import ' --max-new-tokens 200\n"
        f"  .venv/bin/resonance train --data stdlib --output-dir runs/longer --epochs 2\n"
        f"  .venv/bin/resonance train --data YOUR/FILES --init {folder} --output-dir runs/mine --epochs 1",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def fitting_shape(tokens: int, say: Callable[[str], None]) -> dict[str, int]:
    """The larger model, unless training it on so many tokens takes too long here: by the fastest of three steps."""
    import torch

    from resonance_nn import ResonanceConfig, ResonanceForCausalLM
    from resonance_nn.evaluation import autocast, resolve_device, resolve_precision
    from resonance_nn.optim import build_optimizer

    device = resolve_device("auto")
    model = ResonanceForCausalLM(ResonanceConfig(vocab_size=VOCAB_SIZE, **LARGE)).to(device).train()
    optimizer = build_optimizer(model, "muon")
    ids = torch.randint(VOCAB_SIZE, (BATCH_SIZE, SEQ_LEN), device=device)
    fastest = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        with autocast(resolve_precision("auto", device), device):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - begin)
    seconds = fastest * tokens / ids.numel()
    if seconds < TOO_LONG:
        return LARGE
    say(f"   The model of 5.6M parameters would take {seconds / 60:.0f} minutes here: one of 1.3M, then.")
    return SMALL


def verdict(measured: dict) -> str:
    ours, theirs = measured["bits_per_byte"], measured["lzma_bits_per_byte"]
    if ours > theirs:
        return (
            f"lzma wins by {ours - theirs:.2f} bits at this size and budget; a larger model and more epochs (the "
            "second command below) beat it."
        )
    return f"The model wins by {theirs - ours:.2f} bits, and unlike lzma it can write more of it."


if __name__ == "__main__":
    raise SystemExit(main())
