"""Peak memory of a training step beside transformers' models: each model at each length in a process of its own, with
the C library's own allocator (one that keeps freed pages would only add them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from resonance_nn.bench.common import Progress, Row, no_progress, plot_rows, result
from resonance_nn.bench.inference import weight_bytes
from resonance_nn.bench.models import PeerOptions, build_alone, build_ours, check_causal, training_step
from resonance_nn.bench.peak import check_device, in_own_process, peak_memory
from resonance_nn.bench.peers import PEERS
from resonance_nn.loading import quiet_transformers

CALLS = 2  # the first may find the allocator's free lists empty


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(PeerOptions):
    """What to measure.

    Args:
        lengths: of a sequence, in tokens.
        tokens_per_batch: of a step; one sequence if that is longer.
        gradient_checkpointing: recompute each block in the backward pass.
    """

    lengths: Sequence[int] = (2048, 8192)
    tokens_per_batch: int = 8192
    gradient_checkpointing: bool = False

    def check(self) -> None:
        super().check()
        self.at_least(1, "tokens_per_batch")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths = {self.lengths}: must be one or more numbers of tokens ≥ 2")
        check_device(self.device)

    def batch(self, length: int) -> int:
        """Sequences of a step."""
        return max(1, self.tokens_per_batch // length)


def run(options: MemoryOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure, and return what is written as JSON. ``progress`` is told the processes done and their total."""
    options.check()
    lengths = sorted(set(options.lengths))
    done, total = 0, len(lengths) * (1 + len(options.peers))
    rows: list[Row] = []
    for length in lengths:
        measured: dict[str, dict[str, Any]] = {}
        for name in ("ours", *options.peers):
            try:
                measured[name] = in_own_process(measure, name, options, length, keep=False)
            except ChildProcessError as error:  # one that does not fit is a result too
                measured[name] = {"reason": str(error)}
            done += 1
            progress(done, total)
        rows += [_row(length, options, measured, name) for name in options.peers or [None]]
    return result("memory", rows, options.device, options=options.described())


def measure(name: str, options: MemoryOptions, length: int) -> dict[str, int]:
    """Of "ours" or a peer, in this process, which should have done nothing before.

    Returns:
        ``above``: bytes at the peak above those right before the first step, when the model was there; ``whole``: bytes
        at the peak; ``weights``: bytes of the parameters.
    """
    torch.manual_seed(options.seed)
    with quiet_transformers():
        model = _build(name, options, length)
        ids = torch.randint(options.vocab_size, (options.batch(length), length), device=options.device)
        step = training_step(model.train(), ids, options)

        def steps() -> None:
            for _ in range(CALLS):
                step()

        peak = peak_memory(steps, options.device)
    return {"above": peak.above, "whole": peak.whole, "weights": weight_bytes(model)}


def _build(name: str, options: MemoryOptions, length: int) -> PreTrainedModel:
    if name == "ours":
        model: PreTrainedModel = build_ours(options)
        check_causal(model, options.vocab_size)
    else:
        model = build_alone(name, options, length)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def _row(length: int, options: MemoryOptions, measured: dict[str, dict[str, Any]], peer_name: str | None) -> Row:
    ours, batch = measured["ours"], options.batch(length)
    peer = {} if peer_name is None else measured[peer_name]
    both = "above" in ours and "above" in peer
    return {
        "case": f"L={length} B={batch}",
        "metric": "peak bytes above weights",
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
        "reason": ours.get("reason"),
        "peer_reason": peer.get("reason"),
    }


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Bytes over the length, a line a model."""
    plot_rows(payload, path, "length")
