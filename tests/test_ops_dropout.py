"""Dropout: the share asked for, the mean kept, each element by itself, repeatable."""

from __future__ import annotations

import math

import pytest
import torch

from resonance_nn.ops.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.97])
def test_the_share_asked_for_is_zero_and_the_rest_scaled(dtype, p):
    n = 1_000_003  # no multiple of what one draw serves
    y = dropout(torch.ones(n, dtype=dtype), p)
    assert y.dtype == dtype
    zeros = int((y == 0).sum())
    assert abs(zeros - n * p) < 5 * math.sqrt(n * p * (1 - p)) + n * 2**-17
    kept = y[y != 0]
    assert torch.equal(kept, torch.tensor(1 / (1 - p), dtype=dtype).expand_as(kept))


def test_elements_are_dropped_independently():
    """Also those that share a draw: no two of eight neighbours agree more often than chance has it."""
    drops = (dropout(torch.ones(400_000, 8), 0.3) == 0).double()
    correlation = torch.corrcoef(drops.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / math.sqrt(400_000)


def test_the_gradient_is_that_of_the_kept():
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, (y != 0).double() / (1 - 0.4))
    torch.testing.assert_close(y, x * slope, rtol=0, atol=0)


def test_seeds_and_extremes():
    torch.manual_seed(1)
    first = dropout(torch.ones(1000), 0.5)
    assert not torch.equal(dropout(torch.ones(1000), 0.5), first)
    torch.manual_seed(1)
    assert torch.equal(dropout(torch.ones(1000), 0.5), first)
    assert dropout(torch.ones(0, 4), 0.5).shape == (0, 4)
    assert dropout(torch.tensor(2.0), 0.0) == 2
    assert not dropout(torch.ones(100), 1 - 1e-9).isnan().any()
    strided = dropout(torch.ones(64, 64).T, 0.5)
    assert abs(float((strided == 0).float().mean()) - 0.5) < 0.05
