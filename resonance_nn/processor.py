"""Texts, pictures and sounds, any of them missing -> the inputs of a multimodal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from resonance_nn.config_checks import MODALITIES
from resonance_nn.data import encode_text
from resonance_nn.data.audio import normalised, read_audio
from resonance_nn.image_processor import check_size


class ResonanceProcessor(ProcessorMixin):
    """A tokenizer, a :class:`ResonanceImageProcessor` and a `Wav2Vec2FeatureExtractor`, saved as one."""

    def __init__(self, tokenizer: Any, image_processor: Any, feature_extractor: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, image_processor, feature_extractor, **kwargs)

    def __call__(  # type: ignore[override]
        self,
        text: Sequence[str | None] | None = None,
        images: Sequence[Any] | None = None,
        audio: Sequence[Any] | None = None,
        modalities: Sequence[str] = MODALITIES,
        size: tuple[int, int] | None = None,
        max_length: int | None = None,
    ) -> BatchFeature:
        """The inputs of B examples, and ``present`` (B, M), which of ``modalities`` each has.

        Args:
            text: B texts; None, as anywhere below, where there is none.
            images: what :func:`read_image` takes.
            audio: what :func:`read_audio` takes; arrays at the rate of the model.
            modalities: of the model, ``config.modalities``.
            size: (rows, columns) of the pictures, ``config.image_size``.
            max_length: tokens of a text at most.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        self._check(text, images, audio, modalities, size, max_length)
        given = {name: values for name, values in zip(MODALITIES, (text, images, audio), strict=True) if values}
        if not given or len({len(values) for values in given.values()}) > 1:
            lengths = {name: len(values) for name, values in given.items()}
            raise ValueError(f"examples: {lengths or 'none'}; give texts, images or audio, as many of each")
        present = {name: [value is not None for value in values] for name, values in given.items()}
        made: dict[str, torch.Tensor] = {}
        if "text" in given:
            made |= self._texts(given["text"], max_length)
        if "image" in given and any(present["image"]):
            made["pixel_values"] = self._images(given["image"], size)
        if "audio" in given:
            made |= self._sounds(given["audio"])
        B = len(next(iter(given.values())))
        made["present"] = torch.tensor(
            [[present[m][b] if m in present else False for m in modalities] for b in range(B)]
        )
        return BatchFeature(made)

    def _check(self, text: Any, images: Any, audio: Any, modalities: Sequence[str], size: Any, max_length: Any) -> None:
        for name, values in (("text", text), ("images", images), ("audio", audio)):
            if values is not None and not isinstance(values, list | tuple):
                raise ValueError(f"{name} = {values!r:.80}: must be a list, one each example; None where it has none")
        for i, value in enumerate(text or ()):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"text[{i}] = {value!r:.80}: must be a text, or None")
        if isinstance(modalities, str) or not modalities or not set(modalities) <= set(MODALITIES):
            raise ValueError(f"modalities = {modalities!r}: must be some of {', '.join(MODALITIES)}")
        if size is not None:
            check_size(size)
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise ValueError(f"max_length = {max_length!r}: must be an integer ≥ 1, or None")

    def _texts(self, texts: Sequence[str | None], max_length: int | None) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(encode_text(self.tokenizer, text or "", max_length)) for text in texts]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}

    def _images(self, images: Sequence[Any], size: tuple[int, int] | None) -> torch.Tensor:
        there = [i for i, image in enumerate(images) if image is not None]
        some = self.image_processor([images[i] for i in there], size=size)["pixel_values"]
        return some.new_zeros(len(images), *some.shape[1:]).index_copy(0, torch.tensor(there), some)

    def _sounds(self, sounds: Sequence[Any]) -> dict[str, torch.Tensor]:
        rate, silence = self.feature_extractor.sampling_rate, np.zeros(1, np.float32)
        made = normalised([silence if sound is None else read_audio(_array(sound), rate) for sound in sounds])
        return {"input_values": made["input_values"], "audio_attention_mask": made["attention_mask"]}


def _array(sound: Any) -> Any:
    """Tensors and lists of samples as arrays; files and arrays as they are."""
    if isinstance(sound, torch.Tensor):
        return sound.detach().cpu().numpy()
    return np.asarray(sound) if isinstance(sound, list | tuple) else sound
