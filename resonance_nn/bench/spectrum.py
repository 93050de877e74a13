"""A trained model's resonators over real text: how fast they turn, how long they ring, and which of them are used.

For every head the factor Λ_t = exp(−decay_t + i angle_t) of each mode is averaged over the tokens read:

    decay time  1 / mean(decay), tokens until the amplitude has fallen to 1/e;  half-life: ln 2 times that
    period      2π / mean|angle|, tokens a turn, angles taken in (−π, π]
    use         the mode's share of the energy read from the head's memory, |c_t,n|² ‖S_t,n‖², over every 32nd token

Constant filters (``resonance``) have one decay and angle a mode; selective ones follow the token's step δ_t, and, with
rotation "token", its own angles: then a period is their mean size, and need not be an oscillation. What a mode is in
each mixer: ``bench.resonators``. Coarse scales of ``multi_scale`` step once a block; here all is in tokens.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from resonance_nn.backbone import Block
from resonance_nn.bench.common import Progress, Row, no_progress, result
from resonance_nn.bench.resonators import READERS
from resonance_nn.data import DataError, Document, cut_pieces, document_token_id, encode_pieces
from resonance_nn.evaluation import finite, row
from resonance_nn.files import atomic_path
from resonance_nn.mixers.base import Mixer
from resonance_nn.mixers.multi_scale import CoarseMixer, MultiScaleMixer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from resonance_nn.models import ResonanceForCausalLM

SEED = 0  # of the order in which documents are taken


@dataclass
class Part:
    """A mixer with resonators, its place in the model, and what has been read from it."""

    layer: int
    name: str
    scale: int  # tokens a step of the mixer
    mixer: Mixer
    norm: nn.Module  # whose output the mixer reads
    steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # (H, M)
    gates: dict[str, list[Tensor]] = field(default_factory=dict)  # (·, H) each
    constants: dict[str, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def read(self, x: Tensor) -> None:
        """Add what the mixer does with x (B, L, D)."""
        reading = READERS[type(self.mixer)](self.mixer, x)
        B, L = x.shape[:2]
        turn = torch.remainder(reading.angle + math.pi, 2 * math.pi) - math.pi
        means = (reading.decay.mean((0, 1)), turn.abs().mean((0, 1)))
        values = {"decay": B * L * means[0], "angle": B * L * means[1], "energy": reading.energy}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.expand(reading.energy.shape).cpu().double()
        for kept, new in ((self.gates, reading.gates), (self.constants, reading.constants)):
            for name, value in new.items():
                kept.setdefault(name, []).append(value.reshape(-1, value.shape[-1]).cpu().double())
        self.steps += B * L

    def rows(self) -> list[Row]:
        """A row a head. ``ours`` is the decay time in tokens, a mean over the modes weighted by their use."""
        decay, angle = (self.sums[name] / self.steps / self.scale for name in ("decay", "angle"))
        use = self.sums["energy"]
        use = use / use.sum(-1, keepdim=True).clamp(min=torch.finfo(use.dtype).tiny)
        gates = {name: torch.cat(values) for name, values in self.gates.items()}
        constants = {name: torch.cat(values).mean(0) for name, values in self.constants.items()}
        rows = []
        for h in range(len(use)):
            place = f"layer {self.layer}" + (f" scale {self.scale}" if self.scale > 1 else "")
            time = 1 / decay[h]
            mean_time = float((use[h] * time).nansum())
            rows.append(
                {
                    **finite(row(f"{place} head {h}", "decay_time_tokens", mean_time)),
                    "layer": self.layer,
                    "mixer": self.name,
                    "scale": self.scale,
                    "head": h,
                    "frequency": (angle[h] / (2 * math.pi)).tolist(),
                    "period": _finite(2 * math.pi / angle[h]),
                    "decay_time": _finite(time),
                    "half_life": _finite(math.log(2) * time),
                    "use": use[h].tolist(),
                    "modes_in_use": float(torch.special.entr(use[h]).sum().exp()),
                    "gates": {name: _distribution(values[:, h]) for name, values in gates.items()},
                    "constants": finite({name: float(values[h]) for name, values in constants.items()}),
                }
            )
        return rows


def _finite(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _distribution(values: Tensor) -> dict[str, float]:
    low, middle, high = torch.quantile(values, torch.tensor([0.1, 0.5, 0.9], dtype=values.dtype)).tolist()
    return {"mean": float(values.mean()), "p10": low, "p50": middle, "p90": high}


def parts_of(model: ResonanceForCausalLM) -> list[Part]:
    """The mixers of the model that have resonators."""
    parts = []
    for i, block in enumerate(model.model.backbone.blocks):
        assert isinstance(block, Block)
        name, mixer = model.config.layer_mixers[i], block.mixer
        inner = mixer.inner if isinstance(mixer, MultiScaleMixer) else mixer
        parts.append(Part(i, name, 1, inner, block.mixer_norm))
        for coarse in mixer.coarse.values() if isinstance(mixer, MultiScaleMixer) else ():
            assert isinstance(coarse, CoarseMixer)
            parts.append(Part(i, name, coarse.scale, coarse.mixer, coarse.norm))
    return [part for part in parts if type(part.mixer) in READERS]


def windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, tokens: int, window: int
) -> list[list[int]]:
    """The first ``window`` tokens of documents in random order, <|endoftext|> before each, ``tokens`` in all or what
    there is."""
    order = list(documents)
    random.Random(SEED).shuffle(order)
    rows: list[list[int]] = []
    left = tokens
    for document in order:
        pieces = encode_pieces(tokenizer, cut_pieces(itertools.islice(document.chunks(16 * window), 1)))
        ids = [document_token_id(tokenizer), *itertools.chain.from_iterable(pieces)][: min(window, left)]
        if len(ids) > 1:
            rows.append(ids)
            left -= len(ids)
        if left < 2:
            break
    if not rows:
        raise DataError("there is no text to read")
    return rows


@torch.no_grad()
def run(
    model: ResonanceForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    tokens: int = 16_384,
    window: int = 1024,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Read text and return what is written as JSON, a row a layer and head. ``progress``: tokens read and their total.

    Raises:
        ValueError: a value out of range, no text, or a model without resonators.
    """
    for name, value, least in (("tokens", tokens, 2), ("window", window, 2)):
        if value < least:
            raise ValueError(f"{name} = {value}: must be ≥ {least}")
    parts = parts_of(model)
    if not parts:
        named = sorted(set(model.config.layer_mixers))
        raise ValueError(f"mixers {', '.join(named)}: have no resonators; nothing to show")
    rows = sorted(windows(documents, tokenizer, tokens, window), key=len, reverse=True)
    total, done = sum(map(len, rows)), 0
    for _, same in itertools.groupby(rows, key=len):
        alike = list(same)
        for begin in range(0, len(alike), 4):
            ids = torch.tensor(alike[begin : begin + 4], device=model.device)
            for part, x in zip(parts, _inputs(model, parts, ids), strict=True):
                if x is not None and x.shape[1] > 1:
                    part.read(x)
            done += ids.numel()
            progress(done, total)
    measured = [part for part in parts if part.steps]
    silent = set(range(model.config.num_hidden_layers)) - {part.layer for part in measured}
    described: dict[str, Any] = {"tokens": total, "windows": len(rows), "window": window, "longest": len(rows[0])}
    described["without"] = [f"{i}: {model.config.layer_mixers[i]}" for i in sorted(silent)]
    return result("spectrum", [r for part in measured for r in part.rows()], model.device.type, **described)


def _inputs(model: ResonanceForCausalLM, parts: Sequence[Part], ids: Tensor) -> list[Tensor | None]:
    """What each part's mixer reads (B, L, D) when the model reads ids (B, L); None if it is not called."""
    heard: dict[int, Tensor] = {}

    def listen(i: int) -> Callable[..., None]:
        return lambda module, args, output: heard.__setitem__(i, output[1] if isinstance(output, tuple) else output)

    hooks = [part.norm.register_forward_hook(listen(i)) for i, part in enumerate(parts)]
    try:
        model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [heard.get(i) for i in range(len(parts))]


def tables(payload: Mapping[str, Any]) -> list[Table]:
    """The rows for people, a table a layer: of each head the range of its modes, and what is used of them."""
    views = []
    for place, group in itertools.groupby(payload["rows"], key=_place):
        rows = list(group)
        view = Table(title=place, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
        for heading, width in (("head", 4), ("period", 11), ("decay time", 11), ("by use", 6), ("modes used", 10)):
            view.add_column(heading, justify="right", min_width=width, no_wrap=True)
        if rows[0]["gates"]:
            view.add_column("mean (10–90%)", no_wrap=True)
        for r in rows:
            ranges = (_range(r["period"]), _range(r["decay_time"]), _number(r["ours"]))
            gates = [f"{n} {g['mean']:.2g} ({g['p10']:.2g}–{g['p90']:.2g})" for n, g in r["gates"].items()]
            gates += [f"{n} {_number(v)}" for n, v in r["constants"].items()]
            view.add_row(str(r["head"]), *ranges, f"{r['modes_in_use']:.1f}/{len(r['use'])}", "\n".join(gates))
        views.append(view)
    return views


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """A PNG: above, decay time against period of every mode, a panel a layer; below, the use of every mode. Colour is
    use over an equal share: 1 where all modes of the head are used alike."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = payload["rows"]
    panels = [list(group) for _, group in itertools.groupby(rows, key=_place)]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    map_height = max(1.0, 0.12 * len(rows))
    figure = Figure(figsize=(2.6 * max(columns, 2) + 1.4, 2.5 * lines + map_height + 1.0), layout="constrained")
    cells = figure.add_gridspec(lines + 1, columns, height_ratios=[2.5] * lines + [map_height])
    norm, colours = LogNorm(1 / 16, 16, clip=True), colormaps["viridis"]
    x_limits, y_limits = (_limits([v for r in rows for v in r[key]]) for key in ("period", "decay_time"))
    x_limits = (x_limits[0], min(x_limits[1], max(8.0 * payload["longest"], 10 * x_limits[0])))
    figure.suptitle(
        f"{payload['tokens']:,} tokens in windows of at most {payload['longest']:,}. Dashed: one turn in a decay time, "
        "so modes above it ring.\nAt the right edge: modes that turn less than once in 5 windows, or not at all.",
        fontsize="small",
    )
    scatters: list[Any] = []
    for i, panel in enumerate(panels):
        first = scatters[0] if scatters else None
        axes = figure.add_subplot(cells[i // columns, i % columns], sharex=first, sharey=first)
        scatters.append(axes)
        points = sorted((p for r in panel for p in _points(r)), key=lambda p: p[2])  # the most used on top
        periods = [min(p[0], x_limits[1] / 1.5) for p in points]
        times = [min(p[1], y_limits[1] / 1.5) for p in points]
        look = {"norm": norm, "cmap": colours, "edgecolors": "#333333", "linewidths": 0.3}
        axes.plot(x_limits, x_limits, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
        axes.scatter(periods, times, 16 if len(points) < 300 else 5, [p[2] for p in points], **look)
        axes.set(xscale="log", yscale="log", xlim=x_limits, ylim=y_limits)
        axes.set_title(_place(panel[0]), fontsize="small")
        axes.grid(alpha=0.25)
        axes.label_outer()
        axes.tick_params(labelsize="small")
        if i + columns >= len(panels):
            axes.set_xlabel("period, tokens a turn", fontsize="small")
            axes.tick_params(labelbottom=True)
        if i % columns == 0:
            axes.set_ylabel("decay time, tokens", fontsize="small")
    axes = figure.add_subplot(cells[-1, :])
    begins = list(itertools.accumulate([0, *map(len, panels)]))
    for panel, (begin, end) in zip(panels, itertools.pairwise(begins), strict=True):
        image = [[share for *_, share in sorted(_points(r))] for r in panel]
        axes.imshow(image, colours, norm, aspect="auto", interpolation="nearest", extent=(0, 1, end, begin))
        axes.axhline(begin, color="white", linewidth=2)
    axes.set_ylim(begins[-1], 0)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(begins)]
    axes.set_yticks(middles, [_place(panel[0]) for panel in panels], fontsize="x-small")
    axes.set_xticks([])
    axes.set_xlabel("modes of a head, from the shortest period to the longest; a line a head", fontsize="small")
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=[*scatters, axes], shrink=0.5, extend="both")
    bar.set_ticks([1 / 16, 1 / 4, 1, 4, 16], labels=["1/16", "1/4", "1", "4", "16"])
    bar.ax.tick_params(labelsize="small")
    bar.set_label("use, over an equal share", fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _place(r: Row) -> str:
    return f"{r['layer']}: {r['mixer']}" + (f" ×{r['scale']}" if r["scale"] > 1 else "")


def _points(r: Row) -> list[tuple[float, float, float]]:
    """Period, decay time and use, over an equal share, of each mode."""
    periods, times = ([math.inf if v is None else v for v in r[key]] for key in ("period", "decay_time"))
    return list(zip(periods, times, [max(use * len(r["use"]), 1e-9) for use in r["use"]], strict=True))


def _limits(values: Sequence[float | None]) -> tuple[float, float]:
    """Of a logarithmic axis: the finite values with a margin, and room at the upper end for those that are not."""
    numbers = [v for v in values if v is not None] or [1.0, 10.0]
    return min(numbers) / 1.5, max(numbers) * (1.5 if None not in values else 6)


def _number(value: float | None) -> str:
    if value is None or math.isinf(value):
        return "∞"
    return f"{value:.3g}" if value < 999.5 else f"{value / 1000:.3g}k" if value < 999_500 else f"{value / 1e6:.3g}M"


def _range(values: Sequence[float | None]) -> str:
    numbers = [math.inf if v is None else v for v in values]
    low, high = _number(min(numbers)), _number(max(numbers))
    return low if low == high else f"{low}–{high}"
