"""Shared by all tests: small sizes, and uninitialised memory filled with NaN so that reading it cannot pass."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from corpus import FILES, write
from torch import Tensor

from resonance_nn.data import train_tokenizer

torch.set_num_threads(1)  # the tensors here are small: threads would only wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """torch.empty returns NaN while this is in use."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def tokenizer():
    """Of the corpus's 400 most useful tokens."""
    return train_tokenizer(FILES.values(), 400, progress=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The corpus as files."""
    return write(tmp_path / "corpus", FILES)


def relative(actual: Tensor, expected: Tensor) -> float:
    """max|Δ| / max|expected|, the measure of MATH §0."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    actual, expected = actual.detach(), expected.detach()
    scale = expected.double().abs().max().clamp(min=1e-12)
    return float((actual.double() - expected.double()).abs().max() / scale)
