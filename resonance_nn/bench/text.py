"""Text as a task to learn: the next token, on batches that are the same for every model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from resonance_nn.bench.tasks import answer_loss
from resonance_nn.data import Documents, TokenStore, read_texts, split_documents, train_tokenizer
from resonance_nn.data.synthetic import Batch
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.ops.cross_entropy import linear_cross_entropy

HELD_OUT = "held out"
EVALUATED_AT_ONCE = 8192  # tokens


@dataclass(frozen=True)
class TextTask:
    """The next token of text: windows end to end in random order, anew each epoch, and the first windows of
    held-out files.

    Args:
        train, held_out: the corpus.
        seq_len: tokens L a window predicts.
        vocab_size: of the tokenizer.
        eval_tokens: held-out tokens an evaluation takes at most.
        order: which order of the windows.
    """

    train: TokenStore
    held_out: TokenStore
    seq_len: int
    vocab_size: int
    eval_tokens: int = 1 << 16
    order: int = 0
    cells: Mapping[str, None] = field(default_factory=lambda: {HELD_OUT: None})
    watched: tuple[str, ...] = (HELD_OUT,)

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out text."""
        return self.held_out.num_bytes / self.held_out.num_tokens

    def training_batch(self, rng: Generator, tokens: int, step: int) -> Batch:
        """Of an epoch, whose windows lie end to end from an offset of its own, those of this step."""
        rows, L = max(1, tokens // self.seq_len), self.seq_len
        windows = (self.train.num_tokens - 1) // L - 1  # that there are at any offset
        if windows < 1:
            raise ValueError(f"seq_len = {L}: the text has {self.train.num_tokens:,} tokens, fewer than two windows")
        epochs, places = np.divmod(np.arange(step * rows, (step + 1) * rows), windows)
        starts = []
        for epoch in np.unique(epochs):
            of_epoch = np.random.default_rng([self.order, epoch])
            offset, order = of_epoch.integers(L), of_epoch.permutation(windows)
            starts.append(offset + L * order[places[epochs == epoch]])
        return self._windows(self.train, np.concatenate(starts))

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return next_token_loss(model, batch)

    @torch.no_grad()
    def measure(self, model: Any, cell: str, rng: Generator, tokens: int) -> dict[str, float]:
        """Mean cross-entropy in nats over ``eval_tokens`` held-out tokens, and in bits a byte; the same for every
        model."""
        training = model.training
        model.eval()
        windows = min(max(1, self.eval_tokens // self.seq_len), (self.held_out.num_tokens - 1) // self.seq_len)
        total = 0.0
        for starts in torch.arange(windows).mul(self.seq_len).split(max(1, EVALUATED_AT_ONCE // self.seq_len)):
            ids, targets = self._windows(self.held_out, starts.numpy())
            loss = next_token_loss(model, Batch(ids.to(model.device), targets.to(model.device)))[1]
            total += float(loss) * len(starts)
        model.train(training)
        loss = total / windows
        return {"loss": loss, "bits_per_byte": loss / math.log(2) / self.bytes_per_token}

    def reached(self, cells: Mapping[str, Mapping[str, float]], target: float) -> bool:
        """A loss has no target: the budget is used up."""
        return False

    def _windows(self, store: TokenStore, starts: np.ndarray) -> Batch:
        index = starts[:, None] + np.arange(self.seq_len + 1)
        ids = torch.from_numpy(np.asarray(store.tokens)[index].astype(np.int64))
        return Batch(ids[:, :-1], ids[:, 1:])


def next_token_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """As ``answer_loss`` where every token asks: ours by its own loss, which holds no (tokens, vocabulary) logits."""
    if not isinstance(model, ResonanceForCausalLM) or type(model.lm_head) is not nn.Linear:
        return answer_loss(model, batch)
    out = model.base_model(input_ids=batch.input_ids, use_cache=False)
    targets = batch.targets.flatten()
    objective, loss = linear_cross_entropy(out.last_hidden_state.flatten(0, 1), model.lm_head.weight, targets)
    objective, loss = objective / len(targets), loss / len(targets)
    return objective if out.aux_loss is None else objective + out.aux_loss, loss


def text_task(
    documents: Documents,
    folder: Path,
    seq_len: int,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> TextTask:
    """A corpus as token ids under ``folder``, written once.

    ``tokenizer``: from :func:`text_tokenizer`, made if it is not given. ``options``: further fields of
    :class:`TextTask`.
    """
    train, held_out = split_documents(documents)
    tokenizer = tokenizer or text_tokenizer(documents, vocab_size)
    stores = [
        TokenStore.build(part, tokenizer, folder / name) for part, name in ((train, "train"), (held_out, "held-out"))
    ]
    return TextTask(stores[0], stores[1], seq_len, vocab_size, **options)


def text_tokenizer(documents: Documents, vocab_size: int) -> PreTrainedTokenizerBase:
    """Of the training part of a corpus; the same at every call."""
    return train_tokenizer(read_texts(split_documents(documents)[0]), vocab_size, progress=False)
