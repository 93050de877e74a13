"""R-Drop: the loss of two passes and how far they disagree, and what it is refused for."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from resonance_nn.cli import main
from resonance_nn.trainer import disagreement


def test_disagreement_is_both_divergences():
    a, b = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    both = sum(F.kl_div(x, y, reduction="sum", log_target=True) for x, y in ((log_p, log_q), (log_q, log_p)))
    assert float(disagreement(a, b)) == pytest.approx(float(both), rel=1e-5)
    assert float(disagreement(a, a)) == 0


def test_it_is_in_the_loss_of_training_only(tmp_path, capsys):
    table = tmp_path / "table.tsv"
    table.write_text("".join(f"{word} {i}\t{word}\n" for i in range(20) for word in ("good", "bad")))
    words = ["train", "--task", "text-classification", "--data", str(table), "--vocab-size", "300", "--steps", "1"]
    words += ["--set", "hidden_size=32", "--set", "num_hidden_layers=1", "--precision", "fp32", "--batch-size", "8"]
    words += ["--augment", "none"]
    losses, held_out = [], []
    for alpha in ("0.0001", "1000"):
        out = tmp_path / alpha
        assert main([*words, "--dropout", "0.5", "--lr", "1e-9", "--r-drop", alpha, "--output-dir", str(out)]) == 0
        summary = json.loads((out / "train.json").read_text())["summary"]
        losses.append(summary["loss"])
        held_out.append(summary["eval_loss"])
    assert losses[1] > losses[0] + 0.01
    assert held_out[1] == pytest.approx(held_out[0], abs=1e-4)
    assert main([*words, "--dropout", "0", "--r-drop", "5", "--output-dir", str(tmp_path / "none")]) == 2
    assert "both passes are the same without dropout" in capsys.readouterr().err
