"""What the spectral theory of a tridiagonal 𝓗 says, measured. Every report states an inequality or identity that can
fail, with the numbers on both of its sides; none of it is needed to run a model.

    spectral_report               η, sup|m|, memory against both bounds, log|det(z − 𝓗)|, density of states   O(L)
    birman_schwinger              K and det(I + K) against det(𝓗 − z)/det(𝓗_0 − z)                            O(L³)
    mourre_report                 the Mourre estimate of a window of energies                                 O(1)
    limiting_absorption_report    ‖G‖ ≤ 1/η, and whether the weighted resolvent stays bounded as η → 0        O(L³)

Letters: B batch, L length, H heads. Real tensors at every border, complex numbers as pairs in a last dimension of 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from resonance_nn.ops.continued_fraction import continued_fraction, squared_couplings, two_sided_green
from resonance_nn.ops.precision import without_autocast


@dataclass(frozen=True)
class SpectralReport:
    """Of a batch of Hamiltonians, every field (B, H). As a string: a table, one line a head, means over B.

    ``memory`` is measured: 1/memory is the mean of −log|α_t| over the second half of the tokens, the rate at which the
    kernel g_ts falls with t − s (∞ where it does not); L should be a few memories long. Two bounds stand beside it, of
    a chain with the mean potential ā and coupling b̄, to leading order in η and in the disorder (near a band edge
    neither is small), both 0 outside the band |E − ā| < 2b̄, where waves do not travel:

        damping_bound  = √(4b̄² − (E − ā)²) / η
        disorder_bound = 2(4b̄² − (E − ā)²) / (Var a + 4 Var b)     (a, b uncorrelated: Thouless's localisation length)
    """

    energy: Tensor
    eta: Tensor
    sup_green: Tensor  # sup_t |m_t|
    green_bound: Tensor  # 1/η
    growing: Tensor  # share of steps with |α_t| > 1
    memory: Tensor  # tokens
    damping_bound: Tensor  # tokens
    disorder_bound: Tensor  # tokens
    log_abs_det: Tensor  # log|det(z − 𝓗)| = Σ log|L_t|
    density: Tensor  # of states: −Im tr G / π, levels per unit of energy

    @property
    def in_band(self) -> Tensor:
        """(B, H) bool: |E − ā| < 2b̄."""
        return self.damping_bound > 0

    @property
    def holds(self) -> Tensor:
        """(B, H) bool: |m_t| ≤ 1/η at every token, and a positive density of states."""
        return (self.sup_green <= self.green_bound * (1 + 1e-12)) & (self.density > 0)

    def __str__(self) -> str:
        names = [f.name for f in fields(self)]
        rows = [names, *([f"{getattr(self, n)[:, h].mean():.4g}" for n in names] for h in range(self.eta.shape[1]))]
        rows = [[first, *row] for first, row in zip(("head", *map(str, range(len(rows)))), rows, strict=False)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)


@torch.no_grad()
@without_autocast
def spectral_report(a: Tensor, log_b: Tensor, energy: Tensor, eta: Tensor) -> SpectralReport:
    """Report on the fields of an ``ops.resolvent.Hamiltonian``: ``spectral_report(*mixer.hamiltonian(x))``.

    Args:
        a, log_b: (B, L, H), L ≥ 2; the last b couples to nothing.
        energy, eta: (H).
    """
    a, log_b, energy, eta = (x.double() for x in (a, log_b, energy, eta))
    if a.shape[1] < 2:
        raise ValueError(f"a of shape {tuple(a.shape)}: a memory cannot be measured on fewer than 2 tokens")
    b = log_b.exp()
    log_L = torch.view_as_complex(continued_fraction(a, squared_couplings(b), energy, eta)).abs().log()  # (B, L, H)
    b, log_alpha = b[:, :-1], log_b[:, :-1] - log_L[:, 1:]
    rate = -log_alpha[:, log_alpha.shape[1] // 2 :].mean(1)
    band = (4 * b.mean(1).square() - (energy - a.mean(1)).square()).clamp(min=0)
    disorder = a.var(1, correction=0) + 4 * b.var(1, correction=0)
    of_batch = torch.ones_like(rate)
    return SpectralReport(
        energy=energy * of_batch,
        eta=eta * of_batch,
        sup_green=(-log_L).amax(1).exp(),
        green_bound=of_batch / eta,
        growing=(log_alpha > 0).double().mean(1),
        memory=torch.where(rate > 0, 1 / rate, torch.inf),
        damping_bound=band.sqrt() / eta,
        disorder_bound=torch.where(disorder > 0, 2 * band / disorder, torch.inf),
        log_abs_det=log_L.sum(1),
        density=-two_sided_green(a, log_b.exp(), energy, eta)[..., 1].sum(1) / torch.pi,
    )


@dataclass(frozen=True)
class BirmanSchwinger:
    """K (n, n, 2), det(I + K) (2) and what it must equal, det(𝓗 − z)/det(𝓗_0 − z) (2)."""

    operator: Tensor
    determinant: Tensor
    ratio: Tensor

    @property
    def error(self) -> float:
        """|det(I + K) − ratio| / |ratio|."""
        return float((self.determinant - self.ratio).norm() / self.ratio.norm())


@torch.no_grad()
@without_autocast
def birman_schwinger(v: Tensor, energy: float, eta: float, coupling: float = 1.0) -> BirmanSchwinger:
    """The Birman–Schwinger operator of a potential v (n) on the free chain 𝓗_0 = b(T + T*), at z = E + iη:

        K = sgn(v)|v|^{1/2} (𝓗_0 − z)⁻¹ |v|^{1/2},      det(I + K) = det(𝓗_0 + v − z) / det(𝓗_0 − z)

    K is dense, O(n³); the ratio comes from two continued fractions, so the two sides share no arithmetic.

    Raises:
        ValueError: η ≤ 0, where the resolvent need not exist.
    """
    if not eta > 0:
        raise ValueError(f"eta = {eta}: must be > 0, so that z is off the spectrum")
    v = v.double()
    free, root = torch.zeros_like(v), v.abs().sqrt()
    eye = torch.eye(len(v), dtype=torch.complex128)
    K = (v.sign() * root)[:, None] * torch.linalg.inv(_dense(free, coupling) - complex(energy, eta) * eye) * root
    # det(𝓗 − z) = (−1)^n ∏ L_t, and the signs cancel
    ratio = (_log_fraction(v, coupling, energy, eta) - _log_fraction(free, coupling, energy, eta)).sum().exp()
    return BirmanSchwinger(*(torch.view_as_real(x) for x in (K, torch.linalg.det(eye + K), ratio)))


def _log_fraction(a: Tensor, b: float, energy: float, eta: float) -> Tensor:
    """log L_t (n), complex, of one chain with potential a (n) and constant b."""
    k = squared_couplings(torch.full_like(a, b)[None, :, None])
    fraction = continued_fraction(a[None, :, None], k, a.new_tensor([energy]), a.new_tensor([eta]))
    return torch.view_as_complex(fraction)[0, :, 0].log()


def _dense(a: Tensor, b: float) -> Tensor:
    """𝓗 (n, n) complex: potential a (n), constant coupling b."""
    off = torch.full_like(a[1:], b)
    return (torch.diag(a) + torch.diag(off, 1) + torch.diag(off, -1)).to(torch.complex128)


@dataclass(frozen=True)
class MourreReport:
    """E_I(𝓗) i[𝓗, 𝓐] E_I(𝓗) ≥ constant · E_I(𝓗) on the window I, in units of b: a Mourre estimate if positive."""

    constant: float
    holds: bool


def mourre_report(low: float, high: float, potential: float = 0.0, coupling: float = 1.0) -> MourreReport:
    """The Mourre estimate of the infinite chain 𝓗 = a + b(T + T*) on the window of energies [low, high].

    With (Tf)(x) = f(x + 1), S = (T − T*)/i, X = diag(x), 𝓐 = (XS + SX)/2 and Δ = 2 − T − T*,

        i[Δ, 𝓐] = Δ(4 − Δ),      Δ = 2 − (𝓗 − a)/b,      so at energy E the constant is 4 − ((E − a)/b)²

    It is concave in E: its minimum over a window stands at an end. Where it is ≤ 0 (a window that touches a band edge
    or leaves the band) there is no estimate, and the report says so. It speaks of a constant potential only. On a
    finite chain nothing positive could be measured: an eigenvector gives ⟨i[𝓗, 𝓐]⟩ = 0 (virial theorem).

    Raises:
        ValueError: an empty window, or no coupling.
    """
    if not low <= high:
        raise ValueError(f"low = {low}, high = {high}: must be low ≤ high")
    if not coupling > 0:
        raise ValueError(f"coupling = {coupling}: must be > 0")
    constant = min(4 - ((energy - potential) / coupling) ** 2 for energy in (low, high))
    return MourreReport(constant, constant > 0)


def mourre_matrices(n: int) -> tuple[Tensor, Tensor]:
    """i[Δ, 𝓐] and Δ(4 − Δ) on n sites, (n, n) real float64: equal in rows 2 … n − 3, away from the cut-off ends."""
    T = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    eye, X = torch.eye(n, dtype=torch.float64), torch.diag(torch.arange(n, dtype=torch.float64))
    laplacian = 2 * eye - T - T.T
    difference = T - T.T  # iS
    dilation = (X @ difference + difference @ X) / 2  # i𝓐, real
    return laplacian @ dilation - dilation @ laplacian, laplacian @ (4 * eye - laplacian)


@dataclass(frozen=True)
class LimitingAbsorptionReport:
    """Norms along a falling sequence of η, each (J): of G beside 1/η, and of ⟨x⟩^{−s} G ⟨x⟩^{−s}."""

    eta: Tensor
    norm: Tensor
    bound: Tensor  # 1/η
    weighted_norm: Tensor
    growth: float  # of the weighted norm over the last halving of η, as an exponent: 0 bounded, 1 like 1/η

    @property
    def holds(self) -> bool:
        """‖G‖ ≤ 1/η throughout, and the weighted resolvent grows no faster than η^{−1/4} at the end."""
        return bool((self.norm <= self.bound * (1 + 1e-9)).all()) and self.growth < 0.25


@torch.no_grad()
@without_autocast
def limiting_absorption_report(
    potential: Tensor, energy: float, coupling: float = 1.0, *, weight: float = 1.0, halvings: int = 5, reach: int = 6
) -> LimitingAbsorptionReport:
    """Does (𝓗 − E − iη)⁻¹ have a limit as η → 0 between weighted spaces, as in the continuous spectrum?

    ``potential`` (n) stands in the middle of a free chain, long enough that a wave dies before it meets the ends:
    ``reach``·b/η sites. There ‖G‖ = 1/dist(z, spectrum) ≤ 1/η grows, but in the band ⟨x⟩^{−s} G ⟨x⟩^{−s} with
    ⟨x⟩ = √(1 + x²) from the middle stays bounded for s > ½. At an eigenvalue outside the band it grows like 1/η, at a
    band edge like η^{−1/2} or slower, and the report says no.

    Args:
        potential: (n).
        energy: E.
        coupling: b > 0.
        weight: s > ½.
        halvings: J, η = b/4 · 2^{−j} for j < J.
        reach: length of the chain in units of b/η.
    """
    if not weight > 0.5:
        raise ValueError(f"weight = {weight}: must be > 1/2; the limit exists between no other weighted spaces")
    etas = coupling / 4 * 0.5 ** torch.arange(halvings, dtype=torch.float64)
    norms, weighted = [], []
    for eta in etas.tolist():
        side = int(reach * coupling / eta)
        a = F.pad(potential.double(), (side, side))
        hamiltonian = _dense(a, coupling)
        distance = (torch.linalg.eigvalsh(hamiltonian.real) - energy).abs().min()
        norms.append(1 / math.hypot(float(distance), eta))
        green = torch.linalg.inv(complex(energy, eta) * torch.eye(len(a), dtype=torch.complex128) - hamiltonian)
        x = torch.arange(len(a), dtype=torch.float64) - (len(a) - 1) / 2
        w = (1 + x.square()).pow(-weight / 2)
        weighted.append(_largest_singular_value(w[:, None] * green * w))
    weighted_norm = torch.tensor(weighted, dtype=torch.float64)
    growth = float(torch.log2(weighted_norm[-1] / weighted_norm[-2]))
    return LimitingAbsorptionReport(etas, torch.tensor(norms, dtype=torch.float64), 1 / etas, weighted_norm, growth)


def _largest_singular_value(A: Tensor, iterations: int = 60) -> float:
    """Of A (n, n) complex, by power iteration on A^H A."""
    x = torch.ones(len(A), dtype=A.dtype) / len(A) ** 0.5
    for _ in range(iterations):
        x = A.mH @ (A @ x)
        x = x / x.norm()
    return float((A @ x).norm())
