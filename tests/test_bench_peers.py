"""transformers' models beside ours: of one size, trained and read as we say, and refused where they do not fit."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.bench.models import (
    ModelOptions,
    PeerOptions,
    build_alone,
    build_beside,
    build_ours,
    check_causal,
    count,
    training_step,
)
from resonance_nn.bench.peers import PEERS, build_peer
from resonance_nn.loading import quiet_transformers

SMALL = ModelOptions(hidden_size=64, layers=2, vocab_size=300)


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    ours = build_ours(SMALL)
    with quiet_transformers():
        return build_beside(ours, tuple(PEERS), 128)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(("width", "layers", "vocab_size"), [(64, 2, 300), (256, 6, 8192), (512, 4, 8192)])
@pytest.mark.parametrize("overrides", [{}, {"expand": 2, "num_heads": 16}], ids=["default", "expand"])
def test_all_are_of_one_size(name, width, layers, vocab_size, overrides):
    if width == 64 and overrides:
        overrides = {**overrides, "num_heads": 2}
    options = ModelOptions(hidden_size=width, layers=layers, vocab_size=vocab_size, device="meta", overrides=overrides)
    ours = build_ours(options)
    models, notes = build_beside(ours, (name,), 1024)
    (model,) = models.values()
    assert abs(count(model) / count(ours) - 1) < 0.02
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.config.hidden_size, model.config.vocab_size) == (width, vocab_size)
    depth = model.config.num_hidden_layers
    assert depth == layers * (2 if name == "mamba" else 1) or (name == "mamba2" and layers < depth <= 2 * layers)
    assert name != "mamba2" or model.config.state_size >= 64
    assert notes == {PEERS[name].label: notes[PEERS[name].label]}
    assert notes[PEERS[name].label].startswith(f"{depth} layers, ")
    assert "{" not in notes[PEERS[name].label]
    assert count(build_alone(name, options, 1024)) == count(model)


@pytest.mark.parametrize("name", PEERS)
def test_a_training_step_reaches_every_parameter(name, built, monkeypatch):
    model = built[0][PEERS[name].label].train()
    gradients = []
    monkeypatch.setattr(model, "zero_grad", lambda set_to_none: gradients.extend(p.grad for p in model.parameters()))
    ids = torch.randint(300, (2, 70))
    with quiet_transformers():
        training_step(model, ids, SMALL)()
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert len(gradients) == len(list(model.parameters()))
    for p in model.parameters():
        p.grad = None


@pytest.mark.parametrize("name", PEERS)
def test_they_are_causal_too(name, built):
    with quiet_transformers():
        check_causal(built[0][PEERS[name].label], 300)


def test_none_within_the_tolerance_is_an_error():
    with pytest.raises(ValueError, match=r"hidden_size = 64: no Mamba-2 within 2% of our 100 parameters"):
        build_peer("mamba2", ResonanceConfig(hidden_size=64, vocab_size=300), 100, 128)


def test_rwkv_says_what_it_cannot_be():
    with pytest.raises(ValueError, match="layers = 1"):
        build_alone("rwkv", ModelOptions(hidden_size=64, layers=1, vocab_size=300), 128)


@pytest.mark.parametrize("peers", [("llama", "gpt"), ("llama", "llama"), ("",)])
def test_wrong_peers(peers):
    with pytest.raises(ValueError, match="peers = "):
        PeerOptions(peers=peers).check()


@pytest.mark.parametrize(
    "overrides", [{"no_such_field": 1}, {"hidden_size": 8}, {"use_cache": False}, {"tie_word_embeddings": False}]
)
def test_wrong_overrides(overrides):
    with pytest.raises(ValueError, match="overrides: "):
        ModelOptions(overrides=overrides).check()


def test_overrides_reach_our_configuration():
    options = ModelOptions(hidden_size=64, layers=2, vocab_size=300, overrides={"chunk_size": 16, "rotation": "none"})
    config = build_ours(options).config
    assert (config.chunk_size, config.rotation, config.hidden_size) == (16, "none", 64)


def test_quiet_hides_warnings_and_no_longer_than_asked():
    before = logging.get_verbosity()
    with quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before


def test_a_leaking_model_is_not_measured():
    class Leaking(ResonanceForCausalLM):
        def forward(self, input_ids, **kwargs):
            out = super().forward(input_ids, **kwargs)
            out.logits += out.logits.roll(-1, dims=1)
            return out

    model = Leaking(ResonanceConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(RuntimeError, match="not causal"):
        check_causal(model, 50)
