"""`--augment`: what is changed is changed as said, the rest is left alone, and nothing is taken in silence."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from resonance_nn.cli import main
from resonance_nn.data import decode_bytes, encode_text, train_tokenizer
from resonance_nn.data.tokenizer import merged_pairs
from resonance_nn.tasks import TASKS
from resonance_nn.tasks.augment import SPLIT, TokenSplitter, batch_changes, change_sounds, drop_tokens
from resonance_nn.trainer import ResonanceTrainer


def test_dropped_tokens():
    mask = torch.ones(400, 50, dtype=torch.long)
    mask[:, 40:] = 0
    torch.manual_seed(0)
    kept = drop_tokens(mask)
    assert kept.dtype == mask.dtype
    assert kept[:, 0].all()
    assert not kept[:, 40:].any()
    assert float(kept[:, 1:40].float().mean()) == pytest.approx(0.7, abs=0.01)
    torch.manual_seed(0)
    assert torch.equal(drop_tokens(mask), kept)


@pytest.fixture(scope="module")
def words():
    """A tokenizer, and texts of different lengths that its merges were learned from."""
    texts = ["the cat sat on the mat, and the other cat sat there too", "the mat", "é" * 20, "another other mat"]
    return train_tokenizer([text.encode() for text in texts * 3], 320, progress=False), texts


def test_split_tokens_are_the_same_text(words):
    tokenizer, texts = words
    rows = [torch.tensor(encode_text(tokenizer, text)) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).bool()
    split, seen = TokenSplitter(tokenizer), set()
    torch.manual_seed(0)
    for _ in range(50):
        made = split(ids, real)
        for row, before, text in zip(made, rows, texts, strict=True):
            assert decode_bytes(tokenizer, row.tolist(), skip_special_tokens=True).decode() == text
            assert row[0] == before[0]
            assert len(row) >= len(before)
            seen.add(tuple(row.tolist()))
    assert len(seen) > 40
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(split(ids, real), split(ids, real), strict=True)) is False
    torch.manual_seed(0)
    first = split(ids, real)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, split(ids, real), strict=True))


def test_every_merge_is_undone_as_often_as_said(words):
    tokenizer, _ = words
    pairs = merged_pairs(tokenizer)
    flat = [token for token, pair in pairs.items() if not set(pair) & set(pairs)]  # of two bytes
    deep = [token for token, pair in pairs.items() if set(pair) & set(flat)]
    split = TokenSplitter(tokenizer)
    torch.manual_seed(0)
    ids = torch.tensor(flat[:1]).repeat(1, 20_000)
    (made,) = split(ids, torch.ones_like(ids, dtype=torch.bool))
    assert (len(made) - 20_000) / 20_000 == pytest.approx(SPLIT, abs=0.01)
    ids = torch.tensor(deep[:1]).repeat(1, 20_000)
    (made,) = split(ids, torch.ones_like(ids, dtype=torch.bool))
    inner = sum(part in pairs for part in pairs[deep[0]])
    assert (len(made) - 20_000) / 20_000 == pytest.approx(SPLIT * (1 + inner * SPLIT), abs=0.01)


def test_both_sides_of_a_translation_are_split(words):
    tokenizer, texts = words
    ids = torch.tensor([encode_text(tokenizer, texts[0])] * 64)
    labels = torch.cat((ids, torch.full_like(ids[:, :3], -100)), 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    change = batch_changes(["split", "drop"], tokenizer=tokenizer, targets=("labels",))
    assert change is not None
    made = change(batch)
    for row in made["labels"]:
        assert decode_bytes(tokenizer, row[row != -100].tolist(), skip_special_tokens=True).decode() == texts[0]
    assert (made["labels"] != -100).sum() > (labels != -100).sum()
    assert made["input_ids"].shape == made["attention_mask"].shape
    kept = made["attention_mask"].sum() / (made["input_ids"] != tokenizer.pad_token_id).sum()
    assert 0.6 < float(kept) < 0.8
    classes = {**batch, "labels": torch.arange(64)}
    change = batch_changes(["split"], tokenizer=tokenizer)
    assert change is not None
    assert change(classes)["labels"] is classes["labels"]


def test_a_batch_of_several_modalities():
    """Each change touches what it is of; a sound that is missing, one sample of silence, stays so."""
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.ones(8, 20, dtype=torch.long),
        "attention_mask": torch.ones(8, 20, dtype=torch.long),
        "pixel_values": torch.randn(8, 3, 16, 16),
        "input_values": torch.randn(8, 900),
        "audio_attention_mask": torch.ones(8, 900, dtype=torch.long),
        "present": torch.ones(8, 3, dtype=torch.bool),
    }
    batch["audio_attention_mask"][0, 1:] = 0
    batch["input_values"][0] = 0
    of = {
        "drop": ["attention_mask"],
        "crop": ["pixel_values"],
        "flip": ["pixel_values"],
        "speed": ["audio_attention_mask", "input_values"],
        "noise": ["input_values"],
    }
    for name, expected in of.items():
        change = batch_changes([name], sampling_rate=1000)
        assert change is not None
        made = change(batch)
        different = [
            key for key in batch if made[key].shape != batch[key].shape or not torch.allclose(made[key], batch[key])
        ]
        assert sorted(different) == expected or (name == "noise" and different == expected)
        assert int(made["audio_attention_mask"][0].sum()) == 1
        assert not made["input_values"][0].any()
    assert batch_changes(None) is None
    texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    pairs = {**texts, **{f"pair_{key}": value for key, value in texts.items()}}
    change = batch_changes(["drop"])
    assert change is not None
    made = change(pairs)
    assert (made["attention_mask"] != made["pair_attention_mask"]).any()
    assert not made["pair_attention_mask"].all()


def test_sounds_stay_normalised():
    values, mask = torch.randn(3, 2000), torch.ones(3, 2000, dtype=torch.long)
    mask[2, 500:] = 0
    made = change_sounds(values, mask, ["speed", "noise"], 1000)
    for row, real in zip(made["input_values"], made["attention_mask"].bool(), strict=True):
        assert float(row[real].mean()) == pytest.approx(0, abs=1e-3)
        assert float(row[real].var()) == pytest.approx(1, abs=1e-2)
        assert not row[~real].any()


@pytest.mark.parametrize("task", TASKS)
def test_a_change_that_a_task_does_not_know_is_refused(task, tmp_path, capsys):
    (tmp_path / "data.txt").write_text("words\n")
    words = ["train", "--task", task, "--data", str(tmp_path / "data.txt"), "--output-dir", str(tmp_path / "run")]
    assert main([*words, "--augment", "spin"]) == 2
    error = capsys.readouterr().err
    assert f"augment = 'spin': {task} has n" in error
    for name in TASKS[task].changes:
        assert name in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_mean_is_over_the_targets_that_there_are(monkeypatch):
    """A batch whose targets a change makes more of counts as many more, of the step's that it is a part of."""
    seen = []
    monkeypatch.setattr(Trainer, "training_step", lambda self, model, inputs, number: seen.append((inputs, number)))
    trainer = object.__new__(ResonanceTrainer)
    labels = torch.tensor([[3, 4, -100]])
    trainer.augment = lambda batch: {**batch, "labels": torch.tensor([[3, 4, 5, -100]])}
    trainer.training_step(torch.nn.Identity(), {"labels": labels}, torch.tensor(10))
    assert seen[0][0]["labels"].shape == (1, 4)
    assert float(seen[0][1]) == 15
    trainer.augment = lambda batch: {**batch}
    trainer.training_step(torch.nn.Identity(), {"labels": labels}, 10)
    assert seen[1][1] == 10
