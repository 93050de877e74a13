"""Mamba-2 as one setting of ``spectral_gate``: equal to ``transformers``' in values, gradients and decoding."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from torch.nn import functional as F
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from resonance_nn import ResonanceConfig, ResonanceForCausalLM, load_mamba2_layer, mamba2_config
from resonance_nn.mixers.spectral_gate import inverse_softplus


def mamba2_layer(dtype: torch.dtype = torch.float32, **overrides) -> Mamba2Mixer:
    fields = dict(hidden_size=64, num_heads=8, head_dim=16, state_size=16, n_groups=1, num_hidden_layers=1)
    torch.manual_seed(0)
    layer = Mamba2Mixer(Mamba2Config(**{**fields, **overrides}), 0).eval()
    with torch.no_grad():
        for p in (layer.D, layer.norm.weight, layer.conv1d.bias):
            if p is not None:
                p.add_(0.3 * torch.randn(p.shape))
    return layer.to(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_groups": 2, "time_step_limit": (0.01, 0.05)},
        {"n_groups": 8, "num_heads": 16, "head_dim": 8, "state_size": 2, "use_conv_bias": False, "conv_kernel": 3},
    ],
)
def test_equals_transformers_mamba2(overrides: dict, dtype: torch.dtype):
    """Values and gradients. In float64 too the original's scan and norm are float32."""
    layer = mamba2_layer(dtype, **overrides)
    mixer = load_mamba2_layer(layer)
    assert {p.dtype for p in mixer.parameters()} == {dtype}
    for L in (1, 63, 64, 257):
        x = torch.randn(2, L, 64, dtype=dtype, requires_grad=True)
        theirs, ours = layer(x), mixer(x)[0]
        assert relative(ours, theirs) < (1e-5 if dtype == torch.float32 else 1e-6)
        weight = torch.randn_like(theirs)
        expected = torch.autograd.grad((theirs * weight).sum(), [x, layer.out_proj.weight, layer.dt_bias])
        gradients = torch.autograd.grad((ours * weight).sum(), [x, mixer.out_proj.weight, mixer.step_bias])
        for a, b in zip(gradients, expected, strict=True):
            assert relative(a, b) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_groups", [1, 2])
def test_decodes_as_transformers_mamba2(n_groups: int):
    layer = mamba2_layer(n_groups=n_groups)
    mixer, cache, state = load_mamba2_layer(layer), DynamicCache(config=Mamba2Config(num_hidden_layers=1)), None
    x = torch.randn(2, 80, 64)
    with torch.no_grad():
        for piece in (x[:, :33], *x[:, 33:].split(1, 1)):
            theirs = layer(piece, cache_params=cache)
            ours, state = mixer(piece, state=state, return_state=True)
            assert relative(ours, theirs) < 1e-5


def test_half_precision_layers_keep_what_adds_up_in_float32():
    mixer = load_mamba2_layer(mamba2_layer(torch.bfloat16))
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert mixer.damping.dtype == mixer.step_proj.weight.dtype == torch.float32
    assert torch.isfinite(mixer(torch.randn(1, 70, 64, dtype=torch.bfloat16))[0]).all()


@pytest.mark.parametrize(
    ("overrides", "field"),
    [({"hidden_act": "gelu"}, "hidden_act"), ({"use_bias": True}, "use_bias"), ({"state_size": 15}, "state_size")],
)
def test_what_cannot_be_expressed_is_refused(overrides: dict, field: str):
    with pytest.raises(ValueError, match=f"{field} = "):
        load_mamba2_layer(mamba2_layer(**overrides))


def test_weights_are_copies():
    layer = mamba2_layer()
    mixer = load_mamba2_layer(layer)
    before = mixer(x := torch.randn(1, 5, 64))[0]
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    assert torch.equal(mixer(x)[0], before)


def test_mamba2_config_is_a_mamba2(tmp_path):
    """Of its parameters' shapes and initial values, and after saving and loading."""
    config = mamba2_config(64, 2, 61, state_size=16, head_dim=16, n_groups=2)
    config.save_pretrained(tmp_path)
    config = ResonanceConfig.from_pretrained(tmp_path)
    model = ResonanceForCausalLM(config)
    mixer = model.model.backbone.blocks[0].mixer
    expected = load_mamba2_layer(mamba2_layer(n_groups=2))
    assert {n: p.shape for n, p in mixer.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert relative(F.softplus(mixer.damping), torch.arange(1.0, 9)) < 1e-6
    delta = F.softplus(mixer.step_bias)
    assert ((delta > 0.00099) & (delta < 0.101)).all()
    assert len(set(delta.tolist())) == 8
    with pytest.raises(ValueError, match="head_dim = 48"):
        mamba2_config(64, 2, 61, head_dim=48)


def test_inverse_softplus():
    y = torch.tensor([1e-12, 1e-3, 1.0, 30.0, 1e4], dtype=torch.float64)
    assert ((F.softplus(inverse_softplus(y)) - y).abs() / y < 1e-9).all()
