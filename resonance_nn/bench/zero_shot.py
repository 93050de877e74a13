"""What the finished models of ``quality`` are worth elsewhere: on texts they were not trained for, and on minimal
pairs. A run's figures are kept in its folder, in zero-shot.json, by what was measured."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from resonance_nn.bench.learning import PRECISIONS, Plan
from resonance_nn.bench.text import HELD_OUT, TextTask, text_tokenizer
from resonance_nn.data import Documents, TokenStore, find_documents
from resonance_nn.evaluation import finite
from resonance_nn.files import atomic_path
from resonance_nn.minimal_pairs import read_pairs, score_pairs

TEXT, PAIRS = "bits per byte", "accuracy on minimal pairs"


@dataclass(frozen=True)
class Measurement:
    """One thing to measure: ``measure`` of a model with windows of so many tokens; ``key`` tells it from all others."""

    metric: str
    key: str
    measure: Callable[[PreTrainedModel, int], float]


def measurements(
    documents: Documents, vocab_size: int, folder: Path, texts: Sequence[str], pairs: Sequence[str]
) -> list[Measurement]:
    """Of each text, as ``--data`` takes it, and of all pairs.

    Bits per byte are of all the text in windows of the length trained on, each from a fresh state, as the held-out
    loss; the last, partial window is left out. Accuracy is the mean over the phenomena.

    Args:
        documents, vocab_size: the corpus the models were trained on, which gives the tokenizer.
        folder: where to keep encoded texts.
    """
    tokenizer = text_tokenizer(documents, vocab_size)
    made: list[Measurement] = []
    for text in texts:
        name = hashlib.sha256(text.encode()).hexdigest()[:12]
        store = TokenStore.build(find_documents([text]), tokenizer, folder / f"text-{name}", progress=False)

        def bits(model: PreTrainedModel, length: int, store: TokenStore = store) -> float:
            task = TextTask(store, store, length, vocab_size, eval_tokens=store.num_tokens)
            return task.measure(model, HELD_OUT, np.random.default_rng(), 0)["bits_per_byte"]

        made.append(Measurement(f"{TEXT}, {Path(text).name}", store.fingerprint, bits))
    if pairs:
        read = read_pairs(pairs)
        key = hashlib.sha256(json.dumps(read).encode()).hexdigest()
        made.append(Measurement(PAIRS, key, lambda model, _: score_pairs(model, tokenizer, read)["accuracy"]))
    return made


def figures(
    folder: Path, build: Callable[[], PreTrainedModel], wanted: Sequence[Measurement], length: int, plan: Plan
) -> dict[str, float]:
    """Of the finished run in ``folder``, by metric: those of its zero-shot.json, and what is missing there measured.
    NaN where a figure is not finite."""
    path, weights = folder / "zero-shot.json", folder / "model" / "model.safetensors"
    known: dict[str, float | None] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    of_weights = hashlib.sha256(weights.read_bytes()).hexdigest()  # another training run has others
    keys = {one.metric: f"{one.key} {of_weights}" for one in wanted}
    missing = [one for one in wanted if keys[one.metric] not in known]
    if missing:
        model = build()
        load_model(model, weights)
        nn.Module.to(model, plan.device).eval()
        dtype = PRECISIONS[plan.precision]
        kind = torch.device(plan.device).type
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            known |= finite({keys[one.metric]: one.measure(model, length) for one in missing})
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    values = {metric: known[key] for metric, key in keys.items()}
    return {metric: math.nan if value is None else value for metric, value in values.items()}
