"""Language models: embedding -> backbone -> tied head, trained on the next token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from resonance_nn.backbone import Backbone, Block
from resonance_nn.bundled import bundled_models
from resonance_nn.cache import ResonanceCache
from resonance_nn.config import ResonanceConfig
from resonance_nn.layers import RMSNorm, ShortConv
from resonance_nn.mixers import MIXERS, Mixer, mixer_class
from resonance_nn.ops.cross_entropy import linear_cross_entropy, logits_cross_entropy


@dataclass
class ResonanceOutput(ModelOutput):
    """Output of :class:`ResonanceModel`: ``last_hidden_state`` (B, L, D), the cache, the residual streams, and in
    training the sum of the mixers' weighted auxiliary losses (None where no mixer has one)."""

    last_hidden_state: Tensor | None = None
    past_key_values: ResonanceCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


@dataclass
class ResonanceCausalLMOutput(ModelOutput):
    """Output of :class:`ResonanceForCausalLM`. ``aux_loss`` is the part of ``loss`` beyond the cross-entropy."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: ResonanceCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class ResonancePreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving, shared by all models of the package."""

    config_class = ResonanceConfig
    config: ResonanceConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _keep_in_fp32_modules_strict = {name for mixer in MIXERS.values() for name in mixer.float32_parameters}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As ``transformers``', from safetensors files only. The name of a model that comes with the package, as
        "resonance-tiny", is enough, unless a folder is called so."""
        kwargs.setdefault("use_safetensors", True)
        name = args[0] if args else kwargs.pop("pretrained_model_name_or_path", None)
        if isinstance(name, str) and not Path(name).is_dir():
            name = bundled_models().get(name, name)
        return super().from_pretrained(name, *args[1:], **kwargs)

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
        elif isinstance(module, Mixer | ShortConv):
            for name, value in module.initial_values().items():
                init.copy_(module.get_parameter(name), value)


class ResonanceModel(ResonancePreTrainedModel):
    """Token embedding and backbone: ids (B, L) -> hidden states (B, L, D)."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        refuse_non_causal(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = Backbone(config)
        for name, module in self.backbone.named_modules():
            if name.endswith((".out_proj", ".down_proj")):
                module._into_residual = True  # type: ignore[assignment]
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
            use_cache = self.config.use_cache and not self.training
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


class ResonanceForCausalLM(ResonancePreTrainedModel, GenerationMixin):
    """A causal language model with constant-size generation state.

    Use it as any ``transformers`` model: ``generate``, ``from_pretrained``, ``pipeline``, ``Trainer``, PEFT.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012
    lm_head: nn.Linear  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.model = ResonanceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: ResonanceCache | None = None,
        use_cache: bool | None = None,
        reset: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        return_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> ResonanceCausalLMOutput | tuple[Any, ...]:
        """Next-token logits or loss.

        Args:
            input_ids: (B, L).
            attention_mask: (B, ≥ L), 0 at padding, on any side; the last L columns are this call's.
            labels: (B, L), shifted inside; −100 is ignored, and so is the first token of a document (``reset``), which
                nothing in its document predicts.
            past_key_values: state to continue from, updated in place with ``use_cache``.
            use_cache: return the state. None means the config's value, and False when training or with labels.
            reset: (B, L) bool, True at a document's first token: nothing before it is seen.
            logits_to_keep: positions from the end (or indices) to compute logits for; 0 means all without labels,
                none with them.
            inputs_embeds: (B, L, D) instead of input_ids.
            return_logits: with labels, all logits too.
            num_items_in_batch: divide the summed loss by this instead of the number of targets.
            output_hidden_states: return the residual stream before each block, and the normed output.
            return_dict: False for a plain tuple.

        Returns:
            ``loss``, the float32 mean cross-entropy in nats of the next token (plus, in training, the auxiliary
            terms, also alone in ``aux_loss``), ``logits`` (B, kept, V), ``past_key_values``.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            reset=reset,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        hidden = out.last_hidden_state
        loss = aux_loss = logits = None
        if labels is not None:
            loss, aux_loss = self._loss(hidden, labels, reset, num_items_in_batch, out.aux_loss)
        if labels is None or return_logits or not isinstance(logits_to_keep, int) or logits_to_keep > 0:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden if return_logits and labels is not None else hidden[:, keep])
        result = ResonanceCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            aux_loss=aux_loss,
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        reset: Tensor | None,
        num_items: Tensor | int | None,
        mixers_loss: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        config, head = self.config, self.get_output_embeddings()
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be {tuple(hidden.shape[:2])}, as input_ids")
        targets = labels[:, 1:].to(hidden.device)
        if reset is not None:
            targets = targets.masked_fill(reset[:, 1:].bool(), -100)
        targets, hidden = targets.flatten(), hidden[:, :-1].flatten(0, 1)
        regularised = self.training and (config.label_smoothing > 0 or config.z_loss_weight > 0)
        smoothing, z_weight = (config.label_smoothing, config.z_loss_weight) if regularised else (0.0, 0.0)
        if type(head) is nn.Linear and head.bias is None:
            objective, cross_entropy = linear_cross_entropy(
                hidden, head.weight, targets, label_smoothing=smoothing, z_loss_weight=z_weight
            )
        else:  # an adapter, a quantised head: what it computes counts
            objective, cross_entropy = logits_cross_entropy(
                head(hidden), targets, label_smoothing=smoothing, z_loss_weight=z_weight
            )
        num_targets = (targets != -100).sum()
        if num_items is None:
            num_items = num_targets.clamp(min=1)
        if isinstance(num_items, Tensor):
            num_items = num_items.to(objective.device)
        if mixers_loss is not None:  # a mean over this batch, so its share of an accumulated step is by targets
            objective, regularised = objective + num_targets * mixers_loss, True
        loss = objective / num_items
        return loss, (loss - cross_entropy / num_items).detach() if regularised else None

    def _prepare_cache_for_generation(  # type: ignore[override] (its annotation says bool, it returns nothing)
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError("attention_mask ends in padding: to generate, pad on the left (padding_side='left')")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation is not None:
                raise ValueError(
                    f"cache_implementation = {generation_config.cache_implementation!r}: the state of this model has "
                    "one form; leave it unset"
                )
            model_kwargs["past_key_values"] = ResonanceCache(self.config.num_hidden_layers)


def refuse_non_causal(config: ResonanceConfig) -> None:
    """A causal model must not contain a mixer that sees the future."""
    causal = [name for name, mixer in MIXERS.items() if mixer.causal]
    for name in config.mixers:
        if not mixer_class(name).causal:
            raise ValueError(
                f"mixers = {config.mixers!r}: {name!r} sees the future (causal = False), so a language model with it "
                f"would read its own answers; use {', '.join(causal)}, or an encoder"
            )
