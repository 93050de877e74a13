"""Contracts of the encoder–decoder and of the bridges between its halves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import relative
from contract import small_config, uneven
from torch import Tensor
from torch.nn import functional as F

from resonance_nn import ResonanceCache, ResonanceConfig, backbone
from resonance_nn.bridges import BRIDGES, Bridge, MemoryBridge, extent_modes
from resonance_nn.models.base import ResonanceModel
from resonance_nn.models.seq2seq import DecoderBlock, ResonanceForConditionalGeneration
from resonance_nn.optim import build_optimizer

bridges = pytest.mark.parametrize("bridge", BRIDGES)
MODELS = [
    ("memory", ("spectral_gate",)),
    ("memory", ("holographic", "attention")),
    ("spectral", ("spectral_gate",)),
    ("spectral", ("resonance",)),
]
models = pytest.mark.parametrize(("bridge", "mixers"), MODELS)


def small(bridge: str, mixers: tuple[str, ...] = ("spectral_gate",), **overrides: Any):
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


# --- the bridges alone


def test_memory_is_the_delta_rule_over_the_source():
    torch.manual_seed(0)
    bridge, source = MemoryBridge(small_config()).double(), torch.randn(2, 90, 32, dtype=torch.float64)
    H, K, P = 2, 16, 16
    k, v = bridge.source_proj(source).split((H * K, 32), -1)
    w = bridge.conv.weight  # (7, H·K), the fourth is a token's own
    neighbours = F.pad(k, (0, 0, 3, 3))
    k = torch.stack([w[j] * neighbours[:, 6 - j : 96 - j] for j in range(7)]).sum(0)
    k = F.normalize(F.silu(k).view(2, 90, H, K), dim=-1)
    v, beta = v.view(2, 90, H, P), torch.sigmoid(bridge.beta_proj(source))
    S = torch.zeros(2, H, K, P, dtype=torch.float64)
    for s in range(90):
        error = v[:, s] - (k[:, s, :, None] @ S).squeeze(2)
        S = S + beta[:, s, :, None, None] * k[:, s, :, :, None] * error[:, :, None]
    assert relative(bridge.write(source), S) < 1e-4  # UNIT_EPS


@torch.no_grad()
def test_modes_are_those_of_the_fourier_transform():
    v = torch.randn(3, 40, 6, dtype=torch.float64)
    length = torch.tensor([40, 17, 1])
    v[1, 17:] = v[2, 1:] = 0
    Z = extent_modes(v, 25, length)
    for row, n in enumerate(length.tolist()):
        k = torch.arange(25)
        turn = torch.exp(-1j * torch.pi * k.double() / n)[:, None]
        spectrum = torch.fft.fft(v[row, :n], dim=0)[k % n] / n * turn
        assert relative(Z[row], torch.cat((spectrum.real, spectrum.imag))) < 1e-12
    assert relative(extent_modes(v[:1], 25), Z[:1]) < 1e-14
    long = torch.ones(1, 100_000, 1)
    assert relative(extent_modes(long, 3)[0, :1, 0], torch.ones(1)) < 1e-4
    assert extent_modes(long, 3)[0, 1:].abs().max() < 1e-4


@bridges
@torch.no_grad()
def test_what_is_read_does_not_grow_with_the_source(bridge: str):
    torch.manual_seed(0)
    of = BRIDGES[bridge](small_config()).double()
    x, source = torch.randn(1, 50, 32).double(), torch.randn(1, 20, 32).double()
    y = of.read(x, of.write(source))
    repeated = of.read(x, of.write(source.repeat(1, 50, 1)))
    assert 0.5 < float(repeated.norm() / y.norm()) < 2


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


# --- state and generation


@models
@torch.no_grad()
def test_any_split_of_the_target_equals_one_call(bridge: str, mixers: tuple[str, ...], tmp_path):
    model, source, target = small(bridge, mixers), ids(2, 15), ids(2, 175)
    whole = model(source, decoder_input_ids=target).logits
    for sizes in (uneven(175), [3, *[1] * 20]):
        cache, outputs = None, []
        for piece in target[:, : sum(sizes)].split(sizes, 1):
            out = model(None if cache else source, decoder_input_ids=piece, past_key_values=cache, use_cache=True)
            assert cache is None or out.past_key_values is cache, "updated in place"
            cache = out.past_key_values
            outputs.append(out.logits)
        assert cache.get_seq_length() == sum(sizes)
        assert relative(torch.cat(outputs, 1), whole[:, : sum(sizes)]) < 1e-5
    cache.save(tmp_path / "state")
    loaded, _ = ResonanceCache.load(tmp_path / "state")
    expected = model(decoder_input_ids=target[:, :4], past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(decoder_input_ids=target[:, :4], past_key_values=loaded).logits, expected)


@models
@torch.no_grad()
def test_segments_of_a_long_target(bridge: str, mixers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    model, source, target = small(bridge, mixers).double(), ids(2, 15), ids(2, 75)
    whole = model(source, decoder_input_ids=target).logits
    monkeypatch.setattr(backbone, "SEGMENT", 16)
    assert relative(model(source, decoder_input_ids=target).logits, whole) < 1e-10


@bridges
@torch.no_grad()
def test_state_has_one_size_whatever_the_lengths(bridge: str):
    model = small(bridge)
    sizes = {
        model(ids(1, n), decoder_input_ids=ids(1, m)).past_key_values.num_bytes()
        for n in (1, 7, 300)
        for m in (1, 2, 200)
    }
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4, "length_penalty": 0.7}, {"do_sample": True, "top_k": 20, "temperature": 0.9}],
    ids=["greedy", "beam4", "sampled"],
)
@models
def test_generate_cached_equals_uncached(bridge: str, mixers: tuple[str, ...], options: dict):
    model = small(bridge, mixers, initializer_range=0.3)
    for side in ("left", "right"):
        rows = [ids(1, n) for n in (20, 7, 1)]
        source, mask = padded(rows, side)
        common: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False, **options}
        results = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            results.append(model.generate(source, attention_mask=mask, use_cache=use_cache, **common))
        assert torch.equal(*results)
        assert (results[0][:, 0] == 1).all()
        for row, alone in enumerate(rows if not common["do_sample"] else []):
            said = model.generate(alone, **common)[0]
            assert torch.equal(results[0][row, : len(said)], said)
            assert (results[0][row, len(said) :] <= 2).all()  # padding or end


@bridges
def test_generate_goes_on_from_prompts(bridge: str):
    model, source = small(bridge, initializer_range=0.3), ids(2, 9)
    prompts, mask = padded([torch.cat((torch.ones(1, 1).long(), ids(1, m)), 1) for m in (6, 2)], "left")
    common: dict[str, Any] = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    both = model.generate(source, decoder_input_ids=prompts, decoder_attention_mask=mask, **common)
    for row in range(2):
        prompt = prompts[row : row + 1, mask[row].bool()]
        alone = model.generate(source[row : row + 1], decoder_input_ids=prompt, **common)
        assert torch.equal(both[row, -8:], alone[0, -8:])
    with pytest.raises(ValueError, match="ends in padding"):
        model.generate(source, decoder_input_ids=prompts, decoder_attention_mask=mask.flip(1), **common)
    with pytest.raises(ValueError, match="cache_implementation = 'static'"):
        model.generate(source, cache_implementation="static", **common)


@pytest.mark.parametrize("num_beams", [1, 4])
@bridges
def test_a_source_is_read_and_written_once(bridge: str, num_beams: int, monkeypatch: pytest.MonkeyPatch):
    model, source = small(bridge), ids(3, 50)
    calls: dict[str, list[int]] = {"encode": [], "write": [], "read": []}

    def counted(cls: type, method: str, name: str) -> None:
        original = getattr(cls, method)

        def count(self: Any, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            calls[name].append(source.shape[1] if x is None else x.shape[1])
            return original(self, *(() if x is None else (x,)), *args, **kwargs)

        monkeypatch.setattr(cls, method, count)

    counted(ResonanceModel, "forward", "encode")
    counted(BRIDGES[bridge], "write", "write")
    counted(Bridge, "read", "read")
    model.generate(source, max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=num_beams)
    assert calls["encode"] == [50]
    assert calls["write"] == [50, 50], "a block each, not once a step"
    assert calls["read"] == [1] * 24, "token by token"


@models
def test_saved_and_loaded(bridge: str, mixers: tuple[str, ...], tmp_path):
    model, source, labels = small(bridge, mixers, num_encoder_layers=3), ids(2, 9), ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded, info = ResonanceForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(source, labels=labels).loss, model(source, labels=labels).loss)
    assert loaded.lm_head.weight is loaded.encoder.embed.weight is loaded.get_input_embeddings().weight
    assert loaded.generation_config.decoder_start_token_id == 1
    assert len(loaded.encoder.backbone.blocks) == 3
    assert (loaded.get_encoder(), loaded.get_decoder()) == (loaded.encoder, loaded.decoder)
    half = model.to(torch.bfloat16).generate(source, max_new_tokens=5, do_sample=False)
    assert half.shape[0] == 2


def test_untied_head_and_a_config_left_as_it_was():
    config = small_config(tie_word_embeddings=False)
    model = ResonanceForConditionalGeneration(config)
    assert model.lm_head.weight is not model.encoder.embed.weight
    assert model.config.is_encoder_decoder
    assert not config.is_encoder_decoder


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


# --- learning


def accuracy_of_reversing(bridge: str, steps: int) -> float:
    """Of the tokens that a small model says when asked for 8 random ones of 19 in reverse order."""
    torch.manual_seed(0)
    config = ResonanceConfig(
        vocab_size=20,
        hidden_size=64,
        num_heads=2,
        num_hidden_layers=1,
        num_encoder_layers=1,
        initial_context=16,
        bridge=bridge,
        bos_token_id=0,
    )
    model = ResonanceForConditionalGeneration(config).train()
    optimizer = build_optimizer(model, lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 10) * (1 - i / steps))
    for _ in range(steps):
        source = torch.randint(1, 20, (64, 8))
        loss = model(source, labels=source.flip(1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    source = torch.randint(1, 20, (100, 8))
    said = model.eval().generate(source, max_new_tokens=8, do_sample=False)[:, 1:]
    return (said == source.flip(1)).double().mean().item()


def test_the_memory_carries_what_was_said():
    assert accuracy_of_reversing("memory", 200) > 0.95


def test_the_modes_carry_what_was_said():
    assert accuracy_of_reversing("spectral", 30) > 0.25  # by chance: 0.05
