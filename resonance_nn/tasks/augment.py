"""``--augment``: random changes of the examples to train on, a batch at a time, by torch's generator."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from resonance_nn.data.audio import augment, normalised
from resonance_nn.data.tokenizer import merged_pairs

TEXT_CHANGES = ("split", "drop")
IMAGE_CHANGES = ("flip", "crop", "zoom", "erase")
SOUND_CHANGES = ("speed", "tempo", "shift", "mask", "filter", "noise")
CHANGES = {"text": TEXT_CHANGES, "image": IMAGE_CHANGES, "audio": SOUND_CHANGES}
DROPPED = 0.3  # of the tokens
SPLIT = 0.1  # of the merges that made them
IGNORE = -100


def check_changes(names: Sequence[str] | None, known: Sequence[str], task: str) -> None:
    """Raise ValueError for a change that a task does not know, or whose package is missing."""
    for name in names or ():
        if name not in known:
            allowed = f"must be of {', '.join(known)}" if known else "leave it out"
            raise ValueError(f"augment = {name!r}: {task} has {'no such change' if known else 'none'}; {allowed}")
        if name in IMAGE_CHANGES and importlib.util.find_spec("kornia") is None:
            raise ValueError(f"augment = {name!r}: needs kornia; pip install 'resonance-nn[images]'")


def batch_changes(
    names: Sequence[str] | None,
    *,
    sampling_rate: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    targets: Sequence[str] = (),
) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What changes a batch of texts, images, sounds or several of these, by the names in its ``--augment``; None where
    there are none. ``sampling_rate`` is of the sounds, ``tokenizer`` of the texts, ``targets`` names those that are
    texts to be written, padded with −100: they are split, not dropped. What a batch does not have is left alone."""
    if not names:
        return None
    split = TokenSplitter(tokenizer) if "split" in names and tokenizer is not None else None
    images = image_changes([name for name in names if name in IMAGE_CHANGES])
    sounds = [name for name in names if name in SOUND_CHANGES]

    def apply(batch: dict[str, Any]) -> dict[str, Any]:
        changed = dict(batch)
        for name in batch:
            if name.endswith("input_ids"):
                mask = name.removesuffix("input_ids") + "attention_mask"
                if split is not None:
                    rows = split(batch[name], batch[mask].bool())
                    changed[name] = pad_sequence(rows, batch_first=True, padding_value=split.padding)
                    changed[mask] = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
                if "drop" in names:
                    changed[mask] = drop_tokens(changed[mask])
            elif name in targets and split is not None:
                rows = split(batch[name], batch[name] != IGNORE)
                changed[name] = pad_sequence(rows, batch_first=True, padding_value=IGNORE)
        if images is not None and "pixel_values" in batch:
            changed["pixel_values"] = images(batch["pixel_values"])
        if sounds and "input_values" in batch:
            mask = "audio_attention_mask" if "audio_attention_mask" in batch else "attention_mask"
            made = change_sounds(batch["input_values"], batch[mask], sounds, sampling_rate)
            changed["input_values"], changed[mask] = made["input_values"], made["attention_mask"]
        return changed

    return apply


class TokenSplitter:
    """Tokens as those that they were merged from: each merge is undone with a probability of 10%, so that words come in
    ever other pieces, as by BPE-dropout (Provilkov et al. 2020), which leaves merges out at random instead."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.padding: int = tokenizer.pad_token_id or 0  # type: ignore[assignment]
        pairs = merged_pairs(tokenizer)
        self.parts = torch.full((max(pairs, default=0) + 1, 2), -1)
        for token, pair in pairs.items():
            self.parts[token] = torch.tensor(pair)

    def __call__(self, ids: Tensor, real: Tensor) -> list[Tensor]:
        """The tokens (B, L) where ``real`` (B, L), row by row."""
        device, lengths = ids.device, real.sum(1).cpu()
        flat = ids[real].cpu()
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        open_ = torch.ones_like(flat, dtype=torch.bool)  # merges that were not yet asked
        while bool(open_.any()):
            known = flat < len(self.parts)
            parts = self.parts[flat.where(known, 0)]
            chosen = open_ & known & (parts[:, 0] >= 0) & (torch.rand(flat.shape) < SPLIT)
            count = 1 + chosen.long()
            second = count.cumsum(0)[chosen] - 1
            flat, rows, open_ = (t.repeat_interleave(count) for t in (flat, rows, chosen))
            flat[second - 1], flat[second] = parts[chosen].unbind(1)
        return list(flat.to(device).split(torch.bincount(rows, minlength=len(lengths)).tolist()))


def drop_tokens(mask: Tensor) -> Tensor:
    """A mask (B, L) of texts without 30% of their tokens, each at random; the first stays. Word dropout: Iyyer et al.
    2015."""
    kept = torch.rand(mask.shape) >= DROPPED
    kept[:, 0] = True
    return mask * kept.to(mask)


def image_changes(names: Sequence[str]) -> Callable[[Tensor], Tensor] | None:
    """Random changes of normalised images (B, C, rows, columns), by kornia: "flip" left to right; "crop", shifted by up
    to an eighth, the mean moving in; "zoom", three of ten larger or smaller by up to 15%, and less sharp;
    "erase", a rectangle of 2–20% set to the mean, in every fourth. None is none."""
    if not names:
        return None
    from kornia import augmentation as kornia

    steps: list[nn.Module] = []
    if "flip" in names:
        steps.append(kornia.RandomHorizontalFlip(p=0.5))
    if "zoom" in names:
        steps.append(kornia.RandomAffine(degrees=0.0, scale=(0.85, 1.15), p=0.3))
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
            speed=0.3 if "speed" in names else 0.0,
            tempo=0.4 if "tempo" in names else 0.0,
            shift_seconds=0.05 if "shift" in names else 0.0,
            mask=0.2 if "mask" in names else 0.0,
            filter_db=12.0 if "filter" in names else 0.0,
            noise_db=(10.0, 40.0) if "noise" in names else None,
        )
        for samples, real in zip(values, mask, strict=True)
    ]
    return {name: value.to(values.device) for name, value in normalised(sounds).items()}
