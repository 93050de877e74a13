"""Evaluation: equal to the naive one, whatever the window and the batch."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from resonance_nn import ResonanceConfig, ResonanceForCausalLM
from resonance_nn.data import encode_bytes, find_documents, lzma_bits_per_byte, train_tokenizer
from resonance_nn.evaluation import evaluate_documents, resolve_device, resolve_precision, verdict

SOURCE = Path(__file__).parent.parent / "resonance_nn"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([p.read_bytes() for p in sorted(SOURCE.glob("*.py"))], 400, progress=False)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    text = (SOURCE / "cache.py").read_bytes()
    for i, size in enumerate((1, 7, 900, 40, 41, 350, 3)):
        (folder / f"{i}.txt").write_bytes(text[100 * i : 100 * i + size])
    (folder / "latin.txt").write_bytes("naïve café".encode("latin-1"))
    return find_documents([str(folder)])


def naive_nats(model, tokenizer, documents):
    """Each document alone, all logits at once."""
    nats, tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([[tokenizer.bos_token_id, *encode_bytes(tokenizer, document.read())]])
        targets = torch.cat([ids[0, 1:], ids[0, :1]])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        nats += F.cross_entropy(logits[0].double(), targets, reduction="sum").item()
        tokens += len(targets)
    return nats, tokens


@pytest.mark.parametrize("mixers", [("spectral_gate",), ("resonance",), ("spectral_gate", "attention")])
def test_equals_naive_whatever_window_and_batch(mixers, tokenizer, documents):
    torch.manual_seed(0)
    config = ResonanceConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, mixers=mixers, initializer_range=0.2)
    model = ResonanceForCausalLM(config).eval()
    nats, tokens = naive_nats(model, tokenizer, documents)
    size = sum(d.size for d in documents)
    for window, batch_size in ((2048, 8), (64, 3), (17, 1), (1, 2)):
        result = evaluate_documents(model, tokenizer, documents, window=window, batch_size=batch_size, lzma=False)
        assert result["tokens"] == tokens
        assert result["bytes"] == size
        assert result["loss"] == pytest.approx(nats / tokens, abs=1e-5)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_lzma_stands_beside_it_and_the_model_keeps_its_mode(tokenizer, documents):
    model = ResonanceForCausalLM(ResonanceConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1)).train()
    result = evaluate_documents(model, tokenizer, documents, precision="bf16")
    assert model.training
    assert result["lzma_bits_per_byte"] == lzma_bits_per_byte(documents)
    assert "lzma wins" in result["verdict"]
    assert "model wins" in verdict(1.0, 1.5)


def test_refuses_what_does_not_fit(tokenizer, documents):
    model = ResonanceForCausalLM(ResonanceConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"400 ids.*only 300"):
        evaluate_documents(model, tokenizer, documents)
    with pytest.raises(ValueError, match="window = 0"):
        evaluate_documents(model, tokenizer, documents, window=0)
    model.config.vocab_size = 400
    with pytest.raises(ValueError, match="no documents"):
        evaluate_documents(model, tokenizer, [])
    with pytest.raises(ValueError, match=r"precision = 'fp8'.*bf16"):
        resolve_precision("fp8", "cpu")
    with pytest.raises(ValueError, match=r"fp16.*not on a CPU"):
        resolve_precision("fp16", "cpu")
    with pytest.raises(ValueError, match="device = 'tpu'"):
        resolve_device("tpu")
    assert resolve_precision("auto", "cpu") in ("bf16", "fp32")
