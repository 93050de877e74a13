"""Pictures: their class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.models.vision import ResonanceForImageClassification
from resonance_nn.plots import plot_pictures
from resonance_nn.prediction.base import Batch, FilePredictor, Found, OneClass, any_script
from resonance_nn.tasks.images import SUFFIXES, find_pictures


class ImageClasses(OneClass, FilePredictor):
    """Pictures, in the size trained at unless ``size`` says otherwise."""

    what, suffixes, column = "pictures", SUFFIXES, "image"
    architecture = ResonanceForImageClassification
    processor_class = ResonanceImageProcessor
    can_draw = True

    def __init__(self, model: Any, processor: Any, top: int | None = None) -> None:
        super().__init__(model, processor, top)
        self.arrays: dict[str, Any] = {}  # the pictures that are no files of their own, by name

    def files(self, path: str) -> list[Found]:
        if "idx3" not in Path(path).name or not Path(path).is_file():
            return super().files(path)
        found: list[Found] = []
        for number, picture in enumerate(find_pictures(path), 1):
            found.append(self.of_file(f"{path}: image {number}", picture.label))
            self.arrays[found[-1]["name"]] = picture.source
        return found

    def source(self, one: Found) -> Any:
        """What to read a picture from."""
        return self.arrays.get(one["input"], one["input"])

    def batch(self, inputs: list[Found]) -> Batch:
        size = self.model.config.image_size
        arrays = np.stack([self.processor.array(self.source(one), size) for one in inputs])
        return {"pixel_values": self.processor.normalise(torch.from_numpy(arrays))}

    @any_script()
    def draw(self, found: list[Found], path: str) -> None:
        """A grid of the first 48 pictures; a wrong label is red where the right one is known."""
        pictures = [
            (self.processor.array(self.source(one)), f"{one['label']} {one['score']:.0%}", not all(self.right(one)))
            for one in found[:48]
        ]
        plot_pictures(pictures, path)
