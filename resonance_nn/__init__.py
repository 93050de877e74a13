"""Attention-free sequence models: pip install, any device PyTorch runs on, claims that are measurements."""

from resonance_nn.cache import ResonanceCache
from resonance_nn.config import RECIPES, SIZES, ResonanceConfig
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.infilling import infill
from resonance_nn.mixers import MIXERS
from resonance_nn.models import (
    ResonanceForAudioClassification,
    ResonanceForAudioFrameClassification,
    ResonanceForCausalLM,
    ResonanceForConditionalGeneration,
    ResonanceForContrastive,
    ResonanceForImageClassification,
    ResonanceForMaskedLM,
    ResonanceForMultimodalClassification,
    ResonanceForSentenceEmbedding,
    ResonanceForSequenceClassification,
    ResonanceForTokenClassification,
    ResonanceModel,
    load_mamba2_layer,
    mamba2_config,
)
from resonance_nn.packing import pack_weights

__version__ = "0.1.0"

__all__ = [
    "MIXERS",
    "RECIPES",
    "SIZES",
    "ResonanceCache",
    "ResonanceConfig",
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
    "ResonanceImageProcessor",
    "ResonanceModel",
    "infill",
    "load_mamba2_layer",
    "mamba2_config",
    "pack_weights",
]
