"""The resolvent's mixers: prime bumps, initial memory, fresh states, fields."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from contract import make_mixer, small_config

from resonance_nn import ResonanceForCausalLM
from resonance_nn.ops.prime_bump import prime_bump, prime_bump_reference, prime_powers
from resonance_nn.ops.spectral_theory import spectral_report


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, n))


def test_prime_bump_is_its_definition():
    n, log_p = prime_powers(64)
    assert n.tolist() == [
        m for m in range(2, 65) if len({p for p in range(2, m + 1) if m % p == 0 and is_prime(p)}) == 1
    ]
    assert relative(log_p[[5, 6]].exp(), torch.tensor([2.0, 3.0])) < 1e-6
    position = torch.arange(1200)
    for limit, epsilon in ((1000, 0.0), (100, 0.5), (1, 0.0)):
        exact = prime_bump_reference(position, limit, epsilon)
        assert (prime_bump(position, limit, epsilon) - exact).abs().max() < 1e-14
    exact = prime_bump_reference(position, 1000)
    assert exact[1100:].max() < 1e-100
    late = n[(n > 20) & (n < 64)]
    for peak in late[(late[:, None] - n[n != 0]).abs().sort(1).values[:, 1] > 2]:  # no other within 2 tokens
        t = int(peak) - 1
        assert exact[t] > exact[t - 1]
        assert exact[t] > exact[t + 1]


def test_prime_bump_needs_the_position():
    """The state carries it, and a reset restarts it (the contract tests hold both exactly); so it matters."""
    mixer = make_mixer("resolvent", prime_bump=True, prime_bump_limit=100)
    x = torch.randn(1, 30, 32, dtype=torch.float64)
    _, state = mixer(x, return_state=True)
    assert state["position"].tolist() == [30]
    y, _ = mixer(x, state=state)
    elsewhere, _ = mixer(x, state={**state, "position": torch.tensor([7])})
    assert relative(elsewhere, y) > 1e-4
    beyond = [mixer(x, state={**state, "position": torch.tensor([n])})[0] for n in (10_000, 20_000)]
    assert torch.equal(*beyond)


def test_zeros_are_a_fresh_state():
    mixer, x = make_mixer("resolvent", prime_bump=True), torch.randn(2, 20, 32, dtype=torch.float64)
    y, state = mixer(x, return_state=True)
    assert relative(mixer(x, state={n: torch.zeros_like(t) for n, t in state.items()})[0], y) < 1e-14


def test_initial_memory():
    """η and the disorder at first are what the memory asked for allows; measured, their rates add up."""
    context, b = 1024, 0.5
    config = small_config(("resolvent",), hidden_size=256, num_heads=8, initial_context=context)
    mixer = ResonanceForCausalLM(config).double().model.backbone.blocks[0].mixer
    with torch.no_grad():
        hamiltonian = mixer.hamiltonian(torch.randn(8, 16 * context, 256, dtype=torch.float64))
    assert hamiltonian.eta.min() == pytest.approx(2 * b / context)
    assert hamiltonian.eta.max() == pytest.approx(2 * b / 4)
    assert hamiltonian.potential.std() <= b * math.sqrt(8 / context)
    report = spectral_report(*hamiltonian)
    assert report.in_band.all()
    assert report.holds.all()
    expected = 1 / report.damping_bound + 1 / report.disorder_bound
    inner = slice(1, 7)  # of 8 heads: near the band's edges the disorder is not small
    assert ((1 / report.memory) / expected)[:, inner].mean() == pytest.approx(1, abs=0.15)
    assert report.memory.mean(0).max() > 0.4 * context


def test_bidirectional_sees_both_sides_and_keeps_no_state():
    mixer, x = make_mixer("bidirectional_resolvent"), torch.randn(1, 40, 32, dtype=torch.float64)
    y, _ = mixer(x)
    changed = x.clone()
    changed[0, 20] += 1
    assert ((mixer(changed)[0] - y).abs().amax(-1)[0] > 1e-6).all()
    for arguments in ({"return_state": True}, {"state": {}}):
        with pytest.raises(ValueError, match="bidirectional_resolvent reads the whole input"):
            mixer(x, **arguments)
    with pytest.raises(ValueError, match="sees the future"):
        ResonanceForCausalLM(small_config(("bidirectional_resolvent",)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_coupling", 0.0), ("min_damping", 0.0), ("min_damping", -1), ("prime_bump_limit", 0)],
)
def test_bad_fields(field: str, value: float):
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        small_config(("resolvent",), **{field: value})


def test_fields_are_kept():
    assert small_config(max_coupling=2, initial_context=100).min_damping == 0.01
    assert small_config(min_damping=0.5).min_damping == 0.5
