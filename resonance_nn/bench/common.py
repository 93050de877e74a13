"""What the suites share: interleaved timing, a row, and the table, JSON and plot of rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from resonance_nn.files import atomic_path
from resonance_nn.machine import machine_info, versions

Row = dict[str, Any]


def interleaved(
    functions: Mapping[str, Callable[[], None]], repeats: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each call: one round to warm up, then ``repeats`` rounds that call every function once.

    A machine's drift meets all of them alike, so that the ratio within a round is what to compare.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
            advance()
    return seconds


def rate_row(
    case: str, metric: str, work: float, ours: Sequence[float], peer: Sequence[float], peer_name: str, **more: Any
) -> Row:
    """A row of rates: ``work`` over the median seconds, and the median of the rounds' ratios (> 1: we are faster)."""
    ratios = sorted(p / o for o, p in zip(ours, peer, strict=True))
    return {
        "case": case,
        "metric": metric,
        "ours": work / statistics.median(ours),
        "peer": work / statistics.median(peer),
        "peer_name": peer_name,
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "repeats": len(ratios),
        **more,
    }


def result(suite: str, rows: Sequence[Row], device: str | None = None, **more: Any) -> dict[str, Any]:
    """What a suite writes as JSON."""
    return {"suite": suite, "machine": machine_info(device), "versions": versions(), **more, "rows": list(rows)}


def table(payload: Mapping[str, Any], title: str) -> Table:
    """The rows for people."""
    view = Table("case", "metric", title=title)
    for heading in ("ours", payload["rows"][0]["peer_name"], "ratio", "min – max"):
        view.add_column(heading, justify="right")
    for row in payload["rows"]:
        spread = f"{row['ratio_min']:.2f} – {row['ratio_max']:.2f}"
        view.add_row(
            row["case"], row["metric"], f"{row['ours']:,.0f}", f"{row['peer']:,.0f}", f"{row['ratio']:.2f}", spread
        )
    return view


def plot(payload: Mapping[str, Any], path: str | Path, x: str) -> None:
    """Ours and the peer over the rows' field ``x``, both axes logarithmic."""
    from matplotlib.figure import Figure

    rows = payload["rows"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, marker in (("ours", "resonance_nn", "o"), ("peer", rows[0]["peer_name"], "s")):
        axes.plot([row[x] for row in rows], [row[key] for row in rows], marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(rows[0]["metric"])
    axes.set_title(payload["machine"]["cpu"], fontsize="small")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
