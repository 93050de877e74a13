"""``--augment``: random changes of the examples to train on, a batch at a time, by torch's generator."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resonance_nn.data.audio import augment, normalised

TEXT_CHANGES = ("drop",)
IMAGE_CHANGES = ("flip", "crop", "erase")
SOUND_CHANGES = ("speed", "shift", "gain", "mask", "noise")
DROPPED = 0.3  # of the tokens


def check_changes(names: Sequence[str] | None, known: Sequence[str], task: str) -> None:
    """Raise ValueError for a change that a task does not know, or whose package is missing."""
    for name in names or ():
        if name not in known:
            allowed = f"must be of {', '.join(known)}" if known else "leave it out"
            raise ValueError(f"augment = {name!r}: {task} has {'no such change' if known else 'none'}; {allowed}")
        if name in IMAGE_CHANGES and importlib.util.find_spec("kornia") is None:
            raise ValueError(f"augment = {name!r}: needs kornia; pip install 'resonance-nn[images]'")


def batch_changes(
    names: Sequence[str] | None, sampling_rate: int = 1
) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What changes a batch of texts, images, sounds or several of these, by the names in its ``--augment``; None where
    there are none. ``sampling_rate`` is of the sounds. What a batch does not have is left alone."""
    if not names:
        return None
    images = image_changes([name for name in names if name in IMAGE_CHANGES])
    sounds = [name for name in names if name in SOUND_CHANGES]

    def apply(batch: dict[str, Any]) -> dict[str, Any]:
        changed = dict(batch)
        if "drop" in names:
            for name in batch:
                if name.endswith("input_ids"):
                    mask = name.removesuffix("input_ids") + "attention_mask"
                    changed[mask] = drop_tokens(batch[mask])
        if images is not None and "pixel_values" in batch:
            changed["pixel_values"] = images(batch["pixel_values"])
        if sounds and "input_values" in batch:
            mask = "audio_attention_mask" if "audio_attention_mask" in batch else "attention_mask"
            made = change_sounds(batch["input_values"], batch[mask], sounds, sampling_rate)
            changed["input_values"], changed[mask] = made["input_values"], made["attention_mask"]
        return changed

    return apply


def drop_tokens(mask: Tensor) -> Tensor:
    """A mask (B, L) of texts without 30% of their tokens, each at random; the first stays. Word dropout: Iyyer et al.
    2015."""
    kept = torch.rand(mask.shape) >= DROPPED
    kept[:, 0] = True
    return mask * kept.to(mask)


def image_changes(names: Sequence[str]) -> Callable[[Tensor], Tensor] | None:
    """Random changes of normalised images (B, C, rows, columns), by kornia: "flip" left to right; "crop", shifted by up
    to an eighth, the mean moving in; "erase", a rectangle of 2–20% set to the mean, in every fourth. None is none."""
    if not names:
        return None
    from kornia import augmentation as kornia

    steps: list[nn.Module] = []
    if "flip" in names:
        steps.append(kornia.RandomHorizontalFlip(p=0.5))
    if "erase" in names:
        steps.append(kornia.RandomErasing(p=0.25, scale=(0.02, 0.2)))

    def apply(values: Tensor) -> Tensor:
        if "crop" in names:
            rows, columns = values.shape[2:]
            shift = kornia.RandomCrop((rows, columns), padding=(columns // 8, rows // 8))
            values = shift(values)
        for step in steps:
            values = step(values)
        return values

    return apply


def change_sounds(values: Tensor, mask: Tensor, names: Sequence[str], sampling_rate: int) -> dict[str, Tensor]:
    """Sounds (B, longest) as they would be read changed: :func:`resonance_nn.data.audio.augment` with the changes
    named, then normalised and padded; ``input_values`` and ``attention_mask``."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    sounds = [
        augment(
            samples[real.bool()].cpu().numpy(),
            sampling_rate,
            rng,
            speed=0.15 if "speed" in names else 0.0,
            shift_seconds=0.05 if "shift" in names else 0.0,
            gain_db=6.0 if "gain" in names else 0.0,
            mask=0.2 if "mask" in names else 0.0,
            noise_db=(10.0, 40.0) if "noise" in names else None,
        )
        for samples, real in zip(values, mask, strict=True)
    ]
    return {name: value.to(values.device) for name, value in normalised(sounds).items()}
