"""Models of texts, images and sounds: any may be missing, and is then as if the model had no tower for it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from multimodal_cases import (
    MODELS,
    SUBSETS,
    config_of,
    emptied,
    every_subset,
    fusions,
    gradients,
    inputs_of,
    make,
    models,
    of_rows,
    result,
    smaller,
    subsets,
)
from torch.nn import functional as F

from resonance_nn.models.multimodal import (
    ResonanceForContrastive,
    ResonanceForMultimodalClassification,
)

# --- a missing modality


@pytest.mark.parametrize("training", [True, False])
@subsets
@fusions
def test_an_example_is_what_a_model_of_its_modalities_makes_of_it(fusion: str, names: tuple[str, ...], training: bool):
    """In a batch of all subsets, whatever the empty slots hold; alone, with the others not given; gradients too."""
    kind = MODELS[len(names) % 2]
    model, inputs, present = make(kind, fusion).train(training), inputs_of(len(SUBSETS)), every_subset()
    row = SUBSETS.index(names)
    small = smaller(model, names)
    expected = result(small, **of_rows(inputs, [row], names))
    exact_gradients = gradients(small, expected)
    for y in (
        result(model, **emptied(inputs, present), present=present)[[row]],
        result(model, **of_rows(inputs, [row], names)),
    ):
        assert relative(y, expected) < 1e-12
        found = gradients(model, y)
        for key, gradient in found.items():
            exact = exact_gradients.get(key)
            if exact is None:
                assert gradient is None or not gradient.any(), key
            elif float(exact.abs().max()) < 1e-12:  # of what has no effect for want of others
                assert gradient is None or float(gradient.abs().max()) < 1e-12, key
            else:
                assert gradient is not None, key
                assert relative(gradient, exact) < 1e-9, key


@fusions
def test_the_loss_of_a_mixed_batch_has_clean_gradients(fusion: str):
    present = every_subset()
    labels = torch.arange(7) % 5
    inputs = emptied(inputs_of(7), present)
    model = make(ResonanceForMultimodalClassification, fusion).train()
    model(**inputs, present=present, labels=labels).loss.backward()
    other = make(ResonanceForContrastive, fusion).train()
    other(**inputs, present=present, query=("text",), target=("image", "audio")).loss.backward()
    for trained in (model, other):
        assert all(torch.isfinite(p.grad).all() for p in trained.parameters() if p.grad is not None)


@models
@fusions
def test_present_by_name_and_inputs_left_out(fusion: str, kind: type):
    model, inputs = make(kind, fusion), inputs_of(3)
    every = torch.ones(3, 3, dtype=torch.bool)
    y = result(model, **inputs)
    assert relative(result(model, **inputs, present=every), y) < 1e-12
    assert relative(result(model, **inputs, present={"audio": every[:, 0]}), y) < 1e-12
    without = {**of_rows(inputs, [0, 1, 2], ("text", "image"))}
    y = result(model, **without)
    assert relative(result(model, **without, present=every), y) < 1e-12
    assert relative(result(model, **inputs, present={"audio": ~every[:, 0]}), y) < 1e-12


# --- batches, padding, sizes


@models
@fusions
def test_the_order_of_a_batch_does_not_matter(fusion: str, kind: type):
    model, inputs, present = make(kind, fusion), inputs_of(7), every_subset()
    order = [3, 6, 0, 5, 1, 4, 2]
    y = result(model, **inputs, present=present)
    assert relative(result(model, **of_rows(inputs, order), present=present[order]), y[order]) < 1e-12


@pytest.mark.parametrize("where", ["left", "right"])
@models
@fusions
def test_padded_example_equals_example_alone(fusion: str, kind: type, where: str):
    model, inputs = make(kind, fusion), inputs_of(2)
    y = result(model, **inputs)
    texts, samples = (int(inputs[name][0].sum()) for name in ("attention_mask", "audio_attention_mask"))
    alone = {
        "input_ids": inputs["input_ids"][:1, :texts],
        "pixel_values": inputs["pixel_values"][:1],
        "input_values": inputs["input_values"][:1, :samples],
    }
    assert relative(y[:1], result(model, **alone)) < 1e-10
    if where == "left":
        turned = dict(inputs)
        for name, n in (("input_ids", texts), ("attention_mask", texts), ("input_values", samples)):
            turned[name] = inputs[name].clone()
            turned[name][0] = inputs[name][0].roll(-n)
        turned["audio_attention_mask"] = inputs["audio_attention_mask"].clone()
        turned["audio_attention_mask"][0] = inputs["audio_attention_mask"][0].roll(-samples)
        assert relative(result(model, **turned), y) < 1e-10


@pytest.mark.parametrize("L", [1, 2, 3, 63, 64, 65, 257])
@fusions
def test_any_length(fusion: str, L: int):
    model = make(ResonanceForMultimodalClassification, fusion)
    inputs = inputs_of(2)
    ids = torch.randint(0, 61, (2, L))
    y = model(input_ids=ids, pixel_values=inputs["pixel_values"], input_values=torch.randn(2, L).double()).logits
    assert torch.isfinite(y).all()
    padded, mask = F.pad(ids, (0, 3)), F.pad(torch.ones(2, L), (0, 3))
    assert relative(model(input_ids=padded, attention_mask=mask).logits, model(input_ids=ids).logits) < 1e-10


def test_towers_are_those_of_the_config():
    config = config_of("holographic", ("audio", "text"), image_size=None, encoder_mixers=("global_filter",))
    model = ResonanceForContrastive(config)
    assert list(model.towers) == ["audio", "text"]
    assert [len(tower.backbone.blocks) for tower in model.towers.values()] == [2, 2]
    model = ResonanceForContrastive(config_of("holographic", num_encoder_layers=3, audio_mixers=("resonance",)))
    sizes = {name: tower.backbone.blocks[0].mixer for name, tower in model.towers.items()}
    assert sizes["image"].filter_size == (4, 4)
    assert type(sizes["audio"]).__name__ == "ResonanceMixer"
    assert type(sizes["text"]).__name__ == "SpectralGateMixer"
    assert config.filter_size == 64
    std = model.towers["text"].backbone.blocks[0].mlp.down_proj.weight.std().item()
    assert std == pytest.approx(0.02 / math.sqrt(6), rel=0.1)  # of 3 layers, not of num_hidden_layers = 2


def test_images_of_other_sizes():
    model = make(ResonanceForContrastive, "spectral", ("image",))
    assert model.embed(pixel_values=torch.randn(2, 3, 12, 10).double()).shape == (2, 32)
