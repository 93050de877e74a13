"""Pictures: their class."""

from __future__ import annotations

import numpy as np
import torch

from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.models.vision import ResonanceForImageClassification
from resonance_nn.plots import plot_pictures
from resonance_nn.prediction.base import Batch, FilePredictor, Found
from resonance_nn.tasks.images import SUFFIXES


class ImageClasses(FilePredictor):
    """Pictures, in the size trained at unless ``size`` says otherwise."""

    kind, what, suffixes = "labels", "pictures", SUFFIXES
    architecture = ResonanceForImageClassification
    processor_class = ResonanceImageProcessor
    can_draw = True

    def batch(self, inputs: list[Found]) -> Batch:
        size = self.model.config.image_size
        arrays = np.stack([self.processor.array(one["input"], size) for one in inputs])
        return {"pixel_values": self.processor.normalise(torch.from_numpy(arrays))}

    def draw(self, found: list[Found], path: str) -> None:
        """A grid of the first 48 pictures; a wrong label is red where the right one is known."""
        pictures = [(self.processor.array(one["input"]), one) for one in found[:48]]
        plot_pictures([(pixels, f"{one['label']} {one['score']:.0%}", _wrong(one)) for pixels, one in pictures], path)


def _wrong(one: Found) -> bool:
    return "truth" in one and one["truth"] != one["label"]
