"""Each op of the package against its floor: the time its bytes take at the machine's bandwidth, or its operations at
the machine's matmul rate, whichever is longer.

Both rates are measured in the same process right before, by a copy and a matmul that are large. Tensors that fit into
the last cache move faster than that copy, so an op of few passes can come out below its floor.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench.common import Progress, Row, figure, interleaved, no_progress, ratio_fields, result
from resonance_nn.bench.inference import dtype_name, synchronize
from resonance_nn.bench.op_cases import CASES, Case, Cost, Shape

CALL_SECONDS = 0.02  # a timed call runs an op as often as that takes
COPY_BYTES = 1 << 28
GATE_SHAPE = Shape(batch=2, length=70, width=32, heads=2, vocab_size=50)  # more than a chunk, and not whole chunks
# max |Δ| over max |reference|; in bfloat16 the gradient of a frequency, a sum of turning terms, is off by 5%
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}
FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class OpsOptions:
    """What to measure. ``ops`` None means all cases."""

    ops: Sequence[str] | None = None
    tokens: int = 8192
    length: int = 2048
    hidden_size: int = 512
    heads: int = 8
    vocab_size: int = 8192
    repeats: int = 5
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name in ("tokens", "length", "hidden_size", "heads", "vocab_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be ≥ 1")
        if self.tokens % self.length:
            raise ValueError(f"tokens = {self.tokens}: must be a multiple of length = {self.length}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size = {self.hidden_size}: must be a multiple of 2 · heads = {2 * self.heads}")
        if self.dtype not in TOLERANCES:
            raise ValueError(f"dtype = {dtype_name(self.dtype)}: must be one of {', '.join(map(str, TOLERANCES))}")
        self.cases()

    def cases(self) -> list[Case]:
        """The chosen ones; a name stands for every case it begins."""
        if self.ops is None:
            return list(CASES)
        for name in self.ops or ("",):
            if not name or not any(case.name.startswith(name) for case in CASES):
                raise ValueError(f"ops: {name!r} is unknown; choose from {', '.join(case.name for case in CASES)}")
        return [case for case in CASES if case.name.startswith(tuple(self.ops))]

    def shape(self) -> Shape:
        return Shape(self.tokens // self.length, self.length, self.hidden_size, self.heads, self.vocab_size)


@dataclass(frozen=True)
class Rates:
    """Of the machine: bytes a second of a copy (read and written), operations a second of matmuls."""

    bandwidth: float
    matmul: float
    matmul_float32: float

    def floor(self, cost: Cost, fft: bool = False) -> tuple[float, str]:
        """Seconds that no implementation can beat, and what of: "bytes" or "operations"."""
        moving = cost.bytes / self.bandwidth
        computing = cost.operations / (self.matmul_float32 if fft else self.matmul)
        return max(moving, computing), "bytes" if moving >= computing else "operations"


def run(options: OpsOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Check every op against its reference, measure the machine, time the ops in turns. ``progress`` is told the ops
    checked and the calls timed, and the total."""
    options.check()
    kept = options.device == "cpu" and keep_freed_memory()
    torch.manual_seed(options.seed)
    cases = options.cases()
    timed = sum(1 + (case.cost(GATE_SHAPE, 1)[1] is not None) for case in cases)
    total, done = len(cases) + timed * (options.repeats + 1), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for case in cases:
        for dtype in dict.fromkeys((torch.float32, options.dtype)):
            check_op(case, dtype, options.device)
        advance()
    rates = measured_rates(options.dtype, options.device)
    calls, times, costs, elements = {}, {}, {}, {}
    shape = options.shape()
    for case in cases:
        inputs = _inputs(case, shape, options.dtype, options.device)
        forward, backward = case.cost(shape, torch.finfo(options.dtype).bits // 8)
        elements[case.name] = next(iter(inputs.values())).numel()
        costs[case.name, FORWARD] = forward
        if backward is not None:
            costs[case.name, BOTH] = forward + backward
        for metric in (FORWARD, BOTH):
            if (name := (case.name, metric)) in costs:
                key = f"{case.name}: {metric}"
                calls[key], times[name] = _repeated(_call(case, inputs, metric == BOTH), options.device)
    seconds = interleaved(calls, options.repeats, advance)
    rows: list[Row] = []
    for case in cases:
        for metric in (FORWARD, BOTH):
            if (name := (case.name, metric)) in costs:
                each = [s / times[name] for s in seconds[f"{case.name}: {metric}"]]
                rows.append(_row(case, metric, each, costs[name], rates, elements[case.name]))
    described = {f.name: getattr(options, f.name) for f in fields(options)}
    described |= {"dtype": dtype_name(options.dtype), "ops": [case.name for case in cases]}
    measured = {"bytes_per_second": rates.bandwidth, "matmul_operations_per_second": rates.matmul}
    measured["matmul_float32_operations_per_second"] = rates.matmul_float32
    return result("ops", rows, options.device, options=described, rates=measured, keeps_freed_memory=kept)


def check_op(case: Case, dtype: torch.dtype, device: str, shape: Shape = GATE_SHAPE) -> None:
    """The fast form in ``dtype`` must give what the reference gives in float64 of the same numbers, and its gradients
    too. Raises RuntimeError otherwise."""
    inputs = _inputs(case, shape, dtype, device)
    exact = torch.float32 if device.startswith("mps") else torch.float64
    wide = {n: x.detach().to(exact if x.is_floating_point() else x.dtype) for n, x in inputs.items()}
    wide = {n: x.requires_grad_(x.is_floating_point()) for n, x in wide.items()}
    actual, expected = _outputs(case.function(**inputs)), _outputs(case.reference(**wide))
    weights = [torch.randn_like(e) for e in expected]
    for name, gradient, wanted in zip(
        (n for n, x in wide.items() if x.requires_grad),
        _gradients(actual, [w.to(a.dtype) for w, a in zip(weights, actual, strict=True)], inputs),
        _gradients(expected, weights, wide),
        strict=True,
    ):
        _compare(case, f"the gradient of {name}", gradient, wanted, dtype)
    for a, e in zip(actual, expected, strict=True):
        _compare(case, "the value", a, e, dtype)


def measured_rates(dtype: torch.dtype, device: str, repeats: int = 5) -> Rates:
    """The best of some large copies and matmuls."""

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats + 1):
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPY_BYTES / best(lambda: target.copy_(source))
    rates = []
    for kind in (dtype, torch.float32):
        size = 2048 if device == "cpu" else 4096
        x = torch.randn(size, size, device=device).to(kind)
        rates.append(2 * size**3 / best(lambda x=x: x @ x))
    return Rates(bandwidth, *rates)


def _compare(case: Case, what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    actual, expected = actual.detach().to(expected.dtype), expected.detach()
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    if not error <= TOLERANCES[dtype]:
        raise RuntimeError(
            f"{case.name} in {dtype_name(dtype)}: {what} is off by {float(error):.1e} of the reference's largest, more "
            f"than {TOLERANCES[dtype]:g}: nothing is measured"
        )


def _inputs(case: Case, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Leaves of a graph, in the dtypes that a model in half precision gives the op."""
    made = {}
    for name, x in case.inputs(shape).items():
        x = x.to(device, dtype if x.is_floating_point() and name not in case.wide else None)
        made[name] = x.detach().requires_grad_(x.is_floating_point())
    return made


def _outputs(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def _gradients(outputs: Sequence[Tensor], weights: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    pairs = [(y, w) for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    leaves = [x for x in inputs.values() if x.requires_grad]
    return list(torch.autograd.grad([y for y, _ in pairs], leaves, [w for _, w in pairs]))


def _call(case: Case, inputs: Mapping[str, Tensor], backward: bool) -> Callable[[], None]:
    """The op once, with the gradients of all its inputs if asked for."""
    if not backward:

        @torch.no_grad()
        def forward() -> None:
            case.function(**inputs)

        return forward
    weight = torch.ones_like(_outputs(case.function(**inputs))[0])

    def both() -> None:
        _gradients(_outputs(case.function(**inputs))[:1], [weight], inputs)

    return both


def _repeated(call: Callable[[], None], device: str) -> tuple[Callable[[], None], int]:
    """The call as often as fits in ``CALL_SECONDS``, and how often that is."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    times = max(1, min(1000, math.ceil(CALL_SECONDS / (time.perf_counter() - start))))

    def repeated() -> None:
        for _ in range(times):
            call()
        synchronize(device)

    return repeated, times


def _row(case: Case, metric: str, each: Sequence[float], cost: Cost, rates: Rates, elements: int) -> Row:
    floor, bound = rates.floor(cost, case.fft)
    return {
        "case": case.name,
        "metric": f"{metric} ms",
        "ours": 1e3 * statistics.median(each),
        "peer": 1e3 * floor,
        "peer_name": "floor",
        **ratio_fields([s / floor for s in each]),
        "repeats": len(each),
        "bound": bound,
        "bytes": cost.bytes,
        "operations": cost.operations,
        "ns_per_element": 1e9 * statistics.median(each) / elements,
        "seconds": list(each),
    }


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Time over floor, a bar an op and pass."""
    rows = payload["rows"][::-1]
    with figure(path, payload, size=(8, 1 + 0.28 * len(rows))) as (axes,):
        axes.barh(
            [f"{row['case']}, {row['metric'].removesuffix(' ms')}" for row in rows],
            [row["ratio"] for row in rows],
            color=["C0" if row["metric"].startswith(BOTH) else "C1" for row in rows],
        )
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xlabel("time over floor")
