"""Models: inputs + Backbone + head + loss. Importing registers them with transformers' Auto classes."""

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from resonance_nn.config import ResonanceConfig
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.models.audio import ResonanceForAudioClassification, ResonanceForAudioFrameClassification
from resonance_nn.models.base import ResonanceModel
from resonance_nn.models.causal_lm import ResonanceForCausalLM
from resonance_nn.models.encoder import (
    ResonanceForMaskedLM,
    ResonanceForSentenceEmbedding,
    ResonanceForSequenceClassification,
    ResonanceForTokenClassification,
)
from resonance_nn.models.mamba2 import load_mamba2_layer, mamba2_config
from resonance_nn.models.multimodal import ResonanceForContrastive, ResonanceForMultimodalClassification
from resonance_nn.models.seq2seq import ResonanceForConditionalGeneration
from resonance_nn.models.vision import ResonanceForImageClassification
from resonance_nn.processor import ResonanceProcessor

transformers.AutoConfig.register(ResonanceConfig.model_type, ResonanceConfig, exist_ok=True)
for auto, model in (
    (transformers.AutoModel, ResonanceModel),
    (transformers.AutoModelForCausalLM, ResonanceForCausalLM),
    (transformers.AutoModelForSeq2SeqLM, ResonanceForConditionalGeneration),
    (transformers.AutoModelForMaskedLM, ResonanceForMaskedLM),
    (transformers.AutoModelForSequenceClassification, ResonanceForSequenceClassification),
    (transformers.AutoModelForTokenClassification, ResonanceForTokenClassification),
    (transformers.AutoModelForImageClassification, ResonanceForImageClassification),
    (transformers.AutoModelForAudioClassification, ResonanceForAudioClassification),
    (transformers.AutoModelForAudioFrameClassification, ResonanceForAudioFrameClassification),
):
    auto.register(ResonanceConfig, model, exist_ok=True)
transformers.AutoImageProcessor.register(
    ResonanceConfig, slow_image_processor_class=ResonanceImageProcessor, exist_ok=True
)


class _Multimodal(ResonanceConfig):
    """A key for transformers' table of processors, found there by its own name: that of all models would give it to
    those of one modality too."""


transformers.AutoProcessor.register(_Multimodal, ResonanceProcessor, exist_ok=True)
# by the first of these tables of names transformers' Trainer knows whose labels are shifted inside (its label smoothing
# needs it), by the second its audio pipeline what it can run
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ResonanceConfig.model_type] = ResonanceForCausalLM.__name__
_audio: dict[str, str] = MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES  # type: ignore[assignment]
_audio[ResonanceConfig.model_type] = ResonanceForAudioClassification.__name__

__all__ = [
    "ResonanceForAudioClassification",
    "ResonanceForAudioFrameClassification",
    "ResonanceForCausalLM",
    "ResonanceForConditionalGeneration",
    "ResonanceForContrastive",
    "ResonanceForImageClassification",
    "ResonanceForMaskedLM",
    "ResonanceForMultimodalClassification",
    "ResonanceForSentenceEmbedding",
    "ResonanceForSequenceClassification",
    "ResonanceForTokenClassification",
    "ResonanceModel",
    "load_mamba2_layer",
    "mamba2_config",
]
