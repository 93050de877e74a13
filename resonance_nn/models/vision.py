"""Images: patches by reshaping and a linear map -> backbone -> pooled -> classes. No convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import ImageClassifierOutput

from resonance_nn.backbone import Backbone
from resonance_nn.config import ResonanceConfig
from resonance_nn.models.base import ResonancePreTrainedModel, mark_residual_maps
from resonance_nn.models.pooling import classification_loss, label_head, pool
from resonance_nn.ops.precision import wide_dtype, without_autocast

POSITION_STD = 0.02


class PatchEmbedding(nn.Module):
    """Images (B, C, Y, X) -> tokens (B, rows · columns, D), and their grid.

    At ``config.image_size`` the image is cut into squares of ``patch_size`` pixels, each flattened and mapped linearly,
    plus a learned vector a place. An image of another size is the same picture sampled otherwise: it gets a patch for
    every ``patch_size`` pixels of its own, but each shows as much of the picture as it did in training, with as many
    pixels, read off the image at the density trained at (:func:`cubic_samples`). So patches of a larger image overlap.
    Places are interpolated.
    """

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__()
        if config.image_size is None:
            raise ValueError("image_size = None: a model of images needs it; give rows and columns, such as (224, 224)")
        assert isinstance(config.image_size, tuple)
        self.image_size, self.patch_size, self.num_channels = config.image_size, config.patch_size, config.num_channels
        self.grid = config.patch_grid
        self.proj = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position = nn.Parameter(torch.empty(config.hidden_size, *self.grid))

    def initial_values(self) -> dict[str, Tensor]:
        return {"position": torch.empty(self.position.shape).normal_(0, POSITION_STD)}

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens row by row, and their rows and columns."""
        if pixels.dim() != 4 or pixels.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values of shape {tuple(pixels.shape)}: must be (images, {self.num_channels}, rows, columns); "
                f"num_channels = {self.num_channels}"
            )
        p = self.patch_size
        if min(pixels.shape[2:]) < p:
            raise ValueError(
                f"pixel_values of {tuple(pixels.shape[2:])} pixels: must be {p} or more, one patch, each way"
            )
        grid, position = self.grid, self.position
        if tuple(pixels.shape[2:]) != self.image_size:
            grid = (round(pixels.shape[2] / p), round(pixels.shape[3] / p))
            pixels = self._resampled(pixels, grid)
            position = F.interpolate(position[None], size=grid, mode="bilinear", align_corners=False)[0]
        patches = pixels.unflatten(3, (grid[1], p)).unflatten(2, (grid[0], p))  # (B, C, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens = self.proj(patches.to(self.proj.weight.dtype))
        return tokens + position.flatten(1).T.to(tokens.dtype), grid

    @without_autocast
    def _resampled(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, C, rows · p, columns · p): the patches of a grid, each of the extent trained at, side by side; float32 or
        wider."""
        wide = pixels.to(wide_dtype(pixels))
        rows, columns = (self._samples_of(i, wide.shape[2 + i], grid[i]).to(wide) for i in range(2))
        return rows @ wide @ columns.T

    def _samples_of(self, axis: int, size: int, tokens: int) -> Tensor:
        """(tokens · p, size): how the pixels of so many patches along an axis come from those of the image."""
        trained, p = self.image_size[axis], self.patch_size
        centre = (torch.arange(tokens, dtype=torch.float64) + 0.5) * (trained / tokens)
        at = centre[:, None] + torch.arange(p, dtype=torch.float64) - (p - 1) / 2  # in pixels from the edge
        return cubic_samples(at.flatten() * (size / trained), size, max(1.0, size / trained))


def cubic_samples(at: Tensor, size: int, width: float) -> Tensor:
    """(n, size): rows that read the value at places (n), in pixels from the edge, off ``size`` pixels whose middles are
    at ½, 1½, …; ``width`` pixels count as one, so that what is finer is smoothed.

    Keys' cubic convolution (1981, a = −½), exact for parabolas inside at width 1; beyond the outermost middles, their
    values.
    """
    middle = torch.arange(size, dtype=at.dtype, device=at.device) + 0.5
    d = (at.clamp(0.5, size - 0.5)[:, None] - middle).abs() / width
    near = (1.5 * d - 2.5) * d.square() + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


class ResonanceForImageClassification(ResonancePreTrainedModel):
    """A label for an image of any size."""

    main_input_name = "pixel_values"
    base_model_prefix = ""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.embed = PatchEmbedding(config)
        self.backbone = Backbone(config)
        mark_residual_maps(self.backbone)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = label_head(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> ImageClassifierOutput:
        """Logits (B, labels) of images (B, C, rows, columns), and with ``labels`` the loss of
        :func:`classification_loss`."""
        x, grid = self.embed(pixel_values)
        losses: list[Tensor] = []
        x, _, hidden = self.backbone(x, grid=grid, return_hidden=bool(output_hidden_states), losses=losses)
        pooled = pool(x, None, self.config.pooling)
        logits = self.classifier(self.dropout(pooled.to(self.classifier.weight.dtype)))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, self.training)
            loss = loss + torch.stack(losses).sum() if losses and self.training else loss
        return ImageClassifierOutput(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )
