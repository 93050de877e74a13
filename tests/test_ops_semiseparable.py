"""The semiseparable operator: every form against the recurrence, values and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import relative

from resonance_nn.ops import rotate, semiseparable_chunked, semiseparable_reference, semiseparable_step

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
B, H, N, P = 2, 3, 4, 5


def inputs(L: int, dtype: torch.dtype, rotating: bool = True, scale: float = 0.3):
    K = 2 * N if rotating else N
    return dict(
        v=torch.randn(B, L, H, P, dtype=dtype),
        b=torch.randn(B, L, H, K, dtype=dtype),
        c=torch.randn(B, L, H, K, dtype=dtype),
        log_decay=-scale * torch.rand(B, L, H, dtype=dtype),
        angle=2 * torch.randn(B, L, H, N, dtype=dtype) if rotating else None,
        state=torch.randn(B, H, K, P, dtype=dtype),
    )


def with_gradients(op, arguments: dict, **options):
    leaves = {k: t.clone().requires_grad_() for k, t in arguments.items() if t is not None}
    y, S = op(**{**arguments, **leaves}, **options)
    weights = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=weights, dtype=torch.float64).to(t.dtype)).sum() for t in (y, S))
    return [y, S, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotating", [True, False])
@pytest.mark.parametrize("L", [1, 2, 3, 63, 64, 65, 257])
def test_chunked_equals_reference(L: int, rotating: bool, dtype: torch.dtype, poisoned_memory: None):
    x = inputs(L, dtype, rotating)
    for fast, exact in zip(
        with_gradients(semiseparable_chunked, x), with_gradients(semiseparable_reference, x), strict=True
    ):
        assert relative(fast, exact) < TOLERANCE[dtype]


def test_chunked_equals_reference_at_1000():
    x = inputs(1000, torch.float32)
    exact = with_gradients(semiseparable_reference, {k: t.double() for k, t in x.items()})
    for result, expected in zip(with_gradients(semiseparable_chunked, x), exact, strict=True):
        assert relative(result, expected) < 1e-5


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64, 100, 1000])
def test_any_chunk_size_with_resets_and_padding(chunk_size: int):
    L = 150
    x = inputs(L, torch.float64)
    reset = torch.rand(B, L) < 0.05
    reset[0, :40] = False
    mask = torch.rand(B, L) < 0.8
    exact = with_gradients(semiseparable_reference, x, reset=reset, mask=mask)
    fast = with_gradients(semiseparable_chunked, x, reset=reset, mask=mask, chunk_size=chunk_size)
    for a, b in zip(fast, exact, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rotating", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (2, 4), (4, 1)])
def test_shared_vectors_and_scaled_writes(groups: tuple[int, int], rotating: bool, dtype: torch.dtype):
    """b and c shared by the heads of a group, log_write, read_first: as the recurrence, and as repeated vectors."""
    L, H, K = 150, 4, 2 * N
    x = dict(
        v=torch.randn(B, L, H, P, dtype=dtype),
        b=torch.randn(B, L, groups[0], K, dtype=dtype),
        c=torch.randn(B, L, groups[1], K, dtype=dtype),
        log_decay=-0.3 * torch.rand(B, L, H, dtype=dtype),
        angle=2 * torch.randn(B, L, H, N, dtype=dtype) if rotating else None,
        log_write=torch.randn(B, L, H, dtype=dtype),
        state=torch.randn(B, H, K, P, dtype=dtype),
    )
    reset = torch.rand(B, L) < 0.03
    for read_first in (True, False):
        fast = with_gradients(semiseparable_chunked, x, reset=reset, read_first=read_first)
        exact = with_gradients(semiseparable_reference, x, reset=reset, read_first=read_first)
        for a, b in zip(fast, exact, strict=True):
            assert relative(a, b) < TOLERANCE[dtype]
    repeated = {k: x[k].repeat_interleave(H // x[k].shape[2], dim=2) for k in ("b", "c")}
    y, _ = semiseparable_chunked(**{**x, **repeated}, reset=reset)
    assert relative(y, fast[0]) < TOLERANCE[dtype]
    turn = None if x["angle"] is None else x["angle"][:, 0]
    first = [x[k][:, 0] for k in ("v", "b", "c", "log_decay")]
    alone = [repeated[k][:, 0] if k in repeated else x[k][:, 0] for k in ("v", "b", "c", "log_decay")]
    for a, b in zip(
        semiseparable_step(*first, turn, x["state"]), semiseparable_step(*alone, turn, x["state"]), strict=True
    ):
        assert torch.equal(a, b)


def test_reset_equals_separate_calls():
    x = inputs(50, torch.float64)
    reset = torch.zeros(B, 50, dtype=torch.bool)
    reset[:, 20] = True
    y, S = semiseparable_chunked(**x, reset=reset, chunk_size=16)
    later = {k: t[:, 20:] for k, t in x.items() if k != "state"}
    y_later, S_later = semiseparable_chunked(**later, chunk_size=16)
    assert relative(y[:, 20:], y_later) < 1e-12
    assert relative(S, S_later) < 1e-12


def test_step_equals_reference():
    x = inputs(20, torch.float64)
    S, outputs = x["state"], []
    for t in range(20):
        y, S = semiseparable_step(*(x[k][:, t] for k in ("v", "b", "c", "log_decay", "angle")), S)
        outputs.append(y)
    y, final = semiseparable_reference(**x)
    assert relative(torch.stack(outputs, 1), y) < 1e-12
    assert relative(S, final) < 1e-12


def test_step_float32_at_16384():
    L = 16_384
    x = {k: t[:1] for k, t in inputs(L, torch.float32, scale=0.01).items()}
    S, outputs = x["state"], []
    for t in range(L):
        y, S = semiseparable_step(*(x[k][:, t] for k in ("v", "b", "c", "log_decay", "angle")), S)
        outputs.append(y)
    exact, _ = semiseparable_chunked(**{k: t.double() for k, t in x.items()})
    assert relative(torch.stack(outputs, 1), exact) < 1e-4


def test_equals_the_dense_matrix():
    """y = M v with M_ts = Re(c_t^H ∏ Λ b_s) for s ≤ t, 0 above the diagonal."""
    L = 70
    x = inputs(L, torch.float64)
    x["state"] = None
    b, c = (torch.complex(*x[k].chunk(2, -1)) for k in ("b", "c"))
    log_rate = torch.complex(x["log_decay"][..., None].expand(B, L, H, N), x["angle"]).cumsum(1)
    product = torch.exp(log_rate[:, :, None] - log_rate[:, None])  # (B, t, s, H, N)
    M = (c.conj()[:, :, None] * product * b[:, None]).sum(-1).real  # (B, t, s, H)
    M = M * torch.ones(L, L, dtype=torch.float64).tril()[None, :, :, None]
    y, _ = semiseparable_chunked(**x)
    assert relative(y, torch.einsum("btsh,bshp->bthp", M, x["v"])) < 1e-10


def test_nothing_grows_with_the_position():
    """The last 64 outputs of 1,000,000 tokens in one float32 call are as exact as if those tokens came first: sums
    restart in every chunk and the state carries the phase. The angles stay as they are, so a running sum of them over
    the call would be off by radians."""
    L, tail = 1 << 20, 64
    x = dict(
        v=torch.randn(1, L, 1, 2),
        b=torch.randn(1, L, 1, 4),
        c=torch.randn(1, L, 1, 4),
        log_decay=-0.2 * torch.rand(1, L, 1),
        angle=3 * torch.rand(1, L, 1, 2),
    )
    y, _ = semiseparable_chunked(**x, chunk_size=256)
    before = {k: t[:, -4096:-tail].double() for k, t in x.items()}  # a memory of some 100 tokens: 4,032 are enough
    last = {k: t[:, -tail:].double() for k, t in x.items()}
    exact, _ = semiseparable_reference(**last, state=semiseparable_chunked(**before)[1])
    assert relative(y[:, -tail:], exact) < 2e-6


def test_rotation_keeps_norms():
    x, angle = torch.randn(7, 2 * N, dtype=torch.float64), torch.randn(7, N, dtype=torch.float64)
    assert relative(rotate(x, angle.cos(), angle.sin()).norm(dim=-1), x.norm(dim=-1)) < 1e-14


@pytest.mark.parametrize("rotating", [True, False])
def test_gradcheck(rotating: bool):
    x = {k: t[:, :6] if k != "state" else t for k, t in inputs(6, torch.float64, rotating).items() if t is not None}
    leaves = [t[:1, ..., :1, :].clone() if k == "state" else t[:1].clone() for k, t in x.items()]
    leaves[-1] = x["state"][:1].clone()
    names = list(x)

    def op(*tensors: torch.Tensor):
        return semiseparable_chunked(**dict(zip(names, tensors, strict=True)), chunk_size=4)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("scale", [0.0, 1e-6, 100.0, 1e4])
def test_extreme_decays_are_finite(scale: float):
    x = inputs(130, torch.float32, scale=scale)
    for t in with_gradients(semiseparable_chunked, x):
        assert torch.isfinite(t).all()


def test_chunk_size_is_checked():
    with pytest.raises(ValueError, match="chunk_size = 0"):
        semiseparable_chunked(**inputs(3, torch.float32), chunk_size=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("read_first", [True, False])
def test_frequencies_scaled_reads_and_skip(read_first: bool, dtype: torch.dtype):
    """What the chunked form takes besides, as the recurrence defines it; a skip a head and one a token."""
    L = 150
    x = inputs(L, dtype) | dict(
        angle=torch.rand(B, L, H, dtype=dtype),
        frequency=torch.randn(H, N, dtype=dtype),
        log_write=torch.randn(B, L, H, dtype=dtype),
        log_read=torch.randn(B, L, H, dtype=dtype),
    )
    options = dict(read_first=read_first, mask=torch.rand(B, L) < 0.9)
    for skip in (torch.randn(H, dtype=dtype), torch.randn(B, L, H, dtype=dtype)):
        x["skip"] = skip
        fast = with_gradients(semiseparable_chunked, x, **options)
        exact = with_gradients(semiseparable_reference, x, **options)
        for a, b in zip(fast, exact, strict=True):
            assert relative(a, b) < TOLERANCE[dtype]
