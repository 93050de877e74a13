"""Models of texts, images and sounds: any may be missing, and is then as if the model had no tower for it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from contract import small_config
from torch import Tensor
from torch.nn import functional as F

from resonance_nn import ResonanceConfig
from resonance_nn.fusion import FUSIONS
from resonance_nn.models.multimodal import (
    MultimodalEncoder,
    ResonanceForContrastive,
    ResonanceForMultimodalClassification,
)
from resonance_nn.models.pooling import contrastive_loss

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
    assert out.loss is None
    assert out.target_embeddings is None
    present = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    out = model(**inputs, present=present)
    assert out.loss.item() == 0
    out.loss.backward()
    assert model(**inputs, return_loss=False).loss is None
    assert model(**inputs).loss.item() > 0


# --- saving, precision, errors


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
