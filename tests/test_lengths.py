"""Batches of similar lengths: every example once an epoch, in an order that a resumed run finds again."""

from __future__ import annotations

import random

from resonance_nn.data.lengths import SimilarLengths

LENGTHS = [random.Random(i).randrange(1, 100) for i in range(1003)]


def batches(sampler: SimilarLengths) -> list[list[int]]:
    order, size = list(sampler), sampler.batch_size
    return [order[i : i + size] for i in range(0, len(order), size)]


def test_every_example_comes_once_and_the_short_batch_last():
    sampler = SimilarLengths(LENGTHS, 16)
    assert sorted(sampler) == list(range(1003))
    assert len(sampler) == 1003
    assert len(batches(sampler)[-1]) == 1003 % 16


def test_little_of_a_batch_is_padding():
    def padding(order: list[list[int]]) -> float:
        widths = [max(LENGTHS[i] for i in batch) * len(batch) for batch in order]
        return 1 - sum(LENGTHS) / sum(widths)

    grouped = batches(SimilarLengths(LENGTHS, 16))
    order = random.Random(0).sample(range(1003), 1003)
    assert padding([order[i : i + 16] for i in range(0, 1003, 16)]) > 0.4
    assert padding(grouped) < 0.1
    means = [sum(LENGTHS[i] for i in batch) / len(batch) for batch in grouped]
    assert means != sorted(means)  # long and short batches by turns


def test_epochs_and_seeds_differ_and_are_repeatable():
    sampler = SimilarLengths(LENGTHS, 16, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    again = SimilarLengths(LENGTHS, 16, seed=3)
    assert list(again) == first
    again.set_epoch(1)
    assert list(again) == second
    assert list(SimilarLengths(LENGTHS, 16, seed=4)) != first


def test_fewer_examples_than_a_batch():
    assert sorted(SimilarLengths([5, 2, 9], 16)) == [0, 1, 2]
