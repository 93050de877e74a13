"""The reports of ops.spectral_theory against dense algebra, where they hold and where they must say no."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from contract import make_mixer

from resonance_nn.ops.resolvent import Hamiltonian, two_sided_reference
from resonance_nn.ops.spectral_theory import (
    birman_schwinger,
    limiting_absorption_report,
    mourre_matrices,
    mourre_report,
    spectral_report,
)


def constant_chain(
    L: int, energies: list[float], eta: float, disorder: float = 0.0, spread: float = 0.0
) -> Hamiltonian:
    """b = 1 and a = 0 up to disorder."""
    H = len(energies)
    a, b = disorder * torch.randn(1, L, H).double(), 1 + spread * torch.randn(1, L, H).double()
    return Hamiltonian(a, b.log(), torch.tensor(energies).double(), torch.full((H,), eta).double())


def test_report_against_dense_algebra():
    L = 200
    hamiltonian = constant_chain(L, [-1.5, 0.2, 2.5], 0.05, disorder=0.7, spread=0.1)
    report = spectral_report(*hamiltonian)
    a, log_b, energy, eta = hamiltonian
    for h in range(3):
        off = log_b[0, :-1, h].exp()
        dense = torch.diag(a[0, :, h]) + torch.diag(off, 1) + torch.diag(off, -1)
        resolvent = torch.complex(energy[h] - torch.linalg.eigvalsh(dense), eta[h])
        assert abs(report.log_abs_det[0, h] - resolvent.abs().log().sum()) < 1e-10 * L
        shifted = torch.complex(energy[h], eta[h]) * torch.eye(L) - dense
        assert abs(report.log_abs_det[0, h] - torch.linalg.slogdet(shifted).logabsdet) < 1e-10 * L
        assert abs(report.density[0, h] + (1 / resolvent).imag.sum() / math.pi) < 1e-10 * L
    identity = torch.eye(L, dtype=torch.float64)[None, :, None].expand(1, L, 3, L)
    prefix = [
        two_sided_reference(identity[:, :t, :, :t], Hamiltonian(a[:, :t], log_b[:, :t], energy, eta)) for t in (1, 7)
    ]
    for t, green in zip((1, 7), prefix, strict=True):
        m = torch.complex(green[0, -1, :, t - 1], green[0, -1, :, 2 * t - 1])
        assert (m.abs() <= report.sup_green[0] + 1e-12).all()
    assert report.holds.all()


def test_memory_is_the_damping_bound_of_a_clean_chain():
    report = spectral_report(*constant_chain(20_000, [0.0, 1.0, -1.9, 2.1], 1e-3))
    assert report.in_band[0].tolist() == [True, True, True, False]
    assert report.disorder_bound[0, :3].isinf().all()
    ratio = report.memory[0, :3] / report.damping_bound[0, :3]
    assert ((ratio - 1).abs() < 0.02).all()
    assert report.damping_bound[0, 3] == 0
    assert report.memory[0, 3] < 10  # evanescent


@pytest.mark.parametrize(("disorder", "spread"), [(0.2, 0.0), (0.0, 0.1), (0.14, 0.07)])
def test_memory_is_the_localisation_length_of_a_disordered_chain(disorder: float, spread: float):
    """And fluctuations of the couplings count four times, at any energy in the band."""
    report = spectral_report(*constant_chain(200_000, [0.3, 1.1, -1.5], 1e-7, disorder, spread))
    assert ((report.memory / report.disorder_bound - 1).abs() < 0.15).all()
    assert (report.memory < report.damping_bound / 100).all()


def test_report_prints_as_a_table_of_a_mixer():
    mixer = make_mixer("resolvent")
    report = spectral_report(*mixer.hamiltonian(torch.randn(3, 50, 32, dtype=torch.float64)))
    lines = str(report).splitlines()
    assert len(lines) == 1 + 2
    assert "memory" in lines[0]
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        spectral_report(*mixer.hamiltonian(torch.randn(1, 1, 32, dtype=torch.float64)))


@pytest.mark.parametrize("n", [1, 2, 33, 200])
def test_birman_schwinger(n: int):
    v = torch.randn(n, dtype=torch.float64)
    v[n // 2] = 0
    result = birman_schwinger(v, 0.3, 0.1, coupling=0.7)
    assert result.error < 1e-12
    wrong = birman_schwinger(v + 0.1, 0.3, 0.1, coupling=0.7)
    assert relative(wrong.determinant, result.ratio) > 1e-3
    with pytest.raises(ValueError, match="eta = 0"):
        birman_schwinger(v, 0.3, 0.0)


def test_mourre():
    commutator, closed = mourre_matrices(30)
    assert torch.equal(commutator[2:-2], closed[2:-2])
    assert not torch.equal(commutator[0], closed[0])
    report = mourre_report(-0.5, 1.0, potential=0.5, coupling=0.75)
    assert report.holds
    assert report.constant == pytest.approx(4 - (1 / 0.75) ** 2)
    assert not mourre_report(1.0, 2.0).holds  # reaches the band edge
    assert mourre_report(1.0, 2.0).constant == 0
    assert not mourre_report(1.0, 3.0).holds
    with pytest.raises(ValueError, match="low = 1"):
        mourre_report(1, 0)


def test_limiting_absorption_says_yes_in_the_band_and_no_elsewhere():
    bump = torch.tensor([0.3, 1.5, -0.4])
    inside = limiting_absorption_report(bump, 0.5, halvings=4)
    assert inside.holds
    assert (inside.norm[-1] > 0.9 * inside.bound[-1]).all()  # G itself grows like 1/η
    assert not limiting_absorption_report(torch.zeros(1), 2.0, halvings=4).holds  # the band edge
    bound_state = limiting_absorption_report(torch.tensor([1.5]), math.sqrt(4 + 1.5**2), halvings=4)
    assert not bound_state.holds
    assert bound_state.growth == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="weight = "):
        limiting_absorption_report(bump, 0.5, weight=0.5)
