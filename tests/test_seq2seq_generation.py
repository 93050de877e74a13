"""The decoder's state and generation: any split of a target, beams, prompts, files; a source is read once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import relative
from contract import small_config, uneven
from test_seq2seq import bridges, ids, models, padded, small
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from resonance_nn import ResonanceCache, backbone
from resonance_nn.bridges import BRIDGES, Bridge
from resonance_nn.models.base import ResonanceModel
from resonance_nn.models.seq2seq import ResonanceForConditionalGeneration


@models
@torch.no_grad()
def test_any_split_of_the_target_equals_one_call(bridge: str, mixers: tuple[str, ...], tmp_path):
    model, source, target = small(bridge, mixers), ids(2, 15), ids(2, 175)
    whole = model(source, decoder_input_ids=target).logits
    cache: Any = None
    for sizes in (uneven(175), [3, *[1] * 20]):
        cache = None
        outputs: list[Tensor] = []
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


@bridges
@pytest.mark.parametrize("num_beams", [1, 4])
def test_multiplications_are_linear_in_both_lengths(bridge: str, num_beams: int):
    """Of matmuls: a source of n tokens adds as many for each further 64, each further token of the target the same
    again, and neither depends on the other length."""
    model = small(bridge)

    def operations(n: int, m: int) -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            model.generate(ids(1, n), min_new_tokens=m, max_new_tokens=m, do_sample=False, num_beams=num_beams)
        return counter.get_total_flops()

    base = operations(128, 8)  # two chunks: a first one has nothing before it
    longer, twice = operations(192, 8) - base, operations(256, 8) - base
    more, most = operations(128, 16) - base, operations(128, 24) - base
    assert min(longer, more) > 0
    assert twice == 2 * longer
    assert most == 2 * more
    assert operations(192, 16) - base == longer + more


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
    half = model.bfloat16().generate(source, max_new_tokens=5, do_sample=False)
    assert half.shape[0] == 2


def test_untied_head_and_a_config_left_as_it_was():
    config = small_config(tie_word_embeddings=False)
    model = ResonanceForConditionalGeneration(config)
    assert model.lm_head.weight is not model.encoder.embed.weight
    assert model.config.is_encoder_decoder
    assert not config.is_encoder_decoder
