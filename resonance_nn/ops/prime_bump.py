"""The prime-bump potential: von Mangoldt's weights as Gaussian peaks at the prime powers, in logarithmic position.

    V(t) = Σ_{p^k ≤ M+1} (log p) p^{−k(1/2+ε)} exp( −(x − k log p)² / (2 (w/p^k)²) ),   x = log(1 + t)

t counts a document's tokens from 0, so a peak stands at t + 1 = p^k; near it 1 + t differs by j tokens and x by
≈ j/p^k, so every peak is w tokens wide. M is the ``limit``: V vanishes beyond.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from resonance_nn.ops.precision import phase_dtype

WIDTH = 0.5  # w, tokens
REACH = 32  # tokens from a peak beyond which its Gaussian is < 1e-24


def prime_powers(limit: int) -> tuple[Tensor, Tensor]:
    """All p^k ≤ limit and the log p of each, by Eratosthenes' sieve: int64 and float64, sorted."""
    prime = torch.ones(limit + 1, dtype=torch.bool, device="cpu")
    prime[:2] = False
    for n in range(2, int(limit**0.5) + 1):
        if prime[n]:
            prime[n * n :: n] = False
    primes = prime.nonzero().squeeze(1)
    powers, bases, power = [], [], primes
    while len(power):
        powers.append(power)
        bases.append(primes[: len(power)])
        power = power * primes[: len(power)]
        power = power[power <= limit]
    order = torch.cat(powers).argsort()
    return torch.cat(powers)[order], torch.cat(bases)[order].double().log()


def prime_bump_reference(position: Tensor, limit: int, epsilon: float = 0.0) -> Tensor:
    """The definition, a sum over all prime powers. Arguments as :func:`prime_bump`."""
    n, log_p = prime_powers(limit + 1)
    n = n.double()
    x = (1 + position.double()).log()[..., None]
    return (log_p * n ** (-0.5 - epsilon) * torch.exp(-0.5 * ((x - n.log()) * n / WIDTH).square())).sum(-1)


def prime_bump(position: Tensor, limit: int, epsilon: float = 0.0) -> Tensor:
    """V at integer positions t ≥ 0 of any shape, in float64: read from a table of limit + 33 entries, made once.

    Args:
        position: t, integers.
        limit: M ≥ 1.
        epsilon: ε.
    """
    table = _table(limit, epsilon).to(position.device, phase_dtype(position))
    inside = position < len(table)
    return table[position.clamp(max=len(table) - 1)].masked_fill(~inside, 0)


@lru_cache(maxsize=8)
def _table(limit: int, epsilon: float) -> Tensor:
    """V(0) … V(limit + REACH), each peak added to the positions it reaches: O(limit), not O(limit²)."""
    n, log_p = prime_powers(limit + 1)
    offset = torch.arange(-REACH, REACH + 1, device="cpu")
    near = n[:, None] + offset  # 1 + t, (peaks, 2·REACH + 1)
    distance = near.clamp(min=1).double().log() - n[:, None].double().log()
    bump = torch.exp(-0.5 * (distance * n[:, None] / WIDTH).square()) * (near >= 1)
    bump = bump * (log_p * n.double() ** (-0.5 - epsilon))[:, None]
    table = torch.zeros(limit + REACH + 1, dtype=torch.float64, device="cpu")
    return table.index_add_(0, (near.clamp(min=1) - 1).flatten(), bump.flatten())
