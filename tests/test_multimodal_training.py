"""Models of texts, images and sounds: what they learn, and the two sides of retrieval."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from multimodal_cases import COLUMNS, SUBSETS, every_subset, fusions, inputs_of, make, models, of_rows, result
from torch import Tensor

from resonance_nn.models.multimodal import (
    ResonanceForContrastive,
    ResonanceForMultimodalClassification,
)
from resonance_nn.models.pooling import contrastive_loss

# --- training


@fusions
def test_every_parameter_is_trained(fusion: str):
    inputs = inputs_of(4)
    model = make(ResonanceForMultimodalClassification, fusion, mixers=("attention",)).train()
    model(**inputs, labels=torch.tensor([0, 1, 2, 4])).loss.backward()
    other = make(ResonanceForContrastive, fusion).train()
    other(**inputs, query=("text", "image"), target=("audio", "image")).loss.backward()
    for trained in (model, other):
        for key, p in trained.named_parameters():
            if trained is other and "text_audio" in key:
                continue  # never on one side
            assert p.grad is not None, key
            assert p.grad.abs().max() > 0, key
    assert not any(tensor.is_complex() for tensor in model.state_dict().values())


@fusions
def test_it_learns(fusion: str):
    """To name the class that any one modality shows, from examples with all of them, some dropped."""
    torch.manual_seed(0)
    model = make(ResonanceForMultimodalClassification, fusion, num_encoder_layers=1, num_labels=3).float().train()
    model.modality_dropout = 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, pixels = torch.randint(0, 61, (3, 6)), torch.randn(3, 3, 8, 8)
    t = torch.arange(120) / 800
    sounds = torch.stack([torch.sin(2 * math.pi * f * t) for f in (60, 130, 250)])

    def batch(B: int) -> dict[str, Tensor]:
        labels = torch.randint(0, 3, (B,))
        noise = torch.randn(B, 3, 8, 8), torch.randn(B, 120)
        return dict(
            input_ids=ids[labels],
            pixel_values=pixels[labels] + 0.5 * noise[0],
            input_values=sounds[labels] + 0.2 * noise[1],
            labels=labels,
        )

    for _ in range(50):
        loss = model(**batch(16)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    test = batch(60)
    for names in SUBSETS:
        given = {COLUMNS[kind][0]: test[COLUMNS[kind][0]] for kind in names}
        right = (model(**given).logits.argmax(1) == test["labels"]).double().mean()
        assert right > 0.8, names


@models
def test_dropping_modalities_is_for_training(kind: type):
    model, inputs = make(kind, "holographic"), inputs_of(6)
    every, one = torch.ones(6, 3, dtype=torch.bool), of_rows(inputs, [2], ("text",))
    y, alone = result(model, **inputs), result(model, **one)
    model.modality_dropout = 0.9
    assert torch.equal(result(model, **inputs), y)
    assert torch.equal(result(model, **inputs, present=every), y)
    model.train()
    assert relative(result(model, **inputs), y) > 1e-3
    assert relative(result(model, **inputs, present=every), y) > 1e-3
    assert relative(result(model, **one), alone) < 1e-12  # the last one stays
    model.modality_dropout = 1.0
    with pytest.raises(ValueError, match=r"modality_dropout = 1.0"):
        model(**inputs)


# --- retrieval


@fusions
def test_sides_and_their_loss(fusion: str):
    """Examples that lack a side have no part in the loss; the others' is that of a batch of them alone."""
    model, inputs, present = make(ResonanceForContrastive, fusion), inputs_of(7), every_subset()
    out = model(**inputs, present=present, query=("text",), target=("image",))
    assert relative(out.query_embeddings.norm(dim=-1), present[:, 0].double()) < 1e-12
    assert relative(out.target_embeddings.norm(dim=-1), present[:, 1].double()) < 1e-12
    both = [b for b in range(7) if present[b, 0] and present[b, 1]]
    texts, pictures = (model.embed(**of_rows(inputs, both), modalities=(side,)) for side in ("text", "image"))
    assert relative(out.query_embeddings[both], texts) < 1e-12
    assert relative(out.target_embeddings[both], pictures) < 1e-12
    assert relative(out.loss, contrastive_loss(texts, pictures, model.log_scale)) < 1e-12
    alone = model(**of_rows(inputs, both), query=["text"], target=["image"])
    assert relative(alone.loss, out.loss) < 1e-12
    joint = model(**inputs, present=present)  # the text, and all else
    assert relative(joint.query_embeddings, out.query_embeddings) < 1e-12
    some = [1, 2, 3, 4, 5, 6]
    others = model.embed(**of_rows(inputs, some), present=present[some], modalities=("image", "audio"))
    assert relative(joint.target_embeddings[some], others) < 1e-12


@fusions
def test_no_pairs_no_loss(fusion: str):
    model, inputs = make(ResonanceForContrastive, fusion).train(), inputs_of(3)
    out = model(input_ids=inputs["input_ids"])
    assert out.loss.item() == 0, "a batch without a pair is one that teaches nothing, not the end of a run"
    out.loss.backward()
    assert out.target_embeddings is None
    present = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    out = model(**inputs, present=present)
    assert out.loss.item() == 0
    out.loss.backward()
    assert model(**inputs, return_loss=False).loss is None
    assert model(**inputs).loss.item() > 0
