"""How the time of a forward pass grows with the length: the exponent of a power law, with its 95% interval.

No gradient, one sequence, logits of the last token only. Ours reads in chunks, carrying the state, unless ``whole``;
Llama reads in one call, up to ``peer_max_length``. All lengths take turns in every round, so that a drift of the
machine meets all of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench.common import Progress, Row, figure, interleaved, log_axes, no_progress, rate_row, result
from resonance_nn.bench.fit import PowerLaw, fit_exponent
from resonance_nn.bench.inference import converted, synchronize
from resonance_nn.bench.models import ModelOptions, build_beside, build_ours, check_causal, count
from resonance_nn.bench.peers import PEER
from resonance_nn.generation import PREFILL_CHUNK, prefill
from resonance_nn.models import ResonanceForCausalLM

FULL_LENGTHS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
METRIC = "forward tokens/s"


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(ModelOptions):
    """What to measure.

    Args:
        lengths: tokens, ascending.
        chunk: tokens that ours reads at once, carrying its state.
        whole: ours reads a sequence in one call.
        peer_max_length: the longest sequence of the peer; 0 leaves it out.
        repeats: timed rounds, after one to warm up.
    """

    lengths: Sequence[int] = (1024, 4096, 16_384, 65_536)
    chunk: int = PREFILL_CHUNK
    whole: bool = False
    peer_max_length: int = 8192
    repeats: int = 5

    def check(self) -> None:
        lengths = list(self.lengths)
        if len(lengths) < 2 or min(lengths) < 1 or sorted(set(lengths)) != lengths:
            raise ValueError(f"lengths = {lengths}: must be two or more numbers of tokens ≥ 1, ascending")
        self.at_least(1, "chunk", "repeats")
        if self.peer_max_length < 0:
            raise ValueError(f"peer_max_length = {self.peer_max_length}: must be ≥ 0; 0 leaves the peer out")
        super().check()

    @property
    def peer_lengths(self) -> list[int]:
        """The lengths within the peer's bound."""
        return [length for length in self.lengths if length <= self.peer_max_length]


def run(options: ScalingOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Build both models, check that ours is causal, time all lengths in turns and fit. ``progress`` is told tokens read
    and their total."""
    options.check()
    kept = options.device == "cpu" and keep_freed_memory()
    torch.manual_seed(options.seed)
    ours = build_ours(options)
    peer = build_beside(ours, ("llama",), options.lengths[-1])[0][PEER]
    check_causal(ours, options.vocab_size)
    sizes = {"ours": count(ours), "peer": count(peer)}
    ours, peer = converted(ours, options.dtype), converted(peer, options.dtype)
    ids = torch.randint(options.vocab_size, (1, options.lengths[-1] + 1), device=options.device)
    total, done = (options.repeats + 1) * (sum(options.lengths) + sum(options.peer_lengths)), 0

    def read(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    calls = {f"ours {L}": _reading(ours, ids[:, : L + 1], options, read) for L in options.lengths}
    calls |= {f"peer {L}": _whole(peer, ids[:, :L], options, read) for L in options.peer_lengths}
    seconds = interleaved(calls, options.repeats)
    rows: list[Row] = []
    for L in options.lengths:
        mine, other = seconds[f"ours {L}"], seconds.get(f"peer {L}")
        more = {"length": L, "seconds": {"ours": mine, "peer": other}}
        rows.append(rate_row(f"L={L}", METRIC, L, mine, other, None if other is None else PEER, **more))
    for before, after in itertools.pairwise(rows):
        step = math.log(after["length"] / before["length"])
        after["local_exponent"] = 1 - math.log(after["ours"] / before["ours"]) / step
    fits = {
        "ours": _fit(seconds, "ours", options.lengths),
        "peer": _fit(seconds, "peer", options.peer_lengths),
    }
    return result(
        "scaling",
        rows,
        options.device,
        options=options.described(),
        parameters=sizes,
        fits={name: None if fit is None else asdict(fit) for name, fit in fits.items()},
        keeps_freed_memory=kept,
    )


def _fit(seconds: Mapping[str, Sequence[float]], name: str, lengths: Sequence[int]) -> PowerLaw | None:
    """Of every call's time; None of fewer than two lengths."""
    if len(lengths) < 2:
        return None
    points = [(float(L), s) for L in lengths for s in seconds[f"{name} {L}"]]
    return fit_exponent(*zip(*points, strict=True))


def _reading(
    model: ResonanceForCausalLM, ids: Tensor, options: ScalingOptions, read: Callable[[int], None]
) -> Callable[[], None]:
    """A call that reads all but the last of the tokens (1, L + 1)."""
    if options.whole:
        return _whole(model, ids[:, :-1], options, read)

    def call() -> None:
        prefill(model, ids, chunk_size=options.chunk)
        synchronize(options.device)
        read(ids.shape[1] - 1)

    return call


def _whole(
    model: PreTrainedModel, ids: Tensor, options: ScalingOptions, read: Callable[[int], None]
) -> Callable[[], None]:
    """A call that reads the tokens (1, L) in one forward pass."""

    @torch.no_grad()
    def call() -> None:
        model(ids, use_cache=False, logits_to_keep=1)
        synchronize(options.device)
        read(ids.shape[1])

    return call


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Seconds over the length, every call a point, with the fitted lines, both axes logarithmic."""
    with figure(path, payload, size=(6.5, 4.2)) as (axes,):
        for i, (key, label) in enumerate((("ours", "resonance_nn"), ("peer", PEER))):
            points = [(row["length"], s) for row in payload["rows"] for s in row["seconds"][key] or ()]
            if points:
                axes.plot(*zip(*points, strict=True), "os"[i], color=f"C{i}", ms=4, label=label)
            if (values := payload["fits"][key]) is not None:
                fit, ends = PowerLaw(**values), [min(points)[0], max(points)[0]]
                axes.plot(ends, [fit.at(x) for x in ends], color=f"C{i}", lw=1, label=f"length^{fit.exponent:.3f}")
        log_axes(axes, "length, tokens", "seconds of a forward pass")
