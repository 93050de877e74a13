"""Throughput over the batch size: training and the forward pass alone, at one length, beside transformers' models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resonance_nn.bench.common import Progress, no_progress, plot_rows
from resonance_nn.bench.timing import Case, TimingOptions, time_suite


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(TimingOptions):
    """What to measure: ``batches`` are numbers of sequences, ``length`` the tokens of each."""

    batches: Sequence[int] = (1, 2, 4, 8, 16)
    length: int = 512

    def check(self) -> None:
        super().check()
        self.at_least(2, "length")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches = {self.batches}: must be one or more numbers of sequences ≥ 1")


def run(options: ThroughputOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """As ``speed.run``: rows of training steps, then of forward passes."""
    options.check()
    cases = [Case(batch, options.length) for batch in sorted(set(options.batches))]
    return time_suite("throughput", options, cases, (False, True), progress)


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Tokens/s over the batch size, a line a model, a panel a pass."""
    plot_rows(payload, path, "batch")
