"""What finished models are worth elsewhere than where they were trained, as on other texts and on minimal pairs. A
run's figures are kept in its folder, in zero-shot.json, by what was measured and of which weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resonance_nn.bench.runs import Plan
from resonance_nn.bench.text import HELD_OUT, TextTask
from resonance_nn.data import TokenStore, find_documents
from resonance_nn.evaluation import autocast, finite
from resonance_nn.files import atomic_path
from resonance_nn.minimal_pairs import read_pairs, score_pairs

TEXT, PAIRS = "bits per byte", "accuracy on minimal pairs"


@dataclass(frozen=True)
class Measurement:
    """One thing to measure: ``measure`` of a model with windows of so many tokens; ``key`` tells it from all others."""

    metric: str
    key: str
    measure: Callable[[PreTrainedModel, int], Any]


def measurements(
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    lengths: Sequence[int],
    folder: Path,
    texts: Sequence[str],
    pairs: Sequence[str],
) -> list[Measurement]:
    """Of each text, as ``--data`` takes it, and of all pairs.

    Bits per byte are of all the text in windows of the length trained on, each from a fresh state, as the held-out
    loss; the last, partial window is left out. Accuracy is the mean over the phenomena.

    Args:
        tokenizer: makes that of the models.
        lengths: of the windows they are trained on.
        folder: where to keep encoded texts.

    Raises:
        ValueError: a text named twice or shorter than a window; pairs that cannot be read.
    """
    if len(set(texts)) < len(texts):
        raise ValueError(f"text = {list(texts)}: each once")
    made: list[Measurement] = []
    if not (texts or pairs):
        return made
    own = tokenizer()
    for text in texts:
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        store = TokenStore.build(find_documents([text]), own, folder / f"text-{name}", progress=False)
        if store.num_tokens <= max(lengths):
            raise ValueError(
                f"text = {text!r}: has {store.num_tokens:,} tokens, not a window of {max(lengths):,} and the one after "
                "it; give more text, or shorter lengths"
            )

        def bits(model: PreTrainedModel, length: int, store: TokenStore = store) -> float:
            task = TextTask(store, store, length, len(own), eval_tokens=store.num_tokens)
            return task.measure(model, HELD_OUT, np.random.default_rng(), 0)["bits_per_byte"]

        made.append(Measurement(f"{TEXT}, {text}", store.fingerprint, bits))
    if pairs:
        read = read_pairs(pairs)
        key = hashlib.sha256(json.dumps(read).encode()).hexdigest()
        made.append(Measurement(PAIRS, key, lambda model, _: score_pairs(model, own, read)["accuracy"]))
    return made


def figures(
    folder: Path, build: Callable[[], PreTrainedModel], wanted: Sequence[Measurement], length: int, plan: Plan
) -> dict[str, Any]:
    """Of the finished run in ``folder``, by metric: those of its zero-shot.json, and what is missing there measured.
    NaN where a number is not finite."""
    path, weights = folder / "zero-shot.json", folder / "model" / "model.safetensors"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    of_weights = hashlib.sha256(weights.read_bytes()).hexdigest()  # another training run has others
    keys = {one.metric: f"{one.key} {of_weights}" for one in wanted}
    missing = [one for one in wanted if keys[one.metric] not in known]
    if missing:
        model = build()
        load_model(model, weights)
        nn.Module.to(model, plan.device).eval()
        with torch.no_grad(), autocast(plan.precision, torch.device(plan.device).type):
            known |= finite({keys[one.metric]: one.measure(model, length) for one in missing})
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    values = {metric: known[key] for metric, key in keys.items()}
    return {metric: math.nan if value is None else value for metric, value in values.items()}
