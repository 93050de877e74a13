"""Long contexts: reading them in chunks, and a training step on one sequence, with the memory they take.

Each measurement runs in a process of its own, so that the peak is its own. "Above the weights" means above what the
process held with the model and the tokens in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench.common import Row, result
from resonance_nn.bench.inference import converted, dtype_name, synchronize, weight_bytes
from resonance_nn.bench.peak import in_own_process, peak_memory
from resonance_nn.bench.speed import check_causal, count
from resonance_nn.cache import ResonanceCache
from resonance_nn.config import ResonanceConfig
from resonance_nn.evaluation import row
from resonance_nn.files import atomic_path
from resonance_nn.generation import PREFILL_CHUNK, prefill
from resonance_nn.models import ResonanceForCausalLM

Task = Literal["prefill", "train"]
LENGTHS: dict[str, tuple[int, ...]] = {"prefill": (262_144, 1_048_576), "train": (262_144,)}


@dataclass(frozen=True)
class ContextOptions:
    """What to measure. ``lengths`` None means ``LENGTHS``; ``size`` gives width and depth unless they are given."""

    tasks: Sequence[str] = ("prefill", "train")
    lengths: Sequence[int] | None = None
    size: str = "tiny"
    hidden_size: int | None = None
    layers: int | None = None
    vocab_size: int = 8192
    mixers: tuple[str, ...] | None = None
    chunk: int = PREFILL_CHUNK
    gradient_checkpointing: bool = True
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for task in self.tasks or ("",):
            if task not in LENGTHS:
                raise ValueError(f"task = {task!r}: must be one or both of {', '.join(LENGTHS)}")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 2):
            raise ValueError(f"lengths = {list(self.lengths)}: must be one or more numbers of tokens ≥ 2")
        if self.chunk < 1:
            raise ValueError(f"chunk = {self.chunk}: must be ≥ 1")
        self.config()

    def config(self) -> ResonanceConfig:
        """The model's; ValueError as it raises it."""
        given = {"hidden_size": self.hidden_size, "num_hidden_layers": self.layers, "mixers": self.mixers}
        chosen = {name: value for name, value in given.items() if value is not None}
        return ResonanceConfig.from_size(self.size, vocab_size=self.vocab_size, **chosen)


def run(options: ContextOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Check that the model is causal, then measure one case after the other. ``progress`` is told tokens done, where a
    training step counts as its tokens, and the total."""
    options.check()
    kept = options.device == "cpu" and keep_freed_memory()
    cases = [(task, length) for task in options.tasks for length in options.lengths or LENGTHS[task]]
    total, before = sum(length for _, length in cases), 0
    check_causal(_model(options), options.vocab_size)
    rows: list[Row] = []
    for task, length in cases:

        def tell(done: int, of: int, before: int = before, length: int = length) -> None:
            progress(before + done * length // of, total)

        figures = in_own_process(measure, task, length, options, progress=tell)
        before += length
        progress(before, total)
        rate = row(f"{task} L={length}", "tokens/s", length / figures["seconds"])
        rows.append({**rate, "task": task, "length": length, **figures})
    described = {f.name: getattr(options, f.name) for f in fields(options)}
    described |= {"dtype": dtype_name(options.dtype), "tasks": list(options.tasks)}
    config = options.config()
    described |= {"hidden_size": config.hidden_size, "layers": config.num_hidden_layers, "mixers": list(config.mixers)}
    return result("context", rows, options.device, options=described, keeps_freed_memory=kept)


def measure(task: Task, length: int, options: ContextOptions, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Seconds, peak bytes above the weights, bytes of the weights, parameters, and of a prefill its state's bytes."""
    model = _model(options)
    if task == "prefill":
        model = converted(model, options.dtype)
    ids = torch.randint(options.vocab_size, (1, length + (task == "prefill")), device=options.device)
    _work(task, model, ids[:, :128], options, lambda done, total: None)  # what is made once, at the first call
    start = 0.0

    def work() -> int | None:
        nonlocal start
        start = time.perf_counter()
        done = _work(task, model, ids, options, progress)
        synchronize(options.device)
        start = time.perf_counter() - start
        return done

    peak, state = peak_memory(work, options.device)
    return {
        "seconds": start,
        "peak_bytes": peak,
        "weight_bytes": weight_bytes(model),
        "parameters": count(model),
        "state_bytes": state,
    }


def _model(options: ContextOptions) -> ResonanceForCausalLM:
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        return ResonanceForCausalLM(options.config())


def _work(
    task: Task, model: ResonanceForCausalLM, ids: Tensor, options: ContextOptions, progress: Callable[[int, int], None]
) -> int | None:
    """Read all but the last of the tokens (1, L), or train on all of them; the bytes of the state after a prefill."""
    if task == "prefill":
        cache, total = ResonanceCache(model.config.num_hidden_layers), ids.shape[1] - 1
        for stop in range(options.chunk, total + options.chunk, options.chunk):
            prefill(model, ids[:, : min(stop, total) + 1], None, cache, options.chunk)
            progress(min(stop, total), total)
        return cache.num_bytes()
    model.train()
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    kind = torch.device(options.device).type
    with _told(model, 1 + options.gradient_checkpointing, progress):
        with torch.autocast(kind, dtype=options.dtype, enabled=options.dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    model.zero_grad(set_to_none=True)
    return None


@contextmanager
def _told(model: ResonanceForCausalLM, passes: int, progress: Callable[[int, int], None]) -> Iterator[None]:
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    for task in payload["options"]["tasks"]:
        rows = [row for row in payload["rows"] if row["task"] == task]
        lengths = [row["length"] for row in rows]
        memory.plot(lengths, [row["peak_bytes"] / 2**30 for row in rows], marker="o", label=task)
        speed.plot(lengths, [row["ours"] for row in rows], marker="o", label=task)
    memory.set_ylabel("peak above the weights, GB")
    speed.set_ylabel("tokens/s")
    for axes in (memory, speed):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("length, tokens")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.suptitle(payload["machine"]["cpu"], fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
