"""Pictures: their class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from resonance_nn.data.documents import DataError
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.models.vision import ResonanceForImageClassification
from resonance_nn.plots import plot_pictures
from resonance_nn.prediction.base import Found, Predictor
from resonance_nn.tasks.images import SUFFIXES


class ImageClasses(Predictor):
    """Pictures, in the size trained at unless ``size`` says otherwise."""

    kind = "labels"
    architecture = ResonanceForImageClassification
    takes_text = False
    can_draw = True

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        if not (folder / "preprocessor_config.json").is_file():
            raise ValueError(f"model {str(folder)!r}: has no preprocessor_config.json; save its processor beside it")
        return ResonanceImageProcessor.from_pretrained(str(folder), local_files_only=True)

    def files(self, path: str) -> list[Found]:
        place = Path(path)
        if not place.exists():
            raise DataError(f"{path}: no such file or folder")
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        files = [file for file in files if place.is_file() or file.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(f"{path}: no pictures in it ({', '.join(SUFFIXES)})")
        labels = set(self.model.config.id2label.values())
        of_folder = [file.parent.name if place.is_dir() and file.parent.name in labels else None for file in files]
        return [
            {"name": str(file), "input": str(file), **({} if truth is None else {"truth": truth})}
            for file, truth in zip(files, of_folder, strict=True)
        ]

    def batch(self, inputs: list[Found]) -> dict[str, torch.Tensor]:
        size = self.model.config.image_size
        arrays = np.stack([self.processor.array(one["input"], size) for one in inputs])
        return {"pixel_values": self.processor.normalise(torch.from_numpy(arrays))}

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        return self.scores(out.logits)

    def draw(self, found: list[Found], path: str) -> None:
        """A grid of the first 48 pictures; a wrong label is red where the right one is known."""
        pictures = [(self.processor.array(one["input"]), one) for one in found[:48]]
        plot_pictures([(pixels, f"{one['label']} {one['score']:.0%}", _wrong(one)) for pixels, one in pictures], path)


def _wrong(one: Found) -> bool:
    return "truth" in one and one["truth"] != one["label"]
