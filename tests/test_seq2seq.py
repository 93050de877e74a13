"""Contracts of the encoder–decoder: what its decoder sees, its loss, what it refuses. Generation is in
``test_seq2seq_generation.py``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import relative
from contract import small_config
from torch import Tensor
from torch.nn import functional as F

from resonance_nn import ResonanceCache
from resonance_nn.bridges import BRIDGES
from resonance_nn.models.seq2seq import DecoderBlock, ResonanceForConditionalGeneration

bridges = pytest.mark.parametrize("bridge", BRIDGES)
MODELS = [
    ("memory", ("spectral_gate",)),
    ("memory", ("holographic", "attention")),
    ("spectral", ("spectral_gate",)),
    ("spectral", ("resonance",)),
]
models = pytest.mark.parametrize(("bridge", "mixers"), MODELS)


def small(bridge: str, mixers: tuple[str, ...] = ("spectral_gate",), **overrides: Any) -> Any:
    """A model whose parts are large enough for changes to show."""
    torch.manual_seed(0)
    special: dict[str, Any] = dict(decoder_start_token_id=1, eos_token_id=2, pad_token_id=0)
    config = small_config(mixers, bridge=bridge, **{**special, "initializer_range": 0.2, **overrides})
    return ResonanceForConditionalGeneration(config).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 61, shape)


def padded(rows: list[Tensor], side: str, value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows (1, ·) as a batch, and its mask."""
    L = max(row.shape[1] for row in rows)
    pads = [(L - row.shape[1], 0) if side == "left" else (0, L - row.shape[1]) for row in rows]
    batch = torch.cat([F.pad(row, pad, value=value) for row, pad in zip(rows, pads, strict=True)])
    return batch, torch.cat([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])


# --- what the decoder sees


@models
@torch.no_grad()
def test_decoder_is_causal_in_its_own_tokens(bridge: str, mixers: tuple[str, ...]):
    model, source, target = small(bridge, mixers).double(), ids(1, 12), ids(1, 40)
    before = model(source, decoder_input_ids=target).logits
    for t in (0, 1, 20, 38, 39):
        changed = target.clone()
        changed[0, t] = 3 + (changed[0, t] - 2) % 58
        difference = (model(source, decoder_input_ids=changed).logits - before).abs().amax(-1)[0]
        assert not (difference[:t] > 1e-10).any()
        assert difference[t] > 1e-6
        assert t == 39 or difference[t + 1 :].max() > 1e-8


@models
@torch.no_grad()
def test_every_source_token_reaches_every_target_token(bridge: str, mixers: tuple[str, ...]):
    model, source, target = small(bridge, mixers).double(), ids(1, 9), ids(1, 7)
    before = model(source, decoder_input_ids=target).logits
    for s in range(9):
        changed = source.clone()
        changed[0, s] = 3 + (changed[0, s] - 2) % 58
        assert (model(changed, decoder_input_ids=target).logits - before).abs().amax(-1).min() > 1e-8


@models
@torch.no_grad()
def test_other_rows_sources_do_not_matter_to_the_last_bit(bridge: str, mixers: tuple[str, ...]):
    model, source, target = small(bridge, mixers), ids(4, 20), ids(4, 11)
    mask = torch.ones_like(source)
    mask[1, 13:] = mask[3, :6] = 0
    logits = model(source, mask, decoder_input_ids=target).logits
    others = source.clone()
    others[[0, 2, 3]] = ids(3, 20)
    assert torch.equal(model(others, mask, decoder_input_ids=target).logits[1], logits[1])
    assert not torch.equal(model(others, mask, decoder_input_ids=target).logits[0], logits[0])
    order = torch.tensor([2, 0, 3, 1])
    again = model(source[order], mask[order], decoder_input_ids=target[order]).logits
    assert relative(again, logits[order]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@models
def test_padded_rows_equal_rows_alone(bridge: str, mixers: tuple[str, ...], side: str):
    """Source and target, outputs and gradients."""
    model = small(bridge, mixers).double()
    sources, targets = [ids(1, n) for n in (30, 7, 1)], [ids(1, m) for m in (4, 20, 9)]
    source, mask = padded(sources, side)
    labels, target_mask = padded(targets, side, -100)
    target, _ = padded(targets, side)
    out = model(
        source, mask, decoder_input_ids=target, decoder_attention_mask=target_mask, labels=labels, return_logits=True
    )
    losses = []
    for row, (x, y) in enumerate(zip(sources, targets, strict=True)):
        alone = model(x, decoder_input_ids=y, labels=y, return_logits=True)
        assert relative(out.logits[row][target_mask[row].bool()], alone.logits[0]) < 1e-10
        losses.append(alone.loss * y.shape[1])
    expected = torch.stack(losses).sum() / sum(y.shape[1] for y in targets)
    assert relative(out.loss, expected) < 1e-10
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert relative(a, b) < 1e-8


@bridges
@torch.no_grad()
def test_source_of_any_length_beside_any_other(bridge: str):
    model, lengths = small(bridge).double(), [1, 2, 3, 15, 16, 17, 63, 64, 65, 129, 257]
    source, target = ids(len(lengths), 257), ids(len(lengths), 5)
    mask = torch.arange(257) < torch.tensor(lengths)[:, None]
    mask[3] = mask[3].roll(100)
    mask[4, :16], mask[4, ::2][:16] = False, True  # padding in the middle
    out = model(source, mask, decoder_input_ids=target).logits
    noisy = model.encoder(source, mask).last_hidden_state.masked_fill(~mask[..., None], 9.0)
    other = model(attention_mask=mask, encoder_outputs=(noisy,), decoder_input_ids=target).logits
    assert relative(other, out) < 1e-12, "what stands at padding does not matter"
    for row in range(len(lengths)):
        alone = model(source[row : row + 1, mask[row]], decoder_input_ids=target[row : row + 1]).logits
        assert relative(out[row : row + 1], alone) < 1e-10


@bridges
@torch.no_grad()
def test_an_empty_source_is_finite(bridge: str):
    model, source, target = small(bridge), ids(2, 6), ids(2, 5)
    mask = torch.ones_like(source)
    mask[0] = 0
    out = model(source, mask, decoder_input_ids=target).logits
    assert torch.isfinite(out).all()
    assert relative(out[1:], model(source[1:], decoder_input_ids=target[1:]).logits) < 1e-5


# --- the loss


@models
def test_loss_is_the_cross_entropy_of_the_labels(bridge: str, mixers: tuple[str, ...]):
    model, source, labels = small(bridge, mixers, label_smoothing=0.1), ids(3, 10), ids(3, 8)
    labels[0, 5:] = labels[1, 2] = -100
    shifted = F.pad(labels, (1, 0), value=1)[:, :-1].masked_fill(F.pad(labels, (1, 0))[:, :-1] == -100, 0)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), shifted)
    out, logits = model(source, labels=labels), model(source, decoder_input_ids=shifted).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert relative(out.loss, expected) < 1e-5
    assert out.logits is None
    assert out.past_key_values is None
    assert relative(model(source, labels=labels, num_items_in_batch=7).loss * 7, expected * 20) < 1e-5
    assert relative(model(source, labels=labels, return_logits=True).logits, logits) < 1e-6
    assert relative(model(source, decoder_input_ids=shifted, logits_to_keep=3).logits, logits[:, -3:]) < 1e-6
    assert model(source, labels=torch.full_like(labels, -100)).loss == 0
    smoothed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    assert relative(model.train()(source, labels=labels).loss, smoothed) < 1e-5
    assert relative(model(source, labels=labels, return_dict=False)[0], smoothed) < 1e-5


@bridges
def test_the_mixers_losses_of_both_halves_count(bridge: str):
    stacks: dict[str, Any] = dict(encoder_mixers=("spectral_gate",), label_smoothing=0.0)
    source, labels = ids(2, 10), ids(2, 8)
    plain = small(bridge, **stacks).train()(source, labels=labels).loss
    both = small(bridge, **stacks, entropy_weight=0.5).train()
    loss = both(source, labels=labels).loss
    assert loss > plain
    assert plain < both(encoder_outputs=both.encoder(source)[:1], labels=labels).loss < loss


@models
def test_every_parameter_is_trained(bridge: str, mixers: tuple[str, ...]):
    model = small(bridge, mixers, initializer_range=0.02)
    source, labels = ids(2, 70), ids(2, 40)
    with torch.no_grad():
        assert torch.equal(model(source, labels=labels).loss, model.train()(source, labels=labels).loss)
    model(source, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    assert not any(p.is_complex() for p in (*model.parameters(), *model.buffers()))
    dropped = small(bridge, mixers, dropout=0.5).train()
    assert not torch.equal(dropped(source, labels=labels).loss, dropped(source, labels=labels).loss)


@bridges
def test_gradient_checkpointing_changes_nothing(bridge: str):
    source, labels, gradients = ids(2, 20), ids(2, 30), []
    for on in (False, True):
        model = small(bridge).train()
        if on:
            model.activation_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.decoder.blocks)
        model(source, labels=labels).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@bridges
@torch.no_grad()
def test_bf16_autocast_is_near_float32(bridge: str, scale: float):
    model, x, target = small(bridge, initializer_range=0.02), scale * torch.randn(2, 100, 32), ids(2, 50)
    exact = model(inputs_embeds=x, decoder_input_ids=target).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs_embeds=x, decoder_input_ids=target).logits.float()
    assert torch.isfinite(logits).all()
    assert (logits - exact).abs().max() <= 0.05 * exact.abs().max() + 1e-6


@bridges
@torch.no_grad()
def test_double_model_computes_in_double(bridge: str):
    model, source, target = small(bridge), ids(1, 40), ids(1, 30)
    double = copy.deepcopy(model).double()
    out = double(source, decoder_input_ids=target)
    assert relative(model(source, decoder_input_ids=target).logits, out.logits) < 1e-5
    assert all(t.dtype == torch.float64 for state in out.past_key_values.states for t in state.values())
    scaled = copy.deepcopy(double)  # a float32 step anywhere would round 1 + 1e-9 away
    for block in scaled.decoder.blocks:
        assert isinstance(block, DecoderBlock)
        block.bridge.out_proj.weight.mul_(1 + 1e-9)
    assert 1e-13 < (scaled(source, decoder_input_ids=target).logits - out.logits).abs().max() < 1e-6


# --- bad inputs


@bridges
def test_bad_inputs(bridge: str):
    model, source, target = small(bridge), ids(2, 9), ids(2, 7)
    for arguments, message in (
        (dict(input_ids=source), "decoder_input_ids = None: give what the decoder is to read, or labels"),
        (dict(labels=target), "the source: pass exactly one of input_ids, inputs_embeds and encoder_outputs"),
        (dict(input_ids=source, inputs_embeds=torch.zeros(2, 9, 32), labels=target), "pass exactly one"),
        (dict(input_ids=source, labels=target[0]), r"labels of shape \(7,\): must be \(B, m\)"),
        (dict(input_ids=source, labels=target[:, :0]), r"labels of shape \(2, 0\)"),
        (dict(input_ids=source, labels=target[:1]), r"decoder_input_ids of shape \(1, 7\): must be \(2, m\)"),
        (
            dict(input_ids=source, decoder_input_ids=target, labels=target[:, 1:]),
            r"labels of shape \(2, 6\): must be \(2, 7\)",
        ),
        (dict(input_ids=source, attention_mask=target, labels=target), r"attention_mask of shape \(2, 7\)"),
        (
            dict(input_ids=source, decoder_attention_mask=target[:, 1:], labels=target),
            r"decoder_attention_mask of shape \(2, 6\)",
        ),
        (dict(input_ids=source[:, :0], labels=target), "a sequence of 0 tokens"),
        (dict(input_ids=source, labels=target, past_key_values=object()), "type object: must be a ResonanceCache"),
        (dict(input_ids=source, labels=target, past_key_values=ResonanceCache(5)), "holds 5 states"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    without = small(bridge, decoder_start_token_id=None)
    with pytest.raises(ValueError, match="decoder_start_token_id = None: the token that a target begins with"):
        without(source, labels=target)
    assert small(bridge, decoder_start_token_id=None, bos_token_id=3)(source, labels=target).loss > 0
    other = ResonanceForConditionalGeneration(small_config(("holographic", "resonance"), bridge=bridge)).eval()
    with pytest.raises(ValueError, match="its mixer needs"):
        other(source, decoder_input_ids=target, past_key_values=model(source, decoder_input_ids=target).past_key_values)


def test_what_cannot_decode_or_encode():
    with pytest.raises(ValueError, match="'global_filter' sees the future"):
        small("memory", ("global_filter",))
    with pytest.raises(ValueError, match="bridge = 'attention'"):
        small("attention")
    with pytest.raises(ValueError, match="encoder_mixers"):
        small("memory", encoder_mixers=("none",))
