"""Models: inputs + Backbone + head + loss. Importing registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from resonance_nn.config import ResonanceConfig
from resonance_nn.models.causal_lm import ResonanceForCausalLM, ResonanceModel

AutoConfig.register(ResonanceConfig.model_type, ResonanceConfig, exist_ok=True)
AutoModel.register(ResonanceConfig, ResonanceModel, exist_ok=True)
AutoModelForCausalLM.register(ResonanceConfig, ResonanceForCausalLM, exist_ok=True)

__all__ = ["ResonanceForCausalLM", "ResonanceModel"]
