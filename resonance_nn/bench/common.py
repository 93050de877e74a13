"""What the suites share: interleaved timing, rows, and the tables, JSON and plots of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from resonance_nn.files import atomic_path
from resonance_nn.machine import machine_info, versions

Row = dict[str, Any]
Progress = Callable[[int, int], None]  # told what is done, and of how much


def no_progress(done: int, total: int) -> None:
    """Nobody is told."""


_Key = TypeVar("_Key", bound=Hashable)


def interleaved(
    functions: Mapping[_Key, Callable[[], None]],
    repeats: int,
    advance: Callable[[], None] = lambda: None,
    *,
    warm_up: bool = True,
) -> dict[_Key, list[float]]:
    """Seconds of each call: one round to warm up, then ``repeats`` rounds that call every function once.

    A machine's drift meets all of them alike, so that the ratio within a round is what to compare.
    """
    seconds: dict[_Key, list[float]] = {name: [] for name in functions}
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
    return {
        "case": case,
        "metric": metric,
        "ours": work / statistics.median(ours),
        "peer": None if peer is None else work / statistics.median(peer),
        "peer_name": peer_name,
        **ratio_fields(None if peer is None else ratios(peer, ours)),
        "repeats": len(ours),
        **more,
    }


def time_row(
    case: str, metric: str, ours: Sequence[float], peer: Sequence[float] | None, peer_name: str | None, **more: Any
) -> Row:
    """A row of milliseconds, of the median, with the ratios of ``rate_row``."""
    return {
        "case": case,
        "metric": metric,
        "ours": 1e3 * statistics.median(ours),
        "peer": None if peer is None else 1e3 * statistics.median(peer),
        "peer_name": peer_name,
        **ratio_fields(None if peer is None else ratios(peer, ours)),
        "repeats": len(ours),
        **more,
    }


def ratio_fields(rounds: Sequence[float] | None) -> Row:
    """The median, least and largest of the rounds' ratios; None of none."""
    if rounds is None:
        return dict.fromkeys(("ratio", "ratio_min", "ratio_max"))
    return {"ratio": statistics.median(rounds), "ratio_min": min(rounds), "ratio_max": max(rounds)}


def result(suite: str, rows: Sequence[Row], device: str | None = None, **more: Any) -> dict[str, Any]:
    """What a suite writes as JSON."""
    return {"suite": suite, "machine": machine_info(device), "versions": versions(), **more, "rows": list(rows)}


def rate_table(payload: Mapping[str, Any], title: str) -> Table:
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
            rate = "not timed" if row["peer"] is None else f"{row['peer']:,.0f}"
            more = number(row["ratio"]), spread(row), number(row["peer_over_matmuls"])
            view.add_row("", row["peer_name"], rate, *more)
    return view


def number(value: float | None, form: str = ".2f") -> str:
    """With two decimals, or as said; nothing where there is none."""
    return "" if value is None else format(value, form)


def spread(row: Row) -> str:
    """From the least to the largest of the rounds' ratios, or nothing."""
    return "" if row["ratio"] is None else f"{row['ratio_min']:.2f} – {row['ratio_max']:.2f}"


def plot_rows(payload: Mapping[str, Any], path: str | Path, x: str) -> None:
    """Ours and each peer over the rows' field ``x``, a panel a metric, both axes logarithmic."""
    rows = payload["rows"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    with figure(path, payload, panels=len(metrics)) as panels:
        for metric, axes in zip(metrics, panels, strict=True):
            lines: dict[str, dict[int, float]] = {}
            for row in rows:
                if row["metric"] == metric:
                    for key, label in (("ours", "resonance_nn"), ("peer", row["peer_name"])):
                        if row[key] is not None:
                            lines.setdefault(label, {})[row[x]] = row[key]
            for (label, line), marker in zip(lines.items(), itertools.cycle("os^vD*")):
                axes.plot(list(line), list(line.values()), marker=marker, label=label)
            log_axes(axes, x, metric)


@contextmanager
def figure(
    path: str | Path,
    payload: Mapping[str, Any],
    *,
    panels: int = 1,
    rows: int = 1,
    size: tuple[float, float] = (6, 4),
) -> Iterator[list[Any]]:
    """The axes of panels side by side in rows, each of ``size`` inches, under the processor's name; a PNG file at the
    end."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(size[0] * panels // rows, size[1] * rows), layout="constrained")
    yield list(made.subplots(rows, panels // rows, squeeze=False).flat)
    made.suptitle(payload["machine"]["cpu"], fontsize="small")
    with atomic_path(path) as temporary:
        made.savefig(temporary, format="png", dpi=150)


def log_axes(axes: Any, x: str, y: str, *, log_y: bool = True) -> None:
    """Label them, the horizontal one in powers of two."""
    axes.set_xscale("log", base=2)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
