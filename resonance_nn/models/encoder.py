"""Text encoders: token embedding -> backbone, as a rule with mixers that see both ways -> a head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils import ModelOutput

from resonance_nn.config import ResonanceConfig
from resonance_nn.models.base import ResonanceModel, ResonanceOutput, ResonancePreTrainedModel
from resonance_nn.models.pooling import classification_loss, contrastive_loss, label_head, pool
from resonance_nn.ops.cross_entropy import linear_cross_entropy, logits_cross_entropy

LOG_SCALE = math.log(1 / 0.07)  # of similarities at first, as in CLIP


class TextEncoder(ResonancePreTrainedModel):
    """What the heads below stand on."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.model = ResonanceModel(config)

    def encode(self, input_ids: Tensor | None, attention_mask: Tensor | None, **kwargs: Any) -> ResonanceOutput:
        """Hidden states of whole inputs; no cache."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)

    def _objective(self, loss: Tensor, out: ResonanceOutput) -> Tensor:
        """With the mixers' auxiliary losses, in training."""
        return loss if out.aux_loss is None else loss + out.aux_loss


class ResonanceForMaskedLM(TextEncoder):
    """The tokens hidden behind a mask, each from all others."""

    _tied_weights_keys = {"lm_head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        reset: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """Logits (B, L, V), or with ``labels`` (B, L; −100 where nothing is asked) the mean cross-entropy alone.

        Other arguments as :meth:`ResonanceForCausalLM.forward`.
        """
        out = self.encode(
            input_ids,
            attention_mask,
            reset=reset,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
        )
        hidden = out.last_hidden_state
        assert hidden is not None
        if labels is None:
            return MaskedLMOutput(logits=self.lm_head(hidden), hidden_states=out.hidden_states)  # type: ignore[arg-type]
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels of shape {tuple(labels.shape)}: must be {tuple(hidden.shape[:2])}, as input_ids")
        targets = labels.flatten().to(hidden.device)
        asked = (targets != -100).nonzero().squeeze(1)  # one in six or so: the head is for these alone
        rows, targets = hidden.flatten(0, 1)[asked], targets[asked]
        smoothing = self.config.label_smoothing if self.training else 0.0
        if type(self.lm_head) is nn.Linear and self.lm_head.bias is None:
            total: Tensor = linear_cross_entropy(rows, self.lm_head.weight, targets, label_smoothing=smoothing)[0]
        else:
            total = logits_cross_entropy(self.lm_head(rows), targets, label_smoothing=smoothing)[0]
        loss = total / max(1, len(asked))
        return MaskedLMOutput(loss=self._objective(loss, out), hidden_states=out.hidden_states)  # type: ignore[arg-type]


class TextClassifier(TextEncoder):
    """An encoder and a linear map to labels."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = label_head(config)
        self.post_init()

    def classify(self, hidden: Tensor, labels: Tensor | None, out: ResonanceOutput) -> tuple[Tensor, Tensor | None]:
        """Logits of hidden states (..., D), and with ``labels`` the loss of :func:`classification_loss`."""
        logits = self.classifier(self.dropout(hidden.to(self.classifier.weight.dtype)))
        if labels is None:
            return logits, None
        return logits, self._objective(classification_loss(logits, labels, self.config, self.training), out)


class ResonanceForSequenceClassification(TextClassifier):
    """A label for a text: the mean of its tokens, the last or the first (``config.pooling``), and a linear map."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, labels), and with ``labels`` the loss of :func:`classification_loss`. ``inputs_embeds`` and
        ``output_hidden_states`` as of :meth:`ResonanceForCausalLM.forward`."""
        out = self.encode(input_ids, attention_mask, **_known(kwargs))
        assert out.last_hidden_state is not None
        logits, loss = self.classify(pool(out.last_hidden_state, attention_mask, self.config.pooling), labels, out)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)  # type: ignore[arg-type]


class ResonanceForTokenClassification(TextClassifier):
    """A label for every token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits (B, L, labels), and with ``labels`` (B, L; −100 is ignored) the mean cross-entropy. Others as
        :meth:`ResonanceForSequenceClassification.forward`."""
        out = self.encode(input_ids, attention_mask, **_known(kwargs))
        assert out.last_hidden_state is not None
        logits, loss = self.classify(out.last_hidden_state, labels, out)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)  # type: ignore[arg-type]


def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of what a caller may pass, such as the Trainer, what the encoder takes."""
    return {name: kwargs[name] for name in ("inputs_embeds", "output_hidden_states") if name in kwargs}


@dataclass
class SentenceEmbeddingOutput(ModelOutput):
    """Output of :class:`ResonanceForSentenceEmbedding`: ``embeddings`` (B, D), of length 1, and the loss."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    pair_embeddings: Tensor | None = None


class ResonanceForSentenceEmbedding(TextEncoder):
    """A unit vector for a text, such that texts that belong together lie close: pooled tokens, normalised."""

    def __init__(self, config: ResonanceConfig) -> None:
        super().__init__(config)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.post_init()

    def initial_values(self) -> dict[str, Tensor]:
        return {"log_scale": torch.tensor(LOG_SCALE)}

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) -> (B, D), each of length 1."""
        out = self.encode(input_ids, attention_mask)
        assert out.last_hidden_state is not None
        return F.normalize(pool(out.last_hidden_state, attention_mask, self.config.pooling), dim=-1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pair_input_ids: Tensor | None = None,
        pair_attention_mask: Tensor | None = None,
        **_: Any,
    ) -> SentenceEmbeddingOutput:
        """The embeddings, and with the texts that belong to them as ``pair_*`` the loss of :func:`contrastive_loss`."""
        own = self.embed(input_ids, attention_mask)
        if pair_input_ids is None:
            return SentenceEmbeddingOutput(embeddings=own)
        if len(pair_input_ids) != len(input_ids):
            raise ValueError(f"pair_input_ids: {len(pair_input_ids)} texts beside {len(input_ids)}; give one for each")
        other = self.embed(pair_input_ids, pair_attention_mask)
        return SentenceEmbeddingOutput(contrastive_loss(own, other, self.log_scale), own, other)
