"""Language models: embedding -> backbone -> tied head, trained on the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from resonance_nn.cache import ResonanceCache
from resonance_nn.config import ResonanceConfig
from resonance_nn.mixers import MIXERS, is_causal
from resonance_nn.models.base import ResonanceModel, ResonancePreTrainedModel
from resonance_nn.ops.cross_entropy import linear_cross_entropy, logits_cross_entropy


@dataclass
class ResonanceCausalLMOutput(ModelOutput):
    """Output of :class:`ResonanceForCausalLM`. ``aux_loss`` is the part of ``loss`` beyond the cross-entropy."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: ResonanceCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    aux_loss: Tensor | None = None


class ResonanceForCausalLM(ResonancePreTrainedModel, GenerationMixin):
    """A causal language model with constant-size generation state.

    Use it as any ``transformers`` model: ``generate``, ``from_pretrained``, ``pipeline``, ``Trainer``, PEFT.
    """

    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012
    lm_head: nn.Linear  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: ResonanceConfig) -> None:
        refuse_non_causal(config)
        super().__init__(config)
        self.model = ResonanceModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        config, head = self.config, self.lm_head
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
        prepare_state(self.config, generation_config, model_kwargs, "attention_mask")


def prepare_state(
    config: ResonanceConfig, generation_config: Any, model_kwargs: dict[str, Any], mask_name: str
) -> None:
    """A new state for ``generate`` to begin with, unless it goes on from one or wants none. Raises ValueError where the
    mask ends in padding, or another kind of cache is wanted."""
    mask = model_kwargs.get(mask_name)
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError(f"{mask_name} ends in padding: to generate, pad on the left (padding_side='left')")
    if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
        return
    if generation_config.cache_implementation is not None:
        raise ValueError(
            f"cache_implementation = {generation_config.cache_implementation!r}: the state of this model has one form; "
            "leave it unset"
        )
    model_kwargs["past_key_values"] = ResonanceCache(config.num_hidden_layers)


def refuse_non_causal(config: ResonanceConfig) -> None:
    """A causal model must not contain a mixer that sees the future."""
    causal = [name for name, mixer in MIXERS.items() if mixer.causal]
    for name in config.mixers:
        if not is_causal(name):
            raise ValueError(
                f"mixers = {config.mixers!r}: {name!r} sees the future (causal = False), so a language model with it "
                f"would read its own answers; use {', '.join(causal)}, or ResonanceForMaskedLM"
            )
