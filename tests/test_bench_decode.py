"""The decode suite: both models decode what they compute at once, from caches of the length that is reported, and the
peer gets the better of its caches."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.bench import decode
from resonance_nn.bench.caches import check_decoding, filled_caches, kv_bytes
from resonance_nn.bench.decode import DecodeOptions, run
from resonance_nn.bench.inference import converted, weight_bytes
from resonance_nn.bench.models import ModelOptions, build_beside, build_ours
from resonance_nn.bench.peers import PEER
from resonance_nn.cache import ResonanceCache
from resonance_nn.cli import main

SMALL = DecodeOptions(
    contexts=(16, 48), batch_sizes=(1, 3), hidden_size=64, layers=2, vocab_size=300, tokens=3, repeats=2
)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    ours = build_ours(ModelOptions(hidden_size=64, layers=2, vocab_size=300))
    return ours, build_beside(ours, ("llama",), 128)[0][PEER]


def test_conversion_is_what_a_user_loads(models, tmp_path):
    for model in models:
        model.save_pretrained(tmp_path / type(model).__name__)
        loaded = type(model).from_pretrained(tmp_path / type(model).__name__, dtype=torch.bfloat16)
        half = converted(model, torch.bfloat16)
        expected = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        actual = {**dict(half.named_parameters()), **dict(half.named_buffers())}
        assert {n: t.dtype for n, t in actual.items()} == {n: t.dtype for n, t in expected.items()}
        assert all(torch.equal(t, expected[n]) for n, t in actual.items())
        assert torch.float32 in {t.dtype for t in actual.values()}
        assert half.lm_head.weight is half.get_input_embeddings().weight
        assert not half.training
        assert weight_bytes(half) < 0.6 * weight_bytes(model)


def test_filled_caches_hold_the_context(models):
    peer = converted(models[1], torch.bfloat16)
    dynamic, static = filled_caches(peer, 20, 3, room=5)
    assert dynamic.get_seq_length() == int(static.get_seq_length()) == 20
    assert kv_bytes(peer, 20, 3) == sum(t.nbytes for layer in dynamic.layers for t in (layer.keys, layer.values))
    token = torch.tensor([[7], [8], [9]])
    with torch.no_grad():
        one = peer(token, past_key_values=dynamic, use_cache=True).logits
        other = peer(token, past_key_values=static, use_cache=True).logits
    assert torch.allclose(one.float(), other.float(), atol=1e-2)


def test_decoding_that_differs_from_one_pass_is_not_measured(models):
    ours, peer = models
    check_decoding(ours, {"ResonanceCache": lambda: ResonanceCache(2)})
    check_decoding(peer, {"StaticCache": lambda: StaticCache(config=peer.config, max_cache_len=80)})

    class Forgetting(ResonanceForCausalLM):
        def forward(self, input_ids, past_key_values=None, **kwargs):
            if past_key_values is not None and input_ids.shape[1] == 1:
                past_key_values = ResonanceCache(self.config.num_hidden_layers)
            return super().forward(input_ids, past_key_values=past_key_values, **kwargs)

    model = Forgetting(ResonanceConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(RuntimeError, match="other logits"):
        check_decoding(model, {"ResonanceCache": lambda: ResonanceCache(1)})


def test_run_measures_every_context_and_leaves_the_caches_as_they_were(monkeypatch):
    caches, steps = [], []
    original = decode.filled_caches
    monkeypatch.setattr(decode, "filled_caches", lambda *a: caches.append((a[1], original(*a))) or caches[-1][1])
    payload = run(SMALL, lambda done, total: steps.append((done, total)))
    rows = payload["rows"]
    assert [(row["context"], row["batch_size"]) for row in rows] == [(16, 1), (16, 3), (48, 1), (48, 3)]
    assert len(caches) == 4
    for context, (dynamic, static) in caches:
        assert dynamic.get_seq_length() == int(static.get_seq_length()) == context
    for row in rows:
        assert row["state_bytes"] == rows[0]["state_bytes"] * row["batch_size"]
        assert row["peer_ms"].keys() == {"DynamicCache", "StaticCache"}
        assert row["tokens_read"] == row["context"]
        assert row["over_weights"] > 1
    assert [row["over_first_context"] for row in rows[:2]] == [1, 1]
    assert [row["batch_gain"] for row in rows[::2]] == [1, 1]
    done = [done for done, _ in steps]
    assert done == sorted(done)
    assert steps[-1][0] == steps[-1][1]
    json.dumps(payload, allow_nan=False)


def test_the_better_cache_counts_and_ratios_are_of_rounds(monkeypatch):
    tokens = SMALL.tokens
    fake = {"ours": [1.0, 2.0], "DynamicCache": [8.0, 8.0], "StaticCache": [4.0, 6.0], "weights": [0.5, 0.5]}

    def interleaved(calls, repeats, advance):
        return {name: [tokens * s for s in fake.get(name.split(" ")[0], [1.0, 1.0])] for name in calls}

    monkeypatch.setattr(decode, "interleaved", interleaved)
    row = run(SMALL)["rows"][2]
    assert row["peer_name"].endswith("StaticCache")
    assert (row["ours"], row["peer"], row["ratio"], row["ratio_min"]) == (1500, 5000, 3.5, 3)
    assert (row["over_weights"], row["over_first_context"]) == (3, 1.5)


def test_no_peer_where_it_is_too_long_or_does_not_fit(monkeypatch):
    rows = run(replace(SMALL, peer_max_context=20, repeats=1))["rows"]
    assert [row["peer"] is None for row in rows] == [False, False, True, True]
    assert "peer_max_context = 20" in rows[2]["peer_skipped"]
    monkeypatch.setattr(decode, "available_memory", lambda device: 1 << 16)
    rows = run(replace(SMALL, repeats=1))["rows"]
    assert [row["peer"] is None for row in rows] == [False, True, True, True]
    assert "GB are available" in rows[1]["peer_skipped"]


def test_less_of_the_context_is_read_on_request(monkeypatch):
    read = []
    original = decode.prefill
    monkeypatch.setattr(
        decode, "prefill", lambda m, ids, mask, cache: read.append(ids.shape[1] - 1) or original(m, ids, mask, cache)
    )
    rows = run(replace(SMALL, read_tokens=20, batch_sizes=(1,), repeats=1))["rows"]
    assert read == [16, 20]
    assert [row["tokens_read"] for row in rows] == [16, 20]


def test_generate_goes_on_from_the_cache(models, monkeypatch):
    peer = models[1].eval()
    dynamic = DynamicCache(config=peer.config)
    noise = torch.randn(1, peer.config.num_key_value_heads, 8, peer.config.head_dim)
    for i in range(2):
        dynamic.update(noise, noise, i)
    lengths = []
    forward = type(peer).forward
    monkeypatch.setattr(
        type(peer),
        "forward",
        lambda self, input_ids, **k: lengths.append(input_ids.shape[1]) or forward(self, input_ids, **k),
    )
    decode._generating(peer, dynamic, 1, SMALL, lambda: None)()
    assert lengths == [1] * SMALL.tokens
    assert dynamic.get_seq_length() == 8 + SMALL.tokens


def test_command_writes_table_json_and_plot(tmp_path, capsys):
    arguments = ["--contexts", "16,32", "--batch-sizes", "1,2", "--hidden-size", "64", "--layers", "1", "--seed", "1"]
    arguments += ["--vocab-size", "300", "--mixers", "spectral_gate", "--tokens", "2", "--repeats", "1", "--generate"]
    arguments += ["--peer-max-context", "20", "--read-tokens", "24", "--dtype", "fp32", "--device", "cpu"]
    arguments += ["--set", "chunk_size=16"]
    files = ["--json", str(tmp_path / "decode.json"), "--plot", str(tmp_path / "decode.png")]
    assert main(["bench", "decode", *arguments, *files]) == 0
    out, err = capsys.readouterr()
    assert "no Llama at context=32 B=1: context above peer_max_context = 20" in out
    assert "generate()" in out
    assert err == ""
    payload = json.loads((tmp_path / "decode.json").read_text())
    assert payload["suite"] == "decode"
    assert payload["options"]["seed"] == 1
    assert payload["options"]["overrides"] == {"chunk_size": 16}
    assert [row["metric"] for row in payload["rows"]] == ["ms a token", "ms a token, generate()"] * 4
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_contexts_and_batches_ascend_and_come_once():
    for wrong in ({"contexts": (16, 16)}, {"batch_sizes": (1, 1)}, {"contexts": ()}):
        with pytest.raises(ValueError, match="ascending"):
            replace(SMALL, **wrong).check()


def test_full_reads_to_a_million(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(decode, "run", lambda options, progress: asked.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["bench", "decode", "--full"])
    assert asked[0].contexts == (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--contexts", "x"],
        ["--contexts", "64,16"],
        ["--contexts", "0"],
        ["--batch-sizes", ""],
        ["--batch-sizes", "4,1"],
        ["--full", "--contexts", "16"],
        ["--set", "no_such_field=1"],
        ["--size", "tiny", "--layers", "2"],
        ["--tokens", "0"],
        ["--read-tokens", "0"],
        ["--repeats", "0"],
        ["--peer-max-context", "-1"],
        ["--mixers", "bogus"],
        ["--dtype", "auto"],
        ["--device", "nonsense"],
        ["--plot", "/no/such/folder/plot.png"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["bench", "decode", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
