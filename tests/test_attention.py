"""Attention over a window: its op against the definition, the mixer against full attention, cost and precision."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from contract import make_mixer, pieces, small_config, uneven
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resonance_nn.ops.window_attention import window_attention, window_attention_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("L", "window", "chunk_size"),
    [(1, 1, None), (1, 8, None), (2, 3, 1), (7, 2, 3), (65, 8, 16), (130, 64, None), (200, 33, 33), (150, 400, None)],
)
def test_chunks_equal_the_matrix_of_all_scores(L: int, window: int, chunk_size: int | None, dtype: torch.dtype):
    """Values and gradients; one row goes on from before, one has documents that begin inside."""
    q = torch.randn(2, L, 2, 8, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, window - 1 + L, 2, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    begin = torch.full((2, L), -5)
    begin[1, L // 3 :], begin[1, L // 2 :], begin[1, -1] = L // 3, L // 2, L - 1
    results = []
    for form in (window_attention_reference, lambda *a: window_attention(*a, chunk_size=chunk_size)):
        y = form(q, k, v, begin, window)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for name, actual, expected in zip(("y", "q", "k", "v"), results[1], results[0], strict=True):
        if window == 1 and name in ("q", "k"):  # the softmax of one score is constant: what is left is rounding
            assert max(actual.abs().max(), expected.abs().max()) < TOLERANCE[dtype]
        else:
            assert relative(actual, expected) < TOLERANCE[dtype]


def test_gradcheck():
    q = torch.randn(1, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 7, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    begin = torch.tensor([[0, 0, 0, 3, 3]])
    assert torch.autograd.gradcheck(lambda *a: window_attention(*a, begin, 3, chunk_size=2), (q, k, v))


def test_keys_of_the_tokens_before_are_asked_for():
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(ValueError, match=r"must be window − 1 \+ L = 7"):
        window_attention(q, q, q, torch.zeros(1, 5, dtype=torch.long), 3)


def test_a_window_over_everything_is_full_attention():
    """With documents, in pieces."""
    L = 150
    full, sliding = make_mixer("attention"), make_mixer("sliding_attention", sliding_window=200)
    sliding.load_state_dict(full.state_dict())
    x = torch.randn(2, L, 32, dtype=torch.float64)
    reset = torch.zeros(2, L, dtype=torch.bool)
    reset[0, [0, 40]] = reset[1, 75] = True
    for r in (None, reset):
        assert relative(sliding(x, reset=r)[0], full(x, reset=r)[0]) < 1e-10
        state, outputs = None, []
        for piece, part in zip(pieces(x, uneven(L)), pieces(reset, uneven(L)), strict=True):
            y, state = sliding(piece, reset=None if r is None else part, state=state, return_state=True)
            outputs.append(y)
        assert relative(torch.cat(outputs, 1), full(x, reset=r)[0]) < 1e-10


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_a_token_sees_its_window_and_no_more(window: int):
    """Its output is that of full attention over the last W tokens alone: rotary positions only count differences."""
    full, sliding = make_mixer("attention"), make_mixer("sliding_attention", sliding_window=window)
    sliding.load_state_dict(full.state_dict())
    x = torch.randn(1, 230, 32, dtype=torch.float64)
    y, _ = sliding(x)
    for t in (0, 3, window - 1, window, 150, 229):
        last = x[:, max(t + 1 - window, 0) : t + 1]
        assert relative(y[:, t], full(last)[0][:, -1]) < 1e-10


def test_state_is_empty_beyond_the_document():
    mixer = make_mixer("sliding_attention", sliding_window=8)
    x, reset = torch.randn(1, 20, 32, dtype=torch.float64), torch.zeros(1, 20, dtype=torch.bool)
    reset[0, 17] = True
    for state in (mixer(x[:, :3], return_state=True)[1], mixer(x, reset=reset, return_state=True)[1]):
        assert state["length"].tolist() == [3]
        for name in ("key", "value"):
            assert (state[name][:, :-3] == 0).all()
            assert (state[name][:, -3:] != 0).any(-1).all()


def test_positions_around_a_million():
    """Only differences of positions count, there as at 0; and float32 angles are as exact."""
    x = torch.randn(1, 60, 32, dtype=torch.float64)
    mixer = make_mixer("sliding_attention", sliding_window=16)
    _, state = mixer(x[:, :1], return_state=True)
    far = {**{n: torch.zeros_like(t) for n, t in state.items()}, "length": torch.tensor([1_000_000])}
    y, _ = mixer(x, state=far)
    assert relative(y[:, 15:], mixer(x)[0][:, 15:]) < 1e-8  # the window holds tokens of x only
    single = make_mixer("sliding_attention", torch.float32, sliding_window=16).double()
    exact, _ = single(x.float().double(), state=far)
    y, _ = single.float()(x.float(), state=far)
    assert relative(y.double(), exact) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any op's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_cost_is_linear_in_the_length():
    """No tensor of L² elements on the way, neither forward nor backward: at most 2·L·W, or a few times L·D."""
    L, W = 4096, 64
    mixer = make_mixer("sliding_attention", torch.float32, sliding_window=W)
    x = torch.randn(1, L, 32, requires_grad=True)
    with LargestTensor() as largest:
        mixer(x)[0].sum().backward()
    assert 3 * L * 32 <= largest.elements <= 4 * L * W < L * L / 8


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_bad_windows_are_refused(window):
    with pytest.raises(ValueError, match=r"sliding_window = .*: must be an integer ≥ 1"):
        small_config(("sliding_attention",), sliding_window=window)
