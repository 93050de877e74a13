"""`bench task`: models of equal size on the same task by the same loop; what is finished is kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resonance_nn import (
    ResonanceConfig,
    ResonanceForAudioClassification,
    ResonanceForImageClassification,
    ResonanceForSequenceClassification,
)
from resonance_nn.arguments import TrainArguments
from resonance_nn.bench.fit import confidence95
from resonance_nn.bench.peers import TOLERANCE
from resonance_nn.bench.task_peers import TASK_PEERS, build_task_peer, trained
from resonance_nn.bench.tasks_quality import Case, TaskOptions, best_rate
from resonance_nn.cli import main
from resonance_nn.loading import load_config

LABELS = {i: str(i) for i in range(10)}
ENCODER = {"mixers": ("spectral_gate", "reversed:spectral_gate"), "hidden_size": 64, "num_hidden_layers": 2}
IMAGES = {"mixers": ("global_filter",), "hidden_size": 64, "image_size": 28, "num_channels": 1, "num_hidden_layers": 2}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, torch.Tensor]]] = {
    "vit": (ResonanceForImageClassification, IMAGES, {"pixel_values": torch.randn(3, 1, 28, 28)}),
    "bert": (
        ResonanceForSequenceClassification,
        {**ENCODER, "vocab_size": 300},
        {"input_ids": torch.randint(0, 300, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)},
    ),
    "ast": (
        ResonanceForAudioClassification,
        {**ENCODER, "sampling_rate": 8000},
        {"input_values": torch.randn(3, 5000), "attention_mask": torch.ones(3, 5000, dtype=torch.long)},
    ),
    "wav2vec2": (
        ResonanceForAudioClassification,
        {**ENCODER, "hidden_size": 128, "sampling_rate": 8000, "front_end": "waveform"},
        {"input_values": torch.randn(3, 5000), "attention_mask": torch.ones(3, 5000, dtype=torch.long)},
    ),
}


@pytest.mark.parametrize("name", [name for name in TASK_PEERS if name != "marian"])  # see test_bench_translation.py
def test_a_peer_has_our_size_and_learns_from_our_batches(name):
    kind, fields, batch = CASES[name]
    torch.manual_seed(0)
    config = ResonanceConfig(**fields, id2label=LABELS)
    parameters = trained(kind(config))
    peer = build_task_peer(name, config, parameters)
    assert abs(trained(peer) / parameters - 1) <= TOLERANCE
    assert peer.config._attn_implementation == "sdpa"
    out = peer(**batch, labels=torch.tensor([1, 0, 9]))
    assert out.logits.shape == (3, 10)
    out.loss.backward()
    without = [n for n, p in peer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [name for name in without if "masked_spec_embed" not in name], without


@pytest.mark.parametrize("name", list(CASES))
@torch.no_grad()
def test_without_dropout_a_peer_in_training_has_none(name):
    kind, fields, batch = CASES[name]
    config = ResonanceConfig(**fields, id2label=LABELS)
    peer = build_task_peer(name, config, trained(kind(config))).train()
    assert torch.equal(peer(**batch).logits, peer(**batch).logits)


def test_a_peer_of_pictures_that_are_not_square():
    config = ResonanceConfig(**{**IMAGES, "image_size": (28, 42), "patch_size": 7}, id2label=LABELS)
    peer = build_task_peer("vit", config, trained(ResonanceForImageClassification(config)))
    assert peer(torch.randn(2, 1, 28, 42)).logits.shape == (2, 10)


def test_bert_reads_512_tokens():
    config = ResonanceConfig(**ENCODER, vocab_size=300, id2label=LABELS)
    peer = build_task_peer("bert", config, trained(ResonanceForSequenceClassification(config))).eval()
    ids, mask = torch.randint(0, 300, (2, 600)), torch.ones(2, 600, dtype=torch.long)
    assert torch.equal(peer(ids, mask).logits, peer(ids[:, :512], mask[:, :512]).logits)


@pytest.mark.parametrize("name", list(CASES))
def test_a_peer_is_smoothed_as_ours_and_in_training_only(name):
    kind, fields, batch = CASES[name]
    config = ResonanceConfig(**fields, id2label=LABELS, label_smoothing=0.5)
    peer, labels = build_task_peer(name, config, trained(kind(config))), torch.tensor([1, 0, 9])
    for training, smoothing in ((True, 0.5), (False, 0.0)):
        out = peer.train(training)(**batch, labels=labels)
        expected = torch.nn.functional.cross_entropy(out.logits, labels, label_smoothing=smoothing)
        assert torch.allclose(out.loss, expected)


def test_a_peer_of_a_memory_has_heads_of_64_channels():
    config = ResonanceConfig(hidden_size=128, num_hidden_layers=2, vocab_size=300, id2label=LABELS)
    assert config.num_heads == 1
    peer = build_task_peer("bert", config, trained(ResonanceForSequenceClassification(config)))
    assert peer.config.num_attention_heads == 2


def test_a_padded_text_of_berts_equals_the_text_alone():
    config = ResonanceConfig(**ENCODER, vocab_size=300, id2label=LABELS)
    peer = build_task_peer("bert", config, trained(ResonanceForSequenceClassification(config))).eval()
    ids, mask = torch.randint(0, 300, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.no_grad():
        assert torch.allclose(peer(ids, mask).logits[1:], peer(ids[1:, :5]).logits, atol=1e-5)


@pytest.mark.parametrize("longest", [3000, 6000, 8000, 20_000])
def test_a_sound_of_asts_does_not_depend_on_the_others(longest):
    config = ResonanceConfig(**ENCODER, sampling_rate=8000, id2label=LABELS)
    peer = build_task_peer("ast", config, trained(ResonanceForAudioClassification(config))).eval()
    samples, mask = torch.zeros(2, longest), torch.zeros(2, longest, dtype=torch.long)
    samples[0, :2500], mask[0, :2500] = torch.randn(2500), 1
    samples[1], mask[1] = 0.01 * torch.randn(longest), 1
    with torch.no_grad():
        together, alone = peer(samples, mask).logits[:1], peer(samples[:1, :2500], mask[:1, :2500]).logits
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(("task", "best"), [("image-classification", 1e-2), ("fill-mask", 3e-3)])
def test_the_best_rate_is_by_the_tasks_own_figure(task, best):
    lrs = (1e-3, 3e-3, 1e-2, 3e-2)
    options = TaskOptions(TrainArguments(data=["x"], output_dir="x", task=task), lrs=lrs)
    figures = {"image-classification": ("eval_accuracy", (-0.5, 0.0, 0.1)), "fill-mask": ("eval_loss", (2.0, 0.0, 0.1))}
    name, values = figures[task]
    outcomes = {Case("resonance", lr, 0): {name: value} for lr, value in zip(lrs, (*values, None), strict=True)}
    assert best_rate(options, outcomes, "resonance") == best


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, light in (("dark", 40), ("light", 200)):
        (folder / name).mkdir()
        for i in range(30):
            pixels = rng.integers(0, 50, (8, 8), dtype=np.uint8) + np.uint8(light)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_run_tunes_compares_and_resumes(pictures, tmp_path, capsys):
    words = ["bench", "task", "--data", str(pictures), "--models", "resonance,vit", "--steps", "6", "--seeds", "2"]
    words += ["--lrs", "1e-4,1e-2", "--set", "hidden_size=64", "--set", "num_hidden_layers=1", "--set", "patch_size=2"]
    words += ["--batch-size", "16", "--output-dir", str(tmp_path / "runs"), "--json", str(tmp_path / "t.json")]
    assert main(words) == 0
    payload = json.loads((tmp_path / "t.json").read_text())
    assert {(run["model"], run["lr"], run["seed"]) for run in payload["runs"]} >= {
        (model, lr, 0) for model in ("resonance", "vit") for lr in (1e-4, 1e-2)
    }
    assert len(payload["runs"]) == 6
    ours, vit = (row for row in payload["rows"] if row["metric"] == "accuracy")
    assert (ours["case"], vit["case"], ours["peer_name"]) == ("resonance", "vit", "ViT")
    assert ours["difference"] == pytest.approx(ours["ours"] - vit["ours"])
    assert len(ours["values"]) == 2
    assert abs(ours["parameters"] / vit["parameters"] - 1) <= TOLERANCE
    assert main(words) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == payload["rows"]


@pytest.fixture(scope="module")
def sayings(tmp_path_factory):
    """Texts of three people, of whom a/b is one."""
    rows = [
        f"{word} {i},{word},{who}"
        for i, who in enumerate(["ann", "bob", "a/b"] * 4)
        for word in (["yes", "no"] if i < 9 else ["no"])
    ]
    path = tmp_path_factory.mktemp("sayings") / "said.csv"
    path.write_text("\n".join(["text,label,who", *rows]) + "\n")
    return path


TEXTS = ["bench", "task", "--task", "text-classification", "--steps", "2", "--batch-size", "8", "--vocab-size", "300"]
TEXTS += ["--set", "hidden_size=64", "--set", "num_hidden_layers=1", "--lrs", "1e-3,1e-2", "--seeds", "2"]


def test_each_value_of_a_column_is_held_out_in_turn(sayings, tmp_path, capsys):
    words = [*TEXTS, "--data", str(sayings), "--hold-out", "who", "--models", "resonance,bert"]
    words += ["--output-dir", str(tmp_path / "runs"), "--json", str(tmp_path / "t.json")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "each who held out in turn" in shown
    assert "without ann" in shown
    payload = json.loads((tmp_path / "t.json").read_text())
    assert len(payload["runs"]) == 2 * (2 + 2 * 3 - 1)
    tried = [(run["model"], run["seed"], run["held_out"]) for run in payload["runs"][:4]]
    assert tried == [(model, 0, "a/b") for model in ("resonance", "bert")] * 2  # all rates, of the first group only
    assert len({run["lr"] for run in payload["runs"] if run["model"] == "bert" and run["held_out"] != "a/b"}) == 1
    folders = {path.name for path in (tmp_path / "runs" / "bert").iterdir()}
    assert folders == {"held-out-ann", "held-out-bob", "held-out-a%2Fb"}
    rows = [json.loads(line) for line in _held_out(tmp_path / "runs" / "bert" / "held-out-ann")]
    assert rows == ["who=ann"] * 2
    ours, bert = (row for row in payload["rows"] if row["metric"] == "loss")
    assert len(ours["values"]) == 6
    assert ours["ours"] == pytest.approx(sum(ours["values"]) / 6)
    assert list(ours["held_out"]) == ["a/b", "ann", "bob"]
    for i, (group, means) in enumerate(ours["held_out"].items()):
        here, theirs = ours["values"][2 * i : 2 * i + 2], bert["values"][2 * i : 2 * i + 2]
        runs = [r for r in payload["runs"] if (r["model"], r["held_out"], r["lr"]) == ("resonance", group, ours["lr"])]
        assert here == [run["eval_loss"] for run in sorted(runs, key=lambda run: run["seed"])]
        assert means["ours"] == pytest.approx(sum(here) / 2)
        assert means["difference"] == pytest.approx(sum(here) / 2 - sum(theirs) / 2)
    differences = [a - b for a, b in zip(ours["values"], bert["values"], strict=True)]
    assert ours["difference"] == pytest.approx(sum(differences) / 6)
    assert ours["difference_interval"] == pytest.approx(confidence95(differences))
    (tmp_path / "runs" / "bert" / "held-out-bob" / f"lr-{bert['lr']:g}-seed-1" / "train.json").unlink()
    assert main([*words, "--resume"]) == 0
    again = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [row["values"] for row in again] == [row["values"] for row in payload["rows"]]


def _held_out(folder):
    runs = (json.loads(path.read_text()) for path in folder.glob("*/data/run.json"))
    return [json.dumps(run["settings"]["hold_out"]) for run in runs]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hold-out", "whom"], "hold_out = 'whom': no column of example 1 of the data; it has text, label, who"),
        (["--hold-out", "one"], "hold_out = 'one': has one value, '1'; to hold each out takes two or more"),
        (["--hold-out", "some"], "hold_out = 'some': is empty in example 2 of the data"),
        (["--hold-out", "who", "--eval-data", "x.csv"], "hold_out and eval_data: each says what is held out; give one"),
        (["--hold-out", "who", "--task", "fill-mask"], "hold_out = 'who=': is of tables, and fill-mask reads none"),
        (["--hold-out", "who=ann"], "hold_out = 'who=ann': must be a column, each value of which is then held out"),
        (["--hold-out", "text"], "the held-out data have the label"),
    ],
)
def test_what_cannot_be_held_out(more, message, tmp_path, capsys):
    lines = ["text,label,who,one,some", "a,x,ann,1,2", "b,y,bob,1,", "c,z,cyd,1,3"]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    words = [*TEXTS, "--data", str(tmp_path / "data.csv"), "--output-dir", str(tmp_path / "runs"), *more]
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_files_in_folders_have_no_columns(pictures, tmp_path, capsys):
    words = ["bench", "task", "--data", str(pictures), "--output-dir", str(tmp_path / "runs"), "--hold-out", "who"]
    assert main(words) == 2
    assert "no column of example 1 of the data; only tables have columns" in capsys.readouterr().err


def test_variants_are_ours_with_other_fields(tmp_path, pictures):
    """Each modality alone beside all of them, on the same splits."""
    rows = [
        {"text": f"{name} {i}", "image": str(pictures / name / f"{i}.png"), "label": name, "fold": i % 2}
        for name in ("dark", "light")
        for i in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["bench", "task", "--task", "multimodal-classification", "--data", str(tmp_path / "data.jsonl")]
    words += [
        "--variant",
        "text:modalities=text",
        "--variant",
        "image:modalities=image",
        "--variant",
        "image:mlp=swiglu",
    ]
    words += ["--set", "hidden_size=32", "--set", "num_hidden_layers=1", "--set", "patch_size=2", "--steps", "2"]
    words += ["--vocab-size", "300", "--lrs", "1e-2", "--seeds", "1", "--hold-out", "fold"]
    assert main([*words, "--output-dir", str(tmp_path / "runs"), "--json", str(tmp_path / "t.json")]) == 0
    payload = json.loads((tmp_path / "t.json").read_text())
    assert [(row["metric"], row["case"]) for row in payload["rows"]] == [
        (metric, name) for metric in ("accuracy", "macro_accuracy", "loss") for name in ("resonance", "text", "image")
    ]
    everything, text, image = (row for row in payload["rows"] if row["metric"] == "macro_accuracy")
    assert everything["peer_name"] is None
    assert text["peer_name"] == image["peer_name"] == "resonance"
    assert text["difference"] == pytest.approx(text["ours"] - everything["ours"])
    config = load_config(str(tmp_path / "runs" / "image" / "held-out-1" / "lr-0.01-seed-0"))
    assert (config.modalities, config.mlp) == (("image",), "swiglu")
    config = load_config(str(tmp_path / "runs" / "resonance" / "held-out-1" / "lr-0.01-seed-0"))
    assert config.modalities == ("text", "image")


@pytest.mark.parametrize(
    ("models", "variants", "reference"),
    [
        (("resonance",), {}, None),
        (("resonance",), {"small": {}}, "resonance"),
        (("resonance", "vit"), {"small": {}}, "vit"),
    ],
)
def test_whom_the_others_are_compared_with(models, variants, reference):
    assert TaskOptions(TrainArguments(data=["x"], output_dir="x"), models, variants).reference == reference


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--variant", "small"],
            "--variant 'small': must be NAME:FIELD=VALUE, as in --variant deep:num_hidden_layers=8",
        ),
        (["--variant", "vit:hidden_size=32"], "variant = 'vit': must be a name of its own"),
        (["--variant", "../up:hidden_size=32"], "variant = '../up': must be a name of its own"),
        (["--variant", "small:hiden_size=32"], "config: 'hiden_size' is not a field that can be set"),
        (["--variant", "small:hidden_size=-1"], "hidden_size = -1"),
        (["--models", "bert"], "'bert' is none for image-classification; choose from resonance, vit"),
        (["--task", "juggling"], "must be one of text-generation"),
        (["--seeds", "0"], "seeds = 0"),
        (["--lrs", "0"], "lr = 0"),
    ],
)
def test_what_cannot_be_run(more, message, pictures, tmp_path, capsys):
    assert main(["bench", "task", "--data", str(pictures), "--output-dir", str(tmp_path / "runs"), *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
