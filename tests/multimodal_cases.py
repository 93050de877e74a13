"""What the tests of multimodal models share: small models, and inputs for them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from contract import small_config
from torch import Tensor

from resonance_nn import ResonanceConfig
from resonance_nn.fusion import FUSIONS
from resonance_nn.models.multimodal import (
    MultimodalEncoder,
    ResonanceForContrastive,
    ResonanceForMultimodalClassification,
)

KINDS = ("text", "image", "audio")
COLUMNS = {
    "text": ("input_ids", "attention_mask"),
    "image": ("pixel_values",),
    "audio": ("input_values", "audio_attention_mask"),
}
SUBSETS = [names for size in (1, 2, 3) for names in itertools.combinations(KINDS, size)]
MODELS = (ResonanceForMultimodalClassification, ResonanceForContrastive)
fusions = pytest.mark.parametrize("fusion", FUSIONS)
subsets = pytest.mark.parametrize("names", SUBSETS, ids="+".join)
models = pytest.mark.parametrize("kind", MODELS)


def config_of(fusion: str, modalities: tuple[str, ...] = KINDS, **overrides: Any) -> ResonanceConfig:
    fields: dict[str, Any] = dict(
        modalities=modalities,
        fusion=fusion,
        num_encoder_layers=2,
        num_modes=8,
        num_bands=4,
        num_labels=5,
        image_size=8,
        patch_size=2,
        sampling_rate=800,
        num_mel_bins=6,
        intermediate_size=48,
    )
    return small_config(**{**fields, **overrides})


def make(kind: type, fusion: str, modalities: tuple[str, ...] = KINDS, **overrides: Any) -> Any:
    torch.manual_seed(0)
    return kind(config_of(fusion, modalities, **overrides)).double().eval()


def smaller(model: MultimodalEncoder, modalities: tuple[str, ...]) -> Any:
    """Of fewer modalities, with the same weights."""
    small = make(type(model), model.config.fusion, modalities)
    weights = model.state_dict()
    small.load_state_dict({key: weights[key] for key in small.state_dict()})
    return small.train(model.training)


def inputs_of(B: int, kinds: tuple[str, ...] = KINDS, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    everything = {
        "input_ids": torch.randint(0, 61, (B, 11), generator=generator),
        "attention_mask": (torch.arange(11) < 4 + torch.arange(B)[:, None] % 8).long(),
        "pixel_values": torch.randn(B, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
        "input_values": torch.randn(B, 120, generator=generator, dtype=torch.float64).to(dtype),
        "audio_attention_mask": (torch.arange(120) < 60 + 9 * (torch.arange(B)[:, None] % 7)).long(),
    }
    return {name: everything[name] for kind in kinds for name in COLUMNS[kind]}


def of_rows(inputs: dict[str, Tensor], rows: list[int], kinds: tuple[str, ...] = KINDS) -> dict[str, Tensor]:
    return {name: inputs[name][rows] for kind in kinds for name in COLUMNS[kind]}


def every_subset() -> Tensor:
    return torch.tensor([[kind in names for kind in KINDS] for names in SUBSETS])


def emptied(inputs: dict[str, Tensor], present: Tensor) -> dict[str, Tensor]:
    """With what no tower may look at in the empty slots."""
    inputs = {name: x.clone() for name, x in inputs.items()}
    for kind, column in zip(KINDS, present.T, strict=True):
        for name in COLUMNS[kind]:
            inputs[name][~column] = math.nan if inputs[name].is_floating_point() else -5 if name == "input_ids" else 0
    return inputs


def result(model: Any, **inputs: Any) -> Tensor:
    """(B, ·): logits or embeddings."""
    return model.embed(**inputs) if isinstance(model, ResonanceForContrastive) else model(**inputs).logits


def gradients(model: torch.nn.Module, y: Tensor) -> dict[str, Tensor | None]:
    weights = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad((y * weights).sum(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))
