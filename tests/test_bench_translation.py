"""`bench task --task translation`: Marian of our size, with our loss, learns from our batches and is judged as ours."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MarianMTModel

from resonance_nn import ResonanceConfig, ResonanceForConditionalGeneration
from resonance_nn.bench.peers import TOLERANCE
from resonance_nn.bench.task_peers import build_task_peer, trained
from resonance_nn.cli import main
from resonance_nn.data import train_tokenizer
from resonance_nn.tasks.text import PaddedBatch
from resonance_nn.tasks.translation import translate

START, PAD = 0, 1


def marian_of(**fields):
    """Ours and Marian, of a small configuration."""
    torch.manual_seed(0)
    ids = {"bos_token_id": START, "eos_token_id": START, "pad_token_id": PAD, "decoder_start_token_id": START}
    config = ResonanceConfig(**{"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, **ids, **fields})
    ours = ResonanceForConditionalGeneration(config)
    return ours, build_task_peer("marian", config, trained(ours))


def batch_of(lengths):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(9, 300, (n,), generator=generator).tolist() for n in lengths]
    return PaddedBatch(PAD)([{"input_ids": [START, *row], "labels": [*row[: 2 + n % 3], START]} for n, row in
                            zip(lengths, rows, strict=True)])  # fmt: skip


def test_it_has_our_size_and_marians_shape():
    ours, peer = marian_of(num_encoder_layers=3)
    assert abs(trained(peer) / trained(ours) - 1) <= TOLERANCE
    config = peer.config
    assert (config.encoder_layers, config.decoder_layers, config.d_model) == (3, 2, 64)
    assert (config._attn_implementation, config.scale_embedding) == ("sdpa", True)
    embedding = peer.model.shared.weight
    assert peer.lm_head.weight is embedding
    assert peer.model.encoder.embed_tokens.weight is peer.model.decoder.embed_tokens.weight is embedding
    assert embedding.std().item() == pytest.approx(0.02, rel=0.05)
    position = peer.model.encoder.embed_positions.weight
    assert not position.requires_grad
    assert torch.allclose(position[5, [0, 32]], torch.tensor([5.0, 5.0 + torch.pi / 2]).sin())


def test_its_loss_is_transformers_and_smoothed_as_ours():
    ours, peer = marian_of(label_smoothing=0.2)
    batch = batch_of([5, 9, 3])
    direct = MarianMTModel(peer.config).eval()
    direct.load_state_dict(peer.state_dict())
    with torch.no_grad():
        expected = direct(**batch)
        assert torch.allclose(peer.eval()(**batch).loss, expected.loss, rtol=1e-5)
        smoothed = torch.nn.functional.cross_entropy(
            expected.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2
        )
        assert torch.allclose(peer.train()(**batch).loss, smoothed, rtol=1e-5)
        targets = int((batch["labels"] != -100).sum())
        assert torch.allclose(peer(**batch, num_items_in_batch=2 * targets).loss, smoothed / 2, rtol=1e-5)
        starts = (model.prepare_decoder_input_ids_from_labels(batch["labels"]) for model in (ours, peer))
        assert torch.equal(*starts)


def test_it_learns_to_copy_and_searches_with_beams():
    tokenizer = train_tokenizer([b"one two three four five\n" * 20], 300, progress=False)
    ids = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    ids |= dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id"), tokenizer.bos_token_id)
    _, peer = marian_of(**ids)
    words = ["one", "two", "three", "four", "five"]
    texts = [" ".join((a, b)) for a in words for b in words]
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    batch = PaddedBatch(ids["pad_token_id"])(
        [{"input_ids": row, "labels": [*row[1:], ids["eos_token_id"]]} for row in encoded]
    )
    optimizer = torch.optim.AdamW(peer.train().parameters(), lr=2e-3)
    losses: list[float] = []
    for _ in range(150):
        loss = peer(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert not [name for name, p in peer.named_parameters() if p.requires_grad and not optimizer.state[p]]
    made = translate(peer.eval(), tokenizer, texts)
    assert sum(a == b for a, b in zip(made, texts, strict=True)) >= 20
    assert translate(peer, tokenizer, texts[3:4])[0] == made[3]  # the others of a batch do not matter


def test_bench_task_compares_translations(tmp_path):
    words = ["one", "two", "three", "four", "five"]
    lines = [f"{a} {b}\t{b} {a}" for a in words for b in words]
    (tmp_path / "data.tsv").write_text("\n".join(lines) + "\n")
    argv = ["bench", "task", "--task", "translation", "--data", str(tmp_path / "data.tsv"), "--steps", "3"]
    argv += ["--models", "resonance,marian", "--seeds", "1", "--lrs", "1e-3", "--vocab-size", "300"]
    argv += ["--set", "hidden_size=64", "--set", "num_hidden_layers=1", "--batch-size", "8", "--dropout", "0.1"]
    assert main([*argv, "--output-dir", str(tmp_path / "runs"), "--json", str(tmp_path / "t.json")]) == 0
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(row["case"], row["metric"]) for row in rows if row["metric"] == "bleu"] == [
        ("resonance", "bleu"),
        ("marian", "bleu"),
    ]
    ours, marian = rows[:2]
    assert ours["peer_name"] == "Marian"
    assert abs(marian["parameters"] / ours["parameters"] - 1) <= TOLERANCE
