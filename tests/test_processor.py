"""What makes a multimodal model's inputs: what it takes, and what it says of what it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Wav2Vec2FeatureExtractor

from resonance_nn.data import train_tokenizer
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.processor import ResonanceProcessor


@pytest.fixture(scope="module")
def processor() -> Any:
    tokenizer = train_tokenizer([b"a frog", b"a boat"] * 20, 270, progress=False)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=True, return_attention_mask=True)
    return ResonanceProcessor(tokenizer, ResonanceImageProcessor(num_channels=1, size=(8, 8)), extractor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "abc"}, r"text = 'abc': must be a list"),
        ({"text": [5]}, r"text\[0\] = 5: must be a text, or None"),
        ({"text": ["a", b"b"]}, r"text\[1\] = b'b': must be a text, or None"),
        ({"text": ["a"], "modalities": ("video",)}, r"modalities = \('video',\): must be some of text, image, audio"),
        ({"text": ["a"], "max_length": 0}, r"max_length = 0: must be an integer ≥ 1"),
        ({"images": [np.zeros((8, 8), np.uint8)], "size": 8}, r"size = 8: must be \(rows, columns\)"),
        ({"images": [np.zeros((8, 8), np.uint8)], "size": (8.5, 8)}, r"size = \(8.5, 8\): must be"),
        ({"text": ["a"], "audio": [None, None]}, r"examples: \{'text': 1, 'audio': 2\}"),
        ({}, r"examples: none; give texts, images or audio"),
    ],
)
def test_what_it_refuses(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_an_empty_list_is_none(processor):
    assert processor(text=["a"], audio=[])["present"].tolist() == [[True, False, False]]


def test_tensors_lists_and_arrays_are_alike(processor):
    sound, picture = np.sin(np.arange(400) / 7).astype(np.float32), np.arange(64, dtype=np.uint8).reshape(8, 8)
    expected = processor(images=[picture], audio=[sound])
    for images, audio in (([torch.tensor(picture)], [torch.tensor(sound)]), ([picture], [sound.tolist()])):
        made = processor(images=images, audio=audio)
        for name, value in expected.items():
            torch.testing.assert_close(made[name], value)


@pytest.mark.parametrize(
    "arguments",
    [{"image_std": [float("nan")]}, {"image_mean": 0.5}, {"image_std": [0.0]}, {"size": [8]}, {"size": "ab"}],
)
def test_images_that_cannot_be_made(arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"{name} = "):
        ResonanceImageProcessor(**arguments)


def test_auto_processor_finds_it(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    found: Any = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(found, ResonanceProcessor)
    assert torch.equal(found(text=["a frog"])["input_ids"], processor(text=["a frog"])["input_ids"])
