"""Weights in the order of a CPU's kernels: the same numbers, whatever is done to the model afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import relative
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from resonance_nn import ResonanceConfig, ResonanceForCausalLM, pack_weights
from resonance_nn.packing import PackedLinear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def small_model() -> ResonanceForCausalLM:
    torch.manual_seed(0)
    return ResonanceForCausalLM(ResonanceConfig(vocab_size=300, hidden_size=256, num_hidden_layers=2)).eval()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (16, 1), (2, 37), (70,)])
def test_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(256, 300, bias=bias), nn.Linear(300, 8)).to(dtype)
    x = torch.randn(*shape, 256, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        able = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not where AVX2 is all
        assert pack_weights(model) == int(able)  # the second one is small
        assert [type(layer) for layer in model] == [PackedLinear if able else nn.Linear, nn.Linear]
        packed = model(x)
    assert packed.dtype == dtype
    assert relative(packed, expected) < TOLERANCE[dtype]


def test_gradients_autocast_and_other_dtypes_go_by_the_weight_itself():
    model, x = nn.Linear(256, 300), torch.randn(5, 256)
    exact = copy.deepcopy(model)
    wrapped = nn.ModuleList([model])
    assert pack_weights(wrapped) == 1
    packed = wrapped[0]
    packed(x).square().sum().backward()
    exact(x).square().sum().backward()
    assert torch.equal(packed.weight.grad, exact.weight.grad)
    assert torch.equal(packed.bias.grad, exact.bias.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
        assert torch.equal(packed(x), exact(x))
    assert pack_weights(nn.ModuleList([nn.Linear(256, 300).double()])) == 0
    assert pack_weights(nn.ModuleList([nn.Linear(256, 300, device="meta")])) == 0


@torch.no_grad()
def test_copies_follow_their_weights():
    model, x = nn.Sequential(nn.Linear(256, 300)), torch.randn(3, 256)
    pack_weights(model)

    def check() -> None:
        layer = model[0]
        assert relative(model(x), nn.functional.linear(x, layer.weight, layer.bias)) < 1e-5

    check()
    model[0].weight.mul_(2)
    check()
    model.load_state_dict({"0.weight": torch.randn(300, 256), "0.bias": torch.randn(300)})
    check()
    model[0].weight = nn.Parameter(torch.randn(300, 256))
    check()
    model.bfloat16()
    half = x.bfloat16()
    assert relative(model(half), nn.functional.linear(half, model[0].weight, model[0].bias)) < 1e-2
    for dtype in (torch.float64, torch.float16):  # without kernels: by the weight itself
        model.to(dtype)
        other = x.to(dtype)
        assert torch.equal(model(other), nn.functional.linear(other, model[0].weight, model[0].bias))
    with torch.inference_mode():
        assert pack_weights(nn.Sequential(nn.Linear(256, 300))) == 0  # its weights count no changes


@torch.no_grad()
def test_a_weight_of_another_kind_is_left_to_itself():
    """Quantisation puts tensors of its own in a layer's place of the weight."""

    class Quantised(torch.Tensor):
        pass

    model, x = nn.Sequential(nn.Linear(256, 300, bias=False)), torch.randn(3, 256)
    pack_weights(model)
    weight = torch.randn(300, 256)
    model[0].weight = nn.Parameter(weight.as_subclass(Quantised), requires_grad=False)
    assert relative(model(x).as_subclass(torch.Tensor), x @ weight.T) < 1e-5


def test_models_stay_what_they_are(tmp_path: Path):
    """Ours and transformers': logits, greedy tokens, tied weights, copies, files."""
    ours, ids = small_model(), torch.randint(300, (2, 9))
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    ).eval()
    for model in (ours, llama):
        with torch.no_grad():
            expected = model(ids).logits
            tokens = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            names = list(model.state_dict())
            assert pack_weights(model) >= 8
            assert pack_weights(model) == 0  # nothing left to do
            assert list(model.state_dict()) == names
            assert relative(model(ids).logits, expected) < 1e-4
            again = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            assert torch.equal(again, tokens)
            assert relative(copy.deepcopy(model)(ids).logits, expected) < 1e-4
    assert ours.lm_head.weight is ours.model.embed.weight
    ours.save_pretrained(tmp_path)
    loaded = ResonanceForCausalLM.from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    with torch.no_grad():
        assert relative(ours(ids).logits, loaded(ids).logits) < 1e-4
