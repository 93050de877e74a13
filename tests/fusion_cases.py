"""What the tests of fusion share: small fusions, and inputs for them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from contract import small_config
from torch import Tensor

from resonance_nn.fusion import FUSIONS, Fusion

KINDS = ("text", "image", "audio")
LENGTHS = {"text": 9, "image": 16, "audio": 40}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(KINDS, size)]
D = 32
fusions = pytest.mark.parametrize("name", FUSIONS)
subsets = pytest.mark.parametrize("names", SUBSETS, ids="+".join)


def make(name: str, modalities: tuple[str, ...] = KINDS, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A fusion whose parameters that begin at 0 or 1 have left it."""
    torch.manual_seed(0)
    module = FUSIONS[name](small_config(modalities=modalities, fusion=name, num_modes=12, num_bands=5, **overrides))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return module.to(dtype)


def smaller(module: Fusion, name: str, modalities: tuple[str, ...]) -> Any:
    """Of fewer modalities, with the same weights."""
    small = make(name, modalities)
    weights = module.state_dict()
    assert set(small.state_dict()) <= set(weights)
    small.load_state_dict({key: weights[key] for key in small.state_dict()})
    return small


def inputs_of(name: str, B: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {m: (B, D) if name == "holographic" else (B, LENGTHS[m], D) for m in KINDS}
    return {m: torch.randn(shape, generator=generator, dtype=torch.float64) for m, shape in shapes.items()}


def every_subset() -> Tensor:
    """(7, 3): an example with each."""
    return torch.tensor([[m in names for m in KINDS] for names in SUBSETS])


def gradients(module: Fusion, y: Tensor) -> dict[str, Tensor | None]:
    weights = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad((y * weights).sum(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))
