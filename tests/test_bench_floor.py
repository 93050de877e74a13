"""A step's own matmuls: all of them, those of the backward pass too, and run again as they were."""

from __future__ import annotations

import torch

from resonance_nn.bench.floor import Matmul, Operand, record, replay
from resonance_nn.bench.models import ModelOptions, build_ours, count, training_step


def shapes(matmuls: list[Matmul]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(m.left.shape, m.right.shape) for m in matmuls]


def test_forward_and_backward_are_recorded():
    x = torch.randn(3, 4, requires_grad=True)
    layer = torch.nn.Linear(4, 5)
    matmuls = record(lambda: layer(x).sum().backward())
    assert shapes(matmuls)[0] == ((3, 4), (4, 5))  # without the bias
    assert sorted(shapes(matmuls)[1:]) == sorted([((3, 5), (5, 4)), ((5, 3), (3, 4))])
    assert [m.operations for m in matmuls] == [120] * 3


def test_layout_and_dtype_are_kept():
    x, y = torch.randn(2, 4, 3).mT.bfloat16(), torch.randn(2, 4, 5).bfloat16()
    bias = torch.randn(2, 3, 5).bfloat16()
    (matmul,) = record(lambda: torch.baddbmm(bias, x, y))
    assert matmul == Matmul(
        Operand((2, 3, 4), (12, 1, 3), torch.bfloat16), Operand((2, 4, 5), (20, 5, 1), torch.bfloat16)
    )
    assert matmul.operations == 2 * 2 * 3 * 4 * 5


def test_a_replay_runs_what_was_recorded():
    options = ModelOptions(hidden_size=64, layers=2, vocab_size=300)
    ours = build_ours(options).train()
    ids = torch.randint(300, (2, 96))
    matmuls = record(training_step(ours, ids, options))
    assert record(replay(matmuls)) == matmuls
    assert {m.left.dtype for m in matmuls} >= {torch.bfloat16}
    every_weight_three_times = 6 * count(ours) * ids.numel()
    assert 0.95 * every_weight_three_times < sum(m.operations for m in matmuls) < 4 * every_weight_three_times
    forward = record(training_step(ours, ids, options, forward_only=True))
    assert 2.5 < sum(m.operations for m in matmuls) / sum(m.operations for m in forward) < 4


def test_an_expanded_operand_takes_no_more_memory():
    operand = Operand((1000, 3, 4), (0, 4, 1), torch.float32)
    made = operand.make("cpu")
    assert (made.shape, made.stride(), made.untyped_storage().nbytes()) == ((1000, 3, 4), (0, 4, 1), 48)
