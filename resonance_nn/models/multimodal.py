"""Texts, images and sounds, any of them missing: a tower each -> fusion -> labels, or unit vectors to retrieve by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from resonance_nn.backbone import Backbone
from resonance_nn.config import ResonanceConfig
from resonance_nn.fusion import FUSIONS, HolographicFusion, HolographicSlot, Present, drop_modalities, presence
from resonance_nn.models.audio import AudioEmbedding
from resonance_nn.models.base import ResonancePreTrainedModel, mark_residual_maps
from resonance_nn.models.encoder import LOG_SCALE
from resonance_nn.models.pooling import classification_loss, contrastive_loss, label_head, pool
from resonance_nn.models.vision import PatchEmbedding

Tokens = tuple[Tensor, Tensor | None]  # (B, n, D), and which are real (B, n), None: all


def tower_config(config: ResonanceConfig, mixers: tuple[str, ...], filter_size: int | tuple[int, int]) -> Any:
    """That of a Backbone of ``num_encoder_layers`` with these mixers."""
    own = copy.copy(config)
    own.mixers, own.filter_size, own.num_hidden_layers = mixers, filter_size, config.num_encoder_layers
    return own


class Tower(nn.Module):
    """Base class: the encoder of one modality, inputs -> tokens."""

    def __init__(self, config: ResonanceConfig, mixers: tuple[str, ...], filter_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.backbone = Backbone(tower_config(config, mixers, filter_size))
        mark_residual_maps(self.backbone)

    def forward(self, x: Tensor, mask: Tensor | None, losses: list[Tensor] | None) -> Tokens:
        raise NotImplementedError


def line_filter(config: ResonanceConfig) -> int:
    """``filter_size`` of what is no image."""
    return config.filter_size if isinstance(config.filter_size, int) else config.initial_context


class TextTower(Tower):
    """Ids (B, L) -> (B, L, D)."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config, config.encoder_mixers, line_filter(config))
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, losses: list[Tensor] | None) -> Tokens:
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"input_ids of shape {tuple(x.shape)}: must be (texts, tokens), one token or more")
        if mask is not None and mask.shape != x.shape:
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: must be {tuple(x.shape)}, as input_ids")
        return self.backbone(self.embed(x), mask=mask, losses=losses)[0], mask


class ImageTower(Tower):
    """Pixels (B, C, rows, columns) -> (B, patches, D)."""

    def __init__(self, config: ResonanceConfig) -> None:
        embed = PatchEmbedding(config)
        size = config.filter_size
        super().__init__(config, config.image_mixers, size if isinstance(size, tuple) else embed.grid)
        self.embed = embed

    def forward(self, x: Tensor, mask: Tensor | None, losses: list[Tensor] | None) -> Tokens:
        tokens, grid = self.embed(x)
        return self.backbone(tokens, grid=grid, losses=losses)[0], None


class AudioTower(Tower):
    """Samples (B, n) -> (B, frames, D)."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config, config.audio_mixers, line_filter(config))
        self.embed = AudioEmbedding(config)

    def forward(self, x: Tensor, mask: Tensor | None, losses: list[Tensor] | None) -> Tokens:
        tokens, mask = self.embed(x, mask)
        return self.backbone(tokens, mask=mask, losses=losses)[0], mask


TOWERS: dict[str, type[TextTower] | type[ImageTower] | type[AudioTower]] = {
    "text": TextTower,
    "image": ImageTower,
    "audio": AudioTower,
}
INPUTS = {"text": "input_ids", "image": "pixel_values", "audio": "input_values"}


class MultimodalEncoder(ResonancePreTrainedModel):
    """What the heads below stand on: the towers of ``config.modalities``, and their fusion (``config.fusion``).

    An example may lack any modalities but all: ``present`` says which it has, and what stands in place of the others
    is not looked at. It is embedded as by a model that has no more towers than it has modalities, with the same
    weights, whatever its batch holds. A tower runs on the examples that have its modality.
    """

    base_model_prefix = ""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.towers = nn.ModuleDict({name: TOWERS[name](config) for name in config.modalities})
        self.fusion = FUSIONS[config.fusion](config)
        self.modality_dropout = config.modality_dropout  # in training, of each modality of an example but for its last

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HolographicSlot):
            init.copy_(module.role, module.initial_role())
        elif getattr(module, "_into_residual", False):  # of stacks of num_encoder_layers
            assert isinstance(module, nn.Linear)
            init.normal_(
                module.weight, 0.0, self.config.initializer_range / (2 * self.config.num_encoder_layers) ** 0.5
            )

    def get_input_embeddings(self) -> nn.Module:
        return self._text_tower().embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._text_tower().embed = value  # type: ignore[assignment]

    def _text_tower(self) -> TextTower:
        if "text" not in self.towers:
            raise NotImplementedError(f"modalities = {self.config.modalities}: without text there are no embeddings")
        tower = self.towers["text"]
        assert isinstance(tower, TextTower)
        return tower

    def _gather(self, inputs: Mapping[str, Tensor | None], masks: Mapping[str, Tensor | None]) -> dict[str, Tokens]:
        """The inputs given, by modality, in the model's order. Raises ValueError."""
        given = {name: x for name, x in inputs.items() if x is not None}
        for name in given:
            if name not in self.towers:
                raise ValueError(
                    f"{INPUTS[name]} given, but the model has no {name}: modalities = {self.config.modalities}"
                )
        return {name: (given[name], masks.get(name)) for name in self.config.modalities if name in given}

    def _presence(self, given: Mapping[str, Tokens], present: Present, required: bool = True) -> Tensor:
        values = {name: x for name, (x, _) in given.items()}
        return presence(self.config.modalities, values, present, required=required)

    def _dropped(self, present: Tensor) -> Tensor:
        return drop_modalities(present, self.modality_dropout) if self.training else present

    def _fused(self, given: Mapping[str, Tokens], present: Present, losses: list[Tensor] | None = None) -> Tensor:
        """From inputs to one vector an example (B, D), each with one modality or more."""
        here: Tensor | None = self._dropped(self._presence(given, present))
        if present is None and not (self.training and self.modality_dropout > 0):
            here = None  # so that nothing depends on data, and it can be traced
        return self.fuse(self.encode(given, here, losses), here)

    def encode(
        self, given: Mapping[str, Tokens], present: Tensor | None, losses: list[Tensor] | None = None
    ) -> dict[str, Tokens]:
        """Inputs and their masks, and which are there (B, M), None: all -> the tokens of each modality (B, n, D) and
        their mask (B, n), or None; zeros where it is missing. One that no example has is left out."""
        encoded: dict[str, Tokens] = {}
        for i, name in enumerate(self.config.modalities):
            if name not in given:
                continue
            x, mask = given[name]
            if mask is not None and len(mask) != len(x):
                raise ValueError(f"a mask of {len(mask)} examples beside {INPUTS[name]} of {len(x)}: must be as many")
            rows = None if present is None or bool(present[:, i].all()) else present[:, i].nonzero().squeeze(1)
            if rows is not None:
                if len(rows) == 0:
                    continue
                x, mask = x[rows], None if mask is None else mask[rows]
            tokens, mask = self.towers[name](x, mask, losses)
            if mask is not None and not torch.compiler.is_compiling() and not bool(mask.bool().any(1).all()):
                raise ValueError(
                    f"{INPUTS[name]}: of an example that should have {name} all is masked; mark it absent in present"
                )
            if rows is not None:
                B = given[name][0].shape[0]
                tokens = tokens.new_zeros(B, *tokens.shape[1:]).index_copy(0, rows, tokens)
                mask = None if mask is None else mask.new_zeros(B, mask.shape[1]).index_copy(0, rows, mask)
            encoded[name] = (tokens, mask)
        return encoded

    def fuse(self, encoded: Mapping[str, Tokens], present: Tensor | None) -> Tensor:
        """Of what :meth:`encode` gives one vector an example (B, D), in float32 or wider."""
        if isinstance(self.fusion, HolographicFusion):
            pooled = {name: pool(x, mask, self.config.pooling) for name, (x, mask) in encoded.items()}
            return self.fusion(pooled, present)
        tokens = {name: x for name, (x, _) in encoded.items()}
        return self.fusion(tokens, {name: mask for name, (_, mask) in encoded.items()}, present)


class ResonanceForMultimodalClassification(MultimodalEncoder):
    """A label for what any of a text, an image and a sound tell."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = label_head(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        present: Present = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits of B examples.

        Args:
            input_ids, attention_mask: texts (B, L).
            pixel_values: images (B, C, rows, columns).
            input_values, audio_attention_mask: sounds (B, samples).
            present: which modalities each example has: (B, M) bool in the order of ``config.modalities``, or (B) by
                name; None means all whose inputs are given. One whose inputs are not given is missing everywhere.
            labels: see :func:`classification_loss`.

        Returns:
            Logits (B, labels), and with ``labels`` the loss.

        Raises:
            ValueError: an example without any modality, inputs that the model has no tower for, wrong shapes.
        """
        given = self._gather(
            {"text": input_ids, "image": pixel_values, "audio": input_values},
            {"text": attention_mask, "audio": audio_attention_mask},
        )
        losses: list[Tensor] | None = [] if self.training else None
        fused = self._fused(given, present, losses)
        logits = self.classifier(self.dropout(fused.to(self.classifier.weight.dtype)))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, self.training)
            loss = loss + torch.stack(losses).sum() if losses else loss
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


@dataclass
class ContrastiveOutput(ModelOutput):
    """Output of :class:`ResonanceForContrastive`: the loss, and a side's embeddings (B, D), of length 1, or 0 where an
    example has nothing on that side; None where none has."""

    loss: Tensor | None = None
    query_embeddings: Tensor | None = None
    target_embeddings: Tensor | None = None


class ResonanceForContrastive(MultimodalEncoder):
    """Unit vectors of any modalities, such that what belongs together lies close: for retrieval of one by another."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.post_init()

    def initial_values(self) -> dict[str, Tensor]:
        return {"log_scale": torch.tensor(LOG_SCALE)}

    def embed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        present: Present = None,
        modalities: Sequence[str] | None = None,
    ) -> Tensor:
        """(B, D), each of length 1: the fusion of what each example has of ``modalities``, None: of all. Other
        arguments as :meth:`ResonanceForMultimodalClassification.forward`."""
        given = self._gather(
            {"text": input_ids, "image": pixel_values, "audio": input_values},
            {"text": attention_mask, "audio": audio_attention_mask},
        )
        if modalities is not None:
            self._check_side("modalities", modalities)
            given = {name: x for name, x in given.items() if name in modalities}
        return F.normalize(self._fused(given, present), dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_attention_mask: Tensor | None = None,
        present: Present = None,
        query: Sequence[str] | None = None,
        target: Sequence[str] | None = None,
        return_loss: bool = True,
        **_: Any,
    ) -> ContrastiveOutput:
        """Embeddings of both sides of each example, and the loss of :func:`contrastive_loss` over the examples that
        have both (0 where none has).

        Args:
            query: modalities of one side; None means the first of ``config.modalities``.
            target: of the other; None means all that ``query`` has not.
            return_loss: whether a loss is wanted.

        Other arguments as :meth:`ResonanceForMultimodalClassification.forward`; here an example may lack either side.
        """
        modalities = tuple(self.config.modalities)
        query = modalities[:1] if query is None else query
        target = tuple(name for name in modalities if name not in query) if target is None else target
        sides = (self._check_side("query", query), self._check_side("target", target))
        given = self._gather(
            {"text": input_ids, "image": pixel_values, "audio": input_values},
            {"text": attention_mask, "audio": audio_attention_mask},
        )
        whole = self._presence(given, present, required=False)
        here = [self._dropped(whole & of_side.to(whole.device)) for of_side in sides]
        losses: list[Tensor] | None = [] if self.training else None
        encoded = self.encode(given, here[0] | here[1], losses)
        embedded = [self._embed_some(encoded, of_side) for of_side in here]
        a, b = embedded
        loss = None
        if return_loss:
            loss = 0 * self.log_scale
            pairs = (here[0].any(1) & here[1].any(1)).nonzero().squeeze(1)
            if a is not None and b is not None and len(pairs):
                loss = contrastive_loss(a[pairs], b[pairs], self.log_scale)
            loss = loss + torch.stack(losses).sum() if losses else loss
        return ContrastiveOutput(loss, a, b)

    def _embed_some(self, encoded: Mapping[str, Tokens], present: Tensor) -> Tensor | None:
        """(B, D), zeros where nothing is present (B, M); None where nothing is present in any example."""
        some = {
            name: x for i, name in enumerate(self.config.modalities) if present[:, i].any() for x in [encoded[name]]
        }
        if not some:
            return None
        rows = present.any(1).nonzero().squeeze(1)
        chosen = {name: (x[rows], None if mask is None else mask[rows]) for name, (x, mask) in some.items()}
        y = F.normalize(self.fuse(chosen, present[rows]), dim=-1)
        return y.new_zeros(len(present), y.shape[1]).index_copy(0, rows, y)

    def _check_side(self, name: str, side: Sequence[str]) -> Tensor:
        """(M) bool, the modalities of a side."""
        known = tuple(self.config.modalities)
        if isinstance(side, str) or not side or not set(side) <= set(known):
            raise ValueError(f"{name} = {side!r}: must be one or more of modalities = {known}, such as {known[:1]!r}")
        return torch.tensor([modality in side for modality in known])
