"""Transitions that a token chooses: points of a regular polygon in the complex plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def polygon_transition(re: Tensor, im: Tensor, orders: Sequence[int], min_log: float) -> tuple[Tensor, Tensor]:
    """log|λ| and arg λ of the λ that is nearest to z = re + i·im in the polygon of the p-th roots of unity.

        λ = argmin_{w ∈ P_p} |w − z|,   P_p = convex hull of e^{2πij/p}, j = 0 … p − 1   (p = 2: the segment [−1, 1])

    Inside the polygon λ = z: a state forgets, and the loss can move λ anywhere. Beyond it, each root of unity is the
    nearest point to a whole sector: there λ is exact to rounding whatever the jitter of z, and products of such λ stay
    in the group Z_p. That is what counting modulo p, beyond the lengths trained on, needs; an angle that is only close
    drifts.

    Args:
        re, im: z (…, M), float32 or wider.
        orders: p ≥ 2 of each of the M.
        min_log: |λ| is never below e^{min_log}, as logarithms must be finite.

    Returns:
        log|λ| in [min_log, 0] and arg λ in radians, (…, M). Where |λ| would be ≤ e^{min_log}
        neither has a gradient.
    """
    halves = [math.pi / p for p in orders]  # half a side, seen from the centre
    half, cos, sin = (re.new_tensor([f(h) for h in halves]) for f in (float, math.cos, math.sin))
    with torch.no_grad():
        middle = (torch.floor(torch.atan2(im, re) / (2 * half)) + 0.5) * (2 * half)  # of the side in front of z
        c, s = middle.cos(), middle.sin()
    across = torch.minimum(re * c + im * s, cos)  # the side is the segment from (cos, −sin) to (cos, sin)
    along = torch.clamp(im * c - re * s, -sin, sin)
    square = across.square() + along.square()
    tiny = square <= math.exp(2 * min_log)
    log = 0.5 * torch.where(tiny, math.exp(2 * min_log), square).log().clamp(max=0.0)
    across, along = (torch.where(tiny, x.detach(), x) for x in (across, along))
    return log, torch.atan2(along, across) + middle
