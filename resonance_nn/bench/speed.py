"""Speed over the length: a step of our language model beside transformers' models of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resonance_nn.bench.common import Progress, no_progress, plot_rows
from resonance_nn.bench.timing import Case, TimingOptions, time_suite

FULL_LENGTHS = tuple(1 << n for n in range(9, 17))  # 512 ... 65,536


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(TimingOptions):
    """What to measure.

    Args:
        lengths: of a sequence, in tokens.
        tokens_per_batch: of a step; one sequence if that is longer.
        forward_only: the loss without its gradient, under ``no_grad`` and in evaluation.
    """

    lengths: Sequence[int] = (512, 2048, 8192)
    tokens_per_batch: int = 8192
    forward_only: bool = False

    def check(self) -> None:
        super().check()
        self.at_least(1, "tokens_per_batch")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths = {self.lengths}: must be one or more numbers of tokens ≥ 2")


def run(options: SpeedOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure, and return what is written as JSON. ``progress`` is told the steps done and their total."""
    options.check()
    cases = [Case(max(1, options.tokens_per_batch // length), length) for length in sorted(set(options.lengths))]
    return time_suite("speed", options, cases, (options.forward_only,), progress)


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Tokens/s over the length, a line a model."""
    plot_rows(payload, path, "length")
