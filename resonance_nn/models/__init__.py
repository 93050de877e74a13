"""Models: inputs + Backbone + head + loss. Importing registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from resonance_nn.config import ResonanceConfig
from resonance_nn.models.causal_lm import ResonanceForCausalLM, ResonanceModel
from resonance_nn.models.mamba2 import load_mamba2_layer, mamba2_config

AutoConfig.register(ResonanceConfig.model_type, ResonanceConfig, exist_ok=True)
AutoModel.register(ResonanceConfig, ResonanceModel, exist_ok=True)
AutoModelForCausalLM.register(ResonanceConfig, ResonanceForCausalLM, exist_ok=True)
# by this table of names transformers' Trainer knows whose labels are shifted inside (its label smoothing needs it)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ResonanceConfig.model_type] = ResonanceForCausalLM.__name__

__all__ = ["ResonanceForCausalLM", "ResonanceModel", "load_mamba2_layer", "mamba2_config"]
