"""Contracts 3 to 7 for every mixer in MIXERS. A new mixer is tested by being in that dict."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import relative
from contract import VARIANTS, cases, make_mixer, pieces, uneven
from torch import Tensor

from resonance_nn.mixers import MIXERS

CAUSAL = [name for name, mixer in MIXERS.items() if mixer.causal]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def gradients(y: Tensor, inputs: list[Tensor], mixer: torch.nn.Module) -> list[Tensor]:
    """The inputs' gradients one by one; the parameters' as one vector, whose largest entry is the scale: a parameter's
    gradient is a sum over tokens that may nearly cancel, and float32 rounding cannot be measured by what is left.
    In float64 each parameter counts by itself; one whose gradient is less than rounding of the largest has none, as the
    decays of a memory that nothing was written to."""
    of_inputs = torch.autograd.grad(y.square().sum(), [*inputs, *mixer.parameters()])
    least = torch.finfo(torch.float64).eps * max(g.abs().max() for g in of_inputs)
    of_inputs = [g if g.abs().max() > least else torch.zeros_like(g) for g in of_inputs]
    of_parameters = of_inputs[len(inputs) :]
    if y.dtype != torch.float64:
        of_parameters = [torch.cat([g.flatten() for g in of_parameters])]
    return [*of_inputs[: len(inputs)], *of_parameters]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "overrides", "L"), cases([1, 2, 3, 63, 64, 65, 257, 1000], brief=[3, 65, 257]))
def test_any_split_equals_one_call(name: str, overrides: dict, L: int, dtype: torch.dtype, poisoned_memory: None):
    mixer = make_mixer(name, dtype, **overrides)
    x = torch.randn(2, L, 32, dtype=dtype, requires_grad=True)
    whole, final = mixer(x, return_state=True)
    expected = [whole, *gradients(whole, [x], mixer)]
    state, outputs = None, []
    for piece in pieces(x, uneven(L)):
        y, state = mixer(piece, state=state, return_state=True)
        outputs.append(y)
    split = torch.cat(outputs, 1)
    for a, b in zip([split, *gradients(split, [x], mixer)], expected, strict=True):
        assert relative(a, b) < TOLERANCE[dtype]
    for key in final:
        assert relative(state[key].double(), final[key].double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_step_by_step_equals_one_call(name: str, overrides: dict, dtype: torch.dtype):
    mixer = make_mixer(name, dtype, **overrides)
    x = torch.randn(2, 130, 32, dtype=dtype)
    state, outputs = None, []
    with torch.no_grad():
        for piece in x.split(1, 1):
            y, state = mixer(piece, state=state, return_state=True)
            outputs.append(y)
        assert relative(torch.cat(outputs, 1), mixer(x)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_float32_is_near_float64(name: str, overrides: dict):
    x = torch.randn(1, 1000, 32)
    y, _ = make_mixer(name, torch.float32, **overrides)(x)
    exact = make_mixer(name, torch.float32, **overrides).double()(x.double())[0]
    assert relative(y, exact) < 1e-5


@pytest.mark.parametrize("where", ["left", "right", "middle", "all"])
@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_padded_row_equals_row_alone(name: str, overrides: dict, where: str):
    """Outputs, gradients, the state, and what follows from it."""
    mixer = make_mixer(name, **overrides)
    L, real = 90, 61
    x = torch.randn(3, L, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, L, dtype=torch.bool)
    hidden = {"left": slice(0, L - real), "right": slice(real, L), "middle": slice(5, 5 + L - real), "all": slice(0, L)}
    mask[1, hidden[where]] = False
    y, state = mixer(x, mask=mask, return_state=True)
    assert torch.isfinite(y).all()
    assert (y[~mask] == 0).all()
    rest = torch.randn(3, 7, 32, dtype=torch.float64)
    y_rest, _ = mixer(rest, state=state)
    expected = torch.zeros_like(x)
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        alone, alone_rest, row_state = x[row : row + 1, mask[row]], rest[row : row + 1], None
        if alone.shape[1]:
            y_row, row_state = mixer(alone, return_state=True)
            assert relative(y[row : row + 1, mask[row]], y_row) < 1e-10
            total = total + y_row.square().sum()
        assert relative(y_rest[row : row + 1], mixer(alone_rest, state=row_state)[0]) < 1e-10
    expected = torch.autograd.grad(total, [x, *mixer.parameters()])
    for a, b in zip(torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()]), expected, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_padding_inside_a_continued_sequence(name: str, overrides: dict):
    """A second, left-padded call goes on from each row's own last token."""
    mixer = make_mixer(name, **overrides)
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, 10:20] = mask[1, 25:35] = mask[1, :3] = False
    state, outputs = None, []
    for piece, m in zip(x.split(20, 1), mask.split(20, 1), strict=True):
        y, state = mixer(piece, mask=m, state=state, return_state=True)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    for row in range(2):
        assert relative(y[row, mask[row]], mixer(x[row : row + 1, mask[row]])[0][0]) < 1e-10


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_packed_documents_equal_separate_ones(name: str, overrides: dict):
    """Outputs, gradients and the state; boundaries at 0, next to each other, and at the last token too."""
    mixer = make_mixer(name, **overrides)
    L = 140
    x = torch.randn(2, L, 32, dtype=torch.float64, requires_grad=True)
    starts = [[0, 30, 31, 100], [64, L - 1]]
    reset = torch.zeros(2, L, dtype=torch.bool)
    for row, begin in enumerate(starts):
        reset[row, begin] = True
    y, state = mixer(x, reset=reset, return_state=True)
    rest = torch.randn(2, 70, 32, dtype=torch.float64)
    y_rest, _ = mixer(rest, state=state)
    total = torch.zeros((), dtype=torch.float64)
    for row, begin in enumerate(starts):
        edges = sorted({0, *begin, L})
        for a, b in itertools.pairwise(edges):
            y_doc, last = mixer(x[row : row + 1, a:b], return_state=True)
            assert relative(y[row : row + 1, a:b], y_doc) < 1e-10
            total = total + y_doc.square().sum()
        assert relative(y_rest[row : row + 1], mixer(rest[row : row + 1], state=last)[0]) < 1e-10
    expected = torch.autograd.grad(total, [x, *mixer.parameters()])
    for a, b in zip(torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()]), expected, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_resets_and_padding_in_pieces(name: str, overrides: dict):
    """A reset inside a later, padded piece, and a reset on padding, which does not count."""
    mixer = make_mixer(name, **overrides)
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, 40:46] = False
    reset = torch.zeros(2, 60, dtype=torch.bool)
    reset[0, [25, 42]] = reset[1, [20, 50]] = True
    state, outputs = None, []
    for size, begin in ((20, 0), (20, 20), (20, 40)):
        part = slice(begin, begin + size)
        y, state = mixer(x[:, part], mask=mask[:, part], reset=reset[:, part], state=state, return_state=True)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert relative(y[0, 25:][mask[0, 25:]], mixer(x[:1, 25:][:, mask[0, 25:]])[0][0]) < 1e-10
    assert relative(y[1, 50:], mixer(x[1:, 50:])[0][0]) < 1e-10
    assert relative(y[1, 20:50], mixer(x[1:, 20:50])[0][0]) < 1e-10


@pytest.mark.parametrize("name", CAUSAL)
def test_batch_order_does_not_matter(name: str):
    mixer, x = make_mixer(name), torch.randn(4, 70, 32, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert relative(mixer(x[order])[0], mixer(x)[0][order]) < 1e-12


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_bf16_autocast_is_finite_and_near_float32(name: str, overrides: dict, scale: float):
    mixer = make_mixer(name, torch.float32, **overrides)
    x = scale * torch.randn(2, 200, 32)
    exact, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x, return_state=True)
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())
    assert all(torch.isfinite(t).all() for t in state.values())
    assert torch.isfinite(y).all()
    if scale <= 1:  # in a model a norm stands before every mixer; test_causal_lm.py has the model at 100×
        assert float((y.float() - exact).detach().abs().max()) <= 0.03 * float(exact.detach().abs().max())


@pytest.mark.parametrize(("name", "overrides", "value"), cases([-1e4, -30.0, 30.0, 1e4], brief=[-1e4, 30.0]))
def test_any_finite_parameters_give_finite_outputs(name: str, overrides: dict, value: float):
    mixer = make_mixer(name, torch.float32, **overrides)
    for name_of_one, p in mixer.named_parameters():  # one parameter at a time
        kept = p.detach().clone()
        with torch.no_grad():
            p.fill_(value)
        for autocast in (False, True):
            mixer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y, _ = mixer(torch.randn(1, 150, 32))
            y.float().mean().backward()
            assert torch.isfinite(y).all(), name_of_one
            assert all(torch.isfinite(q.grad).all() for q in mixer.parameters()), name_of_one
        with torch.no_grad():
            p.copy_(kept)


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_no_complex_tensors_and_every_parameter_trained(name: str, overrides: dict):
    mixer = make_mixer(name, **overrides)
    y, state = mixer(torch.randn(2, 70, 32, dtype=torch.float64), return_state=True)
    y.square().sum().backward()
    for tensor in [*mixer.parameters(), *mixer.buffers(), *state.values()]:
        assert not tensor.is_complex()
    for parameter_name, p in mixer.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_state_size(name: str, overrides: dict):
    """Constant where the class says so, and as state_bytes() says."""
    mixer = make_mixer(name, torch.float32, **overrides)
    sizes = []
    for L in (1, 50, 300):
        _, state = mixer(torch.randn(1, L, 32), return_state=True)
        sizes.append(sum(t.numel() * t.element_size() for t in state.values()))
        assert mixer.state_bytes(L) == sizes[-1]
        assert sum(t.untyped_storage().nbytes() for t in state.values()) == sizes[-1], "keeps other tensors alive"
        assert set(state) == set(mixer.state_names)
        assert all(t.shape[0] == 1 for t in state.values())
    assert (len(set(sizes)) == 1) == mixer.constant_state


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("channels", [8, 9, 13])
def test_small_and_odd_heads(name: str, channels: int):
    mixer = make_mixer(name, hidden_size=2 * channels, num_modes=None)
    x = torch.randn(1, 20, 2 * channels, dtype=torch.float64)
    _, state = mixer(x[:, :7], return_state=True)
    assert relative(mixer(x[:, 7:], state=state)[0], mixer(x)[0][:, 7:]) < 1e-10


@pytest.mark.parametrize("name", CAUSAL)
def test_gradients_through_the_state(name: str):
    mixer = make_mixer(name)
    x = torch.randn(1, 8, 32, dtype=torch.float64, requires_grad=True)
    _, state = mixer(x[:, :4], return_state=True)
    mixer(x[:, 4:], state=state)[0].sum().backward()
    assert x.grad[:, :4].abs().max() > 0
