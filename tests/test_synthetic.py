"""Synthetic tasks: the answer stands in what came before, nowhere else, and the choices have their distributions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from contract import small_model
from numpy.random import Generator, default_rng
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from resonance_nn.bench.tasks import answer_loss, mixture, recall_task, tracking_task
from resonance_nn.data.synthetic import FILLERS, IGNORE, Batch, copying, group_table, modular_sum, permutations, recall

SIZES = [(16, 4, 8), (64, 16, 512), (65, 16, 33), (256, 32, 512), (512, 4, 512)]


def recalled(batch: Batch, occurrence: int) -> float:
    """The share of queries answered by what followed an earlier occurrence of their key: 0 the first, −1 the last."""
    ids = batch.input_ids.numpy()
    rows, queries = (batch.targets != IGNORE).numpy().nonzero()
    right = 0
    for row, t in zip(rows, queries, strict=True):
        earlier = (ids[row, :t] == ids[row, t]).nonzero()[0]
        right += ids[row, earlier[occurrence] + 1] == batch.targets[row, t].item()
    return right / len(rows)


@pytest.mark.parametrize(("length", "pairs", "vocab_size"), SIZES)
@pytest.mark.parametrize("fillers", FILLERS)
def test_recall_is_pairs_then_one_query_of_each_key(length, pairs, vocab_size, fillers):
    ids, targets = recall(default_rng(0), 20, length, pairs, vocab_size, fillers=fillers)
    assert ids.shape == targets.shape == (20, length)
    assert ids.dtype == targets.dtype == torch.long
    assert 0 <= ids.min() <= ids.max() < vocab_size
    asked = targets != IGNORE
    assert not asked[:, : 2 * pairs].any()
    assert (asked.nonzero()[:, 1] % 2 == 0).all()
    for row in range(20):
        keys, values = ids[row, 0 : 2 * pairs : 2].tolist(), ids[row, 1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == pairs
        assert max(keys) < vocab_size // 2 <= min(values)
        answers = zip(ids[row][asked[row]].tolist(), targets[row][asked[row]].tolist(), strict=True)
        assert sorted(answers) == sorted(zip(keys, values, strict=True))
        if fillers == "unused":
            assert not set(keys) & set(ids[row, 2 * pairs :][~asked[row, 2 * pairs :]].tolist())


@pytest.mark.parametrize(("length", "pairs", "vocab_size"), SIZES)
def test_recall_is_answered_by_what_came_before(length, pairs, vocab_size):
    for fillers in FILLERS:
        batch = recall(default_rng(1), 40, length, pairs, vocab_size, fillers=fillers)
        assert recalled(batch, 0) == 1.0
        if fillers == "unused":
            assert recalled(batch, -1) == 1.0


def test_fillers_of_any_token_mislead_who_takes_the_last_occurrence():
    batch = recall(default_rng(1), 200, 256, 32, 512, fillers="any")
    assert 0.88 < recalled(batch, -1) < 0.95


def test_what_follows_a_query_does_not_tell_its_answer():
    ids, targets = recall(default_rng(2), 2000, 64, 16, 512, fillers="any")
    followed = (targets[:, :-1] == ids[:, 1:])[targets[:, :-1] != IGNORE].float()
    chance = 1 / 512
    assert abs(followed.mean() - chance) < 5 * math.sqrt(chance / len(followed))


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power):
    """The first key's query is the first draw: its slot has the law itself as distribution."""
    length, pairs, count = 72, 4, 20_000
    ids, targets = recall(default_rng(3), count, length, pairs, 512, power=power)
    query = (ids[:, 2 * pairs :] == ids[:, :1]) & (targets[:, 2 * pairs :] != IGNORE)
    slots = query.float().argmax(1) // 2
    law = torch.arange(1, 33, dtype=torch.float64) ** (power - 1)
    law /= law.sum()
    seen = torch.bincount(slots, minlength=32).double()
    assert (((seen - count * law) ** 2) / (count * law)).sum() < 31 + 5 * math.sqrt(2 * 31)  # χ², 5 standard deviations


def test_keys_and_values_are_uniform_in_every_place():
    ids, _ = recall(default_rng(4), 20_000, 16, 4, 16)
    for place in range(8):
        seen = torch.bincount(ids[:, place] % 8, minlength=8).double()
        assert (((seen - 2500) ** 2) / 2500).sum() < 7 + 5 * math.sqrt(14)


@pytest.mark.parametrize("modulus", [2, 3, 5])
def test_modular_sum(modulus):
    ids, targets = modular_sum(default_rng(0), 10, 40, modulus)
    assert set(ids[:, 1:].flatten().tolist()) == set(range(modulus))
    for (begin, *digits), answers in zip(ids.tolist(), targets.tolist(), strict=True):
        assert begin == modulus
        assert answers == [total % modulus for total in itertools.accumulate([0, *digits])]


@pytest.mark.parametrize("elements", [2, 3, 5])
def test_permutations_are_composed_left_to_right(elements):
    group = list(itertools.permutations(range(elements)))
    ids, targets = permutations(default_rng(0), 5, 30, elements)
    for (begin, *row), (first, *answers) in zip(ids.tolist(), targets.tolist(), strict=True):
        assert begin == len(group)
        state = group[first]
        assert state == tuple(range(elements))
        for token, answer in zip(row, answers, strict=True):
            state = tuple(group[token][i] for i in state)
            assert group[answer] == state


def test_the_table_is_a_group():
    table = group_table(3)
    assert (table[0] == np.arange(6)).all()
    assert (table[:, 0] == np.arange(6)).all()
    assert (table[table] == table[:, table]).all()  # (π σ) τ = π (σ τ)
    assert (np.sort(table, axis=1) == np.arange(6)).all()
    assert (table != table.T).any()


def test_the_same_generator_gives_the_same_batch():
    def draw(rng: Generator) -> list[Batch]:
        return [recall(rng, 4, 64, 8, 512), modular_sum(rng, 4, 64), permutations(rng, 4, 64)]

    for a, b, c in zip(draw(default_rng(5)), draw(default_rng(5)), draw(default_rng(6)), strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.targets, b.targets)
        assert not torch.equal(a.input_ids, c.input_ids)


@pytest.mark.parametrize("task", [recall_task(61, (32,), (4,), (32, 4)), tracking_task("sum5", (32,))])
def test_labels_are_for_models_that_shift_inside(task):
    """Ours and transformers' compute the loss of the targets from the labels; all but the last token's."""
    batch = task.training_batch(default_rng(0), 256)
    assert torch.equal(batch.labels[:, 1:], batch.targets[:, :-1])
    kept = Batch(batch.input_ids, F.pad(batch.targets[:, :-1], (0, 1), value=IGNORE))
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for model in (small_model(("attention",)), LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64)).eval()):
        expected = model(input_ids=batch.input_ids, labels=batch.labels).loss
        assert answer_loss(model, kept)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_recall_asks_nothing_at_the_last_token():
    batch = recall(default_rng(0), 500, 16, 4, 64)
    assert (batch.targets[:, -1] == IGNORE).all()
    assert (batch.labels != IGNORE).sum() == 500 * 4


def test_a_mixture_keeps_its_tasks_apart():
    first, second = recall_task(64, (32, 64), (4, 8), (64, 8)), tracking_task("parity", (64,), (64, 128))
    task = mixture(first, second)
    assert task.vocab_size == 67
    assert task.watched == ("64/8", "parity 128")
    kinds = [0, 0]
    for seed in range(200):
        ids, targets = task.training_batch(default_rng(seed), 256)
        answers = targets[targets != IGNORE]
        parity = bool((ids >= 64).all())
        assert parity or bool((ids < 64).all())
        assert bool((answers >= 64).all()) == parity
        kinds[parity] += 1
    assert min(kinds) > 70
    ids, targets = task.cells["parity 128"](default_rng(0), 3)
    assert torch.equal(targets[:, 1:] - 64, (ids[:, 1:] - 64).cumsum(1) % 2)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (dict(length=15, pairs=4), "pairs"),
        (dict(pairs=0), "pairs"),
        (dict(vocab_size=15, pairs=8), "vocab_size"),
        (dict(power=0.0), "power"),
        (dict(fillers="none"), "fillers"),
    ],
)
def test_impossible_recall(arguments, field):
    with pytest.raises(ValueError, match=field):
        recall(default_rng(0), **{**dict(sequences=2, length=64, pairs=4, vocab_size=64), **arguments})


def test_impossible_tracking():
    with pytest.raises(ValueError, match="modulus"):
        modular_sum(default_rng(0), 2, 8, 1)
    with pytest.raises(ValueError, match="elements"):
        permutations(default_rng(0), 2, 8, 7)


def test_copying_says_all_again():
    ids, targets = copying(default_rng(0), 3, 10, 4)
    assert ids.shape == targets.shape == (3, 10)
    for row, answers in zip(ids.tolist(), targets.tolist(), strict=True):
        assert row[5] == 4
        assert row[6:] == row[:4]
        assert answers == [IGNORE] * 5 + row[:5]
        assert max(row[:5]) < 4
    for wrong in ({"length": 7}, {"length": 2}, {"length": 8, "symbols": 1}):
        with pytest.raises(ValueError, match="must be"):
            copying(default_rng(0), 1, **wrong)


def test_recall_beyond_the_lengths_of_training():
    task = recall_task(64, (32, 64), (4, 8), (64, 8), test_lengths=(64, 128, 256))
    assert {draw.length for draw in task.training} == {32, 64}
    assert set(task.cells) == {f"{n}/{p}" for n in (32, 64, 128, 256) for p in (4, 8)}
    assert task.cells["256/8"](default_rng(0), 2).input_ids.shape == (2, 256)
