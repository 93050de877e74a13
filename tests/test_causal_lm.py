"""Contracts 1, 2, 5 to 8 for whole language models."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative
from contract import STACKS, VARIANTS, assert_causal, assert_no_leak, small_config, small_model, uneven
from torch import nn
from torch.nn import functional as F

from resonance_nn import ResonanceCache, ResonanceConfig, ResonanceForCausalLM
from resonance_nn.mixers import MIXERS, Mixer

stacks = pytest.mark.parametrize("mixers", STACKS.values(), ids=STACKS)


class CircularFFTMixer(Mixer):
    """What must never pass: a filter applied by FFTs without zero-padding, so that position 0 sees position L − 1."""

    def __init__(self, config: ResonanceConfig, layer_idx: int = 0) -> None:
        super().__init__(config, layer_idx)
        self.filter = nn.Parameter(0.3 * torch.randn(config.hidden_size, 64))

    def mix(self, x, *, length=None, reset=None, state=None, return_state=False, losses=None):
        L = x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(x.mT, n=L) * torch.fft.rfft(self.filter[:, :L], n=L), n=L).mT
        return y.to(x.dtype), {} if return_state else None


@pytest.fixture
def leaking_mixer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MIXERS, "circular", CircularFFTMixer)
    return ("circular",)


# --- 1, 2: causality and honesty


@stacks
def test_causality(mixers: tuple[str, ...]):
    assert_causal(small_model(mixers))


@stacks
def test_no_leak_on_iid_tokens(mixers: tuple[str, ...]):
    assert_no_leak(mixers)  # from both sides: a model that diverges proves nothing


OPTIONS = [variant for variant in VARIANTS if variant[1]]


@pytest.mark.parametrize(("name", "overrides"), OPTIONS)
def test_causality_of_options(name: str, overrides: dict):
    assert_causal(small_model((name,), **overrides))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), OPTIONS)
def test_no_leak_of_options_on_iid_tokens(name: str, overrides: dict):
    assert_no_leak((name,), **overrides)


def test_a_leaking_mixer_is_caught(leaking_mixer: tuple[str, ...]):
    with pytest.raises(AssertionError, match="changes outputs before it"):
        assert_causal(small_model(leaking_mixer))
    with pytest.raises(AssertionError, match="reads its answers"):
        assert_no_leak(leaking_mixer)


def test_non_causal_mixers_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MIXERS, "sees_all", type("SeesAll", (CircularFFTMixer,), {"causal": False}))
    with pytest.raises(ValueError, match="'sees_all' sees the future"):
        ResonanceForCausalLM(small_config(("sees_all",)))


# --- the loss


@stacks
def test_loss_is_the_cross_entropy_of_the_next_token(mixers: tuple[str, ...]):
    model = small_model(mixers)
    ids = torch.randint(0, 61, (2, 30))
    labels = ids.clone()
    labels[0, 5:9] = -100
    out = model(ids, labels=labels)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert relative(out.loss, expected) < 1e-5
    assert out.logits is None
    assert out.past_key_values is None
    assert relative(model(ids, labels=labels, return_logits=True).logits, logits) < 1e-6
    assert relative(model(ids, labels=labels, logits_to_keep=3).logits, logits[:, -3:]) < 1e-6
    assert (
        relative(model(ids, labels=labels, num_items_in_batch=7).loss * 7, (labels[:, 1:] != -100).sum() * expected)
        < 1e-5
    )
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_auxiliary_terms_in_training_only():
    ids = torch.randint(0, 61, (2, 30))
    model = small_model(("spectral_gate",), label_smoothing=0.1, z_loss_weight=0.01)
    plain = model(ids, labels=ids)
    assert plain.aux_loss is None
    out = model.train()(ids, labels=ids)
    assert relative(out.loss - out.aux_loss, plain.loss) < 1e-5
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    smoothed = F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    assert relative(out.loss, smoothed + 0.01 * logits.logsumexp(-1).square().mean()) < 1e-5


@stacks
def test_every_parameter_is_trained_and_dropout_is_the_only_difference(mixers: tuple[str, ...]):
    model = small_model(mixers)
    ids = torch.randint(0, 61, (2, 70))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.train()(ids).logits)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name
    dropped = small_model(mixers, dropout=0.5).train()
    assert not torch.equal(dropped(ids).logits, dropped(ids).logits)


@stacks
def test_gradient_checkpointing_changes_nothing(mixers: tuple[str, ...]):
    ids = torch.randint(0, 61, (2, 70))
    gradients, calls = [], []
    for on in (False, True):
        model = small_model(mixers).train()
        model.model.backbone.blocks[0].mixer_norm.register_forward_hook(lambda *_, on=on: calls.append(on))
        if on:
            model.activation_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.model.backbone.blocks)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert calls == [False, True, True], "recomputed in the backward pass, only when asked to"
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@stacks
def test_bf16_autocast_is_near_float32(mixers: tuple[str, ...], scale: float):
    model = small_model(mixers)
    x = scale * torch.randn(2, 100, 32)
    with torch.no_grad():
        exact = model(inputs_embeds=x).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs_embeds=x).logits.float()
    assert torch.isfinite(logits).all()
    assert (logits - exact).abs().max() <= 0.05 * exact.abs().max() + 1e-6


@stacks
def test_double_model_computes_in_double(mixers: tuple[str, ...]):
    model = small_model(mixers)
    ids = torch.randint(0, 61, (1, 100))
    double = copy.deepcopy(model).double()
    scaled = copy.deepcopy(double)  # a float32 step anywhere would round 1 + 1e-9 away
    with torch.no_grad():
        scaled.model.embed.weight.mul_(1 + 1e-9)
    with torch.no_grad():
        assert 1e-13 < (scaled.model(ids).last_hidden_state - double.model(ids).last_hidden_state).abs().max() < 1e-6
    cache = double(ids[:, :33], use_cache=True).past_key_values
    assert relative(double(ids[:, 33:], past_key_values=cache).logits, double(ids).logits[:, 33:]) < 1e-12
    difference = relative(model(ids).logits, copy.deepcopy(model).double()(ids).logits)
    assert difference < 1e-5
    out = model.double()(ids, use_cache=True)
    assert out.logits.dtype == torch.float64
    assert all(t.dtype in (torch.float64, torch.int64) for s in out.past_key_values.states for t in s.values())


# --- 5: padding and documents


@pytest.mark.parametrize("side", ["left", "right"])
@stacks
def test_padded_row_equals_row_alone(mixers: tuple[str, ...], side: str):
    model = small_model(mixers)
    rows = [torch.randint(0, 61, (1, n)) for n in (50, 23, 1)]
    ids, mask = pad_rows(rows, side)
    out = model(ids, attention_mask=mask, use_cache=True)
    after = torch.randint(0, 61, (3, 5))
    following = model(after, past_key_values=out.past_key_values).logits
    for i, row in enumerate(rows):
        alone = model(row, use_cache=True)
        assert relative(out.logits[i][mask[i].bool()], alone.logits[0]) < 1e-5
        assert relative(following[i], model(after[i : i + 1], past_key_values=alone.past_key_values).logits[0]) < 1e-5
    labels = ids.masked_fill(mask == 0, -100)
    if side == "right":
        losses = [F.cross_entropy(model(r).logits[0, :-1], r[0, 1:], reduction="sum") for r in rows if r.shape[1] > 1]
        total = sum(r.shape[1] - 1 for r in rows)
        assert relative(model(ids, attention_mask=mask, labels=labels).loss, sum(losses) / total) < 1e-5


def pad_rows(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    L = max(r.shape[1] for r in rows)
    pads = [(L - r.shape[1], 0) if side == "left" else (0, L - r.shape[1]) for r in rows]
    ids = torch.cat([F.pad(r, p) for r, p in zip(rows, pads, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)])
    return ids, mask


@stacks
def test_packed_documents_equal_separate_ones(mixers: tuple[str, ...]):
    model = small_model(mixers)
    documents = [torch.randint(0, 61, (1, n)) for n in (40, 1, 90)]
    reset = torch.zeros(1, 131, dtype=torch.bool)
    reset[0, [0, 40, 41]] = True
    ids = torch.cat(documents, 1)
    packed = model(ids, reset=reset).logits
    separate = torch.cat([model(d).logits for d in documents], 1)
    assert relative(packed, separate) < 1e-5
    losses = [model(d, labels=d, num_items_in_batch=1).loss for d in documents if d.shape[1] > 1]
    expected = torch.autograd.grad(torch.stack(losses).sum(), list(model.parameters()))
    loss = model(ids, labels=ids, reset=reset, num_items_in_batch=1).loss
    assert relative(loss, sum(losses)) < 1e-5
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert relative(a, b) < 1e-4


# --- state


@stacks
def test_any_split_equals_one_call(mixers: tuple[str, ...]):
    model = small_model(mixers)
    ids = torch.randint(0, 61, (2, 300))
    cache, outputs = None, []
    with torch.no_grad():
        for piece in ids.split(uneven(300), 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            assert cache is None or out.past_key_values is cache, "updated in place"
            cache = out.past_key_values
            outputs.append(out.logits)
        assert relative(torch.cat(outputs, 1), model(ids).logits) < 1e-5
    assert cache.get_seq_length() == 300


@stacks
def test_cache_branches_saves_and_loads(mixers: tuple[str, ...], tmp_path):
    model = small_model(mixers)
    ids, more = torch.randint(0, 61, (2, 50)), torch.randint(0, 61, (2, 20))
    cache = model(ids, use_cache=True).past_key_values
    cache.save(tmp_path / "state.safetensors", input_ids=ids)
    branch = copy.deepcopy(cache)
    expected = model(more, past_key_values=cache).logits
    assert torch.equal(model(more, past_key_values=branch).logits, expected)
    loaded, extra = ResonanceCache.load(tmp_path / "state.safetensors")
    assert torch.equal(extra["input_ids"], ids)
    assert loaded.get_seq_length() == 50
    assert torch.equal(model(more, past_key_values=loaded).logits, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_bad_state_files(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        ResonanceCache.load(tmp_path / "missing")
    (tmp_path / "damaged").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="cannot be read"):
        ResonanceCache.load(tmp_path / "damaged")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a saved prompt state"):
        ResonanceCache.load(tmp_path / "other")


def test_use_cache_defaults():
    model, ids = small_model(("spectral_gate",)), torch.randint(0, 61, (1, 5))
    assert model(ids).past_key_values is not None
    assert model(ids, labels=ids).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model.eval()(ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids, use_cache=True).past_key_values is not None


# --- 8: generation


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}], ids=["greedy", "beam4"])
@stacks
def test_generate_cached_equals_uncached_left_padded(mixers: tuple[str, ...], options: dict):
    model = small_model(mixers, initializer_range=0.3)
    ids, mask = pad_rows([torch.randint(0, 61, (1, n)) for n in (20, 7, 1)], "left")
    common = dict(attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, **options)
    cached = model.generate(ids, **common)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **common))
    assert torch.equal(cached, model.generate(ids, prefill_chunk_size=7, **common))  # first chunks are all padding
    for i in range(3):  # and a row alone says the same
        alone = model.generate(ids[i : i + 1, mask[i].bool()], max_new_tokens=30, do_sample=False, **options)
        assert torch.equal(cached[i, 20:], alone[0, int(mask[i].sum()) :])


@stacks
def test_generate_sampling_prefill_and_branches(mixers: tuple[str, ...]):
    model, ids = small_model(mixers, initializer_range=0.3), torch.randint(0, 61, (2, 40))
    options = dict(max_new_tokens=20, do_sample=True, top_k=20, top_p=0.9, temperature=0.8)
    results = []
    for extra in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}):
        torch.manual_seed(5)
        results.append(model.generate(ids, **options, **extra))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    torch.manual_seed(6)
    assert not torch.equal(results[0], model.generate(ids, **options))
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    size = cache.num_bytes()
    greedy = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=20, do_sample=False))
    if "attention" not in mixers:
        assert cache.num_bytes() == size


def test_generate_refuses_foreign_caches():
    from transformers import DynamicCache

    model, ids = small_model(("spectral_gate",)), torch.randint(0, 61, (1, 5))
    with pytest.raises(ValueError, match="must be a ResonanceCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation = 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
