"""Pictures -> pixel values, saved with the model as preprocessor_config.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from resonance_nn.data.images import read_image


def check_size(size: Any) -> list[int]:
    """Rows and columns. Raises ValueError."""
    pair = list(size) if isinstance(size, list | tuple) else []
    if len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
        raise ValueError(f"size = {size!r}: must be (rows, columns), two integers ≥ 1")
    return pair


class ResonanceImageProcessor(BaseImageProcessor):
    """Pictures of any kind -> ``pixel_values`` (B, channels, rows, columns), normalised.

        x = (bytes / 255 − mean) / std          mean and std a channel, of the training images

    Grey ones and those in colour become what the model was trained on. They keep their size unless ``size`` (rows,
    columns) is given: the model takes any, but those of a batch must agree.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        num_channels: int = 3,
        image_mean: Sequence[float] = (0.5,),
        image_std: Sequence[float] = (0.5,),
        size: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            numbers = list(values) if isinstance(values, Sequence) else []
            right = all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
            if not right or len(numbers) not in (1, num_channels) or (name == "image_std" and min(numbers) <= 0):
                raise ValueError(
                    f"{name} = {values!r}: must be a list of 1 or num_channels = {num_channels} numbers, std > 0"
                )
        self.num_channels = num_channels
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.size = None if size is None else check_size(size)

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """``images``: one or a list of Pillow's, paths, arrays or tensors (rows, columns[, channels])."""
        several = isinstance(images, list | tuple)
        size = kwargs.get("size", self.size)
        size = None if size is None else check_size(size)
        arrays = [self.array(image, size) for image in (images if several else [images])]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            sizes = sorted(f"{rows} × {columns}" for rows, columns, _ in shapes)
            raise ValueError(
                f"images of {', '.join(sizes)} pixels in one batch: give size = (rows, columns), or one size"
            )
        return BatchFeature({"pixel_values": self.normalise(torch.from_numpy(np.stack(arrays)))}, return_tensors)

    def array(self, image: Any, size: Sequence[int] | None = None) -> np.ndarray:
        """(rows, columns, channels) bytes of one picture, in the size if one is given."""
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu().numpy()
        pixels = read_image(image, self.num_channels)
        if size is None or pixels.shape[:2] == tuple(size):
            return pixels
        resized = Image.fromarray(pixels.squeeze(-1) if self.num_channels == 1 else pixels).resize(
            (size[1], size[0]), Image.Resampling.BICUBIC
        )
        return np.asarray(resized).reshape(*size, self.num_channels)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes (B, rows, columns, channels) -> float32 (B, channels, rows, columns)."""
        mean = torch.tensor(self.image_mean, device=pixels.device)
        std = torch.tensor(self.image_std, device=pixels.device)
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
