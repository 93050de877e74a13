"""The spectrum suite: what it reports is what the mixers do, on any model, and its files are whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from contract import make_mixer, small_config
from torch import Tensor

from resonance_nn import MIXERS, ResonanceForCausalLM
from resonance_nn.bench import spectrum
from resonance_nn.bench.resonators import READERS, SAMPLE_EVERY
from resonance_nn.cli import main
from resonance_nn.data import find_documents, train_tokenizer
from resonance_nn.mixers.attention import AttentionMixer, SlidingAttentionMixer

TEXT = "".join(f"line {i} of a text, and {i * i} is its square\n" for i in range(400))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "long.txt").write_text(TEXT)
    (folder / "short.txt").write_text("a few words, no more than that\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT.encode()], 300, progress=False)


def saved(folder: Path, tokenizer: Any, *mixers: str, **overrides: Any) -> str:
    torch.manual_seed(0)
    config = small_config(mixers, vocab_size=300, num_hidden_layers=len(mixers), **overrides)
    ResonanceForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measured(tokenizer: Any, text: Path, *mixers: str, tokens: int = 600, **overrides: Any) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = small_config(mixers, vocab_size=300, num_hidden_layers=len(mixers), **overrides)
    model = ResonanceForCausalLM(config).eval()
    payload = spectrum.run(model, tokenizer, find_documents([str(text)]), tokens=tokens, window=256)
    json.dumps(payload, allow_nan=False)
    return payload["rows"]


def test_every_causal_mixer_is_read_or_has_no_resonators():
    assert {m for m in MIXERS.values() if m.causal} - READERS.keys() == {AttentionMixer, SlidingAttentionMixer}


@pytest.mark.parametrize("filters", ["head", "channel"])
def test_constant_resonators(tokenizer, text, filters: str):
    """Period, decay and half-life are those of the parameters, whatever the text."""
    mixer = make_mixer("resonance", filters=filters, num_modes=4)
    modes = 4 if filters == "head" else 4 * 16
    with torch.no_grad():
        mixer.get_parameter("damping").fill_(math.log(math.expm1(1 / 20)))
        mixer.get_parameter("frequency").copy_(torch.tensor([0.0, math.pi / 4, -math.pi, 2 * math.pi + 1]))
    part = spectrum.Part(0, "resonance", 1, mixer, torch.nn.Identity())
    part.read(torch.randn(2, 70, 32, dtype=torch.float64))
    for r in part.rows():
        assert r["period"][:2] == [None, pytest.approx(8.0)]
        assert r["period"][2:4] == [pytest.approx(2.0), pytest.approx(2 * math.pi)]
        assert r["frequency"][:4] == pytest.approx([0, 1 / 8, 1 / 2, 1 / (2 * math.pi)])
        assert r["decay_time"] == pytest.approx([20.0] * modes)
        assert r["half_life"] == pytest.approx([20 * math.log(2)] * modes)
        assert r["ours"] == pytest.approx(20)
        assert sum(r["use"]) == pytest.approx(1)
        assert 1 <= r["modes_in_use"] <= modes


def test_use_of_constant_resonators():
    """g² times the energy of a complex state computed from the definition."""
    mixer = make_mixer("resonance", num_modes=3)
    x = torch.randn(1, 2 * SAMPLE_EVERY + 5, 32, dtype=torch.float64)
    with torch.no_grad():
        u, _ = mixer.conv(mixer.in_proj(x).chunk(2, dim=-1)[0])
        rate = torch.exp(torch.complex(-torch.nn.functional.softplus(mixer.damping), mixer.frequency))[..., None]
        S, expected = torch.zeros(2, 3, 16, dtype=torch.complex128), torch.zeros(2, 3, dtype=torch.float64)
        for t in range(x.shape[1]):
            S = rate * S + u[0, t].view(2, 1, 16)
            if (t + 1) % SAMPLE_EVERY == 0:
                expected += mixer.gain.square() * S.abs().square().sum(-1)
        assert relative(READERS[type(mixer)](mixer, x).energy, expected) < 1e-10


SELECTIVE = [
    ("spectral_gate", {}),
    ("spectral_gate", {"rotation": "step", "num_groups": None}),
    ("spectral_gate", {"rotation": "token", "num_groups": 1, "normalize_gates": False}),
    ("spectral_gate", {"rotation": "step", "frequency_mixing": True, "mode_fraction": 0.5, "expand": 2}),
    ("holographic", {}),
    ("holographic", {"rotation": "step", "erase": "none"}),
    ("holographic", {"rotation": "token", "erase": "hermitian", "decay": "channel"}),
    ("holographic", {"rotation": "token"}),
    ("holographic", {"erase": "gated", "decay": "none"}),
]


@pytest.mark.parametrize(("name", "overrides"), SELECTIVE)
def test_selective_resonators(name: str, overrides: dict, monkeypatch: pytest.MonkeyPatch):
    """Decays, angles and read vectors are those that the mixer hands to its operator."""
    mixer = make_mixer(name, **overrides)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(1, SAMPLE_EVERY, 32, dtype=torch.float64)
    seen: list[dict[str, Any]] = []  # a call of an op; its heads follow those of the one before
    module = f"resonance_nn.mixers.{name}"
    op, at = ("delta_rule_chunked", 4) if name == "holographic" else ("semiseparable_chunked", 3)
    run = vars(__import__(module, fromlist=[op]))[op]

    def spy(*args: Any, **kwargs: Any):
        y, S = run(*args, **kwargs)
        angle, frequency = args[at + 1], kwargs.get("frequency")
        angle = angle if frequency is None else angle[..., None] * frequency
        seen.append({"c": args[2], "log_decay": args[at], "angle": angle, "S": S})
        return y, S

    monkeypatch.setattr(f"{module}.{op}", spy)
    with torch.no_grad():
        mixer(x)
        calls = list(seen)
        reading = READERS[type(mixer)](mixer, x)
    H, modes = 2, reading.energy.shape[1]
    energy, decay, angle = [], [], []
    for call in calls:
        heads, K = call["S"].shape[1:3]
        assert modes in (K, K // 2)
        c = call["c"][0, -1].repeat_interleave(heads // call["c"].shape[2], dim=0)  # (heads, K)
        energy.append(_pairs(c, modes) * _pairs(call["S"][0].norm(dim=-1), modes))
        log_decay = call["log_decay"] if call["log_decay"].dim() == 4 else call["log_decay"][..., None]
        decay.append(_to_modes(-log_decay, reading.decay.shape[-1]))
        turn = torch.zeros_like(log_decay) if call["angle"] is None else call["angle"]
        angle.append(_to_modes(turn, reading.angle.shape[-1]))
    expected = torch.cat(energy)
    assert relative(reading.energy / reading.energy.sum(-1, True), expected / expected.sum(-1, True)) < 1e-10
    assert relative(reading.decay, torch.cat(decay, dim=2)) < 1e-10
    assert (reading.angle - torch.cat(angle, dim=2)).abs().max() < 1e-10
    for gate in reading.gates.values():
        assert gate.shape == (1, SAMPLE_EVERY, H)
        assert gate.min() >= 0


def _to_modes(x: Tensor, modes: int) -> Tensor:
    """(…, modes) of one value for all, or of a value for each pair ``[re | im]`` of reals that count as modes."""
    return x.expand(*x.shape[:3], modes) if x.shape[-1] == 1 else x.repeat(1, 1, 1, modes // x.shape[-1])


def _pairs(x: Tensor, modes: int) -> Tensor:
    """Squared moduli of ``modes`` reals, or of that many complex numbers ``[re | im]``."""
    return x.square() if x.shape[-1] == modes else x[..., :modes].square() + x[..., modes:].square()


def test_steps_scale_what_selective_modes_do(tokenizer, text):
    """At first δ is about 1, so a layer shows the periods and decay times it was given, divided by the mean step."""
    rows = measured(tokenizer, text, "spectral_gate", rotation="step")
    assert [r["head"] for r in rows] == [0, 1]
    for r in rows:
        assert r["gates"]["step"]["mean"] == pytest.approx(1, abs=0.1)
        assert r["period"][0] == pytest.approx(16 / r["gates"]["step"]["mean"], rel=1e-4)
        assert r["gates"]["step"]["p10"] <= r["gates"]["step"]["p50"] <= r["gates"]["step"]["p90"]
    assert [r["decay_time"][0] for r in rows] == pytest.approx([4, 64], rel=0.1)


def test_coarse_scales_are_reported_in_tokens(tokenizer, text):
    rows = measured(tokenizer, text, "multi_scale:spectral_gate", scales=(4, 16), rotation="step")
    assert [(r["scale"], r["head"]) for r in rows] == [(1, 0), (1, 1), (4, 0), (4, 1), (16, 0), (16, 1)]
    assert rows[4]["case"] == "layer 0 scale 16 head 0"
    for r in rows:
        assert r["period"][0] == pytest.approx(16 * r["scale"] / r["gates"]["step"]["mean"], rel=1e-4)


def test_resolvent(tokenizer, text):
    """A wave of energy 0 in a chain without disorder turns by π/2 a token, and loses what η takes."""
    mixer = make_mixer("resolvent")
    with torch.no_grad():
        for name in ("potential_scale", "coupling_scale", "energy"):
            mixer.get_parameter(name).zero_()
        mixer.get_parameter("damping").fill_(math.log(math.expm1(0.01)))
    part = spectrum.Part(0, "resolvent", 1, mixer, torch.nn.Identity())
    part.read(torch.randn(1, 600, 32, dtype=torch.float64))
    for r in part.rows():
        assert r["period"] == pytest.approx([4])
        assert r["ours"] == pytest.approx(r["constants"]["damping_bound"], rel=0.01)
    assert {"energy", "eta", "damping_bound"} <= measured(tokenizer, text, "resolvent")[0]["constants"].keys()


def test_windows(tokenizer, text):
    documents = find_documents([str(text)])
    boundary = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    short = tokenizer.encode((text / "short.txt").read_text(), add_special_tokens=False)
    rows = spectrum.windows(documents, tokenizer, 1000, 64)
    assert sorted(map(len, rows)) == sorted([64, len(short) + 1])
    assert all(row[0] == boundary for row in rows)
    assert sum(map(len, spectrum.windows(documents, tokenizer, 70, 64))) <= 70
    assert spectrum.windows(documents, tokenizer, 1000, 64) == rows


def test_command_writes_tables_json_and_picture(tmp_path, tokenizer, text, capsys):
    model = saved(tmp_path / "model", tokenizer, "spectral_gate", "attention", "hrr", "multi_scale:resonance")
    files = ["--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png")]
    capsys.readouterr()
    assert main(["bench", "spectrum", model, "--data", str(text), "--tokens", "300", "--window", "128", *files]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(place in out for place in ("0: spectral_gate", "2: hrr", "3: multi_scale:resonance ×16"))
    assert "Layers without resonators: 1: attention." in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    payload = json.loads((tmp_path / "x.json").read_text())
    assert (payload["suite"], payload["without"]) == ("spectrum", ["1: attention"])
    assert {(r["layer"], r["scale"]) for r in payload["rows"]} == {(0, 1), (2, 1), (3, 1), (3, 4), (3, 16)}
    assert {"case", "metric", "ours", "peer", "peer_name", "ratio", "period", "use"} <= payload["rows"][0].keys()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_json_alone_on_standard_output(tmp_path, tokenizer, text, capsys):
    model = saved(tmp_path / "model", tokenizer, "resonance")
    capsys.readouterr()
    assert main(["bench", "spectrum", model, "--data", str(text), "--tokens", "100", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] <= 100
    assert "0: resonance" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "tokens = 1: must be ≥ 2"),
        (["--window", "1"], "window = 1: must be ≥ 2"),
        (["--data", "/no/such/file"], "/no/such/file"),
        (["--plot", "/no/such/folder/plot.png"], "--plot"),
        (["--json", "/no/such/folder/x.json"], "--json"),
        (["--device", "nonsense"], "device = 'nonsense'"),
        ([], "attention: have no resonators"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, tokenizer, text, capsys):
    model = saved(tmp_path / "model", tokenizer, "resonance" if arguments else "attention")
    arguments = arguments if "--data" in arguments else [*arguments, "--data", str(text)]
    capsys.readouterr()
    assert main(["bench", "spectrum", model, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
