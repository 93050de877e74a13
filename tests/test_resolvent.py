"""The resolvent: the continued fraction, the causal and the two-sided operator, their theorems."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from torch import Tensor

from resonance_nn.ops import semiseparable_chunked, semiseparable_reference
from resonance_nn.ops.continued_fraction import (
    continued_fraction,
    continued_fraction_reference,
    mobius_scan,
    squared_couplings,
    two_sided_green,
)
from resonance_nn.ops.resolvent import (
    Hamiltonian,
    ResolventState,
    resolvent_chunked,
    resolvent_reference,
    resolvent_step,
    two_sided_reference,
    two_sided_solve,
)
from resonance_nn.ops.spectral_theory import spectral_report

B, H, N, P = 2, 3, 4, 5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def chain(L: int, eta: float = 0.05, dtype: torch.dtype = torch.float64, batch: int = B, disorder: float = 0.5):
    """Energies inside the band, a normal potential, uniform couplings."""
    a = disorder * torch.randn(batch, L, H, dtype=dtype)
    log_b = torch.rand(batch, L, H, dtype=dtype).clamp(min=1e-3).log()
    return Hamiltonian(a, log_b, torch.linspace(-1, 1, H, dtype=dtype), torch.full((H,), eta, dtype=dtype))


def inputs(L: int, dtype: torch.dtype = torch.float64, eta: float = 0.05) -> dict:
    v, k, q = (torch.randn(B, L, H, n, dtype=dtype) for n in (P, N, N))
    L_before = torch.complex(torch.randn(B, H).double(), eta + torch.rand(B, H).double())
    memory = torch.randn(B, H, N, 2 * P, dtype=dtype)
    state = ResolventState(memory, torch.view_as_real(1 / L_before), torch.rand(B, H).double())
    return dict(v=v, k=k, q=q, hamiltonian=chain(L, eta, dtype), state=state)


def with_gradients(op, x: dict, **options) -> list[Tensor]:
    """y, the state and the gradients of a fixed weighting of both by every tensor of x."""
    tensors = {n: x[n] for n in ("v", "k", "q")}
    leaves = [t.clone().requires_grad_() for t in (*tensors.values(), *x["hamiltonian"], *(x.get("state") or ()))]
    state = ResolventState(*leaves[7:]) if len(leaves) > 7 else None
    y, after = op(*leaves[:3], Hamiltonian(*leaves[3:7]), state=state, **options)
    weights = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=weights).to(t.dtype)).sum() for t in (y, *after))
    return [y, *after, *torch.autograd.grad(loss, leaves)]


def widen(x: dict) -> dict:
    def wide(value):
        return value.double() if isinstance(value, Tensor) else type(value)(*(t.double() for t in value))

    return {name: wide(value) for name, value in x.items()}


# --- the continued fraction


@pytest.mark.parametrize("eta", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("L", [1, 2, 3, 64, 65, 257, 1000])
def test_scan_equals_recurrence(L: int, eta: float, poisoned_memory: None):
    """Value and gradient, from a state, with documents that begin within."""
    x = inputs(L, eta=eta)
    a, log_b, energy, etas = x["hamiltonian"]
    reset = torch.rand(B, L) < 0.03
    results = []
    for op in (continued_fraction, continued_fraction_reference):
        leaves = [t.clone().requires_grad_() for t in (a, log_b, energy, etas, x["state"].green, x["state"].coupling)]
        a_, log_b_, energy_, eta_, green, before = leaves
        fraction = op(a_, squared_couplings(log_b_.exp(), before, reset), energy_, eta_, green)
        loss = (fraction * torch.linspace(-1, 1, fraction.numel()).view(fraction.shape)).sum()
        results.append([fraction, *torch.autograd.grad(loss, leaves)])
    for fast, exact in zip(*results, strict=True):
        assert relative(fast, exact) < 1e-10


def test_gradcheck_of_the_scan():
    x = inputs(7)
    a, log_b, energy, eta = x["hamiltonian"]
    k = squared_couplings(log_b.exp(), x["state"].coupling)
    leaves = [t.clone().requires_grad_() for t in (a, k, energy, eta, x["state"].green)]
    assert torch.autograd.gradcheck(continued_fraction, leaves)


@pytest.mark.parametrize("eta", [1.0, 1e-2, 1e-6])
def test_herglotz(eta: float):
    """Im L_t ≥ η at every token, so |m_t| ≤ 1/η; in float32 too, after the sweep."""
    hamiltonian = chain(4096, eta, disorder=1.0)
    k = squared_couplings(hamiltonian.log_coupling.exp())
    fraction = continued_fraction(hamiltonian.potential, k, *hamiltonian[2:])
    assert (fraction[..., 1] >= eta).all()
    assert (fraction.norm(dim=-1) >= eta).all()
    w = torch.complex(hamiltonian.energy - hamiltonian.potential, hamiltonian.eta.expand_as(hamiltonian.potential))
    narrow = mobius_scan(w.to(torch.complex64), k.float(), torch.zeros(B, H, dtype=torch.complex64))
    assert (narrow.imag >= torch.tensor(eta)).all()


def test_coordinates_of_the_scan_are_the_mobius_matrices():
    """Products of [[w, −k], [1, 0]] applied to the first L give the same fraction."""
    hamiltonian = chain(40)
    k = squared_couplings(hamiltonian.log_coupling.exp())[0, :, 0]
    w = torch.complex(hamiltonian.energy[0] - hamiltonian.potential[0, :, 0], hamiltonian.eta[0].expand(40))
    product = torch.eye(2, dtype=torch.complex128)
    fraction = continued_fraction(
        hamiltonian.potential, squared_couplings(hamiltonian.log_coupling.exp()), *hamiltonian[2:]
    )
    for t in range(40):
        step = torch.stack((torch.stack((w[t], -k[t] + 0j)), torch.tensor([1, 0], dtype=torch.complex128)))
        product = step @ product
        product = product / product.abs().max()
        exact = product[0, 0] / product[1, 0]  # of (1, 0)ᵀ: L = ∞ before the first token
        assert (torch.view_as_complex(fraction[0, t, 0]) - exact).abs() < 1e-12 * exact.abs()


# --- the causal operator


@pytest.mark.parametrize("eta", [1.0, 1e-2])
def test_kernel_is_bounded_and_single_steps_are_not(eta: float):
    """|g_ts| ≤ 1/η for all s ≤ t, although |α_t| > 1 at many steps where η is small."""
    L = 512
    hamiltonian = chain(L, eta)
    one = torch.ones(B, L, H, 1, dtype=torch.float64)
    identity = torch.eye(L, dtype=torch.float64)[None, :, None].expand(B, L, H, L)  # v_s = e_s: y_t lists g_ts
    y, _ = resolvent_chunked(identity, one, one, hamiltonian)
    kernel = torch.complex(*y.chunk(2, dim=-1)).abs()
    assert (kernel <= (1 + 1e-12) / eta).all()
    growing = spectral_report(*hamiltonian).growing
    assert (growing > 0.2).all() if eta < 0.1 else (growing < 0.2).all()


def test_equals_dense_algebra():
    """y_t = [(z − 𝓗_{≤t})⁻¹ x_{≤t}]_t."""
    for L in (1, 2, 63, 512):
        hamiltonian, x = chain(L), torch.randn(B, L, H, P, dtype=torch.float64)
        one = torch.ones(B, L, H, 1, dtype=torch.float64)
        y, _ = resolvent_chunked(x, one, one, hamiltonian)
        for t in {0, 1, L // 2, L - 1}:
            if t < L:
                prefix = Hamiltonian(hamiltonian[0][:, : t + 1], hamiltonian[1][:, : t + 1], *hamiltonian[2:])
                assert relative(y[:, t], two_sided_reference(x[:, : t + 1], prefix)[:, t]) < 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("L", [1, 2, 3, 63, 64, 65, 257])
def test_chunked_equals_reference(L: int, dtype: torch.dtype, poisoned_memory: None):
    x = inputs(L, dtype)
    exact = with_gradients(resolvent_reference, widen(x))
    for a, b in zip(with_gradients(resolvent_chunked, x), exact, strict=True):
        assert relative(a.double(), b) < TOLERANCE[dtype]


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_any_chunk_size_with_documents(chunk_size: int):
    x, reset = inputs(150), torch.rand(B, 150) < 0.05
    reset[0, :40] = False
    exact = with_gradients(resolvent_reference, x, reset=reset)
    for a, b in zip(with_gradients(resolvent_chunked, x, reset=reset, chunk_size=chunk_size), exact, strict=True):
        assert relative(a, b) < 1e-10


def test_state_after_the_last_real_token():
    x, length = inputs(90), torch.tensor([61, 0])
    _, after = resolvent_chunked(**x, length=length)
    short = {n: x[n][:1, :61] for n in ("v", "k", "q")}
    a, log_b, *z = x["hamiltonian"]
    first = ResolventState(*(t[:1] for t in x["state"]))
    _, alone = resolvent_chunked(**short, hamiltonian=Hamiltonian(a[:1, :61], log_b[:1, :61], *z), state=first)
    for name, t in after._asdict().items():
        assert relative(t[:1], getattr(alone, name)) < 1e-12
        if name != "memory":
            assert torch.equal(t[1], getattr(x["state"], name)[1])
    assert relative(after.memory[1], x["state"].memory[1]) < 1e-14


def test_step_equals_reference():
    x = inputs(40)
    a, log_b, energy, eta = x["hamiltonian"]
    state, outputs = x["state"], []
    for t in range(40):
        one = Hamiltonian(a[:, t], log_b[:, t], energy, eta)
        y, state = resolvent_step(*(x[n][:, t] for n in ("v", "k", "q")), one, state)
        outputs.append(y)
    y, final = resolvent_reference(**x)
    assert relative(torch.stack(outputs, 1), y) < 1e-12
    for a, b in zip(state, final, strict=True):
        assert relative(a, b) < 1e-12


def test_gradcheck():
    x = inputs(5)
    tensors = [x[n][:1, :, :2, :2] for n in ("v", "k", "q")]
    tensors += [t[:1, :, :2] for t in x["hamiltonian"][:2]] + [t[:2] for t in x["hamiltonian"][2:]]
    tensors += [x["state"].memory[:1, :2, :2, :4], x["state"].green[:1, :2], x["state"].coupling[:1, :2]]

    def op(*t: Tensor):
        y, after = resolvent_chunked(*t[:3], Hamiltonian(*t[3:7]), state=ResolventState(*t[7:]), chunk_size=3)
        return y, *after

    assert torch.autograd.gradcheck(op, [t.clone().requires_grad_() for t in tensors])


@pytest.mark.parametrize(("eta", "tolerance"), [(1.0, 1e-5), (0.01, 1e-3)])
def test_float32_at_16384(eta: float, tolerance: float):
    x = {n: t[:1] if isinstance(t, Tensor) else t for n, t in inputs(16_384, torch.float32, eta).items()}
    x["hamiltonian"], x["state"] = chain(16_384, eta, torch.float32, batch=1), None
    exact, _ = resolvent_reference(
        **{n: t.double() for n, t in x.items() if isinstance(t, Tensor)},
        hamiltonian=Hamiltonian(*(t.double() for t in x["hamiltonian"])),
    )
    y, _ = resolvent_chunked(**x)
    assert relative(y, exact) < tolerance


@torch.no_grad()
def test_nothing_overflows_in_a_million_tokens():
    """Pieces of 65,536 with carried state, η = 0.01: float32 stays near float64 and below the bound to the end."""
    pieces, size, eta = 16, 65_536, 0.01
    generator = torch.Generator().manual_seed(3)
    state: dict[torch.dtype, ResolventState | None] = {torch.float32: None, torch.float64: None}
    for _ in range(pieces):
        a, b, v = (torch.randn(1, size, 1, generator=generator) for _ in range(3))
        one, z = torch.ones(1, size, 1, 1), (torch.tensor([0.3]), torch.tensor([eta]))
        y = {}
        for dtype in state:
            hamiltonian = Hamiltonian(*(t.to(dtype) for t in (0.3 * a, -0.1 * b.abs(), *z)))
            one = one.to(dtype)
            y[dtype], state[dtype] = resolvent_chunked(
                v[..., None].to(dtype), one, one, hamiltonian, state=state[dtype]
            )
        assert relative(y[torch.float32], y[torch.float64]) < 1e-3
        assert y[torch.float32].norm(dim=-1).max() <= v.norm() / eta  # ‖G‖ ≤ 1/η


def test_many_short_documents_do_not_overflow():
    """Products over 32 documents in a chunk, each of which may grow by 1/η, are formed only to be masked."""
    L, eta = 128, 1e-6
    x = inputs(L, torch.float32)
    x["state"] = None
    zero = torch.zeros(B, L, H)
    x["hamiltonian"] = Hamiltonian(zero, zero, torch.zeros(H), torch.full((H,), eta))
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, ::2] = reset[1, ::4] = True
    exact, _ = resolvent_reference(**{n: x[n] for n in ("v", "k", "q", "hamiltonian")}, reset=reset)
    for t in with_gradients(resolvent_chunked, {n: t for n, t in x.items() if n != "state"}, reset=reset):
        assert torch.isfinite(t).all()
    y, _ = resolvent_chunked(**x, reset=reset)
    assert relative(y, exact) < 1e-5


@pytest.mark.parametrize("potential", [0.0, 1e4, -1e8])
@pytest.mark.parametrize("log_b", [0.0, -1e4])
def test_extreme_hamiltonians_are_finite(potential: float, log_b: float):
    x = inputs(130, torch.float32)
    a = potential * torch.randint(0, 2, (B, 130, H))
    x["hamiltonian"] = Hamiltonian(a, torch.full((B, 130, H), log_b), torch.zeros(H), torch.full((H,), 1e-4))
    for t in with_gradients(resolvent_chunked, x):
        assert torch.isfinite(t).all()


# --- what the semiseparable operator learned for it


@pytest.mark.parametrize("rotating", [False, True])
def test_log_write_joins_the_decays_before_exp(rotating: bool):
    """Equal to writes scaled beforehand, with decays of either sign; and not lost where exp(log_write) is 0."""
    K = 2 * N if rotating else N
    v, b, c = (torch.randn(B, 100, H, n, dtype=torch.float64) for n in (P, K, K))
    log_decay, log_write = 0.3 * torch.randn(B, 100, H).double(), torch.randn(B, 100, H).double()
    angle = torch.randn(B, 100, H, N).double() if rotating else None
    mask, reset = torch.rand(B, 100) < 0.9, torch.rand(B, 100) < 0.05
    more = dict(mask=mask, reset=reset)
    exact = semiseparable_reference(v, b * log_write.exp()[..., None], c, log_decay, angle, **more)
    for op in (semiseparable_reference, semiseparable_chunked):
        for t, e in zip(op(v, b, c, log_decay, angle, log_write=log_write, **more), exact, strict=True):
            assert relative(t, e) < 1e-12
    grows, tiny = (
        torch.full((B, 100, H), 0.85).double(),
        torch.full((B, 100, H), -110.0).double(),
    )  # e^−110 = 0 in float32
    exact, _ = semiseparable_reference(v, b, c, grows, angle, log_write=tiny)
    narrow = [None if t is None else t.float() for t in (v, b, c, grows, angle)]
    y, _ = semiseparable_chunked(*narrow, log_write=tiny.float(), chunk_size=100)
    assert relative(y, exact) < 1e-4


# --- both directions


@pytest.mark.parametrize("L", [1, 2, 65, 512])
def test_two_sided_equals_dense_algebra(L: int):
    hamiltonian, x = chain(L), torch.randn(B, L, H, P, dtype=torch.float64)
    assert relative(two_sided_solve(x, hamiltonian), two_sided_reference(x, hamiltonian)) < 1e-12


def test_two_sided_gradients():
    x, hamiltonian = torch.randn(B, 70, H, P, dtype=torch.float64), chain(70)
    results = []
    for op in (two_sided_solve, two_sided_reference):
        leaves = [t.clone().requires_grad_() for t in (x, *hamiltonian)]
        loss = (op(leaves[0], Hamiltonian(*leaves[1:])) * torch.linspace(-1, 1, 2 * P)).sum()
        results.append(torch.autograd.grad(loss, leaves))
    for fast, exact in zip(*results, strict=True):
        assert relative(fast, exact) < 1e-10


def test_two_sided_padding_and_documents():
    L, length = 90, torch.tensor([61, 0])
    hamiltonian, x = chain(L), torch.randn(B, L, H, P, dtype=torch.float64)

    def part(row: int, begin: int, end: int) -> Tensor:
        a, log_b, *z = hamiltonian
        return two_sided_solve(
            x[row : row + 1, begin:end], Hamiltonian(a[row : row + 1, begin:end], log_b[row : row + 1, begin:end], *z)
        )[0]

    y = two_sided_solve(x, hamiltonian, length=length)
    assert relative(y[0, :61], part(0, 0, 61)) < 1e-12
    assert torch.isfinite(y).all()
    reset = torch.zeros(B, L, dtype=torch.bool)
    reset[0, [30, 31, 70]] = reset[1, [0, L - 1]] = True
    y = two_sided_solve(x, hamiltonian, reset=reset)
    for begin, end in ((0, 30), (30, 31), (31, 70), (70, L)):
        assert relative(y[0, begin:end], part(0, begin, end)) < 1e-12
    assert relative(y[1, : L - 1], part(1, 0, L - 1)) < 1e-12


def test_two_sided_green_equals_dense_inverse():
    hamiltonian = chain(100)
    green = two_sided_green(hamiltonian.potential, hamiltonian.log_coupling.exp(), *hamiltonian[2:])
    identity = torch.eye(100, dtype=torch.float64)[None, :, None].expand(B, 100, H, 100)
    dense = torch.complex(*two_sided_reference(identity, hamiltonian).chunk(2, dim=-1))  # (B, t, H, s)
    assert relative(green, torch.view_as_real(dense.diagonal(dim1=1, dim2=3).transpose(1, 2))) < 1e-12
