"""What the suites `recall` and `tracking` train on and measure: draws of batches, and how well a model answers them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.data.synthetic import IGNORE, Batch, copying, modular_sum, permutations, recall

LENGTHS = (64, 128, 256, 512)
PAIRS = (4, 8, 16, 32, 64)
TRACKING: dict[str, tuple[Callable[..., Batch], dict[str, int], int]] = {  # the draw, its argument, its vocabulary
    "parity": (modular_sum, {"modulus": 2}, 3),
    "sum3": (modular_sum, {"modulus": 3}, 4),
    "sum5": (modular_sum, {"modulus": 5}, 6),
    "s3": (permutations, {"elements": 3}, 7),
    "s5": (permutations, {"elements": 5}, 121),
    "copy": (copying, {"symbols": 26}, 27),
}


@dataclass(frozen=True)
class Draw:
    """A distribution of sequences of one length: ``function(rng, sequences)``, its token ids raised by ``offset``.

    ``weight`` is its share among a task's training draws.
    """

    function: Callable[[Generator, int], Batch]
    length: int
    offset: int = 0
    weight: float = 1.0

    def __call__(self, rng: Generator, sequences: int) -> Batch:
        ids, targets = self.function(rng, sequences)
        return Batch(ids + self.offset, targets.where(targets == IGNORE, targets + self.offset))


@dataclass(frozen=True)
class Task:
    """A vocabulary, draws to train on, and held-out cells by name. ``watched`` are the cells measured while training,
    by which a run may end early."""

    vocab_size: int
    training: tuple[Draw, ...]
    cells: Mapping[str, Draw]
    watched: tuple[str, ...]

    def training_batch(self, rng: Generator, tokens: int, step: int = 0) -> Batch:
        """One draw, chosen by weight, of as many sequences as have about ``tokens`` tokens."""
        weights = np.array([draw.weight for draw in self.training])
        draw = self.training[rng.choice(len(weights), p=weights / weights.sum())]
        return draw(rng, max(1, tokens // draw.length))

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return answer_loss(model, batch)

    def measure(self, model: Any, cell: str, rng: Generator, tokens: int) -> dict[str, float]:
        """See :func:`accuracy`; of sequences that have about ``tokens`` tokens, at least 16."""
        return accuracy(model, self.cells[cell], rng, max(16, tokens // self.cells[cell].length))

    def reached(self, cells: Mapping[str, Mapping[str, float]], target: float) -> bool:
        """Whether every figure is at least ``target``."""
        return all(value >= target for figures in cells.values() for value in figures.values())


def recall_cell(length: int, pairs: int) -> str:
    """The name of the held-out cell of these sizes."""
    return f"{length}/{pairs}"


def recall_task(
    vocab_size: int = 512,
    lengths: Sequence[int] = LENGTHS,
    pairs: Sequence[int] = PAIRS,
    watched: tuple[int, int] = (256, 32),
    fillers: str = "unused",
    test_lengths: Sequence[int] = (),
) -> Task:
    """Every (length, pairs) with length ≥ 4·pairs, mixed from the start, and a held-out cell of each; further cells of
    ``test_lengths``, which are not trained on.

    A batch is of one (length, pairs), chosen in proportion to 1/length: short sequences show the task first, and more
    of them fit into a batch.

    Raises:
        ValueError: nothing fits, or the watched cell is not one of them.
    """

    def draw(length: int, count: int) -> Draw:
        def function(rng: Generator, sequences: int) -> Batch:
            return recall(rng, sequences, length, count, vocab_size, fillers=fillers)

        return Draw(function, length, weight=1 / length)  # short ones are learned first

    sizes = [(length, count) for length in sorted(set(lengths)) for count in sorted(set(pairs)) if length >= 4 * count]
    if watched not in sizes:
        fitting = ", ".join(recall_cell(*size) for size in sizes) or "none: a length must be ≥ 4 times the pairs"
        raise ValueError(f"watch = {recall_cell(*watched)}: must be one of the cells trained on, {fitting}")
    cells = {recall_cell(*size): draw(*size) for size in sizes}
    if min(test_lengths, default=math.inf) < 4 * min(pairs):
        raise ValueError(f"test_lengths = {list(test_lengths)}: must be ≥ {4 * min(pairs)}, four times the least pairs")
    further = [(length, count) for length in sorted(set(test_lengths) - set(lengths)) for count in sorted(set(pairs))]
    tested = {recall_cell(*size): draw(*size) for size in further if size[0] >= 4 * size[1]}
    return _checked(Task(vocab_size, tuple(cells.values()), {**cells, **tested}, (recall_cell(*watched),)))


def tracking_task(name: str, train_lengths: Sequence[int], lengths: Sequence[int] = LENGTHS) -> Task:
    """A task of ``TRACKING``, trained on batches of the train lengths in equal shares, held out at each of ``lengths``;
    the longest is watched.

    Raises:
        ValueError: no such task, or a length below 4, where a last quarter has no token.
    """
    if name not in TRACKING:
        raise ValueError(f"task = {name!r}: must be one of {', '.join(TRACKING)}")
    if min([*train_lengths, *lengths], default=0) < 4:
        raise ValueError(f"lengths = {[*train_lengths, *lengths]}: must be ≥ 4")
    function, arguments, vocab_size = TRACKING[name]

    def draw(length: int) -> Draw:
        return Draw(lambda rng, sequences: function(rng, sequences, length, **arguments), length)

    cells = {f"{name} {length}": draw(length) for length in sorted(set(lengths))}
    return _checked(Task(vocab_size, tuple(draw(n) for n in train_lengths), cells, (list(cells)[-1],)))


def _checked(task: Task) -> Task:
    """A task, if each of its sizes can be drawn; raises ValueError otherwise, before anything is trained."""
    for draw in (*task.training, *task.cells.values()):
        draw(np.random.default_rng(0), 1)
    return task


def mixture(*tasks: Task) -> Task:
    """Several tasks in one vocabulary: each has token ids of its own, each batch is of one task, in equal shares."""
    training: list[Draw] = []
    cells: dict[str, Draw] = {}
    vocab_size = 0
    for task in tasks:
        whole = sum(draw.weight for draw in task.training)
        training += [replace(d, offset=d.offset + vocab_size, weight=d.weight / whole) for d in task.training]
        cells |= {name: replace(d, offset=d.offset + vocab_size) for name, d in task.cells.items()}
        vocab_size += task.vocab_size
    return Task(vocab_size, tuple(training), cells, tuple(name for task in tasks for name in task.watched))


def answers(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits (M, V) of a ``transformers`` language model where the batch asks for an answer, the M targets, and the
    sum of the mixers' auxiliary losses if there are any. The head runs on these positions alone."""
    out = model.base_model(input_ids=batch.input_ids, use_cache=False)
    index = (batch.targets != IGNORE).flatten().nonzero().squeeze(1)
    hidden = out.last_hidden_state.flatten(0, 1).index_select(0, index)  # (M, D)
    return model.lm_head(hidden), batch.targets.flatten()[index], getattr(out, "aux_loss", None)


def answer_loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """What to minimise, and its cross-entropy part: the mean over the answers, in nats."""
    logits, targets, auxiliary = answers(model, batch)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
    return loss if auxiliary is None else loss + auxiliary, loss.detach()


@torch.no_grad()
def accuracy(model: Any, draw: Draw, rng: Generator, sequences: int, tokens: int = 1 << 14) -> dict[str, float]:
    """The share of right answers, ``accuracy``, and in tasks that ask at every token that of the last quarter of
    positions, ``last_quarter``. ``tokens`` bounds those of one forward pass."""
    training, device = model.training, model.device
    model.eval()
    right, asked = torch.zeros(draw.length), torch.zeros(draw.length)
    for begin in range(0, sequences, rows := max(1, tokens // draw.length)):
        batch = draw(rng, min(rows, sequences - begin))
        logits, targets, _ = answers(model, Batch(batch.input_ids.to(device), batch.targets.to(device)))
        answered = batch.targets != IGNORE
        hits = torch.zeros(answered.shape)
        hits[answered] = (logits.argmax(-1) == targets).float().cpu()
        right += hits.sum(0)
        asked += answered.sum(0)
    model.train(training)
    result = {"accuracy": float(right.sum() / asked.sum())}
    if bool((asked == sequences).all()):
        last = draw.length - draw.length // 4
        result["last_quarter"] = float(right[last:].sum() / asked[last:].sum())
    return result
