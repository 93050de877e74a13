"""``translation``: from one text to another, without cross-attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerState

from resonance_nn.config import ResonanceConfig
from resonance_nn.data import decode_bytes, encode_text
from resonance_nn.data.tables import Row
from resonance_nn.models.seq2seq import ResonanceForConditionalGeneration
from resonance_nn.tasks.augment import TEXT_CHANGES
from resonance_nn.tasks.base import Learning
from resonance_nn.tasks.text import Examples, PaddedBatch, TextTask

BEAMS = 4
AT_ONCE = 32  # texts
EXTRA = "pip install 'resonance-nn[translation]'"


class Translation(TextTask):
    """Rows with source and target. The vocabulary is of both; a target ends with <|endoftext|>, which also begins it.
    When all is learned the held-out sources are translated with four beams and judged by BLEU (sacrebleu: 13a, cased)
    and ROUGE-L."""

    name = "translation"
    predicts_classes = True
    data = "tables (.tsv, .csv, .jsonl) with source and target"
    columns, texts = ("source", "target"), ("source", "target")
    fields = {}  # noqa: RUF012
    width_and_depth = {"hidden_size": 256, "num_hidden_layers": 3}  # noqa: RUF012
    usual = {"epochs": 8, "dropout": 0.2, "label_smoothing": 0.1, "vocab_size": 6000}  # noqa: RUF012
    batch_size = 128
    metric = "eval_bleu"
    changes = TEXT_CHANGES  # split: of both sides; drop: of the source
    written = ("labels",)
    architecture = ResonanceForConditionalGeneration

    def initial(self) -> ResonanceConfig:
        if importlib.util.find_spec("sacrebleu") is None:
            raise ValueError(f"task = 'translation': needs sacrebleu to judge; {EXTRA}")
        return super().initial()

    def describe(self, config: ResonanceConfig, facts: dict[str, Any]) -> None:
        config.is_encoder_decoder = True
        config.decoder_start_token_id = config.bos_token_id

    def encoded(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> Examples:
        end = tokenizer.eos_token_id
        return Examples(
            [
                {
                    "input_ids": self.ids(tokenizer, row["source"]),
                    "labels": [*self.ids(tokenizer, row["target"])[1:], end],  # what begins it is not asked
                }
                for row in rows
            ]
        )

    def learning(self, examples: tuple[list[Row], list[Row]], folder: Path) -> Learning:
        self.held_out = examples[1]
        learning = super().learning(examples, folder)
        learning.metrics = None  # a loss while training; the rest at the end
        return learning

    def summary(self, state: TrainerState, learning: Learning) -> dict[str, Any]:
        sources, targets = ([row[name] for row in self.held_out] for name in ("source", "target"))
        model: Any = learning.model
        made = translate(model.eval(), learning.processor, sources, progress=self.arguments.progress)
        return {**super().summary(state, learning), **scores(made, targets)}


@torch.no_grad()
def translate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    *,
    num_beams: int = BEAMS,
    max_new_tokens: int | None = None,
    progress: bool = False,
) -> list[str]:
    """Texts by beam search, in their order. ``max_new_tokens`` None: twice the source's, and 10."""
    batch_of = PaddedBatch(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
    ids = [encode_text(tokenizer, source) for source in sources]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    made = [""] * len(ids)
    bar = tqdm(total=len(ids), desc="translating", unit="text", delay=2, leave=False, disable=not progress)
    with bar:
        for begin in range(0, len(order), AT_ONCE):
            rows = order[begin : begin + AT_ONCE]
            batch = {k: v.to(model.device) for k, v in batch_of([{"input_ids": ids[i]} for i in rows]).items()}
            longest = max_new_tokens or 2 * batch["input_ids"].shape[1] + 10
            out = model.generate(**batch, num_beams=num_beams, do_sample=False, max_new_tokens=longest)
            for i, row in zip(rows, out.tolist(), strict=True):
                made[i] = decode_bytes(tokenizer, row).decode("utf-8", errors="replace").strip()
            bar.update(len(rows))
    return made


def scores(made: list[str], targets: list[str]) -> dict[str, float]:
    """BLEU (0 … 100) of all, and the mean ROUGE-L F1 (0 … 1) where rouge-score is installed."""
    import sacrebleu

    found = {"eval_bleu": sacrebleu.corpus_bleu(made, [targets]).score}
    if importlib.util.find_spec("rouge_score") is not None:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        each = [scorer.score(target, text)["rougeL"].fmeasure for target, text in zip(targets, made, strict=True)]
        found["eval_rouge_l"] = sum(each) / len(each)
    return found
