"""transformers' models that ours are measured beside on tasks, from scratch, by the same loop on the same batches.

Each has our width, depth and heads, and parameters within 2% of ours, by the inner width of its MLP. Attention is SDPA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTModel,
    BertConfig,
    BertModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from resonance_nn.bench.peers import STEP, TOLERANCE
from resonance_nn.config import ResonanceConfig
from resonance_nn.models.audio import AudioEmbedding
from resonance_nn.models.pooling import classification_loss, label_head, pool

SECONDS = 1.0  # of sound that AST sees, which needs a fixed length: more is cut off, less is followed by silence


@dataclass(frozen=True)
class TaskPeer:
    """A model of transformers' for some tasks; ``make``: (our configuration, inner width) -> model."""

    label: str
    tasks: tuple[str, ...]
    make: Callable[[ResonanceConfig, int], PreTrainedModel]


def _shape(ours: ResonanceConfig, size: int) -> dict[str, Any]:
    return {
        "hidden_size": ours.hidden_size,
        "num_hidden_layers": ours.num_hidden_layers,
        "num_attention_heads": ours.num_heads,
        "intermediate_size": size,
        "hidden_dropout_prob": ours.dropout,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
        "id2label": ours.id2label,
        "label2id": ours.label2id,
    }


def _vit(ours: ResonanceConfig, size: int) -> PreTrainedModel:
    assert isinstance(ours.image_size, tuple)
    shape = {**_shape(ours, size), "image_size": ours.image_size[0], "patch_size": ours.patch_size}
    return ViTForImageClassification(ViTConfig(**shape, num_channels=ours.num_channels))


class BertClassifier(PreTrainedModel):
    """BERT's encoder, its tokens' mean, and a linear map: as ours but for what mixes the tokens."""

    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, ours: ResonanceConfig, size: int) -> None:
        config = BertConfig(
            **_shape(ours, size),
            vocab_size=ours.vocab_size,
            pad_token_id=ours.pad_token_id or 0,
            max_position_embeddings=512,
            type_vocab_size=1,
        )
        super().__init__(config)
        self.ours = ours
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(ours.dropout)
        self.classifier = label_head(ours)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(self.dropout(pool(hidden, attention_mask, self.ours.pooling)))
        loss = None if labels is None else classification_loss(logits, labels, self.ours, self.training)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


class ASTClassifier(PreTrainedModel):
    """The Audio Spectrogram Transformer on our log-mel spectra, its patches of 16 × 16 every 10, its tokens' mean."""

    config_class = ASTConfig
    _supports_sdpa = True
    main_input_name = "input_values"

    def __init__(self, ours: ResonanceConfig, size: int) -> None:
        front_end = AudioEmbedding(ours)
        if front_end.front_end != "log_mel":
            raise ValueError("front_end = 'waveform': AST reads log_mel; its peer of samples is wav2vec2")
        samples = round(SECONDS * ours.sampling_rate)
        frames = front_end.frame_count(samples)
        config = ASTConfig(**_shape(ours, size), max_length=frames, num_mel_bins=ours.num_mel_bins)
        super().__init__(config)
        self.ours, self.samples = ours, samples
        self.front_end = front_end.requires_grad_(False)  # for its spectra; its map and offset have no part
        self.encoder = ASTModel(config)
        self.classifier = label_head(ours)
        self.post_init()

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        if attention_mask is not None:
            input_values = input_values.masked_fill(attention_mask == 0, 0)
        samples = nn.functional.pad(input_values, (0, self.samples - input_values.shape[1]))  # or cut, if that is < 0
        spectra = self.front_end._features(samples, None)
        logits = self.classifier(self.encoder(input_values=spectra).last_hidden_state.mean(1))
        loss = None if labels is None else classification_loss(logits, labels, self.ours, self.training)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def _wav2vec2(ours: ResonanceConfig, size: int) -> PreTrainedModel:
    width = max(16, ours.hidden_size // 2)
    convolutions = {  # of the published seven: a hop of 80 samples, not 320, for sounds of half a second at 8 kHz
        "conv_dim": (width,) * 5,
        "conv_kernel": (10, 3, 3, 2, 2),
        "conv_stride": (5, 2, 2, 2, 2),
        "num_feat_extract_layers": 5,
    }
    shape = _shape(ours, size)
    shape |= {"hidden_dropout": shape.pop("hidden_dropout_prob"), "attention_dropout": 0.0, "layerdrop": 0.0}
    shape.pop("attention_probs_dropout_prob")
    config = Wav2Vec2Config(
        **shape,
        **convolutions,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        classifier_proj_size=ours.hidden_size,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    return Wav2Vec2ForSequenceClassification(config)


TASK_PEERS: dict[str, TaskPeer] = {
    "vit": TaskPeer("ViT", ("image-classification",), _vit),
    "bert": TaskPeer("BERT-style encoder", ("text-classification",), BertClassifier),
    "ast": TaskPeer("AST", ("audio-classification",), ASTClassifier),
    "wav2vec2": TaskPeer("wav2vec 2.0-style", ("audio-classification",), _wav2vec2),
}


def build_task_peer(name: str, ours: ResonanceConfig, parameters: int) -> PreTrainedModel:
    """A peer beside one of ours with this configuration and number of parameters.

    Raises:
        ValueError: none within 2% of ``parameters``.
    """
    make = TASK_PEERS[name].make
    with torch.device("meta"):
        smallest, next_one = (trained(make(ours, n * STEP)) for n in (1, 2))
    size = STEP + STEP * max(0, round((parameters - smallest) / (next_one - smallest)))
    model = make(ours, size)
    if abs(trained(model) / parameters - 1) > TOLERANCE:
        raise ValueError(
            f"hidden_size = {ours.hidden_size}: no {TASK_PEERS[name].label} within {TOLERANCE:.0%} of our "
            f"{parameters:,} parameters (the nearest has {trained(model):,}); use other sizes"
        )
    return model


def trained(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
