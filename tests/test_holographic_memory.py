"""HolographicMemory: what each way to write recalls exactly, and the theory of what it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from torch import Tensor
from torch.nn import functional as F

from resonance_nn import capacity
from resonance_nn.memory import SOLVES, HolographicMemory, cleanup

KINDS = [dict(binding="outer", key_size=24), dict(binding="hrr"), dict(binding="hrr", num_traces=3)]


def orthonormal(N: int) -> Tensor:
    return torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))[0]


def solves(memory: HolographicMemory) -> list[str]:
    return [s for s in SOLVES if not (s == "delta" and memory.state_shape[0] == 1)]


@pytest.mark.parametrize("N", [1, 7, 64, 256])
def test_delta_is_exact_for_orthonormal_keys_in_one_pass(N: int):
    memory, keys, values = HolographicMemory(16, key_size=N), orthonormal(N).float(), torch.randn(N, 16)
    assert relative(memory.read(keys, memory.write(keys, values)), values) < 1e-5
    again = torch.randn(N, 16)
    state = memory.write(keys, again, memory.write(keys, values))
    assert relative(memory.read(keys, state), again) < 1e-5  # the first values are gone


@pytest.mark.parametrize("P", [8, 9])
@pytest.mark.parametrize("R", [2, 4])
def test_erasing_traces_are_exact_for_keys_orthonormal_at_every_frequency(R: int, P: int):
    memory = HolographicMemory(P, binding="hrr", num_traces=R)
    unitary = torch.linalg.qr(torch.fft.rfft(torch.randn(R, R, P)).permute(2, 0, 1))[0]
    keys = torch.fft.irfft(unitary.permute(1, 2, 0), n=P).flatten(-2)
    values = torch.randn(R, P)
    assert relative(memory.read(keys, memory.write(keys, values)), values) < 1e-5


@pytest.mark.parametrize("N", [1, 7, 64, 256])
def test_lstsq_is_exact_for_independent_keys(N: int):
    memory, keys, values = HolographicMemory(16, key_size=N), torch.randn(N, N), torch.randn(N, 16)
    state = memory.write(keys, values, solve="lstsq")
    assert state.dtype == torch.float64
    assert relative(memory.read(keys, state), values) < 1e-6
    assert relative(state, torch.linalg.pinv(F.normalize(keys.double(), dim=-1)) @ values.double()) < 1e-6


@pytest.mark.parametrize("P", [8, 9])
def test_lstsq_is_exact_for_as_many_keys_as_traces(P: int):
    memory = HolographicMemory(P, binding="hrr", num_traces=3)
    keys, values = torch.randn(3, 3 * P), torch.randn(3, P)
    assert relative(memory.read(keys, memory.write(keys, values, solve="lstsq")), values) < 1e-6


def test_hrr_gives_one_pair_back_whatever_the_key():
    memory, key, value = HolographicMemory(33, binding="hrr"), torch.randn(5, 1, 33), torch.randn(5, 1, 33)
    assert relative(memory.read(key, memory.write(key, value)), value) < 1e-5


def test_lstsq_on_what_is_there_changes_least():
    """The new pairs are recalled; what is orthogonal to their keys stays."""
    memory, M = HolographicMemory(12, key_size=24), 10
    old, new = torch.randn(2, M, 24, dtype=torch.float64)
    state = memory.write(old, torch.randn(M, 12), solve="lstsq")
    values = torch.randn(M, 12, dtype=torch.float64)
    after = memory.write(new, values, state, solve="lstsq")
    assert relative(memory.read(new, after), values) < 1e-10
    beside = torch.linalg.qr(new.mT, mode="complete")[0][:, M:]
    assert relative(beside.mT @ after, beside.mT @ state) < 1e-10


def test_passes_of_the_delta_rule_approach_lstsq():
    memory, keys, values = HolographicMemory(8, key_size=32), torch.randn(16, 32).double(), torch.randn(16, 8).double()
    limit = memory.write(keys, values, solve="lstsq")
    distance = [(memory.write(keys, values, passes=p) - limit).norm().item() for p in (1, 4, 16, 64, 1024)]
    assert distance == sorted(distance, reverse=True)
    assert distance[-1] < 1e-6 * distance[0]


@pytest.mark.parametrize("binding", KINDS)
def test_batches_are_separate_and_broadcast(binding: dict):
    memory = HolographicMemory(12, **binding)
    keys, values = memory.random_keys(2, 3, 5), torch.randn(2, 3, 5, 12)
    for solve in solves(memory):
        state = memory.write(keys, values, solve=solve)
        assert state.shape == (2, 3, *memory.state_shape)
        assert relative(state[1, 2], memory.write(keys[1, 2], values[1, 2], solve=solve)) < 1e-5
        shared = memory.write(keys[0, 0], values, solve=solve)  # the same keys for all
        assert relative(shared[1, 2], memory.write(keys[0, 0], values[1, 2], solve=solve)) < 1e-5
        recalled = memory.read(keys, state)
        assert relative(recalled[1, 2], memory.read(keys[1, 2], state[1, 2])) < 1e-5


@pytest.mark.parametrize("binding", KINDS)
def test_the_state_is_explicit(binding: dict):
    memory = HolographicMemory(12, **binding)
    assert not list(memory.parameters())
    assert not list(memory.buffers())
    keys, values = memory.random_keys(4, 6), torch.randn(4, 6, 12)
    for solve in solves(memory):
        first = memory.write(keys[:, :3], values[:, :3], solve=solve)
        kept = first.clone()
        second = memory.write(keys[:, 3:], values[:, 3:], first, solve=solve)
        assert torch.equal(first, kept)
        assert relative(memory.write(keys[:, 3:], values[:, 3:], kept, solve=solve), second) == 0
        if solve != "lstsq":
            assert relative(memory.write(keys, values, solve=solve), second) < 1e-5
        nothing = memory.write(keys[:, :0], values[:, :0], first, solve=solve)
        assert torch.equal(nothing, first)


def test_hebbian_states_add():
    memory, keys, values = HolographicMemory(12), torch.randn(6, 12), torch.randn(6, 12)
    parts = [memory.write(keys[i::2], values[i::2], solve="hebbian") for i in (0, 1)]
    assert relative(parts[0] + parts[1], memory.write(keys, values, solve="hebbian")) < 1e-6


@pytest.mark.parametrize("binding", KINDS)
def test_clear(binding: dict):
    memory = HolographicMemory(12, **binding)
    empty = memory.clear((2, 3))
    assert empty.shape == (2, 3, *memory.state_shape)
    assert not empty.any()
    state = memory.write(memory.random_keys(2, 3, 4), torch.randn(2, 3, 4, 12))
    assert torch.equal(memory.clear(state), empty)
    some = memory.clear(state, torch.tensor([[True, False, False], [False, True, False]]))
    assert not some[0, 0].any()
    assert not some[1, 1].any()
    assert torch.equal(some[0, 1:], state[0, 1:])
    assert memory.clear(dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("binding", KINDS)
def test_keys_of_any_length_and_zero_keys(binding: dict):
    memory = HolographicMemory(12, **binding)
    keys, values = memory.random_keys(3), torch.randn(3, 12)
    for solve in solves(memory):
        state = memory.write(keys, values, solve=solve)
        assert relative(memory.write(7 * keys, values, solve=solve), state) < 1e-5
        assert relative(memory.read(1e-3 * keys, state), memory.read(keys, state)) < 1e-5
        assert torch.isfinite(memory.write(0 * keys, values, solve=solve)).all()


@pytest.mark.parametrize("binding", KINDS)
def test_gradients(binding: dict):
    memory = HolographicMemory(4, **{**binding, **({"key_size": 5} if "key_size" in binding else {})})
    keys, values = memory.random_keys(2).double(), torch.randn(2, 4).double()
    for solve in solves(memory):

        def recall(k: Tensor, v: Tensor, q: Tensor, solve=solve) -> Tensor:
            return memory(q, memory.write(k, v, solve=solve))

        leaves = [t.requires_grad_() for t in (keys, values, memory.random_keys(3).double())]
        if not (solve == "lstsq" and memory.state_shape[0] == 1):  # two keys, one trace: the rank is 1 either way
            assert torch.autograd.gradcheck(recall, leaves, fast_mode=True)


def test_precision_under_autocast_and_of_half_inputs():
    memory, keys, values = HolographicMemory(16, key_size=64), orthonormal(64).float(), torch.randn(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = memory.write(keys, values)
        assert relative(memory.read(keys, state), values) < 1e-5
    state = memory.write(keys.bfloat16(), values.bfloat16())
    assert state.dtype == torch.float32
    assert memory.read(keys.bfloat16(), state).dtype == torch.bfloat16


def test_cleanup_finds_the_nearest_whatever_the_scale():
    codebook = torch.randn(50, 8)
    index = torch.randint(50, (3, 4))
    noisy = 1e-3 * (codebook[index] + 0.05 * torch.randn(3, 4, 8))
    values, found = cleanup(codebook, noisy)
    assert torch.equal(found, index)
    assert torch.equal(values, codebook[index])


def test_binding_a_record_and_taking_it_apart():
    """Roles bound to fillers and superposed: the classical use, with the clean-up after the crosstalk."""
    codebook, memory = torch.randn(1024, 512), HolographicMemory(512, binding="hrr")
    roles = memory.random_keys(5)
    fillers = torch.tensor([3, 1, 4, 1, 5])
    record = memory.write(roles, codebook[fillers])
    assert record.shape == (1, 512)
    assert torch.equal(cleanup(codebook, memory.read(roles, record))[1], fillers)


@pytest.mark.parametrize("dimension", [256, 512, 1024])
def test_hrr_accuracy_is_within_5_points_of_theory(dimension: int):
    """Over 1 to 256 pairs, nearest of 1,024 values."""
    memory = HolographicMemory(dimension, binding="hrr")
    for row in memory.capacity_report(trials=2048, generator=torch.Generator().manual_seed(1)):
        K = row["pairs"]
        assert row["accuracy_theory"] == capacity.hrr_accuracy(dimension, K, 1024)
        assert abs(row["accuracy"] - row["accuracy_theory"]) < 0.05
        assert row["error"] == pytest.approx(K - 1, rel=0.05, abs=1e-10)
        if K > 1:
            assert row["snr_theory"] == pytest.approx(capacity.hrr_snr(dimension, K))
            assert row["snr"] == pytest.approx(row["snr_theory"], rel=0.1)


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("load", [0.25, 1, 4])
def test_squared_error_of_random_keys_follows_theory(load: float, solve: str):
    memory = HolographicMemory(16, key_size=96)
    generator = torch.Generator().manual_seed(2)
    (row,) = memory.capacity_report((int(96 * load),), codebook_size=64, trials=4000, solve=solve, generator=generator)
    assert row["error"] == pytest.approx(row["error_theory"], rel=0.06, abs=1e-8)


def test_more_traces_divide_the_crosstalk():
    memory = HolographicMemory(128, binding="hrr", num_traces=4)
    generator = torch.Generator().manual_seed(2)
    (row,) = memory.capacity_report((33,), codebook_size=64, trials=2000, solve="hebbian", generator=generator)
    assert row["error_theory"] == 8
    assert row["error"] == pytest.approx(8, rel=0.05)


def test_delta_error_is_the_mean_of_its_differential_equation():
    """de/du = 4 − e^{−s} − 2e − 2e^{−u}, s = x − U + u, for a pair that U·N writes have gone over, by Euler's method
    and averaged over the pairs, against the closed form; and that form as it is usually written."""
    x, steps = 1.7, 4000
    du = x / steps
    end = torch.arange(steps, dtype=torch.float64) * du + du / 2  # U of each pair
    error = torch.zeros_like(end)
    for i in range(steps):
        u = i * du
        slope = 4 - torch.exp(-(x - end + u)) - 2 * error - 2 * math.exp(-u)
        error = torch.where(u < end, error + du * slope, error)
    assert capacity.delta_error(1700, 1000) == pytest.approx(error.mean().item(), abs=1e-3)
    closed = 2 - math.exp(-x) - (math.expm1(x) / x) * (2 * math.exp(-x) - math.exp(-2 * x))
    assert capacity.delta_error(1700, 1000) == pytest.approx(closed, abs=1e-12)


def test_theory_at_its_ends():
    assert capacity.hrr_accuracy(512, 1, 1024) == pytest.approx(1, abs=1e-9)
    assert capacity.hrr_accuracy(512, 10**9, 64) == pytest.approx(1 / 64, rel=0.01)  # noise only: chance
    assert capacity.hrr_accuracy(64, 500, 1) == pytest.approx(1, abs=1e-9)
    assert capacity.hrr_snr(400, 5) == 10
    assert capacity.hrr_snr(400, 1) == math.inf
    assert capacity.delta_error(1, 10**9) == pytest.approx(0.5e-9)
    assert capacity.delta_error(10**6, 10) == pytest.approx(2, rel=1e-4)
    assert capacity.lstsq_error(10, 10) == 0
    assert capacity.lstsq_error(40, 10) == 0.75
    assert capacity.stored_bits(1.0, 7, 1024) == 70
    assert capacity.stored_bits(1 / 64, 7, 64) == pytest.approx(0, abs=1e-9)
    assert capacity.stored_bits(1.0, 7, 1) == 0


def test_optical_capacity():
    assert capacity.optical_capacity(1e-4, 532e-9, 100) == pytest.approx(2.3525e9, rel=1e-4)
    assert capacity.optical_capacity(2e-4, 532e-9, 100) == 2 * capacity.optical_capacity(1e-4, 532e-9, 100)
    assert capacity.optical_capacity(1e-4, 532e-9, 0) == 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: HolographicMemory(8, binding="sum"), "binding = 'sum'"),
        (lambda: HolographicMemory(0), "dimension = 0"),
        (lambda: HolographicMemory(8, num_traces=2), "num_traces = 2"),
        (lambda: HolographicMemory(8, binding="hrr", key_size=4), "key_size = 4"),
        (lambda: HolographicMemory(8, binding="hrr").write(*torch.zeros(2, 1, 8), solve="delta"), "num_traces ≥ 2"),
        (lambda: HolographicMemory(8).write(*torch.zeros(2, 1, 8), solve="newton"), "solve = 'newton'"),
        (lambda: HolographicMemory(8).write(*torch.zeros(2, 1, 8), solve="lstsq", passes=2), "passes = 2"),
        (lambda: HolographicMemory(8).write(torch.zeros(1, 7), torch.zeros(1, 8)), r"keys has shape \(1, 7\)"),
        (lambda: HolographicMemory(8).write(torch.zeros(1, 8), torch.zeros(8)), r"values has shape \(8,\)"),
        (lambda: HolographicMemory(8).read(torch.zeros(1, 7), torch.zeros(8, 8)), r"queries has shape \(1, 7\)"),
        (lambda: capacity.optical_capacity(0, 532e-9, 1), "area = 0"),
        (lambda: capacity.optical_capacity(1, -1, 1), "wavelength = -1"),
        (lambda: capacity.optical_capacity(1, 1, -1), "snr = -1"),
        (lambda: capacity.hrr_accuracy(8, 0, 4), "pairs = 0"),
        (lambda: capacity.recall_accuracy(8, -1, 4), "noise = -1"),
        (lambda: capacity.stored_bits(1.5, 1, 4), "accuracy = 1.5"),
    ],
)
def test_wrong_arguments(call, match: str):
    with pytest.raises(ValueError, match=match):
        call()
