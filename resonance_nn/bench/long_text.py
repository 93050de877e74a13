"""What a long context is worth to a trained model: the same tokens predicted after more and more text, and loss by
position."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from resonance_nn.bench.common import Row, figure, result
from resonance_nn.bench.fit import confidence95
from resonance_nn.data import DataError, Document, cut_pieces, document_token_id, encode_pieces
from resonance_nn.evaluation import autocast, finite, row
from resonance_nn.models import ResonanceForCausalLM

LOSS, CHANGE, BY_POSITION = "loss of the last tokens", "change of their loss", "loss by position"
LOGITS_AT_ONCE = 1024  # tokens a row


@dataclass(frozen=True)
class LongTextOptions:
    """What to measure.

    Args:
        contexts: tokens before those that are scored, ≥ 1.
        score: tokens at the end of each window that are scored.
        windows: how many; what is scored never overlaps, what stands before it may.
        reference: the context that others are compared with, one of ``contexts``.
        chunk: tokens in one forward pass.
        batch_size: windows at a time.
        precision: "bf16", "fp16" or "fp32", of the matmuls.
    """

    contexts: tuple[int, ...] = (1024, 8192, 32_768, 65_536)
    score: int = 1024
    windows: int = 50
    reference: int = 8192
    chunk: int = 4096
    batch_size: int = 4
    precision: str = "fp32"

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        if not self.contexts or sorted(set(self.contexts)) != list(self.contexts) or self.contexts[0] < 1:
            raise ValueError(f"contexts = {self.contexts}: must be numbers of tokens ≥ 1, ascending, each once")
        if self.reference not in self.contexts:
            raise ValueError(f"reference = {self.reference}: must be one of contexts = {self.contexts}")
        if self.precision not in ("bf16", "fp16", "fp32"):
            raise ValueError(f"precision = {self.precision!r}: must be bf16, fp16 or fp32")
        for name, least in (("score", 1), ("windows", 2), ("chunk", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be ≥ {least}")


def run(
    model: ResonanceForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    options: LongTextOptions,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Join the documents, each after <|endoftext|>, spread windows evenly over them, and predict the last ``score``
    tokens of each from fresh states ``contexts`` tokens earlier. The model is left in evaluation mode. ``progress`` is
    told tokens read, and the total.

    Raises:
        ValueError: an option out of range, or too little text.
    """
    options.check()
    ids = joined(tokenizer, documents)
    longest, score = options.contexts[-1], options.score
    fits = (len(ids) - longest) // score
    if fits < options.windows:
        raise DataError(
            f"windows = {options.windows}: the text has {len(ids):,} tokens, room for {max(0, fits)} windows of "
            f"{score:,} tokens after {longest:,} others; give more text, fewer windows or shorter contexts"
        )
    ends = np.linspace(longest + score, len(ids), options.windows).astype(int)
    total = options.windows * sum(context + score for context in options.contexts)
    done, losses = 0, {}
    model.eval()
    for context in options.contexts:
        parts = []
        for some in np.split(ends, range(options.batch_size, len(ends), options.batch_size)):
            batch = torch.from_numpy(np.stack([ids[end - score - context : end] for end in some]))
            parts.append(token_losses(model, batch, options))
            done += len(some) * (context + score)
            progress(done, total)
        losses[context] = torch.cat(parts).double().numpy()  # (windows, context + score − 1)
    last = {context: table[:, -score:].mean(1) for context, table in losses.items()}
    rows: list[Row] = [_row(f"after {context:,} tokens", LOSS, values, context) for context, values in last.items()]
    rows += [
        _row(f"{options.reference:,} to {context:,} tokens", CHANGE, values - last[options.reference], context)
        for context, values in last.items()
        if context != options.reference
    ]
    rows += _by_position(losses[longest], ends)
    chosen = {name: getattr(options, name) for name in options.__dataclass_fields__}
    return result("longtext", rows, model.device.type, options=chosen, tokens=len(ids), documents=len(documents))


def joined(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> np.ndarray:
    """The token ids of documents end to end, each after <|endoftext|>."""
    boundary = np.array([document_token_id(tokenizer)])
    parts = [
        part
        for document in documents
        for part in (boundary, *map(np.asarray, encode_pieces(tokenizer, cut_pieces(document.chunks()))))
    ]
    if not parts:
        raise DataError("there are no documents to read")
    return np.concatenate(parts).astype(np.int64)


@torch.no_grad()
def token_losses(model: ResonanceForCausalLM, ids: Tensor, options: LongTextOptions) -> Tensor:
    """Nats of every token but the first, ids (B, n + 1) -> (B, n), the state carried from chunk to chunk."""
    cache, losses = None, []
    inputs, targets = ids[:, :-1].to(model.device), ids[:, 1:].to(model.device)
    with autocast(options.precision, model.device.type):
        for x, y in zip(inputs.split(options.chunk, 1), targets.split(options.chunk, 1), strict=True):
            out = model.model(x, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert out.last_hidden_state is not None
            for hidden, answer in zip(
                out.last_hidden_state.split(LOGITS_AT_ONCE, 1), y.split(LOGITS_AT_ONCE, 1), strict=True
            ):
                logits = model.lm_head(hidden).float().transpose(1, 2)
                losses.append(F.cross_entropy(logits, answer, reduction="none").cpu())
    return torch.cat(losses, dim=1)


def _row(case: str, metric: str, values: np.ndarray, context: int) -> Row:
    """The mean over windows, and half its 95% interval."""
    means = [float(value) for value in values]
    more = {"interval": confidence95(means), "windows": len(means), "context": context}
    return finite({**row(case, f"{metric}, nats a token", fmean(means)), **more})


def _by_position(losses: np.ndarray, ends: np.ndarray) -> list[Row]:
    """Means between powers of two of the position, over windows (of ``losses``, ending at ``ends``) that do not
    overlap, or an interval would count the same tokens as different ones."""
    length = losses.shape[1]
    apart = [0]
    for i, end in enumerate(ends):
        if end - ends[apart[-1]] >= length:
            apart.append(i)
    edges = [0, *(1 << k for k in range(6, math.ceil(math.log2(length)))), length] if length > 64 else [0, length]
    return [
        _row(f"positions {a:,} to {b - 1:,}", BY_POSITION, losses[apart, a:b].mean(1), b)
        for a, b in itertools.pairwise(edges)
    ]


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Loss by position, and the change of the same tokens' loss by context; bars are 95% intervals, none of one
    window."""
    with figure(path, payload, panels=2) as (left, right):
        for axes, metric, label in ((left, BY_POSITION, "position"), (right, CHANGE, "tokens before those scored")):
            rows = [row for row in payload["rows"] if row["metric"].startswith(metric)]
            x, y = [row["context"] for row in rows], [row["ours"] for row in rows]
            axes.errorbar(x, y, yerr=[row["interval"] or 0.0 for row in rows], marker="o", capsize=3)
            axes.set_xscale("log", base=2)
            axes.set_xlabel(label)
            axes.set_ylabel(f"{metric}, nats a token")
            axes.set_title(f"{rows[0]['windows']} windows", fontsize="small")
            axes.grid(alpha=0.3)
        right.axhline(0, color="grey", linewidth=0.8)
        reference = payload["options"]["reference"]
        right.set_title(f"against {reference:,} tokens, {payload['options']['windows']} windows", fontsize="small")
