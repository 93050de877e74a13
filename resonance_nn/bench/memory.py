"""Peak memory of a training step, and of reading a prompt: each model at each length in a process of its own, with the
C library's own allocator (one that keeps freed pages would only add them)."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resonance_nn.allocator import release_freed_memory
from resonance_nn.bench.child import Progress, in_child
from resonance_nn.bench.common import Row, result
from resonance_nn.bench.models import ModelOptions, autocast, build_ours, check_causal, count, quiet, training_step
from resonance_nn.bench.peers import PEERS, build_peer
from resonance_nn.generation import PREFILL_CHUNK, prefill
from resonance_nn.models import ResonanceForCausalLM

TASKS = ("train", "prefill")
CALLS = {"train": 2, "prefill": 1}  # a second step meets memory as the first one left it; a prompt is many chunks
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(ModelOptions):
    """What to measure.

    Args:
        lengths: of a sequence, in tokens.
        tokens_per_batch: of a step; one sequence if that is longer.
        task: "train" is forward, loss and backward; "prefill" reads prompts, in chunks where the model can.
        gradient_checkpointing: recompute each block in the backward pass.
    """

    lengths: Sequence[int] = (2048, 8192)
    tokens_per_batch: int = 8192
    task: Literal["train", "prefill"] = "train"
    gradient_checkpointing: bool = False

    def check(self) -> None:
        super().check()
        self.at_least(1, "tokens_per_batch")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths = {self.lengths}: must be one or more numbers of tokens ≥ 2")
        if self.task not in TASKS:
            raise ValueError(f"task = {self.task!r}: must be one of {', '.join(TASKS)}")
        if self.gradient_checkpointing and self.task == "prefill":
            raise ValueError("gradient_checkpointing = True: has no effect on task = 'prefill'; leave it out")
        kind = torch.device(self.device).type
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device = {self.device!r}: its peak memory cannot be read; use cpu or cuda")
        if kind == "cpu" and not STATUS.exists() and importlib.util.find_spec("resource") is None:
            raise ValueError("device = 'cpu': this system does not tell a process its peak memory")


def run(options: MemoryOptions, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Measure, and return what is written as JSON. ``progress`` is told the processes done and their total."""
    options.check()
    lengths = sorted(set(options.lengths))
    done, total = 0, len(lengths) * (1 + len(options.peers))
    rows: list[Row] = []
    for length in lengths:
        measured: dict[str, dict[str, Any]] = {}
        for name in ("ours", *options.peers):
            try:
                measured[name] = in_child(peak_memory, name, options, length)
            except ChildProcessError as error:  # one that does not fit is a result too
                measured[name] = {"reason": str(error)}
            done += 1
            progress(done, total)
        rows += [_row(length, options, measured, name) for name in options.peers or [None]]
    return result("memory", rows, options.device, options=options.described())


def peak_memory(name: str, options: MemoryOptions, length: int) -> dict[str, Any]:
    """Of "ours" or a peer, measured in this process, which should have done nothing before.

    Returns:
        ``above``: bytes at the peak above those right before the first call, when the model was there; ``whole``: bytes
        at the peak; ``weights``: bytes of the parameters; ``method``: where the figures are from.
    """
    torch.manual_seed(options.seed)
    with quiet():
        model = _build(name, options, length)
        ids = torch.randint(options.vocab_size, (_batch(options, length), length), device=options.device)
        if options.task == "train":
            call = training_step(model.train(), ids, options)
        else:
            call = _prefill(name, model.eval(), ids, options)
        peak = _PeakMemory(options.device)
        for _ in range(CALLS[options.task]):
            call()
        whole = peak.read()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"above": whole - peak.before, "whole": whole, "weights": weights, "method": peak.method}


def _build(name: str, options: MemoryOptions, length: int) -> PreTrainedModel:
    if name == "ours":
        model: PreTrainedModel = build_ours(options)
        check_causal(model, options.vocab_size)
    else:
        with torch.device("meta"):
            ours = ResonanceForCausalLM(options.config())
        model, _ = build_peer(name, ours.config, count(ours), length, options.device)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def _prefill(name: str, model: PreTrainedModel, ids: Tensor, options: MemoryOptions) -> Callable[[], None]:
    @torch.no_grad()
    def call() -> None:
        with autocast(options):
            if isinstance(model, ResonanceForCausalLM):
                prefill(model, ids)
            else:
                prefill_peer(name, model, ids)

    return call


def prefill_peer(name: str, model: PreTrainedModel, ids: Tensor, chunk_size: int = PREFILL_CHUNK) -> Tensor:
    """A peer's logits (B, 1, V) after a prompt (B, L), read in chunks into its cache; whole by one that has none."""
    field = PEERS[name].cache
    if field is None:
        return model(ids, use_cache=False, logits_to_keep=1).logits
    cache = None
    logits = torch.empty(0)
    for chunk in ids.split(chunk_size, dim=1):
        out = model(chunk, use_cache=True, logits_to_keep=1, **{field: cache})
        cache, logits = getattr(out, field), out.logits
    return logits


class _PeakMemory:
    """The peak from its making on: of the device, or the resident set of this process. Bytes."""

    def __init__(self, device: str) -> None:
        gc.collect()
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(device)
            self.method, self.before = "torch.cuda.max_memory_allocated", torch.cuda.memory_allocated(device)
        elif STATUS.exists():
            release_freed_memory()
            self.method = "VmHWM"
            try:
                CLEAR.write_text("5")  # the peak is the present from here on
            except OSError:
                self.method = "VmHWM since the start of the process"
            self.before = _status("VmRSS")
        else:
            self.method = "ru_maxrss since the start of the process"
            self.before = _largest_resident_set()
        self.device = device

    def read(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM") if STATUS.exists() else _largest_resident_set()


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _largest_resident_set() -> int:
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _batch(options: MemoryOptions, length: int) -> int:
    return max(1, options.tokens_per_batch // length)


def _row(length: int, options: MemoryOptions, measured: dict[str, dict[str, Any]], peer_name: str | None) -> Row:
    ours, batch = measured["ours"], _batch(options, length)
    peer = {} if peer_name is None else measured[peer_name]
    both = "above" in ours and "above" in peer
    return {
        "case": f"L={length} B={batch}",
        "metric": f"{options.task}: peak bytes above weights",
        "ours": ours.get("above"),
        "peer": peer.get("above"),
        "peer_name": None if peer_name is None else PEERS[peer_name].label,
        "ratio": peer["above"] / ours["above"] if both else None,
        "length": length,
        "batch": batch,
        "whole": ours.get("whole"),
        "peer_whole": peer.get("whole"),
        "weights": ours.get("weights"),
        "peer_weights": peer.get("weights"),
        "method": ours.get("method"),
        "reason": ours.get("reason"),
        "peer_reason": peer.get("reason"),
    }
