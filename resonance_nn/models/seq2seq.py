"""Sequence to sequence without cross-attention: encoder -> a state of fixed size a block -> causal decoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput

from resonance_nn.backbone import Backbone, Block
from resonance_nn.bridges import BRIDGES
from resonance_nn.cache import ResonanceCache
from resonance_nn.config import ResonanceConfig
from resonance_nn.config_checks import check_fields
from resonance_nn.layers import ResidualRMSNorm
from resonance_nn.mixers.base import RightPadding, State, real_tokens
from resonance_nn.models.base import ResonanceModel, ResonancePreTrainedModel, mark_residual_maps
from resonance_nn.models.causal_lm import prepare_state, refuse_non_causal
from resonance_nn.ops.cross_entropy import linear_cross_entropy, logits_cross_entropy

SOURCE = "source"  # what the bridge wrote, in a block's state


class DecoderBlock(Block):
    """A block that reads the source: [ x + mixer(norm x);  x + bridge(norm x, S);  x + mlp(norm x) ].

    S is part of the block's state, beside the mixer's, from before the first token on, and stays as it is.
    """

    def __init__(self, config: ResonanceConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.bridge_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.bridge = BRIDGES[config.bridge](config)
        self.state_names = (*self.mixer.state_names, SOURCE)

    def mix(
        self,
        x: Tensor,
        length: Tensor | None,
        reset: Tensor | None,
        state: State | None,
        return_state: bool,
        losses: list[Tensor] | None,
        grid: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor, State | None]:
        assert state is not None
        of_mixer = {name: t for name, t in state.items() if name != SOURCE} or None  # None before the first token
        x, y, of_mixer = super().mix(x, length, reset, of_mixer, return_state, losses, grid)
        x, normed = self.bridge_norm(x, self._drop(y))
        y = self.bridge.read(normed, state[SOURCE])
        return x, y, None if of_mixer is None else {**of_mixer, SOURCE: state[SOURCE]}


class ResonanceForConditionalGeneration(ResonancePreTrainedModel, GenerationMixin):
    """An encoder–decoder: mixers of any kind over the source (``config.encoder_mixers``), causal ones over the target
    (``config.mixers``), and ``config.bridge`` between them. One embedding for both sides, and for the head if tied.

    Use it as any encoder–decoder of ``transformers``: ``generate``, also with beams, ``Seq2SeqTrainer``,
    ``DataCollatorForSeq2Seq``. To train or generate takes time linear in n + m; a decoder's state has a fixed size.
    ``config`` is copied, as an encoder–decoder's (``is_encoder_decoder``).
    """

    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.weight": "encoder.embed.weight"}  # noqa: RUF012
    _no_split_modules = ["Block", "DecoderBlock"]  # noqa: RUF012
    base_model_prefix = ""
    lm_head: nn.Linear  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: ResonanceConfig) -> None:
        refuse_non_causal(config)
        config = copy.deepcopy(config)
        config.is_encoder_decoder = True
        super().__init__(config)
        of_encoder = copy.deepcopy(config)
        of_encoder.mixers, of_encoder.num_hidden_layers = config.encoder_mixers, config.num_encoder_layers
        of_encoder.use_cache = False
        check_fields(of_encoder)
        self.encoder = ResonanceModel(of_encoder)
        self.decoder = Backbone(config, DecoderBlock)
        mark_residual_maps(self.decoder)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embed = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: ResonanceCache | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Logits or loss of the target, given a source.

        Args:
            input_ids: the source (B, n).
            attention_mask: (B, n), 0 at padding of the source, on any side.
            decoder_input_ids: (B, m): the target before each of its tokens. None: made from labels, by
                :meth:`prepare_decoder_input_ids_from_labels`.
            decoder_attention_mask: (B, ≥ m), 0 at padding, on any side; the last m columns are this call's.
            labels: the target (B, m), not shifted inside; −100 is ignored.
            encoder_outputs: of an earlier call of the encoder, instead of input_ids; its first is (B, n, D).
            past_key_values: state to continue from, updated in place with ``use_cache``. It knows the source: what is
                passed of it beside a state of one token or more is not looked at.
            use_cache: return the state. None means the config's value, and False when training or with labels.
            inputs_embeds: (B, n, D) instead of input_ids.
            logits_to_keep: positions from the end (or indices) to compute logits for; 0 means all without labels,
                none with them.
            return_logits: with labels, all logits too.
            num_items_in_batch: divide the summed loss by this instead of the number of targets.
            output_hidden_states: return the residual streams before each block, and the normed outputs.
            return_dict: False for a plain tuple.

        Returns:
            ``loss``, the float32 mean cross-entropy in nats (plus, in training, the auxiliary terms), ``logits``
            (B, kept, V), ``past_key_values``, ``encoder_last_hidden_state`` (None where it was not needed).
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids = None: give what the decoder is to read, or labels to make it of")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        cache = past_key_values
        if use_cache and cache is None:
            cache = ResonanceCache(self.config.num_hidden_layers)
        states = None if cache is None else self._check_cache(cache)
        if states is None:
            encoder_outputs = self._encode(
                input_ids, attention_mask, encoder_outputs, inputs_embeds, output_hidden_states
            )
            states = self.write(encoder_outputs[0], attention_mask)
        sources = len(states[0][SOURCE])  # B
        if decoder_input_ids.dim() != 2 or len(decoder_input_ids) != sources or decoder_input_ids.shape[1] == 0:
            raise ValueError(
                f"decoder_input_ids of shape {tuple(decoder_input_ids.shape)}: must be ({sources}, m), a row for each "
                "source, with m ≥ 1"
            )
        if labels is not None and labels.shape != decoder_input_ids.shape:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)}: must be {tuple(decoder_input_ids.shape)}, as decoder_input_ids"
            )
        m = decoder_input_ids.shape[1]
        mask = decoder_attention_mask
        if mask is not None:
            if mask.dim() != 2 or len(mask) != sources or mask.shape[1] < m:
                raise ValueError(
                    f"decoder_attention_mask of shape {tuple(mask.shape)}: must be ({sources}, L) with L ≥ {m}, the "
                    "tokens of this call"
                )
            mask = mask[:, mask.shape[1] - m :]
        losses: list[Tensor] | None = [] if self.training else None
        hidden, after, residuals = self.decoder(
            self.encoder.embed(decoder_input_ids),
            mask=mask,
            states=states,
            return_states=use_cache,
            return_hidden=bool(output_hidden_states),
            losses=losses,
        )
        if use_cache:
            assert cache is not None
            cache.set(after, m)
        loss = logits = None
        if labels is not None:
            of_encoder = getattr(encoder_outputs, "aux_loss", None)
            auxiliary = [*(losses or []), *([] if of_encoder is None else [of_encoder])]
            loss = target_loss(hidden, self.lm_head, labels, self.config, self.training, num_items_in_batch, auxiliary)
        if labels is None or return_logits or not isinstance(logits_to_keep, int) or logits_to_keep > 0:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden if return_logits and labels is not None else hidden[:, keep])
        result = Seq2SeqLMOutput(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=cache if use_cache else None,  # type: ignore[arg-type]
            decoder_hidden_states=(*residuals, hidden) if residuals else None,
            encoder_last_hidden_state=None if encoder_outputs is None else encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def write(self, source: Tensor, mask: Tensor | None = None) -> list[State]:
        """The states of the decoder's blocks before the first target token: all that it will know of the encoder's
        hidden states (B, n, D), mask (B, n)."""
        length, padding = None, RightPadding.of(mask)
        if padding is not None:
            source, length = padding.apply(source), padding.length
            real = real_tokens(source, length)
            assert real is not None
            source = source.masked_fill(~real[..., None], 0)
        blocks = (block for block in self.decoder.blocks if isinstance(block, DecoderBlock))
        return [{SOURCE: block.bridge.write(source, length)} for block in blocks]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels (B, m) one place to the right, after ``config.decoder_start_token_id``, or ``bos_token_id`` where
        that is None, as in ``generate``. For −100 stands the padding's id, or again the first token's."""
        config = self.config
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ValueError(
                "decoder_start_token_id = None: the token that a target begins with; give it, or bos_token_id, in the "
                "configuration"
            )
        if labels.dim() != 2 or labels.shape[1] == 0:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be (B, m) with m ≥ 1")
        ids = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), dim=1)
        return ids.masked_fill(ids == -100, start if config.pad_token_id is None else config.pad_token_id)

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        encoder_outputs: Any,
        inputs_embeds: Tensor | None,
        output_hidden_states: bool | None,
    ) -> Any:
        given = (input_ids is not None) + (inputs_embeds is not None) + (encoder_outputs is not None)
        if given == 0 or (given > 1 and encoder_outputs is None):
            raise ValueError("the source: pass exactly one of input_ids, inputs_embeds and encoder_outputs")
        if encoder_outputs is None:
            x = input_ids if inputs_embeds is None else inputs_embeds
        else:
            x = encoder_outputs[0]
        assert x is not None
        if attention_mask is not None and attention_mask.shape != x.shape[:2]:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)}: must be {tuple(x.shape[:2])}, as the source"
            )
        if encoder_outputs is not None:
            return encoder_outputs
        return self.encoder(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, output_hidden_states=output_hidden_states
        )

    def _check_cache(self, cache: ResonanceCache) -> list[State] | None:
        """The states of a cache that has read a token, None of a new one."""
        if not isinstance(cache, ResonanceCache):
            raise ValueError(f"past_key_values of type {type(cache).__name__}: must be a ResonanceCache, or None")
        blocks = (block for block in self.decoder.blocks if isinstance(block, DecoderBlock))
        cache.check([block.state_names for block in blocks])
        states = [state for state in cache.states if state is not None]
        return states or None

    def _prepare_cache_for_generation(  # type: ignore[override] (its annotation says bool, it returns nothing)
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        prepare_state(self.config, generation_config, model_kwargs, "decoder_attention_mask")


def target_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    config: ResonanceConfig,
    training: bool,
    num_items: Tensor | int | None = None,
    auxiliary: Sequence[Tensor] = (),
) -> Tensor:
    """The mean cross-entropy of a decoder's hidden states (B, m, D) through its head to labels (B, m), −100 ignored.

    In ``training`` smoothed and with the z-loss of ``config``, and with ``auxiliary`` losses. ``num_items``: what to
    divide the sum by instead of the number of targets.
    """
    targets = labels.flatten().to(hidden.device)
    asked = (targets != -100).nonzero().squeeze(1)
    rows, targets = hidden.flatten(0, 1)[asked], targets[asked]
    options: dict[str, Any] = {}
    if training:
        options = dict(label_smoothing=config.label_smoothing, z_loss_weight=config.z_loss_weight)
    if type(head) is nn.Linear and head.bias is None:
        total: Tensor = linear_cross_entropy(rows, head.weight, targets, **options)[0]
    else:  # an adapter, a quantised head: what it computes counts
        total = logits_cross_entropy(head(rows), targets, **options)[0]
    if auxiliary:  # means over this batch, so its share of an accumulated step is by targets
        total = total + len(asked) * torch.stack(tuple(auxiliary)).sum()
    if num_items is None:
        return total / max(1, len(asked))
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
