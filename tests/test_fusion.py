"""Fusion of modalities: what both kinds promise; a missing modality is as if there were no slot for it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import relative
from contract import small_config
from fusion_cases import KINDS, SUBSETS, every_subset, fusions, gradients, inputs_of, make, smaller, subsets

from resonance_nn.fusion import FUSIONS, drop_modalities
from resonance_nn.ops.fusion import (
    masked_softmax,
)


@subsets
@fusions
def test_a_missing_modality_is_as_if_there_were_no_slot_for_it(name: str, names: tuple[str, ...]):
    """By itself and in a batch with every other subset, outputs and gradients; whatever stands in the empty slots."""
    whole, x = make(name), inputs_of(name, len(SUBSETS))
    small, row = smaller(whole, name, names), SUBSETS.index(names)
    present = every_subset()
    for m, column in zip(KINDS, present.T, strict=True):
        x[m][~column] = math.nan
    one = {m: x[m][row : row + 1] for m in names}
    expected = small(one)
    exact_gradients = gradients(small, expected)
    of_batch = whole(x, present=present)[row : row + 1]
    left_out = whole(one)
    for y in (of_batch, left_out):
        assert relative(y, expected) < 1e-12
        found = gradients(whole, y)
        for key, exact in exact_gradients.items():
            if exact is None or float(exact.abs().max()) < 1e-13:  # of what has no effect for want of others
                assert found[key] is None or float(found[key].abs().max()) < 1e-13
            else:
                assert found[key] is not None, key
                assert relative(found[key], exact) < 1e-10, key
        for key in set(found) - set(dict(small.named_parameters())):
            assert found[key] is None or not found[key].any(), key


@fusions
def test_present_by_name_is_present_by_column(name: str):
    module, x, present = make(name), inputs_of(name, 7), every_subset()
    y = module(x, present=present)
    assert torch.equal(module(x, present=dict(zip(KINDS, present.T, strict=True))), y)
    every = torch.ones(7, 3, dtype=torch.bool)
    assert torch.equal(module(x, present={"image": every[:, 0]}), module(x))
    assert torch.equal(module(x, present=every), module(x))
    assert (
        relative(
            module({m: x[m] for m in ("audio", "text")}, present=every),
            smaller(module, name, ("text", "audio"))({m: x[m] for m in ("text", "audio")}),
        )
        < 1e-12
    )


@fusions
def test_the_order_of_modalities_and_of_examples_does_not_matter(name: str):
    module, x, present = make(name), inputs_of(name, 7), every_subset()
    y = module(x, present=present)
    order = torch.tensor([3, 6, 0, 5, 1, 4, 2])
    assert relative(module({m: x[m][order] for m in reversed(KINDS)}, present=present[order]), y[order]) < 1e-12
    turned = smaller(module, name, KINDS[::-1])
    assert relative(turned(x, present=present.flip(1)), y) < 1e-12


@fusions
def test_an_example_moves_no_other(name: str):
    module, x = make(name), inputs_of(name, 4)
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).bool()
    leaves = {m: t.clone().requires_grad_() for m, t in x.items()}
    y = module(leaves, present=present)
    found = torch.autograd.grad(y[1].square().sum(), list(leaves.values()))
    for m, gradient in zip(leaves, found, strict=True):
        assert gradient[[0, 2, 3]].abs().max() == 0, m
        assert bool(gradient[1].any()) == (m != "image")


@fusions
def test_weights_sum_to_1_over_those_present(name: str):
    module, x, present = make(name), inputs_of(name, 7), every_subset()
    weights = module.superpose(x, present)[1] if name == "holographic" else module.fuse_modes(x, present=present)[1]
    assert relative(weights.sum(1), torch.ones_like(weights.sum(1))) < 1e-12
    assert (weights[~present] == 0).all()
    assert (weights[present] > 0).all()


@fusions
def test_every_parameter_is_trained_from_the_start(name: str):
    torch.manual_seed(0)
    module = FUSIONS[name](small_config(modalities=KINDS, fusion=name)).double()
    for key, gradient in gradients(module, module(inputs_of(name, 3))).items():
        assert gradient is not None, key
        assert gradient.abs().max() > 0, key
    assert not any(tensor.is_complex() for tensor in module.state_dict().values())


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@fusions
def test_bf16_autocast_is_finite_and_near_float32(name: str, scale: float):
    module = make(name, dtype=torch.float32)
    x = {m: scale * t.float() for m, t in inputs_of(name, 7).items()}
    exact = module(x, present=every_subset())
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, present=every_subset())
    assert y.dtype == torch.float32
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert torch.isfinite(y).all()
    assert relative(y, exact) < 0.1
    assert relative(module(x), make(name)({m: t.double() for m, t in x.items()}).float()) < 1e-4


@fusions
def test_in_half_precision_it_stays_near(name: str):
    x = {m: t.bfloat16() for m, t in inputs_of(name, 7).items()}
    y = make(name, dtype=torch.bfloat16)(x, present=every_subset())
    exact = make(name, dtype=torch.float32)({m: t.float() for m, t in x.items()}, present=every_subset())
    assert relative(y, exact) < 0.15


@pytest.mark.parametrize("value", [-1e4, -30.0, 30.0, 1e4])
@fusions
def test_any_finite_parameters_give_finite_outputs(name: str, value: float):
    module = make(name, dtype=torch.float32)
    x = {m: t.float() for m, t in inputs_of(name, 7).items()}
    for key, p in module.named_parameters():
        kept = p.detach().clone()
        with torch.no_grad():
            p.fill_(value)
        module.zero_grad()
        y = module(x, present=every_subset())
        y.mean().backward()
        assert torch.isfinite(y).all(), key
        assert all(torch.isfinite(q.grad).all() for q in module.parameters()), key
        with torch.no_grad():
            p.copy_(kept)


@fusions
def test_wrong_inputs(name: str):
    module, x = make(name), inputs_of(name, 3)
    present = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="'smell' is no modality of this model: modalities = text, image, audio"):
        module({**x, "smell": x["text"]})
    with pytest.raises(ValueError, match="'smell' is no modality"):
        module(x, present={"smell": present[:, 0]})
    with pytest.raises(ValueError, match=r"present of shape \(3, 2\): must be \(3, 3\)"):
        module(x, present=present[:, :2])
    with pytest.raises(ValueError, match=r"present\['text'\] of shape \(2,\): must be \(3,\)"):
        module(x, present={"text": present[:2, 0]})
    with pytest.raises(ValueError, match="example 1 has none of text, image, audio"):
        module(x, present=present.index_fill(0, torch.tensor(1), False))
    with pytest.raises(ValueError, match="example 2 has none of text, which are given"):
        module({"text": x["text"]}, present={"text": torch.tensor([True, True, False])})
    with pytest.raises(ValueError, match="image: 2 examples beside 3 of text"):
        module({**x, "image": x["image"][:2]})
    with pytest.raises(ValueError, match=r"audio of shape .*: must be \(B, .*D\)"):
        module({**x, "audio": x["audio"][..., :5]})
    with pytest.raises(ValueError, match="no inputs: give one or more of text, image, audio"):
        module({})


def test_dropping_modalities():
    torch.manual_seed(0)
    present = every_subset().repeat(4000, 1)
    kept = drop_modalities(present, 0.4)
    assert not (kept & ~present).any()
    assert kept.any(1).all()
    two = kept[present.sum(1) == 2]
    both, one = two.sum(1).eq(2).double().mean(), two.double().sum() / len(two)
    assert abs(both - 0.36) < 0.02
    assert abs(one - (2 * 0.36 + 0.64)) < 0.02
    assert abs(kept[6::7].double().mean(0) - kept[6::7].double().mean()).max() < 0.03  # none is preferred
    assert torch.equal(drop_modalities(present, 0.0), present)
    assert not drop_modalities(torch.zeros(5, 3, dtype=torch.bool), 0.5).any()
    with pytest.raises(ValueError, match=r"modality_dropout = 1.0: must be in \[0, 1\)"):
        drop_modalities(present, 1.0)


def test_masked_softmax():
    scores = torch.randn(50, 4, dtype=torch.float64) * 1e3
    present = torch.rand(50, 4) < 0.5
    present[0] = False
    w = masked_softmax(scores, present)
    assert (w[~present] == 0).all()
    for row in range(50):
        assert torch.equal(w[row][present[row]], scores[row][present[row]].softmax(0)) or not present[row].any()
