"""Steps of our model and of its peers timed in turns, each over its own matmuls too. ``speed`` and ``throughput`` are
tables of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resonance_nn.allocator import is_freed_memory_kept, keep_freed_memory
from resonance_nn.bench.common import Progress, Row, interleaved, rate_row, ratios, result
from resonance_nn.bench.floor import Matmul, record, replay
from resonance_nn.bench.models import PeerOptions, build_beside, build_ours, check_causal, count, training_step
from resonance_nn.bench.peak import in_own_process
from resonance_nn.loading import quiet_transformers

ALLOCATORS = ("keep", "default")
APPROACH = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class TimingOptions(PeerOptions):
    """How to measure.

    Args:
        repeats: timed rounds, after a step of each to warm up.
        floor: whether to time each model's matmuls alone as well.
        compile: all models under torch.compile.
        allocator: "keep" freed memory in the process, as training does, or the C library's "default".
        max_seconds: a peer whose first step takes longer, or would by its steps on shorter sequences, is not timed, nor
            in the larger cases. Time to compile does not count.
    """

    repeats: int = 5
    floor: bool = True
    compile: bool = False
    allocator: Literal["keep", "default"] = "keep"
    max_seconds: float = 120.0

    def check(self) -> None:
        super().check()
        self.at_least(1, "repeats")
        if self.allocator not in ALLOCATORS:
            raise ValueError(f"allocator = {self.allocator!r}: must be one of {', '.join(ALLOCATORS)}")
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds = {self.max_seconds}: must be > 0")


class Case(NamedTuple):
    """A batch to time a step on."""

    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        return f"L={self.length} B={self.batch}"


class Clock:
    """Counts steps for a progress bar."""

    def __init__(self, cases: int, options: TimingOptions, progress: Progress) -> None:
        self.a_case = (1 + len(options.peers)) * (1 + options.repeats * (1 + options.floor))
        self.done, self.total, self.progress = 0, cases * self.a_case, progress

    def step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def end_case(self) -> None:
        """Count the steps that were left out, too."""
        if left := -self.done % self.a_case:
            self.done += left
            self.progress(self.done, self.total)


def time_suite(
    suite: str, options: TimingOptions, cases: Sequence[Case], passes: Sequence[bool], progress: Progress
) -> dict[str, Any]:
    """Build the models, check that ours is causal, time them in turns, and return what is written as JSON.

    Args:
        cases: from small to large.
        passes: for each whether it is the forward pass only.
        progress: is told the steps done and their total.
    """
    if options.allocator == "default" and is_freed_memory_kept():  # which cannot be undone in this process
        return in_own_process(time_suite, suite, options, cases, passes, progress=progress, keep=False)
    kept = options.allocator == "keep" and options.device == "cpu" and keep_freed_memory()
    torch.manual_seed(options.seed)
    with quiet_transformers():
        ours = build_ours(options)
        peers, notes = build_beside(ours, options.peers, max(case.length for case in cases))
        check_causal(ours, options.vocab_size)
        clock = Clock(len(cases) * len(passes), options, progress)
        rows = [row for only in passes for row in measure(ours, peers, cases, options, clock, forward_only=only)]
    return result(
        suite,
        rows,
        options.device,
        options=options.described(),
        parameters={name: count(model) for name, model in {"ours": ours, **peers}.items()},
        peers=notes,
        keeps_freed_memory=kept,
    )


def measure(
    ours: PreTrainedModel,
    peers: Mapping[str, PreTrainedModel],
    cases: Sequence[Case],
    options: TimingOptions,
    clock: Clock,
    *,
    forward_only: bool = False,
) -> list[Row]:
    """A row a case and peer: tokens/s of a training step, or of the loss alone. Cases go from small to large.

    ``reason`` of a row says why its peer was not timed. ``over_matmuls`` and ``peer_over_matmuls`` are the medians of
    the rounds' ratios of a step to the model's own matmuls, ``operations`` the multiplications and additions in those.
    """
    rows: list[Row] = []
    given_up: dict[str, str] = {}
    pace: dict[str, float] = {}  # seconds a token
    models = {"ours": ours, **peers}
    for model in models.values():
        model.train(not forward_only)
    for case in cases:
        if options.compile:
            torch._dynamo.reset()  # beyond a few shapes it would fall back to the eager step without a word
        ids = torch.randint(options.vocab_size, (case.batch, case.length), device=options.device)
        functions: dict[str, Callable[[], None]] = {}
        operations: dict[str, int] = {}
        for name, model in models.items():
            if name in peers and name not in given_up:
                expected = pace[name] * case.tokens if name in pace else 0.0
                if expected <= options.max_seconds and not options.compile:
                    expected = _approach(model, case, options, forward_only)
                if expected > options.max_seconds:
                    given_up[name] = f"a step at {case} would take {expected:,.0f} s or more"
            if name in given_up:
                continue
            try:
                first = _first_step(name, model, ids, options, forward_only)
            except torch.OutOfMemoryError:
                if name == "ours":
                    raise
                given_up[name] = f"out of memory at {case}"
                continue
            clock.step()
            if name in peers and first.seconds > options.max_seconds:
                given_up[name] = f"a step at {case} took {first.seconds:,.0f} s"
                continue
            functions[name] = first.step
            if first.matmuls is not None:
                functions[_alone(name)] = replay(first.matmuls, options.device)
                functions[_alone(name)]()  # to warm up
                operations[name] = sum(matmul.operations for matmul in first.matmuls)
        seconds = interleaved(functions, options.repeats, clock.step, warm_up=False)
        clock.end_case()
        pace = {name: statistics.median(seconds[name]) / case.tokens for name in models if name in seconds}
        metric = "forward tokens/s" if forward_only else "training tokens/s"
        rows += [_row(case, metric, label, seconds, operations, given_up) for label in peers or [None]]
    return rows


def _approach(model: PreTrainedModel, case: Case, options: TimingOptions, forward_only: bool) -> float:
    """Seconds that a step will take, at least, from steps on shorter sequences, each twice as long as the one before:
    a step cannot be interrupted, and those of some peers grow with the square of the length. Ends where it is more than
    ``max_seconds``."""
    expected, before = 0.0, None
    length = APPROACH
    while 2 * length <= case.length and expected <= options.max_seconds:
        ids = torch.randint(options.vocab_size, (1, length), device=options.device)
        step = training_step(model, ids, options, forward_only=forward_only)
        if before is None:
            step()  # what is done once is no part of it
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        if before is not None:  # the difference, so that a step's fixed costs are no part of it either
            expected = (seconds - before) / (length // 2) * case.tokens
        before = seconds
        length *= 2
    return expected


class _First(NamedTuple):
    step: Callable[[], None]
    seconds: float
    matmuls: list[Matmul] | None


def _first_step(name: str, model: PreTrainedModel, ids: Tensor, options: TimingOptions, forward_only: bool) -> _First:
    """A model's step after one to warm up, which is the one whose matmuls are recorded. A compiled step hides them, so
    that they are recorded in an eager one."""
    step = training_step(model, ids, options, forward_only=forward_only)
    if options.compile:
        matmuls = record(step) if options.floor else None
        step = _compile(name, model, ids, options, forward_only)
        start = time.perf_counter()
        step()
    else:
        start = time.perf_counter()
        matmuls = record(step) if options.floor else step()
    return _First(step, time.perf_counter() - start, matmuls)


def _compile(
    name: str, model: PreTrainedModel, ids: Tensor, options: TimingOptions, forward_only: bool
) -> Callable[[], None]:
    """The step under torch.compile, after one call, which is what compiles it."""
    from torch._dynamo.exc import TorchDynamoException  # slow to import

    compiled: Any = torch.compile(model, dynamic=False)
    step = training_step(compiled, ids, options, forward_only=forward_only)
    try:
        step()
    except TorchDynamoException as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        advice = "it needs a C++ compiler; or leave compile out"
        raise ValueError(f"compile = True: {name} does not compile ({reason}); {advice}") from error
    return step


def _alone(name: str) -> str:
    return f"{name}: matmuls alone"


def _row(
    case: Case,
    metric: str,
    label: str | None,
    seconds: Mapping[str, list[float]],
    operations: Mapping[str, int],
    given_up: Mapping[str, str],
) -> Row:
    reason = None if label is None else given_up.get(label)
    theirs = None if label is None else seconds.get(label)
    timed = {"ours": seconds["ours"]} if theirs is None else {"ours": seconds["ours"], "peer": theirs}
    more: dict[str, Any] = {"length": case.length, "batch": case.batch, "seconds": timed, "reason": reason}
    for prefix, name in (("", "ours"), ("peer_", label)):
        alone = seconds.get(_alone(name)) if name is not None else None
        over = None if alone is None or name is None else statistics.median(ratios(seconds[name], alone))
        more[f"{prefix}over_matmuls"] = over
        more[f"{prefix}operations"] = operations.get(name) if name is not None else None
    return rate_row(str(case), metric, case.tokens, seconds["ours"], theirs, label, **more)
