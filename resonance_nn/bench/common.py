"""What the suites share: interleaved timing, a row, and the table, JSON and plot of rates."""

from __future__ import annotations

import itertools
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
    functions: Mapping[str, Callable[[], None]],
    repeats: int,
    advance: Callable[[], None] = lambda: None,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call: one round to warm up, then ``repeats`` rounds that call every function once.

    A machine's drift meets all of them alike, so that the ratio within a round is what to compare.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(0 if warm_up else 1, repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
            advance()
    return seconds


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Those of the rounds, ascending."""
    return sorted(a / b for a, b in zip(over, under, strict=True))


def rate_row(
    case: str,
    metric: str,
    work: float,
    ours: Sequence[float],
    peer: Sequence[float] | None,
    peer_name: str | None,
    **more: Any,
) -> Row:
    """A row of rates: ``work`` over the median seconds, and the median of the rounds' ratios (> 1: we are faster).

    Without the seconds of a peer, its rate and the ratios are None.
    """
    rounds = None if peer is None else ratios(peer, ours)
    return {
        "case": case,
        "metric": metric,
        "ours": work / statistics.median(ours),
        "peer": None if peer is None else work / statistics.median(peer),
        "peer_name": peer_name,
        "ratio": None if rounds is None else statistics.median(rounds),
        "ratio_min": None if rounds is None else rounds[0],
        "ratio_max": None if rounds is None else rounds[-1],
        "repeats": len(ours),
        **more,
    }


def result(suite: str, rows: Sequence[Row], device: str | None = None, **more: Any) -> dict[str, Any]:
    """What a suite writes as JSON."""
    return {"suite": suite, "machine": machine_info(device), "versions": versions(), **more, "rows": list(rows)}


def table(payload: Mapping[str, Any], title: str) -> Table:
    """Rates for people: for each case ours, then each peer with the ratio to it."""
    view = Table("case", "model", title=title, highlight=False)
    for heading in ("tokens/s", "ratio", "min – max", "over own matmuls"):
        view.add_column(heading, justify="right")
    several = len({row["metric"] for row in payload["rows"]}) > 1
    shown = None
    for row in payload["rows"]:
        case = f"{row['metric'].split()[0]} {row['case']}" if several else row["case"]
        if case != shown:
            shown = case
            view.add_row(case, "ours", f"{row['ours']:,.0f}", "", "", number(row["over_matmuls"]))
        if row["peer_name"] is not None:
            spread = "" if row["ratio"] is None else f"{row['ratio_min']:.2f} – {row['ratio_max']:.2f}"
            rate = "not timed" if row["peer"] is None else f"{row['peer']:,.0f}"
            view.add_row("", row["peer_name"], rate, number(row["ratio"]), spread, number(row["peer_over_matmuls"]))
    return view


def number(value: float | None) -> str:
    """With two decimals, or nothing."""
    return "" if value is None else f"{value:.2f}"


def plot(payload: Mapping[str, Any], path: str | Path, x: str) -> None:
    """Ours and each peer over the rows' field ``x``, a panel a metric, both axes logarithmic."""
    from matplotlib.figure import Figure

    rows = payload["rows"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    figure = Figure(figsize=(6 * len(metrics), 4), layout="constrained")
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row["metric"] == metric:
                for key, label in (("ours", "resonance_nn"), ("peer", row["peer_name"])):
                    if row[key] is not None:
                        lines.setdefault(label, {})[row[x]] = row[key]
        for (label, line), marker in zip(lines.items(), itertools.cycle("os^vD*")):
            axes.plot(list(line), list(line.values()), marker=marker, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(metric)
        axes.set_title(payload["machine"]["cpu"], fontsize="small")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
