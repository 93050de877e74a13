"""transformers' models that ours are measured beside on tasks, from scratch, by the same loop on the same batches.

Each has our width and depth, and trained parameters within 2% of ours, by the inner width of its MLP. It has our heads,
or heads of 64 channels where ours are wider, as a memory's are. Attention is SDPA. The rest is transformers', initial
weights too.
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
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.modeling_outputs import Seq2SeqLMOutput, SequenceClassifierOutput

from resonance_nn.bench.peers import STEP, TOLERANCE
from resonance_nn.config import ResonanceConfig, usual_heads
from resonance_nn.models.audio import AudioEmbedding
from resonance_nn.models.pooling import classification_loss, label_head, pool
from resonance_nn.models.seq2seq import target_loss

SECONDS = 1.0  # of sound that AST sees, which needs a fixed length: more is cut off, less is followed by silence
POSITIONS_OF_BERT = 512  # tokens that it reads, as published: the rest is cut off
POSITIONS = 16384  # tokens that Marian can read or write, sinusoids all: more than a source twice as long as usual


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
        "num_attention_heads": _heads(ours),
        "intermediate_size": size,
        "hidden_dropout_prob": ours.dropout,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
        "id2label": ours.id2label,
        "label2id": ours.label2id,
    }


def _heads(ours: ResonanceConfig) -> int:
    return max(ours.num_heads, usual_heads(ours.hidden_size))


class ViTClassifier(ViTForImageClassification):
    """ViT and its head of the first token; the loss is ours, smoothed alike."""

    def __init__(self, ours: ResonanceConfig, size: int) -> None:
        assert isinstance(ours.image_size, tuple)
        shape = {**_shape(ours, size), "image_size": ours.image_size, "patch_size": ours.patch_size}
        super().__init__(ViTConfig(**shape, num_channels=ours.num_channels))
        self.ours = ours

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (it is called by names)
        self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        out: Any = super().forward(pixel_values)
        return _classified(out.logits, labels, self)


def _classified(logits: Tensor, labels: Tensor | None, peer: Any) -> SequenceClassifierOutput:
    """With our loss of the labels (B), if there are any."""
    loss = None if labels is None else classification_loss(logits, labels, peer.ours, peer.training)
    return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


class BertClassifier(PreTrainedModel):
    """BERT's encoder, its tokens' mean, and a linear map: as ours but for what mixes the tokens."""

    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, ours: ResonanceConfig, size: int) -> None:
        config = BertConfig(
            **_shape(ours, size),
            vocab_size=ours.vocab_size,
            pad_token_id=ours.pad_token_id or 0,
            max_position_embeddings=POSITIONS_OF_BERT,
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
        input_ids = input_ids[:, :POSITIONS_OF_BERT]
        attention_mask = None if attention_mask is None else attention_mask[:, :POSITIONS_OF_BERT]
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return _classified(self.classifier(self.dropout(pool(hidden, attention_mask, self.ours.pooling))), labels, self)


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
        return _classified(self.classifier(self.encoder(input_values=spectra).last_hidden_state.mean(1)), labels, self)


class Wav2Vec2Classifier(Wav2Vec2ForSequenceClassification):
    """wav2vec 2.0 on samples, the mean of its real frames, a linear map; the loss is ours, smoothed alike."""

    def __init__(self, ours: ResonanceConfig, size: int) -> None:
        super().__init__(_wav2vec2_config(ours, size))
        self.ours = ours

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (it is called by names)
        self, input_values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        out: Any = super().forward(input_values, attention_mask)
        return _classified(out.logits, labels, self)


def _wav2vec2_config(ours: ResonanceConfig, size: int) -> Wav2Vec2Config:
    width = max(16, ours.hidden_size // 2)
    convolutions = {  # of the published seven: a hop of 80 samples, not 320, for sounds of half a second at 8 kHz
        "conv_dim": (width,) * 5,
        "conv_kernel": (10, 3, 3, 2, 2),
        "conv_stride": (5, 2, 2, 2, 2),
        "num_feat_extract_layers": 5,
    }
    shape = _shape(ours, size)
    shape |= {"hidden_dropout": shape.pop("hidden_dropout_prob"), "attention_dropout": 0.0, "layerdrop": 0.0}
    shape["activation_dropout"] = 0.0
    shape.pop("attention_probs_dropout_prob")
    return Wav2Vec2Config(
        **shape,
        **convolutions,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
        classifier_proj_size=ours.hidden_size,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )


class Marian(MarianMTModel):
    """Marian as OPUS-MT has it: layer norms after each part, SiLU, sinusoidal positions, one scaled embedding for both
    sides and the head. It begins with our first token and not with padding, and its loss is ours: smoothed and divided
    alike."""

    accepts_loss_kwargs = True

    def __init__(self, ours: ResonanceConfig, size: int) -> None:
        fields: dict[str, Any] = {
            "vocab_size": ours.vocab_size,
            "d_model": ours.hidden_size,
            "encoder_layers": ours.num_encoder_layers,
            "decoder_layers": ours.num_hidden_layers,
            "encoder_attention_heads": _heads(ours),
            "decoder_attention_heads": _heads(ours),
            "encoder_ffn_dim": size,
            "decoder_ffn_dim": size,
            "dropout": ours.dropout,
            "activation_function": "swish",
            "scale_embedding": True,
            "max_position_embeddings": POSITIONS,
            "decoder_start_token_id": ours.decoder_start_token_id or 0,
            "bos_token_id": ours.bos_token_id,
            "eos_token_id": ours.eos_token_id,
            "pad_token_id": ours.pad_token_id or 0,
            "forced_eos_token_id": None,
            "attn_implementation": "sdpa",
        }
        super().__init__(MarianConfig(**fields))
        self.ours = ours

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (it is called by names)
        self,
        *args: Any,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = False,
        **inputs: Any,
    ) -> Seq2SeqLMOutput:
        if labels is None:
            return super().forward(*args, **inputs)
        ids = self.prepare_decoder_input_ids_from_labels(labels)
        hidden = self.model(*args, **inputs, decoder_input_ids=ids, use_cache=False).last_hidden_state
        loss = target_loss(hidden, self.lm_head, labels, self.ours, self.training, num_items_in_batch)
        return Seq2SeqLMOutput(loss=loss, logits=self.lm_head(hidden) if return_logits else None)  # type: ignore[arg-type]


TASK_PEERS: dict[str, TaskPeer] = {
    "vit": TaskPeer("ViT", ("image-classification",), ViTClassifier),
    "marian": TaskPeer("Marian", ("translation",), Marian),
    "bert": TaskPeer("BERT-style encoder", ("text-classification",), BertClassifier),
    "ast": TaskPeer("AST", ("audio-classification",), ASTClassifier),
    "wav2vec2": TaskPeer("wav2vec 2.0-style", ("audio-classification",), Wav2Vec2Classifier),
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
