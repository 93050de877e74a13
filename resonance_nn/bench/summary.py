"""The figures that matter, of the payload of any suite: one row a figure, a table of them, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from resonance_nn.bench.common import Row, number
from resonance_nn.bench.peers import PEER
from resonance_nn.evaluation import row

RATIOS = "ratio > 1: ours is better; of ops it is time over the floor, of capacity bits over the bound"
HEADINGS = ("command", "case", "figure", "beside", "ratio")
FURTHER: dict[str, dict[str, str]] = {  # fields of a suite's rows that are figures of their own
    "speed": {"over_matmuls": "× its own matmuls"},
    "throughput": {"over_matmuls": "× its own matmuls"},
    "decode": {
        "over_weights": "× reading the weights",
        "over_first_context": "× the first context's time",
        "batch_gain": "× the first batch's tokens/s",
        "state_bytes": "bytes of state",
    },
    "context": {"peak_bytes": "peak bytes above weights"},
    "mixers": {"decode_ms": "ms a token", "state_bytes": "bytes of state"},
}


def figures(payload: Mapping[str, Any]) -> list[Row]:
    """Rows of case, metric, ours, peer, peer_name and ratio: a suite's own, without those that only make up a curve,
    and one more for each of its other figures."""
    suite, rows = payload["suite"], payload["rows"]
    found = [{name: each[name] for name in row("", "", None)} for each in PICKED.get(suite, list)(rows)]
    for field, metric in FURTHER.get(suite, {}).items():
        seen = {(each["case"], each["metric"]): each[field] for each in rows if each.get(field) is not None}
        several = len({kind for _, kind in seen}) > 1  # training and forward: cases come twice
        for (case, kind), value in seen.items():
            found.append(row(f"{kind.split()[0]} {case}" if several else case, metric, value))
    for name, fit in payload.get("fits", {}).items():
        if fit is not None:
            interval = "" if fit["low"] is None else f", 95% {fit['low']:.3f} to {fit['high']:.3f}"
            who = "ours" if name == "ours" else PEER
            found.append(row(f"{who}: {fit['points']} points{interval}", "exponent", fit["exponent"]))
    return found


PICKED: dict[str, Callable[[Sequence[Row]], Sequence[Row]]] = {
    "capacity": lambda rows: [each for each in rows if each["curve"] == "bits"],
}


def cells(command: str, figure: Row) -> tuple[str, ...]:
    """Of a row for people, under ``HEADINGS``."""
    return command, figure["case"], _text(figure), figure["peer_name"] or "", number(figure["ratio"])


def table(rows: Sequence[Row]) -> Table:
    """Rows with a ``command`` each, for people. A command is named once."""
    view = Table(*HEADINGS[:2], highlight=False)
    for heading in HEADINGS[2:]:
        view.add_column(heading, justify="left" if heading == "beside" else "right")
    shown = None
    for each in rows:
        view.add_row(*cells("" if each["command"] == shown else each["command"], each))
        shown = each["command"]
    return view


def markdown(rows: Sequence[Row], title: str, failures: Mapping[str, str]) -> str:
    """The same as a file. ``failures`` are lines by command."""
    lines = [title, "", f"| {' | '.join(HEADINGS)} |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells('`' + each['command'] + '`', each))} |" for each in rows]
    lines += ["", f"{RATIOS}.", *(f"\n`{command}` failed: {line}" for command, line in failures.items())]
    return "\n".join(lines) + "\n"


def _text(figure: Row) -> str:
    """The figure and its unit."""
    value = figure["ours"]
    if value is None:
        return f"not measured: {figure['metric']}"
    return f"{value:,.0f} {figure['metric']}" if abs(value) >= 100 else f"{value:.3g} {figure['metric']}"
