"""Long contexts, ours alone: reading them in chunks, and a training step on one sequence, with the time and the memory
they take.

Each measurement runs in a process of its own, so that the peak is its own. "Above the weights" means above what the
process held with the model and the tokens in memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench.common import Progress, Row, figure, log_axes, no_progress, result
from resonance_nn.bench.inference import converted, synchronize, weight_bytes
from resonance_nn.bench.models import ModelOptions, build_ours, check_causal, count, training_step
from resonance_nn.bench.peak import check_device, in_own_process, peak_memory
from resonance_nn.cache import ResonanceCache
from resonance_nn.config import SIZES
from resonance_nn.evaluation import row
from resonance_nn.generation import PREFILL_CHUNK, prefill
from resonance_nn.models import ResonanceForCausalLM

Task = Literal["prefill", "train"]
TASKS: tuple[Task, ...] = ("prefill", "train")


@dataclass(frozen=True, kw_only=True)
class ContextOptions(ModelOptions):
    """What to measure, with a model of size "tiny".

    Args:
        prefill: lengths of prompts to read in chunks, in tokens.
        train: lengths of sequences to train on, in tokens.
        chunk: tokens of a prompt in one forward pass.
        gradient_checkpointing: in training, keep the blocks' inputs only and compute again.
    """

    hidden_size: int = SIZES["tiny"]["hidden_size"]
    layers: int = SIZES["tiny"]["num_hidden_layers"]
    prefill: Sequence[int] = (262_144, 1_048_576)
    train: Sequence[int] = (262_144,)
    chunk: int = PREFILL_CHUNK
    gradient_checkpointing: bool = True

    def check(self) -> None:
        for name in TASKS:
            if min(getattr(self, name), default=2) < 2:
                raise ValueError(f"{name} = {list(getattr(self, name))}: must be numbers of tokens ≥ 2")
        if not self.prefill and not self.train:
            raise ValueError("prefill and train: no lengths; give at least one")
        self.at_least(1, "chunk")
        check_device(self.device)
        super().check()


def run(options: ContextOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Check that the model is causal, then measure one case after the other. ``progress`` is told tokens done, where a
    training step counts as its tokens, and the total."""
    options.check()
    kept = options.device == "cpu" and keep_freed_memory()
    cases = [(task, length) for task in TASKS for length in getattr(options, task)]
    total, before = sum(length for _, length in cases), 0
    check_causal(build_ours(options), options.vocab_size)
    rows: list[Row] = []
    for task, length in cases:

        def tell(done: int, of: int, before: int = before, length: int = length) -> None:
            progress(before + done * length // of, total)

        figures = in_own_process(measure, task, length, options, progress=tell)
        before += length
        progress(before, total)
        rate = row(f"{task} L={length}", "tokens/s", length / figures["seconds"])
        rows.append({**rate, "task": task, "length": length, **figures})
    return result("context", rows, options.device, options=options.described(), keeps_freed_memory=kept)


def measure(task: Task, length: int, options: ContextOptions, progress: Progress) -> dict[str, Any]:
    """Seconds, peak bytes above the weights, bytes of the weights, parameters, and of a prefill its state's bytes."""
    torch.manual_seed(options.seed)
    model = build_ours(options)
    if task == "prefill":
        model = converted(model, options.dtype)
    ids = torch.randint(options.vocab_size, (1, length + (task == "prefill")), device=options.device)
    work = _read if task == "prefill" else _train
    work(model, ids[:, :128], options, no_progress)  # what is made once, at the first call
    seconds = 0.0

    def timed() -> int | None:
        nonlocal seconds
        start = time.perf_counter()
        state = work(model, ids, options, progress)
        synchronize(options.device)
        seconds = time.perf_counter() - start
        return state

    peak = peak_memory(timed, options.device)
    return {
        "seconds": seconds,
        "peak_bytes": peak.above,
        "weight_bytes": weight_bytes(model),
        "parameters": count(model),
        "state_bytes": peak.result,
    }


def _read(model: ResonanceForCausalLM, ids: Tensor, options: ContextOptions, progress: Progress) -> int:
    """Read all but the last of the tokens (1, L); bytes of the state after them."""
    cache, total = ResonanceCache(model.config.num_hidden_layers), ids.shape[1] - 1
    for stop in range(options.chunk, total + options.chunk, options.chunk):
        prefill(model, ids[:, : min(stop, total) + 1], None, cache, options.chunk)
        progress(min(stop, total), total)
    return cache.num_bytes()


def _train(model: ResonanceForCausalLM, ids: Tensor, options: ContextOptions, progress: Progress) -> None:
    """A training step on the tokens (1, L)."""
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    with _told(model, 1 + options.gradient_checkpointing, progress):
        training_step(model.train(), ids, options)()


@contextmanager
def _told(model: ResonanceForCausalLM, passes: int, progress: Progress) -> Iterator[None]:
    """Tells how many of the blocks' forward passes are over, each ``passes`` times. A pass that is computed again for
    its gradient ends as soon as nothing more is needed of it, so their beginnings are counted."""
    blocks = model.model.backbone.blocks
    begun, total = 0, passes * len(blocks)

    def tell(module: nn.Module, args: Any) -> None:
        nonlocal begun
        progress(min(begun, total), total)
        begun += 1

    hooks = [block.register_forward_pre_hook(tell) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Peak memory above the weights, and tokens/s, over the length."""
    with figure(path, payload, panels=2, size=(4.5, 4)) as (memory, speed):
        for task in TASKS:
            rows = [row for row in payload["rows"] if row["task"] == task]
            if rows:
                lengths = [row["length"] for row in rows]
                memory.plot(lengths, [row["peak_bytes"] / 2**30 for row in rows], marker="o", label=task)
                speed.plot(lengths, [row["ours"] for row in rows], marker="o", label=task)
        log_axes(memory, "length, tokens", "peak above the weights, GB", log_y=False)
        log_axes(speed, "length, tokens", "tokens/s", log_y=False)
