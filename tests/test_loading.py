"""Names to models: what is found, and one clear line for everything that is not."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from resonance_nn import ResonanceConfig, ResonanceForCausalLM, bundled
from resonance_nn.data import train_tokenizer
from resonance_nn.loading import load_model, resolve_model

TEXT = b"def area(width, height):\n    return width * height\n\nnaive caf\xc3\xa9\n" * 20
VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-model"
    torch.manual_seed(0)
    config = ResonanceConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_heads=2)
    ResonanceForCausalLM(config).save_pretrained(folder)
    train_tokenizer([TEXT], VOCAB_SIZE, progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def error_line(name: Path | str, **kwargs) -> str:
    with pytest.raises(ValueError, match=r"model|device") as caught:
        load_model(str(name), **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_loads_what_was_saved(saved):
    model, tokenizer = load_model(str(saved))
    assert not model.training
    assert model.config.mixers == ("holographic",)
    assert len(tokenizer) <= VOCAB_SIZE
    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    original = ResonanceForCausalLM(model.config).eval()
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0)
    assert load_model(str(saved), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_bundled_name(saved, monkeypatch):
    monkeypatch.setattr(bundled, "CHECKPOINTS", saved.parent)
    assert resolve_model("tiny-model") == str(saved)
    assert ResonanceForCausalLM.from_pretrained("tiny-model").config.mixers == ("holographic",)


def test_mistyped_names(saved):
    assert f"did you mean {saved}?" in error_line(saved.parent / "tiny-modle")
    assert "write hub:nobody/nothing" in error_line("nobody/nothing")
    assert "no such folder" in error_line("")
    assert "name the folder" in error_line(saved / "config.json")
    assert "must be hub:org/name" in error_line("hub:nothing")


def test_hub_is_the_only_way_to_the_network(monkeypatch, saved):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(saved))
    assert resolve_model("hub:org/name") == str(saved)
    assert asked == ["org/name"]


def test_folder_without_a_model(tmp_path, broken):
    assert "no config.json" in error_line(tmp_path / "broken" / "..")
    (broken / "model.safetensors").unlink()
    assert "no model.safetensors" in error_line(broken)


def test_foreign_checkpoint(broken):
    edit_config(broken, model_type="llama")
    assert "is a 'llama' checkpoint" in error_line(broken)


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": '])
def test_damaged_config(broken, content):
    (broken / "config.json").write_text(content)
    assert "config.json is not a JSON object" in error_line(broken)


def test_a_model_for_something_else(broken):
    edit_config(broken, architectures=["ResonanceForImageClassification"])
    assert "is a ResonanceForImageClassification; this takes a ResonanceForCausalLM" in error_line(broken)


def test_invalid_config(broken):
    edit_config(broken, num_heads=5)
    assert "num_heads = 5" in error_line(broken)
    edit_config(broken, num_heads="two")
    assert "num_heads" in error_line(broken)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(broken, size):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "its weights cannot be read" in error_line(broken)


def test_loading_prints_nothing(saved, broken, capfd):
    load_model(str(saved))
    edit_config(broken, num_hidden_layers=3)
    error_line(broken)
    assert capfd.readouterr() == ("", "")


def test_weights_of_another_model(broken):
    edit_config(broken, num_hidden_layers=3)
    assert "its weights lack model.backbone.blocks.2" in error_line(broken)
    edit_config(broken, num_hidden_layers=1)
    assert "have the unknown model.backbone.blocks.1" in error_line(broken)
    edit_config(broken, num_hidden_layers=2, vocab_size=VOCAB_SIZE + 8)
    assert "have the wrong shape for" in error_line(broken)


def test_tokenizers_that_do_not_fit(broken):
    (broken / "tokenizer.json").rename(broken / "hidden.json")
    assert "no tokenizer.json" in error_line(broken)
    (broken / "tokenizer.json").write_text("{}")
    assert "tokenizer cannot be read" in error_line(broken)
    train_tokenizer([TEXT, bytes(range(32, 127)) * 9, b"quick brown foxes jump " * 9], 340).save_pretrained(broken)
    assert f"tokens but vocab_size is {VOCAB_SIZE}" in error_line(broken)
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(broken)
    assert "not byte-level" in error_line(broken)


def test_unfinished_run(saved, tmp_path, caplog):
    for step in (9, 10, 100):
        shutil.copytree(saved, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-100" / "model.safetensors").unlink()  # killed while it was written
    edit_config(tmp_path / "checkpoint-9", mixers=["attention"])
    model, _ = load_model(str(tmp_path))
    assert model.config.mixers == ("holographic",)
    assert "taking checkpoint-10" in caplog.text
    for step in (9, 10):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert "without a complete checkpoint" in error_line(tmp_path)


def test_device_that_is_not_there(saved):
    assert "device 'nonsense'" in error_line(saved, device="nonsense")
