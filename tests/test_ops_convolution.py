"""FFT convolution, constant resonators and the linear cross-entropy against their references."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from torch.nn import functional as F

from resonance_nn.ops import (
    Resonators,
    blocks,
    causal_conv_reference,
    fft_conv,
    impulse_response,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    resonator_chunked,
    resonator_fft,
    resonator_reference,
    resonator_step,
)
from resonance_nn.ops.fft_conv import fft_length

LENGTHS = [1, 2, 3, 63, 64, 65, 257]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


# --- fft_conv


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("K", [1, 4, 100])
def test_conv_equals_reference(L: int, K: int, dtype: torch.dtype):
    u = torch.randn(2, 3, L, dtype=dtype, requires_grad=True)
    h = torch.randn(3, K, dtype=dtype, requires_grad=True)
    tail = torch.randn(2, 3, K - 1, dtype=dtype)
    for block in (None, 50):
        results = []
        for op in (lambda *a: fft_conv(*a, block_size=block), causal_conv_reference):  # noqa: B023
            y, new_tail = op(u, h, tail)
            gradients = torch.autograd.grad((y.square().sum() + new_tail.square().sum()), (u, h))
            results.append([y, new_tail, *gradients])
        for fast, exact in zip(*results, strict=True):
            if exact.numel():
                assert relative(fast, exact) < TOLERANCE[dtype]


def test_conv_streams_in_uneven_pieces():
    u, h = torch.randn(2, 3, 500, dtype=torch.float64), torch.randn(3, 120, dtype=torch.float64)
    tail, outputs = None, []
    for piece in u.split([1, 2, 200, 3, 294], dim=-1):
        y, tail = fft_conv(piece, h, tail)
        outputs.append(y)
    assert relative(torch.cat(outputs, -1), fft_conv(u, h)[0]) < 1e-12


def test_overlap_add_is_exact_above_the_direct_limit():
    u, h = torch.randn(1, 1, 40_000, dtype=torch.float64), torch.randn(1, 3000, dtype=torch.float64)
    assert relative(fft_conv(u, h)[0], fft_conv(u, h, block_size=40_000)[0]) < 1e-10


def test_conv_is_not_circular():
    u = torch.zeros(1, 16)
    u[0, -1] = 1
    assert fft_conv(u, torch.ones(1, 16))[0][0, :-1].abs().max() < 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 1000, 1025, 1537])
def test_fft_length(n: int):
    assert n <= fft_length(n) < 2 * n or n <= 2
    assert fft_length(n) % 2 == 0 or fft_length(n) in (1, 3)


def test_fft_length_takes_three_halves():
    assert (fft_length(1025), fft_length(1536), fft_length(1537)) == (1536, 1536, 2048)


# --- resonators

B, Fn, N, R = 2, 3, 4, 5


def modes(dtype: torch.dtype, slowest: float = 0.01) -> Resonators:
    return Resonators(
        slowest + torch.rand(Fn, N, dtype=dtype),
        3 * torch.rand(Fn, N, dtype=dtype),
        torch.randn(Fn, N, dtype=dtype),
        torch.randn(Fn, N, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("L", LENGTHS)
def test_resonator_forms_agree(L: int, dtype: torch.dtype, poisoned_memory: None):
    m, v = modes(dtype), torch.randn(B, L, Fn, R, dtype=dtype)
    state = torch.randn(B, Fn, 2 * N, R, dtype=dtype)
    results = []
    for op in (resonator_fft, lambda *a, **k: resonator_fft(*a, **k, block_size=30), resonator_chunked):
        results.append(resonator_results(op, v, m, state))
    exact = resonator_results(resonator_reference, v, m, state)
    for result in results:
        for fast, expected in zip(result, exact, strict=True):
            assert relative(fast, expected) < TOLERANCE[dtype]


def resonator_results(op, v, m, state, **options):
    leaves = [t.clone().requires_grad_() for t in (v, state, *m)]
    y, S = op(leaves[0], Resonators(*leaves[2:]), state=leaves[1], **options)
    return [y, S, *torch.autograd.grad(y.square().sum() + S.square().sum(), leaves)]


@pytest.mark.parametrize("chunk_size", [1, 8, 64, 300])
def test_resonator_resets(chunk_size: int):
    m, v, state = modes(torch.float64), torch.randn(B, 100, Fn, R).double(), torch.randn(B, Fn, 2 * N, R).double()
    reset = torch.rand(B, 100) < 0.05
    exact = resonator_results(resonator_reference, v, m, state, reset=reset)
    fast = resonator_results(resonator_chunked, v, m, state, reset=reset, chunk_size=chunk_size)
    for a, b in zip(fast, exact, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("op", [resonator_fft, resonator_chunked])
def test_resonator_right_padding(op):
    m, v, state = modes(torch.float64), torch.randn(B, 100, Fn, R).double(), torch.randn(B, Fn, 2 * N, R).double()
    length = torch.tensor([37, 0])
    options = {"block_size": 30} if op is resonator_fft else {"chunk_size": 30}
    y, S = op(v, m, state=state, length=length, **options)
    y_alone, S_alone = resonator_reference(v[:1, :37], m, state=state[:1])
    assert relative(y[:1, :37], y_alone) < 1e-12
    assert relative(S[:1], S_alone) < 1e-12
    assert torch.equal(S[1], state[1])


def test_resonator_step():
    m, v = modes(torch.float64), torch.randn(B, 30, Fn, R).double()
    S, outputs = torch.zeros(B, Fn, 2 * N, R).double(), []
    for t in range(30):
        y, S = resonator_step(v[:, t], m, S)
        outputs.append(y)
    y, final = resonator_reference(v, m)
    assert relative(torch.stack(outputs, 1), y) < 1e-12
    assert relative(S, final) < 1e-12


def test_impulse_response_is_its_definition():
    m = modes(torch.float64)
    tau = torch.arange(1000, dtype=torch.float64)
    h = (m.gain[..., None] * torch.exp(-m.damping[..., None] * tau)) * torch.cos(
        m.frequency[..., None] * tau + m.phase[..., None]
    )
    assert relative(impulse_response(*m, 1000), h.sum(1)) < 1e-12


def test_resonator_float32_at_16384_and_around_a_million():
    m = modes(torch.float32, slowest=1e-5)
    m = m._replace(damping=1e-5 + 1e-3 * torch.rand(Fn, N))
    double = m.widen(torch.float64)
    v = torch.randn(1, 20_000, Fn, 1)
    y, S = resonator_fft(v[:, :16_384], m)
    y_exact, S_exact = resonator_fft(v[:, :16_384].double(), double)
    assert relative(y, y_exact) < 1e-4
    assert relative(S, S_exact) < 1e-4
    S = S_exact = None
    for _ in range(50):  # 1,000,000 tokens
        y, S = resonator_fft(v, m, state=S)
        y_exact, S_exact = resonator_fft(v.double(), double, state=S_exact)
    assert relative(y, y_exact) < 1e-4
    assert relative(S, S_exact) < 1e-4
    h, exact = impulse_response(*m, 1 << 20)[:, -1000:], impulse_response(*double, 1 << 20)[:, -1000:]
    assert float((h - exact).abs().max()) < 1e-4 * float(exact.abs().max())


@pytest.mark.parametrize("raw", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_resonator_gradients_are_finite_at_extreme_damping(raw: float):
    for op in (resonator_fft, resonator_chunked):
        damping = torch.full((Fn, N), raw, requires_grad=True)
        y, S = op(torch.randn(1, 100, Fn, R), modes(torch.float32)._replace(damping=F.softplus(damping)))
        (y.square().mean() + S.square().mean()).backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(damping.grad).all()


def test_resonator_gradcheck():
    leaves = [t.requires_grad_() for t in (torch.randn(1, 7, Fn, 2).double(), *modes(torch.float64))]
    assert torch.autograd.gradcheck(lambda v, *m: resonator_fft(v, Resonators(*m)), leaves)
    assert torch.autograd.gradcheck(lambda v, *m: resonator_chunked(v, Resonators(*m), chunk_size=3), leaves)


# --- linear cross-entropy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [1, 7, 50, None])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_cross_entropy(smoothing: float, z: float, chunk: int | None, dtype: torch.dtype, poisoned_memory: None):
    x, w = torch.randn(50, 16, dtype=dtype, requires_grad=True), torch.randn(33, 16, dtype=dtype, requires_grad=True)
    y = torch.randint(0, 33, (50,))
    y[::3] = -100
    options = {"label_smoothing": smoothing, "z_loss_weight": z}
    objective, plain = linear_cross_entropy(x, w, y, **options, chunk_size=chunk)
    expected, expected_plain = linear_cross_entropy_reference(x, w, y, **options)
    gradients = torch.autograd.grad(3 * objective, (x, w))
    expected_gradients = torch.autograd.grad(3 * expected, (x, w))
    for a, b in zip((objective, plain, *gradients), (expected, expected_plain, *expected_gradients), strict=True):
        assert relative(a, b) < TOLERANCE[dtype]


def test_cross_entropy_equals_torch():
    x, w = torch.randn(20, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    y = torch.randint(0, 11, (20,))
    ours = linear_cross_entropy(x, w, y)[0] / 20
    torchs = F.cross_entropy(x @ w.T, y)
    assert relative(ours, torchs) < 1e-6
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(torchs, (x, w)), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("block", [1, 80])
def test_cross_entropy_in_blocks_and_of_targets_that_underflow(block: int, monkeypatch: pytest.MonkeyPatch):
    """Logits 200 below the largest have a probability of 0 in float32 and an exact loss, in one row as in all."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)
    x, w = torch.randn(20, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
    y = torch.randint(0, 33, (20,))
    with torch.no_grad():
        for row in (3, 11):
            y[row] = (x[row] @ w.T).argmin()
            x[row] *= 200 / (x[row] @ w.T).min().abs()
    options = {"label_smoothing": 0.1, "z_loss_weight": 1e-3, "chunk_size": 7}
    ours = linear_cross_entropy(x, w, y, **options)
    exact = linear_cross_entropy_reference(x, w, y, label_smoothing=0.1, z_loss_weight=1e-3)
    for a, b in zip(ours, exact, strict=True):
        assert relative(a, b) < 1e-6
    of_ours, of_exact = (torch.autograd.grad(objective[0], (x, w)) for objective in (ours, exact))
    for a, b in zip(of_ours, of_exact, strict=True):
        assert relative(a, b) < 1e-5


def test_cross_entropy_gradcheck_and_frozen_parts():
    x, w = torch.randn(9, 4).double().requires_grad_(), torch.randn(6, 4).double().requires_grad_()
    y = torch.tensor([0, 5, -100, 2, 3, 1, 0, -100, 4])

    def op(x: torch.Tensor, w: torch.Tensor):
        return linear_cross_entropy(x, w, y, label_smoothing=0.1, z_loss_weight=0.01, chunk_size=4)[0]

    assert torch.autograd.gradcheck(op, (x, w))
    assert torch.autograd.gradcheck(lambda x: op(x, w.detach()), (x,))
    assert torch.autograd.gradcheck(lambda w: op(x.detach(), w), (w,))


def test_cross_entropy_never_holds_all_logits():
    """No tensor of M·V elements is allocated, in either pass."""
    M, V, D = 4096, 4096, 8
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    x, w = torch.randn(M, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with Watch():
        linear_cross_entropy(x, w, torch.randint(0, V, (M,)))[0].backward()
    assert largest <= M * V // 4


def test_cross_entropy_refuses_second_derivatives():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = linear_cross_entropy(x, w, torch.tensor([0, 1, 2]))[0].square()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_cross_entropy_arguments():
    x, w, y = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"label_smoothing = 1\.0"):
        linear_cross_entropy(x, w, y, label_smoothing=1.0)
    with pytest.raises(ValueError, match="z_loss_weight = -1"):
        linear_cross_entropy(x, w, y, z_loss_weight=-1.0)
