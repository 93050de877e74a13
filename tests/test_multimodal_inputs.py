"""Models of texts, images and sounds: saved, in other precisions, and inputs that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import relative
from multimodal_cases import KINDS, every_subset, fusions, inputs_of, make, models, result

from resonance_nn.models.multimodal import (
    ResonanceForContrastive,
    ResonanceForMultimodalClassification,
)


@models
@fusions
def test_saved_and_loaded_it_is_the_same(fusion: str, kind: type, tmp_path: Path):
    model, inputs, present = make(kind, fusion).float(), inputs_of(7, dtype=torch.float32), every_subset()
    y = result(model, **inputs, present=present)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert again.config.modalities == KINDS
    assert torch.equal(result(again, **inputs, present=present), y)
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {n: True for n, _ in model.named_parameters()}


def test_a_modality_added_to_a_saved_model_has_the_role_of_its_name(tmp_path: Path):
    make(ResonanceForContrastive, "holographic", ("text", "image")).float().save_pretrained(tmp_path)
    grown = ResonanceForContrastive.from_pretrained(tmp_path, modalities=KINDS)
    fresh = make(ResonanceForContrastive, "holographic").float()
    for name in KINDS:
        assert torch.equal(grown.fusion.slots[name].role, fresh.fusion.slots[name].role)
    assert torch.isfinite(grown.embed(**inputs_of(2, dtype=torch.float32))).all()


@models
@fusions
def test_bf16_autocast_is_finite_and_near_float32(fusion: str, kind: type):
    model, inputs, present = make(kind, fusion).float(), inputs_of(7, dtype=torch.float32), every_subset()
    exact = result(model, **inputs, present=present)
    with torch.autocast("cpu", torch.bfloat16):
        y = result(model, **inputs, present=present)
        out = model(**inputs, present=present, labels=torch.zeros(7, dtype=torch.long))
    assert relative(y.float(), exact) < 0.05
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    half = make(kind, fusion).bfloat16()
    assert relative(result(half, **inputs, present=present).float(), exact) < 0.1


@models
def test_inputs_that_do_not_fit(kind: type):
    model, inputs = make(kind, "holographic"), inputs_of(3)
    present = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="'smell' is no modality of this model: modalities = text, image, audio"):
        result(model, **inputs, present={"smell": present[:, 0]})
    with pytest.raises(ValueError, match="example 1 has none of text, image, audio"):
        result(model, **inputs, present=present.index_fill(0, torch.tensor(1), False))
    with pytest.raises(ValueError, match=r"present of shape \(3, 2\): must be \(3, 3\)"):
        result(model, **inputs, present=present[:, :2])
    with pytest.raises(ValueError, match="no inputs: give one or more of text, image, audio"):
        result(model)
    with pytest.raises(ValueError, match="image: 2 examples beside 3 of text"):
        result(model, **{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match=r"input_ids of shape \(3,\): must be \(texts, tokens\)"):
        result(model, input_ids=inputs["input_ids"][:, 0])
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 5\): must be \(3, 11\)"):
        result(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"][:, :5])
    with pytest.raises(ValueError, match="a mask of 2 examples beside input_ids of 3: must be as many"):
        result(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"][:2])
    with pytest.raises(ValueError, match=r"pixel_values of shape .*: must be \(images, 3, rows, columns\)"):
        result(model, pixel_values=inputs["pixel_values"][:, :2])
    with pytest.raises(ValueError, match="input_ids: of an example that should have text all is masked"):
        result(model, input_ids=inputs["input_ids"], attention_mask=0 * inputs["attention_mask"])
    two = make(kind, "holographic", ("text", "audio"))
    with pytest.raises(
        ValueError, match=r"pixel_values given, but the model has no image: modalities = \('text', 'audio'\)"
    ):
        result(two, **inputs)
    with pytest.raises(ValueError, match="image_size = None"):
        make(kind, "holographic", image_size=None)
    with pytest.raises(ValueError, match=r"modalities = .*: must be one or more of text, image, audio"):
        make(kind, "holographic", ("text", "smell"))


def test_sides_and_labels_that_do_not_fit():
    model, inputs = make(ResonanceForContrastive, "spectral", ("text", "image")), inputs_of(3, ("text", "image"))
    for wrong in ("text", (), ("audio",), ("text", "audio")):
        with pytest.raises(ValueError, match=r"query = .*: must be one or more of modalities = \('text', 'image'\)"):
            model(**inputs, query=wrong, target=("image",))
        with pytest.raises(ValueError, match="target = "):
            model(**inputs, query=("text",), target=wrong)
        with pytest.raises(ValueError, match="modalities = "):
            model.embed(**inputs, modalities=wrong)
    single = make(ResonanceForContrastive, "spectral", ("text",))
    with pytest.raises(ValueError, match=r"target = \(\): must be one or more"):
        single(**inputs_of(3, ("text",)))
    classes = make(ResonanceForMultimodalClassification, "spectral")
    with pytest.raises(ValueError, match="labels: 5 is not a class; num_labels = 5 has 0 … 4"):
        classes(**inputs_of(3), labels=torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"labels of shape \(2,\): must be \(3,\)"):
        classes(**inputs_of(3), labels=torch.tensor([0, 1]))


def test_the_embedding_of_tokens_can_be_resized():
    model = make(ResonanceForContrastive, "holographic")
    model.resize_token_embeddings(70)
    assert model.towers["text"].embed.weight.shape[0] == 70
    with pytest.raises(NotImplementedError, match="without text there are no embeddings"):
        make(ResonanceForContrastive, "holographic", ("image",)).get_input_embeddings()
