"""Seconds of translating n tokens into m, beside a Marian of equal size: linear in n + m, and how exactly.

    python examples/translation_time.py

Ours is an encoder, a bridge and a causal decoder; Marian, with its cache, looks at all tokens for each one. Both have
random weights, for time does not depend on them, and write m tokens by ``generate`` with as many beams as asked for.
Each round times every length of both once, in the order of the table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from resonance_nn import ResonanceConfig, ResonanceForConditionalGeneration
from resonance_nn.bench.common import interleaved, ratios
from resonance_nn.bench.task_peers import POSITIONS, build_task_peer, trained

Lengths = tuple[int, int]  # of source and target


def pair(bridge: str, width: int, layers: int) -> dict[str, Any]:
    """Ours and a Marian of as many parameters, by name."""
    torch.manual_seed(0)
    config = ResonanceConfig(
        vocab_size=6000,
        hidden_size=width,
        num_hidden_layers=layers,
        bridge=bridge,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    ours = ResonanceForConditionalGeneration(config).eval()
    marian = build_task_peer("marian", config, trained(ours)).eval()
    return {"ours": ours, "Marian": marian}


def translation(model: Any, lengths: Lengths, beams: int) -> Callable[[], None]:
    """What is timed."""
    n, m = lengths
    source = torch.randint(3, 6000, (1, n), generator=torch.Generator().manual_seed(n))

    def run() -> None:
        made = model.generate(source, min_new_tokens=m, max_new_tokens=m, do_sample=False, num_beams=beams)
        assert made.shape[1] == m + 1, "and the token that it begins with"

    return run


def linear_fit(seconds: dict[Lengths, float]) -> tuple[np.ndarray, float]:
    """a, b, c of a + b n + c m, by least squares of relative errors, and the largest such error."""
    lengths, measured = np.array(list(seconds)), np.array(list(seconds.values()))
    design = np.column_stack((np.ones(len(lengths)), lengths)) / measured[:, None]
    fit, *_ = np.linalg.lstsq(design, np.ones(len(measured)), rcond=None)
    return fit, float(np.abs(design @ fit - 1).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="64,256,1024", help="of source and of target, three or more, by commas")
    parser.add_argument("--bridge", default="memory", choices=("memory", "spectral"))
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3, help="of encoder and of decoder")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    given = [int(n) for n in options.lengths.split(",") if n.strip().isdecimal()]
    lengths = sorted(set(given))
    if len(given) <= options.lengths.count(",") or len(lengths) < 3 or not 1 <= lengths[0] <= lengths[-1] < POSITIONS:
        parser.error(f"--lengths {options.lengths}: must be three or more lengths of 1 to {POSITIONS - 1:,} tokens")
    for name in ("beams", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be ≥ 1")
    try:
        models = pair(options.bridge, options.width, options.layers)
    except ValueError as error:
        parser.error(str(error))
    grid = list(product(lengths, lengths))
    calls = {(name, at): translation(model, at, options.beams) for at in grid for name, model in models.items()}
    seconds = interleaved(calls, options.repeats)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    sizes = ", ".join(f"{name} {trained(model):,}" for name, model in models.items())
    table = Table("source", "target", *models, "ratio", title=f"Seconds a translation; parameters: {sizes}")
    for at in grid:
        ours, marian = (seconds[name, at] for name in models)
        ratio = statistics.median(ratios(marian, ours))  # round by round
        table.add_row(*(f"{n:,}" for n in at), *(f"{medians[name, at]:.3f}" for name in models), f"{ratio:.2f}")
    console = Console()
    console.print(table)
    for name in models:
        (a, b, c), worst = linear_fit({at: medians[name, at] for at in grid})
        text = f"{name}: {1000 * a:.1f} ms + {1000 * b:.3f} ms · n + {1000 * c:.3f} ms · m, off by {worst:.0%} at most"
        console.print(text, highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
