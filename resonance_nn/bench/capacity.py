"""What associative memories hold: measured recall with the theory of ``resonance_nn.capacity`` beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from resonance_nn.bench.common import Progress, Row, no_progress, result
from resonance_nn.capacity import delta_error, optical_capacity
from resonance_nn.files import atomic_path
from resonance_nn.memory import SOLVES, HolographicMemory, Solve

POINTS = 5.0  # a measured accuracy may be that many percentage points from theory
BOUND = 1e-4  # of a recall that should be exact: max|y − v| / max|v|
LOADS = (0.125, 0.25, 0.5, 1, 2, 4, 8)  # pairs over key size, random keys
PASSES = (1, 2, 4, 8, 16)
EXACT_TRACES = (2, 4)
VALUE_SIZE = 64  # channels of a value in the outer-product memories
WAVELENGTH, OPTICAL_SNR = 532e-9, 100.0  # of the hologram set beside them: metres, 20 dB


@dataclass(frozen=True)
class CapacityOptions:
    """What to measure: ``dims`` P and ``pairs`` K of HRR, ``key_sizes`` N of outer products, ``codebook_size`` C, and
    ``trials``, the recalls a figure rests on at least."""

    dims: Sequence[int] = (256, 512, 1024)
    pairs: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    key_sizes: Sequence[int] = (64, 256)
    codebook_size: int = 1024
    trials: int = 4096
    seed: int = 0

    @classmethod
    def full(cls, **overrides: Any) -> CapacityOptions:
        pairs = tuple(sorted({round(2 ** (i / 2)) for i in range(21)}))
        return cls(**{"dims": (256, 512, 1024, 2048, 4096), "pairs": pairs, "trials": 16_384, **overrides})

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name, least in (("dims", 2), ("pairs", 1), ("key_sizes", 8)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"{name} = {tuple(values)}: must be one or more integers ≥ {least}")
        for name, least in (("codebook_size", 2), ("trials", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be ≥ {least}")


def run(options: CapacityOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure everything and return what is written as JSON. ``progress`` is told the parts done and their total."""
    options.check()
    generator = torch.Generator().manual_seed(options.seed)
    parts: list[Callable[[], list[Row]]] = []
    for P in options.dims:
        parts += [lambda P=P, K=K: _hrr(P, K, options, generator) for K in options.pairs]
    for N in options.key_sizes:
        parts += [lambda N=N: _exact_outer(N, generator)]
        parts += [lambda N=N, x=x: _random_outer(N, x, options, generator) for x in LOADS]
        parts += [lambda N=N, p=p: _passes(N, p, options, generator) for p in PASSES]
    parts += [lambda R=R: _exact_traces(R, options.dims[0], generator) for R in EXACT_TRACES]
    rows: list[Row] = []
    for done, part in enumerate(parts, 1):
        rows += part()
        progress(done, len(parts))
    rows += _bits(rows)
    compared = [row for row in rows if row["curve"] == "hrr"]
    return result(
        "capacity",
        rows,
        options={k: list(v) if isinstance(v, tuple | list) else v for k, v in asdict(options).items()},
        largest_difference_points=max(abs(row["difference_points"]) for row in compared),
        within_5_points=all(row["within_5_points"] for row in compared),
        exact=all(row["ratio"] < 1 for row in rows if row["curve"] == "exact"),
    )


def _row(curve: str, case: str, metric: str, ours: float, peer: float, peer_name: str, **more: Any) -> Row:
    ratio = ours / peer
    row = {"case": case, "metric": metric, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio}
    return {**row, "curve": curve, **more}


def _hrr(P: int, K: int, options: CapacityOptions, generator: torch.Generator) -> list[Row]:
    """HRR with unitary keys, Hebbian, nearest entry of the codebook."""
    memory = HolographicMemory(P, binding="hrr")
    (point,) = memory.capacity_report(
        (K,), codebook_size=options.codebook_size, trials=options.trials, generator=generator
    )
    difference = 100 * (point["accuracy"] - point["accuracy_theory"])
    more = {"dimension": P, "reals": P, "difference_points": difference, "within_5_points": abs(difference) <= POINTS}
    accuracy = point["accuracy"], point["accuracy_theory"]
    return [_row("hrr", f"hrr P={P} K={K}", "accuracy", *accuracy, "theory", **more, **point)]


def _exact_outer(N: int, generator: torch.Generator) -> list[Row]:
    """One pass of the delta rule on orthonormal keys, and least squares on independent ones, up to N of each."""
    memory, rows = HolographicMemory(VALUE_SIZE, key_size=N), []
    orthonormal = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0].float()
    independent = memory.random_keys(N, generator=generator)
    for K in (N // 4, N // 2, N):
        values = torch.randn(K, VALUE_SIZE, generator=generator)
        cases: tuple[tuple[Solve, str, Tensor], ...] = (
            ("delta", "orthonormal", orthonormal[:K]),
            ("lstsq", "independent", independent[:K]),
        )
        for solve, name, keys in cases:
            error = _largest_error(memory.read(keys, memory.write(keys, values, solve=solve)), values)
            case = f"{solve}, {name} keys, N={N} K={K}"
            rows.append(_row("exact", case, "largest error", error, BOUND, "bound", pairs=K, key_size=N))
    return rows


def _exact_traces(R: int, P: int, generator: torch.Generator) -> list[Row]:
    """HRR with erasing: R keys that are orthonormal at every frequency."""
    memory = HolographicMemory(P, binding="hrr", num_traces=R)
    spectra = torch.fft.rfft(torch.randn(R, R, P, generator=generator, dtype=torch.float64)).permute(2, 0, 1)
    keys = torch.fft.irfft(torch.linalg.qr(spectra)[0].permute(1, 2, 0), n=P).flatten(-2).float()  # rows of a unitary
    values = torch.randn(R, P, generator=generator)
    error = _largest_error(memory.read(keys, memory.write(keys, values, solve="delta")), values)
    return [_row("exact", f"hrr, erasing, R={R} K={R}", "largest error", error, BOUND, "bound", pairs=R, key_size=R)]


def _random_outer(N: int, load: float, options: CapacityOptions, generator: torch.Generator) -> list[Row]:
    """Outer products of random keys: the squared error of each way to write."""
    memory, rows, K = HolographicMemory(VALUE_SIZE, key_size=N), [], max(1, round(load * N))
    for solve in SOLVES:
        (point,) = memory.capacity_report(
            (K,), codebook_size=options.codebook_size, trials=options.trials, solve=solve, generator=generator
        )
        case, more = f"{solve}, random keys, N={N} K={K}", {"solve": solve, "key_size": N, "reals": N * VALUE_SIZE}
        peer, name = (point["error_theory"], "theory") if point["error_theory"] else (BOUND**2, "bound²")
        rows.append(_row("outer", case, "squared error", point["error"], peer, name, **more, **point))
    return rows


def _passes(N: int, passes: int, options: CapacityOptions, generator: torch.Generator) -> list[Row]:
    """More passes of the delta rule, N/2 random pairs: Kaczmarz's iteration."""
    memory, K = HolographicMemory(VALUE_SIZE, key_size=N), N // 2
    (point,) = memory.capacity_report((K,), trials=options.trials, solve="delta", passes=passes, generator=generator)
    case, more = f"delta, {passes} passes, N={N} K={K}", {"passes": passes, "key_size": N, "pairs": K}
    name = "theory, one pass"
    return [_row("passes", case, "squared error", point["error"], delta_error(K, N), name, **more)]


def _bits(rows: Sequence[Row]) -> list[Row]:
    """The most bits that each memory was measured to hold, beside the bound of a hologram with a resolution cell, that
    is a complex amplitude, for every two reals of state."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["curve"] in ("hrr", "outer"):
            name = f"hrr P={row['dimension']}" if row["curve"] == "hrr" else f"{row['solve']} N={row['key_size']}"
            if name not in best or row["bits"] > best[name]["bits"]:
                best[name] = row
    out = []
    for name, row in best.items():
        area = row["reals"] / 2 * WAVELENGTH**2
        bound = optical_capacity(area, WAVELENGTH, OPTICAL_SNR)
        more = {k: row[k] for k in ("pairs", "accuracy", "reals")} | {"area_m2": area, "wavelength_m": WAVELENGTH}
        more |= {"bits_per_real": row["bits"] / row["reals"], "optical_snr": OPTICAL_SNR}
        case = f"{name}, at K={row['pairs']}"
        out.append(_row("bits", case, "bits held", row["bits"], bound, "optical bound, 20 dB", **more))
    return out


def _largest_error(y: Tensor, v: Tensor) -> float:
    return ((y - v).abs().max() / v.abs().max()).item()


def tables(payload: Mapping[str, Any]) -> list[Table]:
    """The rows for people, a table for each kind."""
    rows: Sequence[Row] = payload["rows"]

    def of(curve: str) -> list[Row]:
        return [row for row in rows if row["curve"] == curve]

    C = payload["options"]["codebook_size"]
    accuracy = _table(f"HRR, nearest of {C:,} values", "case", "measured", "± s.e.", "theory", "points off", "within 5")
    for row in of("hrr"):
        figures = f"{row['ours']:.4f}", f"{row['standard_error']:.4f}", f"{row['peer']:.4f}"
        verdict = "yes" if row["within_5_points"] else "NO"
        accuracy.add_row(row["case"], *figures, f"{row['difference_points']:+.2f}", verdict)

    outer = _table("outer products, random keys: squared error, measured (theory)", "keys", *SOLVES)
    loads: dict[str, dict[str, str]] = {}
    for row in of("outer"):
        cells = loads.setdefault(f"N={row['key_size']} K={row['pairs']}", {})
        cells[row["solve"]] = f"{row['ours']:.3g} ({row['error_theory']:.3g})"
    for name, cells in loads.items():
        outer.add_row(name, *(cells[solve] for solve in SOLVES))

    passes = _table("delta, random keys: squared error after passes", "keys", *map(str, PASSES))
    keys = dict.fromkeys((row["key_size"], row["pairs"]) for row in of("passes"))
    for N, K in keys:
        passes.add_row(f"N={N} K={K}", *(f"{row['ours']:.3g}" for row in of("passes") if row["key_size"] == N))

    exact = _table(f"recalls that should be exact, to {BOUND:g}", "case", "largest error")
    for row in of("exact"):
        exact.add_row(row["case"], f"{row['ours']:.2g}")

    bits = _table(
        "most bits held, and a hologram's bound for as many reals", "memory", "bits", "a real", "bound, 20 dB"
    )
    for row in of("bits"):
        bits.add_row(row["case"], f"{row['ours']:,.0f}", f"{row['bits_per_real']:.2f}", f"{row['peer']:,.0f}")
    return [accuracy, outer, passes, exact, bits]


def _table(title: str, first: str, *headings: str) -> Table:
    view = Table(first, title=title)
    for heading in headings:
        view.add_column(heading, justify="right")
    return view


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Three panels: accuracy of HRR over pairs, squared error of outer products over K/N, bits over pairs. Points are
    measured, lines are theory."""
    from matplotlib.figure import Figure

    from resonance_nn.capacity import hebbian_error, hrr_accuracy, lstsq_error, stored_bits

    rows, C = payload["rows"], payload["options"]["codebook_size"]
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    accuracy, error, bits = figure.subplots(1, 3)
    hrr = [row for row in rows if row["curve"] == "hrr"]
    most = max(row["pairs"] for row in hrr)
    K = sorted({round(2 ** (i / 8)) for i in range(8 * math.ceil(math.log2(max(most, 2))) + 1)})
    for i, P in enumerate(payload["options"]["dims"]):
        color, points = f"C{i}", [row for row in hrr if row["dimension"] == P]
        theory = [hrr_accuracy(P, k, C) for k in K]
        x = [row["pairs"] for row in points]
        spread = [1.96 * row["standard_error"] for row in points]
        accuracy.errorbar(x, [row["ours"] for row in points], spread, fmt="o", ms=4, color=color, label=f"P = {P}")
        accuracy.plot(K, theory, color=color, lw=1)
        bits.plot(x, [row["bits"] for row in points], "o", ms=4, color=color, label=f"P = {P}")
        bits.plot(K, [stored_bits(a, k, C) for a, k in zip(theory, K, strict=True)], color=color, lw=1)
    bits.plot(K, [k * math.log2(C) for k in K], "k:", lw=1, label=f"K log₂ {C}")
    bits.set_ylim(0, 1.15 * max(row["bits"] for row in hrr))
    loads = [2 ** (i / 8) for i in range(-24, 25)]
    theories = {"hebbian": hebbian_error, "delta": delta_error, "lstsq": lstsq_error}
    markers = dict(zip(payload["options"]["key_sizes"], "os^vD*", strict=False))
    for i, (solve, theory) in enumerate(theories.items()):
        for N, marker in markers.items():
            points = [row for row in rows if row["curve"] == "outer" and (row["solve"], row["key_size"]) == (solve, N)]
            points = [row for row in points if row["error_theory"]]
            x, y = [row["pairs"] / N for row in points], [row["ours"] for row in points]
            error.plot(x, y, marker, ms=4, color=f"C{i}", label=f"{solve}, N = {N}")
        curve = [(x, theory(round(x * 8192), 8192)) for x in loads]
        error.plot(*zip(*(point for point in curve if point[1] > 0), strict=True), color=f"C{i}", lw=1)
    error.axhline(1, color="black", lw=0.8, ls=":")
    accuracy.set(xlabel="pairs K", ylabel=f"right among {C:,} values", title="HRR, unitary keys, Hebbian")
    error.set(xlabel="load K/N (lstsq is exact up to 1)", ylabel="E|y − v|² / |v|²")
    error.set_title("outer products, random keys, one pass")
    bits.set(xlabel="pairs K", ylabel="bits held (Fano)", title="HRR: information")
    error.set_yscale("log")
    for axes in (accuracy, error, bits):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle("points: measured, lines: theory", fontsize="medium")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
