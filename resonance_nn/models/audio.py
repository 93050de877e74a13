"""Sounds: frames of samples, as they are or as log-mel spectra, and a linear map -> backbone -> a head."""

from __future__ import annotations

import copy
import warnings
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.audio_utils import mel_filter_bank, optimal_fft_length
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from resonance_nn.backbone import Backbone
from resonance_nn.config import ResonanceConfig
from resonance_nn.mixers.base import RightPadding, real_tokens
from resonance_nn.models.base import ResonanceOutput, ResonancePreTrainedModel, mark_residual_maps
from resonance_nn.models.pooling import classification_loss, label_head, pool
from resonance_nn.ops.mel import log_mel, mel_frames
from resonance_nn.ops.precision import wide_dtype

SILENCE = 1e-5  # power in a band beside that of white noise of variance 1: 50 dB below; what is fainter is hiss
LOG_SPREAD = 4.0  # about the standard deviation of the log power of speech, over bands and frames
OFFSET_STD = 0.1  # about that of the tokens of a sound of variance 1 at first

_Count = TypeVar("_Count", int, Tensor)


@lru_cache
def mel_filters(num_mel_bins: int, window_size: int, sampling_rate: int) -> np.ndarray:
    """(F/2+1, bins): triangles on Slaney's mel scale from 0 Hz to half the sampling rate, each scaled so that white
    noise of variance 1 under a Hann window has a mean power of 1 in it. F is the least power of two that holds the
    window and gives every triangle a frequency; zeros fill it up."""
    fft_size = max(2, optimal_fft_length(window_size))
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a filter is empty: it gets a longer DFT
            filters = mel_filter_bank(
                *(fft_size // 2 + 1, num_mel_bins, 0.0, sampling_rate / 2, sampling_rate), mel_scale="slaney"
            )
        if (filters.sum(0) > 0).all():
            break
        fft_size *= 2
    window = 3 / 8 * window_size if window_size > 2 else 1.0  # Σ w_j²; in numbers, for models are built on "meta"
    return filters / (window * filters.sum(0))


class AudioEmbedding(nn.Module):
    """Samples (B, n) -> tokens (B, frames, D), and which are real.

    "waveform": ``frame_size`` samples a frame, side by side, the last one filled up with zeros; they are mapped
    linearly. "log_mel": :func:`resonance_nn.ops.mel.log_mel` with :func:`mel_filters`, divided by a constant: no
    statistics of the sound, so that a frame depends on its own samples alone, and causal mixers stay causal. A learned
    vector is added, beside which the norms of the backbone tell loud from quiet.

    Samples should have a variance of about 1, which `Wav2Vec2FeatureExtractor(do_normalize=True)` sees to.
    Padding may stand anywhere in a row: real samples are moved to its beginning first, and real frames come back there.
    """

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__()
        self.front_end, self.sampling_rate = config.front_end, config.sampling_rate
        if self.front_end == "waveform":
            self.window_size = self.hop_size = config.frame_size
            size = config.frame_size
        else:
            self.window_size, self.hop_size = config.window_size, config.hop_size
            size = config.num_mel_bins
            self.filters = mel_filters(size, self.window_size, self.sampling_rate)
        self.proj = nn.Linear(size, config.hidden_size, bias=False)
        self.offset = nn.Parameter(torch.empty(config.hidden_size).normal_(0, OFFSET_STD))

    def initial_values(self) -> dict[str, Tensor]:
        return {"offset": torch.empty(self.offset.shape).normal_(0, OFFSET_STD)}

    def frame_count(self, samples: _Count) -> _Count:
        """Frames that so many samples give: ⌈n/frame_size⌉, or 1 + ⌊max(0, n − window_size)/hop_size⌋ for n ≥ 1."""
        if self.front_end == "waveform":
            return -(-samples // self.hop_size)
        return mel_frames(samples, self.window_size, self.hop_size)

    def frame_times(self, samples: int) -> np.ndarray:
        """(frames, 2): the seconds at which each frame of so many samples starts and ends. Those of "log_mel" overlap
        where hops are shorter than windows."""
        start = np.arange(self.frame_count(samples)) * self.hop_size
        return np.stack((start, np.minimum(start + self.window_size, samples)), axis=1) / self.sampling_rate

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Samples (B, n), and a mask (B, n), False or 0 at padding -> tokens (B, frames, D) and their mask, where all
        padding is on the right; None where there is none."""
        if input_values.dim() != 2 or input_values.shape[1] == 0 or not input_values.is_floating_point():
            raise ValueError(
                f"input_values of shape {tuple(input_values.shape)} and {input_values.dtype}: must be (sounds, "
                "samples) of floating-point numbers, one sample or more; data.audio.read_audio makes them"
            )
        if attention_mask is not None and attention_mask.shape != input_values.shape:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: must be {tuple(input_values.shape)}, as "
                "input_values"
            )
        padding, length = RightPadding.of(attention_mask), None
        if padding is not None:
            input_values, length = padding.apply(input_values), padding.length
        features = self._features(input_values, length)
        tokens = self.proj(features.to(self.proj.weight.dtype)) + self.offset
        return tokens, None if length is None else real_tokens(tokens, self.frame_count(length))

    def _features(self, samples: Tensor, length: Tensor | None) -> Tensor:
        """(B, n) -> (B, frames, ·)."""
        n = samples.shape[1]
        if self.front_end == "waveform":
            if length is not None:
                samples = samples.masked_fill(torch.arange(n, device=samples.device) >= length[:, None], 0)
            samples = F.pad(samples, (0, -n % self.window_size))
            return samples.unflatten(1, (-1, self.window_size))
        filters = torch.as_tensor(self.filters, dtype=wide_dtype(self.proj.weight), device=samples.device)
        y = log_mel(
            samples.to(filters.dtype),
            filters,
            window_size=self.window_size,
            hop_size=self.hop_size,
            floor=SILENCE,
            length=length,
        )
        return y / LOG_SPREAD


class AudioEncoder(ResonancePreTrainedModel):
    """What the heads below stand on."""

    main_input_name = "input_values"
    base_model_prefix = ""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.embed = AudioEmbedding(config)
        self.backbone = Backbone(config)
        mark_residual_maps(self.backbone)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = label_head(config)

    def frame_count(self, samples: _Count) -> _Count:
        """As :meth:`AudioEmbedding.frame_count`."""
        return self.embed.frame_count(samples)

    def frame_times(self, samples: int) -> np.ndarray:
        """As :meth:`AudioEmbedding.frame_times`."""
        return self.embed.frame_times(samples)

    def encode(
        self, input_values: Tensor, attention_mask: Tensor | None, output_hidden_states: bool | None = None
    ) -> tuple[ResonanceOutput, Tensor | None]:
        """Hidden states of the frames, and which of them are real."""
        tokens, mask = self.embed(input_values, attention_mask)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        losses: list[Tensor] | None = [] if self.training else None
        x, _, hidden = self.backbone(tokens, mask=mask, return_hidden=output_hidden_states, losses=losses)
        out = ResonanceOutput(
            last_hidden_state=x,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            aux_loss=torch.stack(losses).sum() if losses else None,
        )
        return out, mask


class ResonanceForAudioClassification(AudioEncoder):
    """A label for a sound: the mean of its frames, the last or the first (``config.pooling``), and a linear map."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, labels) of sounds (B, samples), and with ``labels`` the loss of :func:`classification_loss`."""
        out, mask = self.encode(input_values, attention_mask, output_hidden_states)
        assert out.last_hidden_state is not None
        pooled = pool(out.last_hidden_state, mask, self.config.pooling)
        logits = self.classifier(self.dropout(pooled.to(self.classifier.weight.dtype)))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config, self.training)
            loss = loss if out.aux_loss is None else loss + out.aux_loss
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)  # type: ignore[arg-type]


class ResonanceForAudioFrameClassification(AudioEncoder):
    """Labels for every frame of a sound: what happens when."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> TokenClassifierOutput:
        """Logits (B, frames, labels), a row's first :meth:`frame_count` of them its own, wherever its padding stands.

        With ``labels`` the loss of :func:`classification_loss` over real frames: of (B, frames, labels), 0 … 1, binary
        cross-entropy, unless ``config.problem_type`` says otherwise; of (B, frames) integers cross-entropy. −100 is
        ignored.
        """
        out, mask = self.encode(input_values, attention_mask, output_hidden_states)
        assert out.last_hidden_state is not None
        logits = self.classifier(self.dropout(out.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, mask)
            loss = loss if out.aux_loss is None else loss + out.aux_loss
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)  # type: ignore[arg-type]

    def _loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        B, n, K = logits.shape
        if labels.shape not in ((B, n), (B, n, K)):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}: must be {(B, n)} or {(B, n, K)}; frame_count tells how many "
                "frames so many samples give"
            )
        if mask is not None:
            real = mask.to(labels.device)
            logits, labels = logits[mask], labels[real]
        config = self.config
        if config.problem_type is None and labels.is_floating_point():  # of one label too, elsewhere a regression
            config = copy.copy(config)
            config.problem_type = "multi_label_classification"
        return classification_loss(logits, labels, config, self.training)
