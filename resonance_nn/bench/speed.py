"""Speed over the length: a step of our language model beside transformers' models of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from resonance_nn.bench.child import Progress
from resonance_nn.bench.models import build_beside, build_ours, quiet
from resonance_nn.bench.timing import Case, TimingOptions, time_suite
from resonance_nn.models import ResonanceForCausalLM

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


def run(options: SpeedOptions, progress: Progress = lambda done, total: None) -> dict[str, Any]:
    """Measure, and return what is written as JSON. ``progress`` is told the steps done and their total."""
    options.check()
    cases = [Case(max(1, options.tokens_per_batch // length), length) for length in sorted(set(options.lengths))]
    return time_suite("speed", options, cases, (options.forward_only,), progress)


def build(options: SpeedOptions) -> tuple[ResonanceForCausalLM, *tuple[PreTrainedModel, ...]]:
    """Ours, and each of ``options.peers``: equal width and vocabulary, tied embeddings, parameters within 2%."""
    with quiet():
        ours = build_ours(options)
        peers, _ = build_beside(ours, options, max(options.lengths))
    return ours, *peers.values()
