"""Long sequences go through a block in segments, where memory is what matters, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from conftest import relative
from contract import STACKS, small_model

from resonance_nn import ResonanceConfig, backbone
from resonance_nn.backbone import Backbone, Block

L = 75


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, a mask with padding on all sides that leaves whole segments empty, and documents of some tokens."""
    torch.manual_seed(1)
    ids, mask = torch.randint(0, 61, (3, L)), torch.ones(3, L, dtype=torch.long)
    mask[0, :20], mask[1, 10:60], mask[2, 70:] = 0, 0, 0
    reset = torch.rand(3, L) < 0.08
    reset[2, 32] = True  # where a segment begins
    return ids, mask, reset


@pytest.mark.parametrize("stack", STACKS)
def test_segments_of_a_forward_pass(stack: str, monkeypatch: pytest.MonkeyPatch):
    model, (ids, mask, reset) = small_model(STACKS[stack]).double(), batch()

    @torch.no_grad()
    def read() -> tuple[torch.Tensor, torch.Tensor]:
        out = model(ids, attention_mask=mask, reset=reset, use_cache=True)
        following = model(ids[:, :9], past_key_values=out.past_key_values, use_cache=True)
        return out.logits, following.logits

    whole = read()
    calls = spy(monkeypatch, 16)
    for a, b in zip(read(), whole, strict=True):
        assert relative(a, b) < 1e-10
    in_segments = [name for name in model.config.layer_mixers if name != "attention"]
    assert calls.count(16) == 4 * len(in_segments)
    assert calls.count(L) == len(model.config.layer_mixers) - len(in_segments)


@pytest.mark.parametrize("stack", ["spectral_gate", "holographic", "hybrid_attention", "multi_scale"])
def test_segments_of_a_checkpointed_training_step(stack: str, monkeypatch: pytest.MonkeyPatch):
    model, (ids, mask, reset) = small_model(STACKS[stack]).double().train(), batch()

    def gradients() -> list[torch.Tensor]:
        loss = model(ids, attention_mask=mask, reset=reset, labels=ids.masked_fill(mask == 0, -100)).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    whole = gradients()
    calls = spy(monkeypatch, 16)
    gradients()
    assert set(calls) == {L}  # every activation is kept anyway
    model.activation_checkpointing_enable()
    calls.clear()
    for a, b in zip(gradients(), whole, strict=True):
        assert relative(a, b) < 1e-10
    assert calls.count(16) >= 4


def test_auxiliary_losses_are_means_over_the_segments(monkeypatch: pytest.MonkeyPatch):
    model = small_model(("spectral_gate",), entropy_weight=0.5, num_hidden_layers=1).train()
    model.activation_checkpointing_enable()
    ids = torch.randint(0, 61, (1, 48))
    spy(monkeypatch, 16)
    pieces = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: pieces.append(forward(*args)) or pieces[-1])
    aux = model(ids, labels=ids).aux_loss
    assert len(pieces) == 3
    assert torch.allclose(aux, torch.stack([losses[0] for _, _, losses in pieces]).mean())


def spy(monkeypatch: pytest.MonkeyPatch, segment: int) -> list[int]:
    """The lengths of the calls of a block from now on, with segments of that many tokens."""
    calls: list[int] = []
    monkeypatch.setattr(backbone, "SEGMENT", segment)
    forward = Block.forward

    def counted(self: Block, x: torch.Tensor, *args: object) -> object:
        calls.append(x.shape[1])
        return forward(self, x, *args)

    monkeypatch.setattr(Block, "forward", counted)
    return calls


def test_dropout_of_the_tokens_vectors():
    torch.manual_seed(0)
    stack = Backbone(ResonanceConfig(hidden_size=32, num_hidden_layers=1, vocab_size=2, dropout=0.25))
    x = torch.rand(4, 64, 32) + 1
    entered = stack.train()(x, return_hidden=True)[2][0]
    assert float((entered == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.allclose(entered[entered != 0], (x / 0.75)[entered != 0])
    assert torch.equal(stack.eval()(x, return_hidden=True)[2][0], x)
