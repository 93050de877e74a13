"""Heads on text encoders and images: padding, batches, gradients, saving, labels that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import relative
from contract import small_config
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForSequenceClassification

from resonance_nn import (
    ResonanceForImageClassification,
    ResonanceForMaskedLM,
    ResonanceForSentenceEmbedding,
    ResonanceForSequenceClassification,
    ResonanceForTokenClassification,
)
from resonance_nn.models.pooling import classification_loss, contrastive_loss, pool
from resonance_nn.models.vision import cubic_samples

STACKS = [("spectral_gate", "reversed:spectral_gate"), ("global_filter",), ("holographic",), ("attention",)]
CLASSIFIERS = [ResonanceForSequenceClassification, ResonanceForTokenClassification]
TEXT_MODELS = [*CLASSIFIERS, ResonanceForMaskedLM, ResonanceForSentenceEmbedding]


def make(kind: type[Any], mixers: tuple[str, ...] = STACKS[0], **overrides: Any) -> Any:
    torch.manual_seed(0)
    return kind(small_config(mixers, num_labels=5, **overrides)).double().eval()


def output(model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    out = model(*args, **kwargs)
    return out.embeddings if isinstance(model, ResonanceForSentenceEmbedding) else out.logits


def batch(*lengths: int, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    ids, L = torch.randint(0, 61, (len(lengths), max(lengths))), max(lengths)
    real = torch.arange(L) < torch.tensor(lengths)[:, None]
    return ids, (real if side == "right" else real.flip(1)).long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("mixers", STACKS)
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_a_padded_text_equals_the_text_alone(kind, mixers, pooling, side):
    model = make(kind, mixers, pooling=pooling)
    ids, mask = batch(65, 1, 2, 3, 40, side=side)
    with torch.no_grad():
        y = output(model, ids, attention_mask=mask)
        for row in range(len(ids)):
            alone = output(model, ids[row : row + 1, mask[row].bool()])
            whole = y[row : row + 1]
            if y.dim() == 3:
                whole = whole[:, mask[row].bool()]
            assert relative(whole, alone) < 1e-10


@pytest.mark.parametrize("kind", TEXT_MODELS)
@pytest.mark.parametrize("mixers", STACKS)
def test_every_parameter_is_trained_and_saved(kind, mixers, tmp_path):
    model = make(kind, mixers).train()
    ids, mask = batch(20, 13, 7)
    labels: dict[str, Any] = {"labels": ids.masked_fill(mask == 0, -100) % 5}
    if kind is ResonanceForSequenceClassification:
        labels = {"labels": torch.tensor([1, 0, 4])}
    elif kind is ResonanceForSentenceEmbedding:
        labels = {"pair_input_ids": ids.flip(0), "pair_attention_mask": mask.flip(0)}
    model(ids, attention_mask=mask, **labels).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    model.eval().save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(output(again, ids, attention_mask=mask), output(model, ids, attention_mask=mask))


def test_masked_language_model_asks_only_where_there_is_a_label():
    model = make(ResonanceForMaskedLM)
    ids, _ = batch(30, 30)
    labels = torch.full_like(ids, -100)
    labels[0, 3] = labels[1, 29] = 7
    with torch.no_grad():
        logits = model(ids).logits
        loss = model(ids, labels=labels).loss
    expected = -(logits[0, 3].log_softmax(-1)[7] + logits[1, 29].log_softmax(-1)[7]) / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-10)
    with torch.no_grad():
        assert float(model(ids, labels=torch.full_like(ids, -100)).loss) == 0
    with pytest.raises(ValueError, match="labels of shape"):
        model(ids, labels=labels[:, 1:])


def test_it_reads_both_ways():
    model = make(ResonanceForMaskedLM)
    ids, _ = batch(30)
    other = ids.clone()
    other[0, 29] = (ids[0, 29] + 1) % 61
    with torch.no_grad():
        assert (model(other).logits - model(ids).logits)[0, 0].abs().max() > 1e-8


def test_pooling():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]])
    assert torch.equal(pool(hidden, mask, "mean"), torch.stack([hidden[0, 1:3].mean(0), torch.zeros(3)]))
    assert torch.equal(pool(hidden, mask, "last")[0], hidden[0, 2])
    assert torch.equal(pool(hidden, mask, "first")[0], hidden[0, 1])
    assert not pool(hidden, mask, "last")[1].any()
    assert torch.equal(pool(hidden, None, "last"), hidden[:, 3])
    assert pool(hidden.bfloat16(), None, "mean").dtype == torch.float32


def test_losses_are_those_that_the_labels_mean():
    config = small_config(num_labels=3)
    logits = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, -100, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert float(classification_loss(logits, labels, config)) == pytest.approx(float(expected), rel=1e-10)
    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, -100, 1]], dtype=torch.float64)
    known = several != -100
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits[known], several[known])
    assert float(classification_loss(logits, several, config)) == pytest.approx(float(each), rel=1e-10)
    one = small_config(num_labels=1)
    values = torch.tensor([0.5, -100.0, 2.0, 1.0], dtype=torch.float64)
    squared = (logits[:, 0] - values).square().mean()
    assert float(classification_loss(logits[:, :1], values, one)) == pytest.approx(float(squared), rel=1e-10)
    for wrong in (torch.tensor([0, 3, 1, 1]), torch.tensor([0, -1, 1, 1])):
        with pytest.raises(ValueError, match=r"is not a class; num_labels = 3 has 0 … 2"):
            classification_loss(logits, wrong, config)
    for value in (5.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"labels: {value:g}; must be 0 … 1 for each label"):
            classification_loss(logits, torch.where(several > 0.5, value, 0.0), config)
    with pytest.raises(ValueError, match="labels of shape"):
        classification_loss(logits, labels[:3], config)
    with pytest.raises(ValueError, match="labels of shape"):
        classification_loss(logits, several[:, :2], config)


def test_texts_that_belong_together_are_pulled_together():
    a = torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1)
    scale = torch.tensor(3.0, dtype=torch.float64)
    assert contrastive_loss(a, a, scale) < contrastive_loss(a, a.roll(1, 0), scale)
    model = make(ResonanceForSentenceEmbedding)
    ids, mask = batch(9, 4)
    with torch.no_grad():
        assert torch.allclose(model(ids, attention_mask=mask).embeddings.norm(dim=-1), torch.ones(2).double())
    with pytest.raises(ValueError, match="pair_input_ids: 1 texts beside 2"):
        model(ids, pair_input_ids=ids[:1])


@pytest.mark.parametrize("kind", [ResonanceForSequenceClassification, ResonanceForMaskedLM])
def test_bf16_autocast_is_finite_and_near_float32(kind):
    model = make(kind).float()
    ids, mask = batch(50, 9)
    with torch.no_grad():
        exact = output(model, ids, attention_mask=mask)
        with torch.autocast("cpu", torch.bfloat16):
            y = output(model, ids, attention_mask=mask)
    assert torch.isfinite(y).all()
    assert float((y.float() - exact).abs().max()) <= 0.05 * float(exact.abs().max())


# --- images


IMAGE = {"image_size": (12, 8), "patch_size": 4, "num_channels": 1, "num_bands": 2}


@pytest.mark.parametrize("mixers", [("global_filter",), ("spectral_gate",)])
def test_images_of_any_size(mixers):
    model = make(ResonanceForImageClassification, mixers, **IMAGE)
    for rows, columns in ((12, 8), (24, 16), (13, 9), (4, 4), (50, 7)):
        images = torch.randn(3, 1, rows, columns, dtype=torch.float64)
        with torch.no_grad():
            y = model(images).logits
            assert y.shape == (3, 5)
            assert relative(model(images[1:2]).logits, y[1:2]) < 1e-10


def test_patches_are_squares_in_reading_order_and_those_of_a_larger_picture_show_as_much():
    embed = make(ResonanceForImageClassification, ("global_filter",), **IMAGE).embed
    images = torch.randn(2, 1, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        tokens, grid = embed(images)
        assert grid == (3, 2)
        patch = images[:, :, 4:8, 4:8].flatten(1)  # second row, second column
        assert relative(tokens[:, 3], embed.proj(patch) + embed.position[:, 1, 1]) < 1e-12
        assert relative(embed._resampled(images, (3, 2)), images) < 1e-10
        ramp = torch.linspace(0, 1, 24, dtype=torch.float64)[:, None].expand(1, 1, 24, 16)
        fine = embed._resampled(ramp, (6, 4)).unflatten(2, (6, 4)).mean((3, 4))[0, 0]
        coarse = embed._resampled(ramp, (3, 2)).unflatten(2, (3, 4)).mean((3, 4))[0, 0]
    assert torch.allclose(fine[1:5].view(2, 2).mean(1), (coarse[:2] + coarse[1:]) / 2, atol=2e-3)


def test_pixels_of_another_size_are_read_in_full_precision():
    """Inside autocast, in half precision, and as bytes."""
    embed = make(ResonanceForImageClassification, ("global_filter",), **IMAGE).embed.float()
    images = 100 * torch.rand(2, 1, 24, 16)
    for pixels in (images, images.bfloat16(), images.to(torch.uint8)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            read = embed._resampled(pixels, (6, 4))
        assert relative(read.double(), embed._resampled(pixels.double(), (6, 4))) < 1e-6


@pytest.mark.parametrize(("size", "width"), [(12, 1.0), (7, 1.0), (30, 2.5)])
def test_cubic_samples(size: int, width: float):
    """At the pixels themselves the pixels; a constant stays, at the edges too; parabolas inside are exact."""
    middle = torch.arange(size, dtype=torch.float64) + 0.5
    assert torch.allclose(cubic_samples(middle, size, 1.0), torch.eye(size, dtype=torch.float64), atol=1e-15)
    at = torch.linspace(-2, size + 2, 101, dtype=torch.float64)
    rows = cubic_samples(at, size, width)
    assert torch.allclose(rows.sum(1), torch.ones(101, dtype=torch.float64), atol=1e-14)
    outside = cubic_samples(torch.tensor([-3.0, 0.0, size + 1.0], dtype=torch.float64), size, width)
    edges = cubic_samples(torch.tensor([0.5, 0.5, size - 0.5], dtype=torch.float64), size, width)
    assert torch.equal(outside, edges)
    inside = (at > 2 * width + 0.5) & (at < size - 2 * width - 0.5)
    assert inside.any()
    if width == 1:
        assert torch.allclose(rows[inside] @ middle.square(), at[inside].square(), rtol=1e-12)
    else:  # what is finer than a pixel of the result is smoothed away, what is coarser stays
        assert (rows[inside] @ (-1.0) ** middle.floor()).abs().max() < 0.05
        assert torch.allclose(rows[inside] @ middle, at[inside], rtol=0.01)


def test_a_smooth_picture_sampled_twice_as_finely_is_the_same_picture():
    model = make(ResonanceForImageClassification, ("global_filter",), image_size=28, patch_size=4, num_channels=1)

    def picture(size: int) -> torch.Tensor:
        t = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        return (torch.sin(5 * t)[:, None] * torch.cos(3 * t)[None]).expand(1, 1, size, size)

    with torch.no_grad():
        y = model(picture(28)).logits
        assert relative(model(picture(56)).logits, y) < 0.4
        assert relative(model(picture(57)).logits, y) < 0.4
        assert relative(model(picture(56).flip(3)).logits, y) > 1


def test_image_model_trains_everything_and_saves(tmp_path):
    model = make(ResonanceForImageClassification, ("global_filter",), **IMAGE).train()
    images = torch.randn(3, 1, 12, 8, dtype=torch.float64)
    model(images, labels=torch.tensor([0, 4, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


def test_images_that_do_not_fit():
    model = make(ResonanceForImageClassification, ("global_filter",), **IMAGE)
    with pytest.raises(ValueError, match="num_channels = 1"):
        model(torch.randn(1, 3, 12, 8))
    with pytest.raises(ValueError, match="must be 4 or more, one patch, each way"):
        model(torch.randn(1, 1, 3, 8))
    with pytest.raises(ValueError, match="image_size = None"):
        make(ResonanceForImageClassification)
    for wrong in (30, (28, 30), 2, "28", (28,)):
        with pytest.raises(ValueError, match="image_size"):
            small_config(image_size=wrong, patch_size=4)


def test_auto_classes(tmp_path):
    for auto, kind in (
        (AutoModelForMaskedLM, ResonanceForMaskedLM),
        (AutoModelForSequenceClassification, ResonanceForSequenceClassification),
    ):
        model = make(kind)
        model.save_pretrained(tmp_path / kind.__name__)
        assert type(auto.from_pretrained(tmp_path / kind.__name__)) is kind
