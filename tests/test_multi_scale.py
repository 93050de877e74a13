"""Coarse copies of a mixer against their definition, their schedule, and long streams."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from conftest import relative
from contract import make_mixer, small_config, small_model
from torch import Tensor

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.cli.models import describe_size
from resonance_nn.mixers import MIXERS, MultiScaleMixer, build_mixer, mixer_class
from resonance_nn.mixers.multi_scale import CoarseMixer

CAUSAL = [name for name, mixer in MIXERS.items() if mixer.causal]


def by_definition(mixer: MultiScaleMixer, x: Tensor) -> Tensor:
    """One document x (1, L, D): blocks, summaries and releases one by one."""
    y, L = mixer.inner(x)[0], x.shape[1]
    for coarse in mixer.coarse.values():
        s, outputs = coarse.scale, []
        blocks = [x[:, begin : begin + s] for begin in range(0, L - s + 1, s)]
        if blocks:
            u = torch.stack([(coarse.pool * block).sum(1) for block in blocks], dim=1)
            h, _ = coarse.mixer(coarse.norm(u))
        for t in range(L):
            finished = (t + 1) // s
            held = h[:, finished - 1] if finished else torch.zeros_like(x[:, 0])
            gate = torch.sigmoid(coarse.release_proj(x[:, t]) + coarse.release_bias)
            outputs.append(gate.repeat_interleave(mixer.head_dim, dim=-1) * held)
        y = y + torch.stack(outputs, dim=1)
    return y


def weighty(name: str, **overrides) -> MultiScaleMixer:
    """In float64, with what is a constant at first made different everywhere, and coarse outputs that count."""
    mixer = make_mixer(f"multi_scale:{name}", **overrides)
    assert isinstance(mixer, MultiScaleMixer)
    with torch.no_grad():
        for coarse in mixer.coarse.values():
            coarse.pool.add_(torch.randn_like(coarse.pool))
            coarse.release_bias.copy_(torch.randn_like(coarse.release_bias))
        for parameter, p in mixer.named_parameters():
            if parameter.endswith("conv.weight"):
                p.copy_(torch.where(p == 0, 0.1 * torch.randn_like(p), p))
    return mixer


@pytest.mark.parametrize("L", [1, 2, 5, 70])
@pytest.mark.parametrize(("name", "scales"), [("spectral_gate", (4, 16)), ("resonance", (3,)), ("attention", (2, 7))])
def test_equals_the_definition(name: str, scales: tuple[int, ...], L: int):
    """Values and gradients."""
    mixer = weighty(name, scales=scales)
    x = torch.randn(1, L, 32, dtype=torch.float64, requires_grad=True)
    inputs, results = [x, *mixer.parameters()], []
    for y in (by_definition(mixer, x), mixer(x)[0]):
        gradients = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
        results.append([y, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True))])
    largest = max(float(expected.detach().abs().max()) for expected in results[0])
    for actual, expected in zip(results[1], results[0], strict=True):  # a gradient may be 0 but for rounding
        scale = max(float(expected.detach().abs().max()), 1e-6 * largest)
        assert (actual - expected).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("name", CAUSAL)
def test_every_causal_mixer_can_be_wrapped(name: str):
    """Causality, and any split, step by step too, with the constancy of the state."""
    mixer = weighty(name, scales=(2, 5))
    x = torch.randn(2, 33, 32, dtype=torch.float64)
    with torch.no_grad():
        y, final = mixer(x, return_state=True)
        assert set(final) == set(mixer.state_names)
        for t in (0, 1, 9, 16, 32):
            changed = x.clone()
            changed[:, t] += 1
            difference = (mixer(changed)[0] - y).abs().amax((0, 2))
            assert (difference[:t] <= 1e-10).all()
            assert difference[t] > 1e-6
        for sizes in ([1] * 33, [4, 1, 7, 21], [12, 20, 1]):
            state, outputs = None, []
            for piece in x.split(sizes, 1):
                y_piece, state = mixer(piece, state=state, return_state=True)
                outputs.append(y_piece)
            assert relative(torch.cat(outputs, 1), y) < 1e-10
    assert mixer.constant_state == MIXERS[name].constant_state
    assert (mixer.state_bytes(1) == mixer.state_bytes(33)) == mixer.constant_state


def test_a_block_is_released_to_the_token_that_finishes_it():
    """What a coarse mixer's output at t depends on: with 5 tokens a block, those of the blocks finished by t."""
    coarse = CoarseMixer(small_config(("attention",)), 0, MIXERS["attention"], 5).double()
    x = torch.randn(1, 23, 32, dtype=torch.float64)

    def output(x: Tensor) -> Tensor:
        with torch.no_grad():
            return coarse(x)[0]

    y = output(x)
    assert (y[:, :4] == 0).all()
    for source in range(23):
        changed = x.clone()
        changed[:, source] += 1
        own = torch.arange(23) == source  # the gate
        seen = ((output(changed) - y).abs().amax((0, 2)) > 1e-9) & ~own
        release = source // 5 * 5 + 4
        assert seen.tolist() == [t >= release and t != source for t in range(23)]


def test_decoding_runs_a_coarse_mixer_when_a_block_is_finished(monkeypatch: pytest.MonkeyPatch):
    """Once in s tokens, also for rows at different phases where none of them finishes a block."""
    mixer = weighty("spectral_gate", scales=(4, 16))
    calls = dict.fromkeys((4, 16), 0)
    for s, coarse in zip(calls, mixer.coarse.values(), strict=True):
        inner = coarse.mixer.mix

        def counted(*args, s=s, inner=inner, **kwargs):
            calls[s] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(coarse.mixer, "mix", counted)
    x = torch.randn(2, 65, 32, dtype=torch.float64)
    mask = torch.tensor([[True], [False]])
    with torch.no_grad():
        _, state = mixer(x[:, :1], mask=mask, return_state=True)  # the second row is a token behind
        calls.update({4: 0, 16: 0})
        for t in range(1, 65):
            _, state = mixer(x[:, t : t + 1], state=state, return_state=True)
    assert calls == {4: 16 + 16, 16: 4 + 4}


@pytest.mark.parametrize("name", ["spectral_gate", "resonance", "sliding_attention"])
def test_rows_at_different_phases(name: str):
    """A batch of prompts of unlike lengths, continued by tokens, by pieces and with pauses, equals its rows alone."""
    mixer = weighty(name, scales=(3, 4))
    lengths, more = (1, 6, 12, 23), 30
    x = torch.randn(4, 23, 32, dtype=torch.float64)
    mask = torch.arange(23) >= 23 - torch.tensor(lengths)[:, None]
    rest = torch.randn(4, more, 32, dtype=torch.float64)
    rest_mask = torch.rand(4, more) < 0.8
    with torch.no_grad():
        for sizes in ([1] * more, [7, 1, 1, 21]):
            _, state = mixer(x, mask=mask, return_state=True)
            outputs = []
            for piece, m in zip(rest.split(sizes, 1), rest_mask.split(sizes, 1), strict=True):
                y, state = mixer(piece, mask=m, state=state, return_state=True)
                outputs.append(y)
            y = torch.cat(outputs, 1)
            for row, n in enumerate(lengths):
                whole = torch.cat((x[row, 23 - n :], rest[row, rest_mask[row]]))[None]
                assert relative(y[row, rest_mask[row]], mixer(whole)[0][0, n:]) < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_documents_and_padding_anywhere(seed: int):
    """Random boundaries, padding and pieces: every document's outputs are those of the document alone."""
    generator = torch.Generator().manual_seed(seed)

    def chance(p: float) -> Tensor:
        return torch.rand(12, 48, generator=generator) < p

    mixer = weighty("spectral_gate", scales=(2, 3))
    x = torch.randn(12, 48, 32, dtype=torch.float64, generator=generator)
    mask, reset = ~chance(0.1), chance(0.2)
    sizes = [3, 1, 5, 1, 1, 12, 25]
    state, outputs = None, []
    with torch.no_grad():
        for piece, m, r in zip(x.split(sizes, 1), mask.split(sizes, 1), reset.split(sizes, 1), strict=True):
            y, state = mixer(piece, mask=m, reset=r, state=state, return_state=True)
            outputs.append(y)
        y = torch.cat(outputs, 1)
        for row in range(12):
            real, actual = x[row, mask[row]], y[row, mask[row]]
            begins = [0, *reset[row, mask[row]].nonzero().flatten().tolist(), len(real)]
            for begin, end in itertools.pairwise(begins):
                if end > begin:
                    assert relative(actual[begin:end], mixer(real[None, begin:end])[0][0]) < 1e-10


def test_batch_order_does_not_matter():
    mixer, x = weighty("spectral_gate"), torch.randn(4, 70, 32, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert relative(mixer(x[order])[0], mixer(x)[0][order]) < 1e-12


def test_a_stream_of_65536_tokens():
    """Pieces of any length with the carried state reproduce the full call, a few single tokens among them."""
    config = small_config(("multi_scale:spectral_gate",), hidden_size=8, num_heads=1, scales=(4, 64))
    mixer = build_mixer(config.mixers[0], config).double()
    L, sizes, cycle = 65_536, [], [1, 5000, 64, 1, 1, 20_000, 7, 999]
    while sum(sizes) < L:
        sizes.append(min(cycle[len(sizes) % len(cycle)], L - sum(sizes)))
    x = torch.randn(1, L, 8, dtype=torch.float64)
    state, outputs = None, []
    with torch.no_grad():
        whole, final = mixer(x, return_state=True)
        for piece in x.split(sizes, 1):
            y, state = mixer(piece, state=state, return_state=True)
            outputs.append(y)
    assert relative(torch.cat(outputs, 1), whole) < 1e-10
    for name, t in final.items():
        assert relative(state[name].double(), t.double()) < 1e-10


def test_time_constants_are_counted_in_blocks():
    mixer = make_mixer("multi_scale:spectral_gate", initial_context=64, scales=(4, 16, 50))
    assert mixer.inner.longest == 64
    assert [coarse.mixer.longest for coarse in mixer.coarse.values()] == [16, 4, 2]


def test_auxiliary_losses_of_all_copies_and_none_of_empty_blocks():
    class Noisy(MIXERS["resonance"]):
        def mix(self, x, *, losses=None, **kwargs):
            if losses is not None:
                losses.append(x.new_ones(()))
            return super().mix(x, **kwargs)

    mixer = MultiScaleMixer(small_config(("resonance",), scales=(4, 16)), 0, Noisy)
    for L, expected in ((3, 1), (4, 2), (15, 2), (16, 3)):
        losses: list[Tensor] = []
        mixer(torch.randn(2, L, 32), losses=losses)
        assert len(losses) == expected
    losses = []
    mixer(torch.randn(2, 8, 32), mask=torch.arange(8) >= torch.tensor([[5], [7]]), losses=losses)
    assert len(losses) == 1, "no row has a block of 4 tokens"


def test_names():
    assert mixer_class("multi_scale:attention") is MIXERS["attention"] is mixer_class("attention")
    for name, message in (
        ("multi_scale:unknown", "'multi_scale:unknown': after multi_scale: must stand one of resonance, "),
        ("multi_scale:multi_scale:resonance", "must stand one of .*, once"),
        ("multi_scale:", "must stand one of"),
        ("unknown", "'unknown' is unknown; choose from resonance, .* or multi_scale: or reversed: before a causal one"),
    ):
        with pytest.raises(ValueError, match=message):
            small_config((name,))


def test_a_mixer_that_sees_the_future_cannot_be_wrapped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MIXERS, "sees_all", type("SeesAll", (MIXERS["resonance"],), {"causal": False}))
    with pytest.raises(ValueError, match=r"'multi_scale:sees_all': sees_all sees the future .* use resonance"):
        small_config(("multi_scale:sees_all",))


@pytest.mark.parametrize("scales", [(), (1, 4), (4, 4), (16, 4), (4.0,), 4, "4", (True, 3)])
def test_bad_scales_are_refused(scales):
    with pytest.raises(ValueError, match=r"scales = .*: must be one or more integers ≥ 2, ascending"):
        small_config(scales=scales)


def test_scales_are_saved_and_loaded(tmp_path):
    model = small_model(("multi_scale:spectral_gate", "sliding_attention"), scales=(3, 8), sliding_window=5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["scales"] == [3, 8]
    assert ResonanceConfig.from_pretrained(tmp_path).scales == (3, 8)
    loaded, ids = ResonanceForCausalLM.from_pretrained(tmp_path).eval(), torch.randint(0, 61, (1, 30))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_state_in_a_file_and_another_models_state(tmp_path):
    from resonance_nn import ResonanceCache

    model, ids = small_model(("multi_scale:spectral_gate",)), torch.randint(0, 61, (1, 21))
    cache = model(ids, use_cache=True).past_key_values
    cache.save(tmp_path / "state")
    loaded, _ = ResonanceCache.load(tmp_path / "state")
    assert torch.equal(model(ids, past_key_values=loaded).logits, model(ids, past_key_values=cache).logits)
    with pytest.raises(ValueError, match="use the cache with the model that made it"):
        small_model(("multi_scale:spectral_gate",), scales=(8,))(ids, past_key_values=loaded)


def test_counted_state_of_wrappers_round_different_mixers():
    options = dict(vocab_size=61, mixers=("multi_scale:resonance", "multi_scale:spectral_gate"), num_modes=8)
    model = ResonanceForCausalLM(ResonanceConfig.from_size("tiny", **options)).eval()
    cache = model(torch.zeros(1, 1, dtype=torch.long)).past_key_values
    row = describe_size("tiny", options)
    assert row["state_bytes_1k"] == row["state_bytes_1m"] == cache.num_bytes()
