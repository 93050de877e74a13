"""Holographic binding and its recurrent memory: algebra, and every form against the recurrence."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops import (
    bind,
    hrr_chunked,
    hrr_reference,
    hrr_step,
    key_spectrum,
    random_unitary,
    unbind,
    unit_spectrum,
    unitary,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
B, H = 2, 3
TOKENS = ("v", "key", "query", "log_decay", "beta")


def inputs(L: int, dtype: torch.dtype, R: int = 2, P: int = 8, scale: float = 0.3) -> dict[str, Tensor]:
    return dict(
        v=torch.randn(B, L, H, P, dtype=dtype),
        key=unit_spectrum(torch.randn(B, L, H, R, P, dtype=dtype)),
        query=unit_spectrum(torch.randn(B, L, H, R, P, dtype=dtype)),
        log_decay=-scale * torch.rand(B, L, H, dtype=dtype),
        beta=torch.rand(B, L, H, dtype=dtype),
        state=torch.randn(B, H, R, P, dtype=dtype),
    )


def with_gradients(op, arguments: dict[str, Tensor], **options) -> list[Tensor]:
    leaves = {k: t.clone().requires_grad_() for k, t in arguments.items()}
    y, S = op(**leaves, **options)
    weights = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=weights, dtype=torch.float64).to(t.dtype)).sum() for t in (y, S))
    return [y, S, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("P", [1, 2, 7, 8, 64])
def test_binding_is_circular_convolution_and_unbinding_its_adjoint(P: int):
    k, v, c = torch.randn(3, 5, P, dtype=torch.float64)
    n = torch.arange(P)
    circulant = k[:, (n[:, None] - n) % P]  # (5, n, m): k_{n−m}
    assert relative(bind(k, v), (circulant @ v[..., None]).squeeze(-1)) < 1e-13
    assert relative((bind(k, v) * c).sum(-1), (v * unbind(k, c)).sum(-1)) < 1e-13


@pytest.mark.parametrize("P", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("make", ["projected", "random"])
def test_a_unitary_key_gives_one_pair_back(P: int, make: str):
    v = torch.randn(20, P, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    k = unitary(v.flip(0)) if make == "projected" else random_unitary((20, P), generator, dtype=torch.float64)
    assert relative(torch.fft.fft(k).abs(), torch.ones_like(k)) < 1e-13
    assert relative(unbind(k, bind(k, v)), v) < 1e-13
    assert relative(bind(k, v).norm(dim=-1), v.norm(dim=-1)) < 1e-13


def test_projection_to_unitary_keeps_phases_and_survives_zeros():
    x = torch.randn(5, 9, dtype=torch.float64)
    z = torch.fft.rfft(x)
    assert relative(torch.view_as_real(torch.fft.rfft(unitary(x)) * z.abs()), torch.view_as_real(z)) < 1e-13
    assert relative(unitary(torch.zeros(3, 8)), torch.eye(8)[:1].expand(3, 8)) < 1e-6  # the unit impulse
    keys = torch.fft.rfft(unitary(torch.randn(4, 3, 9, dtype=torch.float64).index_fill(0, torch.tensor(2), 0), -2))
    assert relative(keys.abs().square().sum(1), torch.ones(4, 5)) < 1e-13


def test_random_unitary_has_both_signs_at_the_real_bins():
    z = torch.fft.rfft(random_unitary((2000, 8), torch.Generator().manual_seed(0), dtype=torch.float64))
    for share in ((z[:, 0].real > 0), (z[:, 4].real > 0), (z[:, 1].imag > 0)):
        assert 0.45 < share.double().mean() < 0.55
    assert z.mean(0).abs().max() < 0.1


@pytest.mark.parametrize("P", [1, 2, 7, 8])
def test_packed_spectra(P: int):
    x = torch.randn(4, 3, P, dtype=torch.float64)
    packed, z = key_spectrum(x), torch.fft.rfft(x)
    assert packed.shape == x.shape
    assert relative(packed, torch.cat((z.real, z.imag[..., 1 : (P + 1) // 2]), -1)) < 1e-13
    key = unit_spectrum(packed)
    bins = torch.complex(key[..., : P // 2 + 1], F.pad(key[..., P // 2 + 1 :], (1, 1 - P % 2)))  # (4, R, F)
    power = z.abs().square().sum(1)
    assert relative(bins.abs().square().sum(1), power / (power + 1e-6)) < 1e-12
    assert relative(torch.view_as_real(bins * (power + 1e-6).sqrt()[:, None]), torch.view_as_real(z)) < 1e-12


def test_soft_keys_count_weak_bins_less():
    """Σ_r |κ_r|² = p / (p + σ · mean p) at each bin of power p."""
    x = torch.randn(4, 3, 9, dtype=torch.float64)
    square = x.square().sum(1)
    power = square[:, :5] + F.pad(square[:, 5:], (1, 0))  # (4, F)
    soft, hard = unit_spectrum(x, eps=0, softness=0.5), unit_spectrum(x, eps=0)
    scale = (power / (power + 0.5 * power.mean(-1, keepdim=True))).sqrt()
    assert relative(soft, hard * torch.cat((scale, scale[:, 1:]), -1)[:, None]) < 1e-12


def test_keys_have_a_bounded_gradient_at_zero():
    x = torch.zeros(1, 2, 8, requires_grad=True)
    unit_spectrum(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.max() <= 1e3 + 1e-3  # eps^{−1/2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize(("R", "P"), [(1, 8), (2, 8), (3, 7), (2, 1)])
@pytest.mark.parametrize("L", [1, 2, 3, 63, 64, 65, 257])
def test_chunked_equals_reference(L: int, R: int, P: int, erase: bool, dtype: torch.dtype, poisoned_memory: None):
    x = inputs(L, dtype, R, P)
    exact = with_gradients(hrr_reference, x, erase=erase)
    for fast, expected in zip(with_gradients(hrr_chunked, x, erase=erase), exact, strict=True):
        assert relative(fast, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("erase", [False, True])
def test_chunked_equals_reference_at_1000(erase: bool):
    x = inputs(1000, torch.float32)
    exact = with_gradients(hrr_reference, {k: t.double() for k, t in x.items()}, erase=erase)
    for fast, expected in zip(with_gradients(hrr_chunked, x, erase=erase), exact, strict=True):
        assert relative(fast, expected) < 1e-5


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64, 1000])
def test_any_chunk_size_with_resets_and_padding(chunk_size: int, erase: bool):
    L = 100
    x = inputs(L, torch.float64)
    reset = torch.rand(B, L) < 0.05
    reset[0, :40] = False
    mask = torch.rand(B, L) < 0.8
    exact = with_gradients(hrr_reference, x, reset=reset, mask=mask, erase=erase)
    fast = with_gradients(hrr_chunked, x, reset=reset, mask=mask, erase=erase, chunk_size=chunk_size)
    for a, b in zip(fast, exact, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("erase", [False, True])
def test_a_state_carries_on_and_a_reset_forgets(erase: bool):
    x = inputs(50, torch.float64)
    y, S = hrr_chunked(**x, erase=erase, chunk_size=16)
    first = {k: t[:, :21] if k in TOKENS else t for k, t in x.items()}
    later = {k: t[:, 21:] for k, t in x.items() if k in TOKENS}
    y_first, S_first = hrr_chunked(**first, erase=erase, chunk_size=16)
    y_later, S_later = hrr_chunked(**later, state=S_first, erase=erase, chunk_size=16)
    assert relative(torch.cat((y_first, y_later), 1), y) < 1e-12
    assert relative(S_later, S) < 1e-12
    reset = torch.zeros(B, 50, dtype=torch.bool)
    reset[:, 21] = True
    y, S = hrr_chunked(**x, erase=erase, reset=reset, chunk_size=16)
    y_later, S_later = hrr_chunked(**later, erase=erase, chunk_size=16)
    assert relative(y[:, 21:], y_later) < 1e-12
    assert relative(S, S_later) < 1e-12


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("P", [7, 8])
def test_step_equals_reference(P: int, erase: bool):
    x = inputs(20, torch.float64, P=P)
    S, outputs = x["state"], []
    for t in range(20):
        y, S = hrr_step(*(x[k][:, t] for k in TOKENS), S, erase=erase)
        outputs.append(y)
    y, final = hrr_reference(**x, erase=erase)
    assert relative(torch.stack(outputs, 1), y) < 1e-12
    assert relative(S, final) < 1e-12


def test_step_float32_at_16384():
    L = 16_384
    x = {k: t[:1] for k, t in inputs(L, torch.float32, 2, 4, 0.01).items()}
    S, outputs = x["state"], []
    for t in range(L):
        y, S = hrr_step(*(x[k][:, t] for k in TOKENS), S, erase=True)
        outputs.append(y)
    exact, _ = hrr_chunked(**{k: t.double() for k, t in x.items()}, erase=True, chunk_size=128)
    assert relative(torch.stack(outputs, 1), exact) < 1e-4


def test_the_state_is_the_trace_of_bound_pairs():
    """One trace, α = β = 1: the state is Σ bind(k, v), and what is read from it is unbind(q, trace)."""
    v, k, q = torch.randn(1, 5, 1, 9, dtype=torch.float64), *random_unitary((2, 1, 5, 1, 9), dtype=torch.float64)
    one = torch.ones(1, 5, 1, dtype=torch.float64)
    y, trace = hrr_chunked(v, key_spectrum(k)[..., None, :], key_spectrum(q)[..., None, :], 0 * one, one)
    bound = bind(k, v).cumsum(1)
    assert relative(trace[:, :, 0], bound[:, -1]) < 1e-12
    assert relative(y, unbind(q, bound)) < 1e-12


def orthonormal_keys(R: int, P: int) -> Tensor:
    """R packed keys (R, R, P), orthonormal in C^R at every frequency, real at DC and Nyquist."""
    x = torch.randn(R, R, P, dtype=torch.float64)
    z = torch.fft.rfft(x)  # (R, R, F)
    q = torch.linalg.qr(z.permute(2, 0, 1))[0]  # a unitary matrix for each frequency
    return key_spectrum(torch.fft.irfft(q.permute(2, 1, 0), n=P))


@pytest.mark.parametrize("P", [7, 8])
@pytest.mark.parametrize("R", [2, 3, 4])
def test_erasing_is_exact_for_as_many_orthonormal_keys_as_traces(R: int, P: int):
    """R keys written twice: the second values stand, the first are gone. A Hebbian memory returns their sum."""
    keys = orthonormal_keys(R, P)
    v = torch.randn(1, 2 * R, 1, P, dtype=torch.float64)
    key = torch.cat((keys, keys))[None, :, None]  # (1, 2R, 1, R, P)
    one = torch.ones(1, 2 * R, 1, dtype=torch.float64)
    _, state = hrr_chunked(v, key, key, 0 * one, one, erase=True)
    recall, _ = hrr_chunked(0 * v, key, key, 0 * one, 0 * one, erase=True, state=state)
    assert relative(recall[:, :R], v[:, R:]) < 1e-12
    _, state = hrr_chunked(v, key, key, 0 * one, one)
    recall, _ = hrr_chunked(0 * v, key, key, 0 * one, 0 * one, state=state)
    assert relative(recall[:, :R], v[:, :R] + v[:, R:]) < 1e-12


def test_erasing_with_one_trace_keeps_only_the_last_pair():
    x = inputs(6, torch.float64, R=1)
    signal = random_unitary((B, 6, H, 1, 8), dtype=torch.float64)
    key = key_spectrum(signal)
    _, state = hrr_chunked(x["v"], key, key, 0 * x["beta"], torch.ones_like(x["beta"]), erase=True)
    assert relative(unbind(signal[:, -1, :, 0], state[:, :, 0]), x["v"][:, -1]) < 1e-12


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize(("R", "P"), [(1, 4), (2, 3)])
def test_gradcheck(R: int, P: int, erase: bool):
    x = inputs(5, torch.float64, R, P)
    leaves = [t[:1, :, :1] if k in TOKENS else t[:1, :1] for k, t in x.items()]

    def op(*tensors: Tensor):
        return hrr_chunked(**dict(zip(x, tensors, strict=True)), erase=erase, chunk_size=2)

    assert torch.autograd.gradcheck(op, [t.clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("scale", [0.0, 100.0, 1e4])
def test_extreme_decays_are_finite(scale: float, erase: bool):
    x = inputs(130, torch.float32, scale=scale)
    for t in with_gradients(hrr_chunked, x, erase=erase):
        assert torch.isfinite(t).all()


def test_reflecting_writes_do_not_grow():
    """β = 2 turns the erased part round: the traces' norm is kept, at any length."""
    x = inputs(5000, torch.float32)
    x["beta"] = torch.full_like(x["beta"], 2.0)
    x["key"] = unit_spectrum(x["key"].double(), eps=0).float()
    _, state = hrr_chunked(
        0 * x["v"], x["key"], x["query"], 0 * x["log_decay"], x["beta"], erase=True, state=x["state"]
    )
    assert relative(state.norm(dim=(-2, -1)), x["state"].norm(dim=(-2, -1))) < 1e-3


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values(dtype: torch.dtype, erase: bool):
    x = inputs(130, torch.float32, P=32)
    exact, _ = hrr_chunked(**x, erase=erase)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = hrr_chunked(**{**x, "v": x["v"].to(dtype)}, erase=erase)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert relative(y.float(), exact) < 3e-2


@pytest.mark.parametrize("erase", [False, True])
def test_shapes_without_data(erase: bool):
    x = {k: t.to("meta") for k, t in inputs(9, torch.float32).items()}
    y, state = hrr_chunked(**x, erase=erase, chunk_size=4)
    assert (y.shape, state.shape) == (x["v"].shape, x["state"].shape)


def test_chunk_size_is_checked():
    with pytest.raises(ValueError, match="chunk_size = 0"):
        hrr_chunked(**inputs(3, torch.float32), chunk_size=0)
