"""``fill-mask``: the tokens hidden in packed documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from resonance_nn.models.encoder import ResonanceForMaskedLM
from resonance_nn.tasks.base import Learning
from resonance_nn.tasks.language import LanguageModelling
from resonance_nn.tasks.text import ENCODER, IGNORE

SHARE = 0.15  # of the tokens asked for


class MaskedLanguageModelling(LanguageModelling):
    """15% of the tokens are asked for (Devlin et al. 2019): of these 80% are hidden behind the mask, 10% are another
    token, 10% stay. Which, is drawn anew each time; in held-out text it stays the same."""

    name = "fill-mask"
    architecture = ResonanceForMaskedLM
    fields = ENCODER

    def learning(self, examples: Any, folder: Path) -> Learning:
        learning = super().learning(examples, folder)
        tokenizer, vocab_size = learning.processor, learning.model.config.vocab_size
        if tokenizer.mask_token_id is None:
            raise ValueError("tokenizer: has no mask token; leave it out to train one that has")
        self.mask = (tokenizer.mask_token_id, vocab_size)
        learning.eval_set = Masked(learning.eval_set, *self.mask)
        learning.augment = self._masked
        return learning

    def _masked(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids, labels = mask_tokens(batch["input_ids"], *self.mask)
        return {**batch, "input_ids": ids, "labels": labels}


class Masked(Dataset[Any]):
    """Windows with the same tokens hidden every time."""

    def __init__(self, windows: Dataset[Any], mask_id: int, vocab_size: int) -> None:
        self.windows, self.mask_id, self.vocab_size = windows, mask_id, vocab_size

    def __len__(self) -> int:
        return len(self.windows)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> dict[str, Any]:
        window = self.windows[i]
        generator = torch.Generator().manual_seed(i)
        ids, labels = mask_tokens(window["input_ids"], self.mask_id, self.vocab_size, generator)
        return {**window, "input_ids": ids, "labels": labels}


def mask_tokens(
    ids: Tensor, mask_id: int, vocab_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Ids with some hidden, and labels: −100 where nothing is asked. At least one token of the batch is asked for."""
    draw = torch.rand(ids.shape, generator=generator).to(ids.device)
    draw.view(-1)[draw.argmin()] = 0.0
    other = torch.randint(vocab_size, ids.shape, generator=generator).to(ids.device)
    labels = ids.masked_fill(draw >= SHARE, IGNORE)
    hidden = torch.where(draw < 0.8 * SHARE, mask_id, torch.where(draw < 0.9 * SHARE, other, ids))
    return hidden, labels
