"""What stands between the matmuls: each fast form against its formula, values and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops import (
    add_rms_norm,
    blocks,
    rms_norm,
    rms_norm_reference,
    semiseparable_chunked,
    short_conv,
    short_conv_reference,
    sigmoid_gate,
    silu_gate,
    squared_relu,
    swiglu,
    unit,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def with_gradients(op, *tensors: Tensor | None, **options) -> list[Tensor]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    y = op(*leaves, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), [t for t in leaves if t is not None])]


def check(fast: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for a, b in zip(fast, exact, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(7,), (3, 1, 8), (2, 5, 3, 64)])
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_rms_norm(shape: tuple[int, ...], shift: float, dtype: torch.dtype):
    """A mean far from 0 too: the derivative is a layer norm's less the part of the mean."""
    x, weight = torch.randn(shape, dtype=dtype) + shift, torch.randn(shape[-1], dtype=dtype)
    tolerance = TOLERANCE[dtype] * (1 if shift == 0 else 10)  # dx is a difference of numbers 30 times its size
    check(
        with_gradients(rms_norm, x, weight, eps=1e-6),
        with_gradients(rms_norm_reference, x, weight, eps=1e-6),
        tolerance,
    )


def test_rms_norm_of_slices_zeros_and_into_another_dtype():
    x = torch.randn(4, 6, 10)[..., 2:7].transpose(0, 1)
    weight = torch.randn(5)
    check(
        with_gradients(rms_norm, x, weight, eps=1e-6, dtype=torch.bfloat16),
        with_gradients(rms_norm_reference, x, weight, eps=1e-6, dtype=torch.bfloat16),
        1e-2,
    )
    zeros = with_gradients(rms_norm, torch.zeros(2, 5), weight, eps=1e-6)
    check(zeros, with_gradients(rms_norm_reference, torch.zeros(2, 5), weight, eps=1e-6), 1e-5)
    half = torch.randn(3, 64).bfloat16()
    check(
        with_gradients(rms_norm, half, torch.ones(64), eps=1e-6),
        with_gradients(rms_norm_reference, half, torch.ones(64), eps=1e-6),
        1e-2,
    )


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize(("dtype", "branch"), [*((d, d) for d in TOLERANCE), (torch.float32, torch.bfloat16)])
def test_add_rms_norm(dtype: torch.dtype, branch: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch):
    """The stream and its norm, both used and each alone, whole and in blocks of rows (the last one smaller)."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)
    x, y, weight = torch.randn(2, 7, 8, dtype=dtype), torch.randn(2, 7, 8, dtype=branch), torch.randn(8, dtype=dtype)

    def reference(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x if y is None else x + y.to(x.dtype)
        return x, rms_norm_reference(x, weight, eps)

    for used in ((0, 1), (0,), (1,)):
        for second in (y, None):
            if used == (0,) and second is None:
                continue

            def of(op, x: Tensor, y: Tensor | None, weight: Tensor, used: tuple[int, ...] = used) -> Tensor:
                outputs = op(x, y, weight, eps=1e-6)
                return torch.cat([outputs[i] for i in used], dim=-1) + 0 * weight.sum()

            fast, exact = (
                with_gradients(lambda *t, op=op: of(op, *t), x, second, weight) for op in (add_rms_norm, reference)
            )
            check(fast, exact, TOLERANCE[dtype])
    with torch.no_grad():
        for a, b in zip(add_rms_norm(x, y, weight, 1e-6), reference(x, y, weight, 1e-6), strict=True):
            assert relative(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 512), (16, 1, 512), (2, 1, 8, 64), (5,)])
@torch.no_grad()
def test_norms_in_decoding(shape: tuple[int, ...], dtype: torch.dtype):
    """Of few rows as of many (16·512 elements), at any size of x, also where eps and where x decides."""
    tolerance = {**TOLERANCE, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for scale, shift in ((1.0, 0.0), (1e-3, 0.0), (100.0, 0.0), (1.0, 30.0), (0.0, 0.0)):
        x = (scale * torch.randn(shape) + shift).to(dtype)
        weight = (1 + torch.randn(shape[-1]) / 4).to(dtype)
        normed = rms_norm(x, weight, 1e-6)
        assert (normed.dtype, normed.shape) == (dtype, x.shape)
        assert relative(normed, rms_norm_reference(x, weight, 1e-6)) < tolerance
        exact = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-12).sqrt()
        assert relative(unit(x), exact.to(dtype)) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unit(dtype: torch.dtype):
    x = torch.randn(3, 4, 6, dtype=dtype)
    check(with_gradients(unit, x), with_gradients(lambda x: F.normalize(x, dim=-1), x), TOLERANCE[dtype])
    assert unit(torch.zeros(2, 6)).abs().max() == 0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gates(dtype: torch.dtype):
    x, gate = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 9, dtype=dtype)[..., 4:]
    check(with_gradients(silu_gate, x, gate), with_gradients(lambda x, g: x * F.silu(g), x, gate), TOLERANCE[dtype])
    expected = with_gradients(lambda x, g: 2 * x * g.sigmoid(), x, gate)
    check(with_gradients(sigmoid_gate, x, gate), expected, TOLERANCE[dtype])
    both = torch.randn(2, 3, 10, dtype=dtype)
    expected = with_gradients(lambda x: F.silu(x[..., :5]) * x[..., 5:], both)
    check(with_gradients(swiglu, both), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("L", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("documents", [False, True])
def test_short_conv(documents: bool, L: int, bias: bool, dtype: torch.dtype):
    x, weight = torch.randn(2, L, 6, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    reset = torch.rand(2, L) < 0.3 if documents else None
    tensors = (x, weight, torch.randn(6, dtype=dtype) if bias else None)
    check(
        with_gradients(short_conv, *tensors, reset=reset),
        with_gradients(short_conv_reference, *tensors, reset=reset),
        TOLERANCE[dtype],
    )


def test_derivatives_by_differences():
    x, w = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    reset = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 0, 1]]).bool()

    def op(x: Tensor, w: Tensor, conv: Tensor) -> Tensor:
        x = short_conv(rms_norm(x, w, 1e-3), conv, w, reset)
        return silu_gate(unit(x, 0.1), swiglu(torch.cat((x, x.sin()), dim=-1)))

    leaves = [t.requires_grad_() for t in (x, w, torch.randn(4, 3, dtype=torch.float64))]
    assert torch.autograd.gradcheck(op, leaves)


def test_backward_inside_autocast_is_as_outside():
    """Values and derivatives in the dtype of the inputs, whatever autocast says of matmuls and convolutions."""
    x, w, conv = torch.randn(2, 70, 8), torch.randn(8), torch.randn(4, 8)
    decay = -torch.rand(2, 70, 2)

    def op(x: Tensor, w: Tensor, conv: Tensor) -> Tensor:
        v = short_conv(rms_norm(x, w, 1e-6), conv).unflatten(-1, (2, 4))
        return semiseparable_chunked(v, unit(v), v, decay)[0]

    expected = with_gradients(op, x, w, conv)
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(op, x, w, conv)
    for a, b in zip(inside, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16])
def test_squared_relu(dtype: torch.dtype):
    x = torch.randn(3, 5, 64, dtype=dtype)
    x[0, 0, :2] = torch.tensor([0.0, -0.0])
    exact = with_gradients(lambda x: F.relu(x).square(), x)
    check(with_gradients(squared_relu, x), exact, TOLERANCE.get(dtype, 2e-2))
    assert all(t.isfinite().all() for t in with_gradients(squared_relu, x * 1e-25))  # squares that underflow


def test_squared_relu_keeps_its_result_only():
    saved = []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = squared_relu(x)
    assert [t.data_ptr() for t in saved] == [y.data_ptr()]
