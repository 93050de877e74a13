"""Settings that would change nothing are refused, and those that do are not: `unread_fields`."""

from __future__ import annotations

import wave

import numpy as np
import pytest
from PIL import Image

from resonance_nn import ResonanceConfig
from resonance_nn.cli import main
from resonance_nn.loading import load_config
from resonance_nn.mixers import is_causal
from resonance_nn.tasks import TASKS
from resonance_nn.unread import READ_LATER, unread_fields

USES = (  # fields that together have every other one read by some model
    {"mixers": ("spectral_gate", "multi_scale:holographic", "attention", "sliding_attention")},
    {"mixers": ("resonance", "hrr", "resolvent"), "prime_bump": True},
    {"mixers": ("global_filter",), "front_end": "waveform"},
    {"mixers": ("holographic",), "rotation": "token", "num_heads": 4},
)


def config_of(task: str, **fields) -> ResonanceConfig:
    small = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 64, "image_size": 32}
    return ResonanceConfig(**{**small, **TASKS[task].fields, **fields})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 8 × 8 and sounds at 4,000 Hz, of two classes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for kind in ("pictures", "sounds"):
        for name in ("a", "b"):
            (folder / kind / name).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(
            folder / "pictures" / "ab"[i % 2] / f"{i}.png"
        )
        with wave.open(str(folder / "sounds" / "ab"[i % 2] / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 4000, 0, "NONE", ""))
            file.writeframes(rng.integers(-9999, 9999, 1000).astype("<i2").tobytes())
    return folder


def test_every_field_is_read_by_some_model():
    fields = sorted(ResonanceConfig.own_fields())
    unread = set(fields) - READ_LATER
    assert not READ_LATER - set(fields)
    for uses in USES:
        for name, task in TASKS.items():
            if name in ("text-generation", "translation") and not all(map(is_causal, uses["mixers"])):
                continue
            unread &= set(unread_fields(task.architecture, config_of(name, **uses), fields))
    assert not unread


@pytest.mark.parametrize(
    ("task", "fields", "unread"),
    [
        ("text-generation", {}, {"num_groups", "num_bands", "encoder_mixers", "patch_size", "num_traces"}),
        ("text-generation", {"mixers": ("spectral_gate",)}, {"erase", "gates", "initial_recall", "sampling_rate"}),
        ("text-classification", {"mixers": ("global_filter",)}, {"num_modes", "conv_size", "erase"}),
        ("translation", {}, {"filter_size", "image_mixers", "fusion"}),
        ("image-classification", {}, {"num_modes", "expand", "front_end", "sliding_window"}),
        ("audio-classification", {}, {"frame_size", "erase", "patch_size", "bridge"}),
        ("audio-classification", {"front_end": "waveform"}, {"num_mel_bins", "erase"}),
        ("multimodal-classification", {}, {"erase", "frame_size", "bridge"}),
    ],
)
def test_what_is_unread(task, fields, unread):
    config = config_of(task, **fields)
    found = set(unread_fields(TASKS[task].architecture, config, sorted(ResonanceConfig.own_fields())))
    assert unread <= found
    assert not found & {"hidden_size", "num_heads", "num_hidden_layers", "dropout", "norm_eps", "mlp"}
    assert type(config) is ResonanceConfig  # as it was
    assert config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "image-classification", "--set", "num_modes=8"], "num_modes = 8 changes nothing"),
        (["--task", "audio-classification", "--set", "frame_size=16"], "frame_size = 16 changes nothing"),
        (["--set", "filter_size=128"], "filter_size = 128 changes nothing"),
        (["--task", "multimodal-retrieval", "--mixers", "spectral_gate"], "set encoder_mixers"),
        (["--task", "multimodal-retrieval", "--recipe", "spectral"], "set encoder_mixers"),
        (["--task", "multimodal-retrieval", "--set", "mixers=spectral_gate"], "set encoder_mixers"),
    ],
)
def test_the_command_refuses_them(words, message, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--data", "nowhere", "--output-dir", str(run), "--steps", "1", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not run.exists()


def test_a_comparison_refuses_them_before_anything_is_trained(tmp_path, capsys):
    words = ["bench", "task", "--data", "nowhere", "--output-dir", str(tmp_path / "b")]
    assert main([*words, "--variant", "deep:num_modes=4"]) == 2
    assert "num_modes = 4 changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "words", "kept", "dropped"),
    [
        ("audio-classification", ["num_mel_bins=40", "--variant", "w:front_end=waveform"], "resonance", "w"),
        ("text-classification", ["num_bands=4", "--variant", "f:mixers=global_filter"], "f", "resonance"),
        ("translation", ["num_bands=4", "--variant", "s:bridge=spectral"], "s", "resonance"),
    ],
)
def test_what_one_contestant_reads_is_set_on_it_alone(task, words, kept, dropped, monkeypatch, tmp_path):
    from resonance_nn.bench import tasks_quality

    seen = {}

    def run(options, **_):
        options.check()
        seen.update({name: options.arguments_of(name).config for name in options.contestants})
        raise ValueError("enough")

    monkeypatch.setattr(tasks_quality, "run", run)
    command = ["bench", "task", "--task", task, "--data", "nowhere", "--output-dir", str(tmp_path / "b")]
    assert main([*command, "--set", *words]) == 2
    field = words[0].split("=")[0]
    assert field in seen[kept]
    assert field not in seen[dropped]


@pytest.mark.parametrize("suite", [["speed"], ["quality"], ["passkey"]])
def test_benchmarks_refuse_them(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *suite, "--set", "num_bands=4"]) == 2
    assert "num_bands = 4 changes nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_part_left_out_may_be_set(tmp_path, capsys):
    """So that a comparison's variants of fewer modalities can share the settings of all."""
    words = ["train", "--task", "multimodal-classification", "--data", str(tmp_path / "no.jsonl"), "--steps", "1"]
    words += ["--set", "modalities=text", "--set", "patch_size=8", "--output-dir", str(tmp_path / "run")]
    assert main(words) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "field", "value"), [("image", "image_size", (8, 8)), ("audio", "sampling_rate", 4000)]
)
def test_a_recipe_leaves_the_facts_of_the_data(kind, field, value, data, tmp_path):
    folder = {"image": "pictures", "audio": "sounds"}[kind]
    words = ["train", "--task", f"{kind}-classification", "--data", str(data / folder), "--recipe", "spectral"]
    words += ["--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--steps", "1", "--precision", "fp32"]
    assert main([*words, "--output-dir", str(tmp_path / "run")]) == 0
    config = load_config(str(tmp_path / "run"))
    assert getattr(config, field) == value
    assert config.mixers == ("spectral_gate",)
