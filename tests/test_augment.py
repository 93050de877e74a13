"""`--augment`: what is changed is changed as said, the rest is left alone, and nothing is taken in silence."""

from __future__ import annotations

import pytest
import torch

from resonance_nn.cli import main
from resonance_nn.tasks import TASKS
from resonance_nn.tasks.augment import batch_changes, change_sounds, drop_tokens


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
        change = batch_changes([name], 1000)
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
    made = change_sounds(values, mask, ["speed", "gain", "noise"], 1000)
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
