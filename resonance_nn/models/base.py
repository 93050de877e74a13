"""What all models share: initialisation, loading and saving, and the stack behind a token embedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from resonance_nn.backbone import Backbone, Block
from resonance_nn.bundled import bundled_models
from resonance_nn.cache import ResonanceCache
from resonance_nn.config import ResonanceConfig
from resonance_nn.layers import RMSNorm
from resonance_nn.mixers import MIXERS, is_causal

ALIGNMENT = 64  # bytes, as PyTorch allocates on a CPU


@dataclass
class ResonanceOutput(ModelOutput):
    """Output of :class:`ResonanceModel`: ``last_hidden_state`` (B, L, D), the cache, the residual streams, and in
    training the sum of the mixers' weighted auxiliary losses (None where no mixer has one)."""

    last_hidden_state: Tensor | None = None
    past_key_values: ResonanceCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class ResonancePreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by all models of the package."""

    config_class = ResonanceConfig
    config: ResonanceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the Trainer divides the losses of accumulated batches, unless a model does by targets
    _is_stateful = True
    _keep_in_fp32_modules_strict = {name for mixer in MIXERS.values() for name in mixer.float32_parameters}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As ``transformers``', from safetensors files only. The name of a model that comes with the package, as
        "resonance-tiny", is enough, unless a folder is called so. On a CPU weights are moved to where a new model's
        would lie: those of a mapped file begin anywhere, and on some CPUs sums then round otherwise."""
        kwargs.setdefault("use_safetensors", True)
        name = args[0] if args else kwargs.pop("pretrained_model_name_or_path", None)
        if isinstance(name, str) and not Path(name).is_dir():
            name = bundled_models().get(name, name)
        loaded = super().from_pretrained(name, *args[1:], **kwargs)
        _align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear maps and embeddings N(0, σ²), the two maps into the residual stream σ/√(2·layers), norms 1, and each
        mixer's own parameters as the mixer says."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            residual = getattr(module, "_into_residual", False)
            init.normal_(module.weight, 0.0, std / (2 * self.config.num_hidden_layers) ** 0.5 if residual else std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, 0.0, std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif hasattr(module, "initial_values"):  # a mixer's, a convolution's, a front end's own parameters
            for name, value in module.initial_values().items():  # type: ignore[operator]
                init.copy_(module.get_parameter(name), value)


def _align(model: nn.Module) -> None:
    """Copy the tensors on a CPU that do not begin at a multiple of ``ALIGNMENT`` bytes."""
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor.data) is Tensor and tensor.device.type == "cpu"  # no quantised ones
        if plain and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


class ResonanceModel(ResonancePreTrainedModel):
    """Token embedding and backbone: ids (B, L) -> hidden states (B, L, D). The mixers may be of either kind: without a
    cache, of those that see the future too."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.causal = all(map(is_causal, config.mixers))
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = Backbone(config)
        mark_residual_maps(self.backbone)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: ResonanceCache | None = None,
        use_cache: bool | None = None,
        reset: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> ResonanceOutput:
        """Arguments as :meth:`ResonanceForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] == 0:
            raise ValueError("a sequence of 0 tokens: pass at least one, a bos token for an empty prompt")
        if use_cache is None:
            use_cache = self.config.use_cache and self.causal and not self.training
        cache = past_key_values
        if use_cache and cache is None:
            cache = ResonanceCache(self.config.num_hidden_layers)
        if cache is not None and not isinstance(cache, ResonanceCache):
            raise ValueError(f"past_key_values of type {type(cache).__name__}: must be a ResonanceCache, or None")
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        B, L = x.shape[:2]
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < L:
                raise ValueError(
                    f"attention_mask of shape {tuple(attention_mask.shape)}: must be ({B}, L) with L ≥ {L}, the tokens "
                    "of this call"
                )
            attention_mask = attention_mask[:, attention_mask.shape[1] - L :]
        if reset is not None:
            if reset.shape != (B, L):
                raise ValueError(f"reset of shape {tuple(reset.shape)}: must be ({B}, {L}), one for each token")
            reset = reset.bool()
        if cache is not None:
            blocks = [block for block in self.backbone.blocks if isinstance(block, Block)]
            cache.check([block.mixer.state_names for block in blocks])
        losses: list[Tensor] | None = [] if self.training else None
        x, states, hidden = self.backbone(
            x,
            mask=attention_mask,
            reset=reset,
            states=None if cache is None else cache.states,
            return_states=use_cache,
            return_hidden=output_hidden_states,
            losses=losses,
        )
        if use_cache:
            assert cache is not None
            cache.set(states, L)
        return ResonanceOutput(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            aux_loss=torch.stack(losses).sum() if losses else None,
        )


def mark_residual_maps(backbone: Backbone) -> None:
    """Tell :meth:`ResonancePreTrainedModel._init_weights` which maps write into the residual stream."""
    for name, module in backbone.named_modules():
        if name.endswith((".out_proj", ".down_proj")):
            module._into_residual = True  # type: ignore[assignment]
