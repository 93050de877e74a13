"""Batches of examples that are about as long, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUP = 50  # batches that are sorted by length together: the fewer, the more at random


class SimilarLengths(Sampler[int]):
    """Indices of all examples in a random order, ``batch_size`` after ``batch_size`` of about the same length.

    Every epoch has an order of its own, from ``seed`` and the epoch alone: a resumed run meets the same batches.
    ``GROUP`` batches drawn at random are sorted by length and cut; then the batches are shuffled, but for one that is
    not full, which is the last.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = torch.tensor(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        groups = order.split(GROUP * self.batch_size)
        batches = [batch for g in groups for batch in g[self.lengths[g].argsort(stable=True)].split(self.batch_size)]
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # one at most, of the last group
        turn = torch.randperm(len(full), generator=generator).tolist()
        yield from torch.cat([*(full[i] for i in turn), *rest]).tolist()
