"""Tasks with an answer: sequences drawn from a numpy generator, with what a causal model must say at each token.

    recall          multi-query associative recall (Arora et al. 2023, "Zoology"): what a state can hold
    modular_sum     the running sum of digits modulo m; m = 2 is the parity of bits: what a state can track
    permutations    the running product of permutations of n things, a group that does not commute for n ≥ 3
    copying         say all again, in order: what a state can carry over

Letters: B sequences, L tokens, K pairs, V vocabulary. Every function draws the whole batch at once, and the same
generator state gives the same batch.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # no answer here: the index that cross-entropies ignore
FILLERS = ("any", "unused")


class Batch(NamedTuple):
    """``input_ids`` (B, L), and ``targets`` (B, L): the token a model that has read 0..t must answer at t, or −100.

    The answer is not the next input: what follows a query is a filler, so nothing is gained by looking ahead.
    """

    input_ids: Tensor
    targets: Tensor

    @property
    def labels(self) -> Tensor:
        """(B, L) for a model that shifts labels inside, as ours and ``transformers``' do: the target of t stands at
        t + 1. The last token's target has no place there and is left out; in :func:`recall` it never has one."""
        return F.pad(self.targets[:, :-1], (1, 0), value=IGNORE)


def recall(
    rng: Generator,
    sequences: int,
    length: int,
    pairs: int,
    vocab_size: int,
    *,
    power: float = 0.01,
    fillers: str = "any",
) -> Batch:
    """Multi-query associative recall: K key–value pairs, then each key once more, to be answered with its value.

        k_1 v_1 k_2 v_2 … k_K v_K | k_2 · · · k_1 · k_K · · ·        target at a query: its value; elsewhere none

    Keys are K different tokens of the first half of the vocabulary, values K different ones of the second. Queries
    stand at slots 2K + 2j, j ≥ 0, each key's slot drawn in turn without replacement with P(j) ∝ (j + 1)^{power − 1}.

    Args:
        rng: the source of all choices.
        sequences: B.
        length: L ≥ 4K, so that the L − 2K tokens after the pairs have a slot for each query.
        pairs: K ≥ 1.
        vocab_size: V; each half has at least K tokens.
        power: a of the power law a·x^{a−1}; 1 is uniform, 0.01 that of Zoology.
        fillers: the other tokens after the pairs, uniform over "any" of the vocabulary, as in Zoology, or over those
            "unused" as keys of this sequence. With "any" a filler may repeat a key, and its successor look like
            another value: the answer is the value after the key's *first* occurrence. That touches a share of the
            queries near (fillers before the query)/(2V), which a small vocabulary feels.

    Raises:
        ValueError: the pairs do not fit the length or the vocabulary.
    """
    half = vocab_size // 2
    if pairs < 1 or length < 4 * pairs:
        raise ValueError(f"pairs = {pairs}: must be in 1 … length/4 = {length // 4}, or a query has no slot")
    if half < pairs:
        raise ValueError(f"vocab_size = {vocab_size}: must be ≥ {2 * pairs}, a half each for {pairs} keys and values")
    if power <= 0:
        raise ValueError(f"power = {power}: must be > 0; 0.01 is Zoology's, 1 is uniform")
    if fillers not in FILLERS:
        raise ValueError(f"fillers = {fillers!r}: must be {' or '.join(map(repr, FILLERS))}")
    B, K = sequences, pairs
    keys = _without_replacement(rng, B, np.ones(half), K)  # (B, K)
    values = half + _without_replacement(rng, B, np.ones(vocab_size - half), K)
    slots = _without_replacement(rng, B, np.arange(1.0, (length - 2 * K) // 2 + 1) ** (power - 1), K)
    at = 2 * K + 2 * slots  # the queries' positions
    if fillers == "any":
        ids = rng.integers(vocab_size, size=(B, length))
    else:  # the i-th token that is not a key: i plus the keys at or below it
        ids = rng.integers(vocab_size - K, size=(B, length))
        for key in np.sort(keys, axis=1).T:
            ids += ids >= key[:, None]
    ids[:, 0 : 2 * K : 2], ids[:, 1 : 2 * K : 2] = keys, values
    np.put_along_axis(ids, at, keys, axis=1)
    targets = np.full((B, length), IGNORE)
    np.put_along_axis(targets, at, values, axis=1)
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


def modular_sum(rng: Generator, sequences: int, length: int, modulus: int = 2) -> Batch:
    """The token m, where the sequence begins, then digits x_t uniform in 0 … m − 1; the target at every t is the sum of
    the digits so far mod m. m = 2 is parity. V = m + 1."""
    if modulus < 2:
        raise ValueError(f"modulus = {modulus}: must be ≥ 2")
    ids = rng.integers(modulus, size=(sequences, length))
    ids[:, 0] = 0
    targets = ids.cumsum(1) % modulus
    ids[:, 0] = modulus
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


def permutations(rng: Generator, sequences: int, length: int, elements: int = 5) -> Batch:
    """The word problem of the symmetric group S_n: the token n!, where the sequence begins, then permutations π_t of n
    things, uniform, numbered in lexicographic order; the target at every t is π_t ∘ … ∘ π_1, at first the identity, 0.
    V = n! + 1."""
    product = group_table(elements)
    ids = rng.integers(len(product), size=(sequences, length))
    targets = np.zeros_like(ids)
    for t in range(1, length):
        targets[:, t] = product[ids[:, t], targets[:, t - 1]]
    ids[:, 0] = len(product)
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


def copying(rng: Generator, sequences: int, length: int, symbols: int = 26) -> Batch:
    """n = length/2 symbols, uniform, the token ``symbols`` that ends them, and the first n − 1 of them again; from that
    token on the target is the symbol that comes next in the copy. V = symbols + 1.

        x_1 x_2 … x_n ; x_1 … x_{n−1}        targets there: x_1 x_2 … x_n
    """
    if length < 4 or length % 2:
        raise ValueError(f"length = {length}: must be even and ≥ 4, half of it to be copied")
    if symbols < 2:
        raise ValueError(f"symbols = {symbols}: must be ≥ 2")
    n = length // 2
    text = rng.integers(symbols, size=(sequences, n))
    ids = np.concatenate([text, np.full((sequences, 1), symbols), text[:, :-1]], axis=1)
    targets = np.concatenate([np.full((sequences, n), IGNORE), text], axis=1)
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets))


def group_table(elements: int) -> NDArray[np.int64]:
    """(n!, n!): the number of π ∘ σ at [π, σ], permutations of n things in lexicographic order."""
    if not 2 <= elements <= 6:
        raise ValueError(f"elements = {elements}: must be in 2 … 6, as the vocabulary is all permutations of them")
    group = np.array(list(itertools.permutations(range(elements))))  # (n!, n)
    digits = elements ** np.arange(elements)
    number = np.zeros(elements**elements, dtype=np.int64)
    number[group @ digits] = np.arange(len(group))
    return number[group[:, group] @ digits]  # (π ∘ σ)(i) = π(σ(i))


def _without_replacement(rng: Generator, rows: int, weights: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """(rows, count) indices, each row drawn one after another in proportion to ``weights`` without replacement: the
    first arrivals of independent exponential clocks with these rates."""
    arrivals = rng.standard_exponential((rows, len(weights)), dtype=np.float32)
    if (weights != 1).any():
        arrivals /= weights.astype(np.float32)
    if count < len(weights):
        first = np.argpartition(arrivals, count - 1, axis=1)[:, :count]
    else:
        first = np.broadcast_to(np.arange(count), (rows, count))
    order = np.take_along_axis(arrivals, first, axis=1).argsort(axis=1)
    return np.take_along_axis(first, order, axis=1)
