"""Texts: their class, that of their words, what is hidden in them, which are near."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from resonance_nn.data import encode_bytes, encode_text
from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import Row, is_missing, is_table, label_of, read_lines, read_table, text_of
from resonance_nn.evaluation import autocast
from resonance_nn.loading import load_tokenizer
from resonance_nn.models.encoder import (
    ResonanceForMaskedLM,
    ResonanceForSentenceEmbedding,
    ResonanceForSequenceClassification,
    ResonanceForTokenClassification,
)
from resonance_nn.models.seq2seq import ResonanceForConditionalGeneration
from resonance_nn.prediction.base import Batch, Figure, Found, OneClass, Predictor, recalls
from resonance_nn.tasks.text import padded
from resonance_nn.tasks.translation import EXTRA, scores, translate


class TextPredictor(Predictor):
    """Texts: the lines of a file, or a column of a table."""

    what = "texts"
    columns: ClassVar[tuple[str, ...]] = ("text",)  # the first that the table has

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        return load_tokenizer(folder)

    def files(self, path: str) -> list[Found]:
        if is_table(path):
            column = column_of(path, self.columns)
            rows = read_table(path, (column,), optional=(self.answer,))
            return [
                {"name": f"{path}:{i}", **self.of_row(row, column, f"{path}: row {i}")} for i, row in enumerate(rows, 1)
            ]
        lines = [(i, line) for i, line in enumerate(read_lines(path), 1) if line.strip()]
        if not lines:
            raise DataError(f"{path}: holds no text")
        return [{"name": f"{path}:{i}", "input": line} for i, line in lines]

    def of_row(self, row: Row, column: str, where: str) -> Found:
        """What a row of a table holds. Raises DataError."""
        text = "" if is_missing(row[column]) else text_of(row, column, where)
        return {"input": text, **self.truth(self.answer_of(row, where))}

    def batch(self, inputs: list[Found]) -> Batch:
        ids = [self.ids(one) for one in inputs]
        mask = padded([[1] * len(row) for row in ids], 0)
        return {"input_ids": padded(ids, self.processor.pad_token_id or 0), "attention_mask": mask}

    def ids(self, one: Found) -> list[int]:
        """At least one token."""
        return encode_text(self.processor, one["input"])


class TextClasses(OneClass, TextPredictor):
    architecture = ResonanceForSequenceClassification


class WordClasses(TextPredictor):
    """Words between spaces, or those that a table lists as ``tokens``, and their ``tags``, which may be missing."""

    kind = "labels of words"
    architecture = ResonanceForTokenClassification
    columns = ("tokens", "text")
    judged = "words"

    def of_row(self, row: Row, column: str, where: str) -> Found:
        if column == "text":
            return super().of_row(row, column, where)
        words, tags = row["tokens"], row.get("tags")
        if not isinstance(words, list) or not words:
            raise DataError(f"{where}: its tokens are {words!r:.60}; they must be a list of words, not empty")
        if tags is not None and (not isinstance(tags, list) or len(tags) != len(words)):
            raise DataError(f"{where}: its tags are {tags!r:.60}; they must be a list of {len(words)}, one a token")
        words = [label_of(word, where, f"token {i}") for i, word in enumerate(words, 1)]
        known = {} if tags is None else {"tags": [None if is_missing(tag) else str(tag) for tag in tags]}
        return {"input": " ".join(words), "tokens": words, **known}

    def right(self, one: Found) -> list[bool]:
        known = self.model.config.label2id
        pairs = zip(one.get("tags", ()), one["words"], strict=False)
        return [tag == word["label"] for tag, word in pairs if tag in known]

    def ids(self, one: Found) -> list[int]:
        return self.encoded(words_of(one))[0]

    def encoded(self, words: list[str]) -> tuple[list[int], list[int]]:
        """The tokens of words, and where each word begins among them."""
        ids, first = encode_text(self.processor, ""), []
        for i, word in enumerate(words):
            first.append(len(ids))
            ids += encode_bytes(self.processor, f"{' ' if i else ''}{word}".encode())
        return ids, first

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        names, said = self.model.config.id2label, []
        for one, p in zip(inputs, out.logits.float().softmax(-1).cpu(), strict=True):
            best = p[self.encoded(words_of(one))[1]].max(-1)
            words = zip(words_of(one), best.indices.tolist(), best.values.tolist(), strict=True)
            tags = [{"word": word, "label": names[i], "score": score} for word, i, score in words]
            said.append({"label": " ".join(f"{tag['word']}/{tag['label']}" for tag in tags), "words": tags})
        return said


class HiddenWords(TextPredictor):
    """What stands behind each <|mask|>."""

    kind = "hidden tokens"
    architecture = ResonanceForMaskedLM

    def ids(self, one: Found) -> list[int]:
        mask = self.processor.mask_token
        parts = one["input"].split(mask)
        if len(parts) < 2:
            raise DataError(f"text {one['input']!r}: has no {mask}, behind which something could be hidden")
        ids = encode_text(self.processor, "")
        for i, part in enumerate(parts):
            ids += ([self.processor.mask_token_id] if i else []) + encode_bytes(self.processor, part.encode())
        return ids

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        said: list[Found] = []
        for hidden, logits in zip(batch["input_ids"] == self.processor.mask_token_id, out.logits, strict=True):
            holes: list[list[Found]] = []
            for of_hole in logits[hidden.to(logits.device)].float().softmax(-1).cpu():
                best = of_hole.topk(min(self.top, len(of_hole)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                holes.append([{"token": self.processor.decode([i]), "score": score} for i, score in pairs])
            said.append({"label": " | ".join(hole[0]["token"] for hole in holes), "masks": holes})
        return said


class AnsweredByText(TextPredictor):
    """What is right of a text is a text too, kept under the name of its column."""

    def answer_of(self, row: Row, where: str) -> Any:
        return None if super().answer_of(row, where) is None else text_of(row, self.answer, where)

    def truth(self, answer: Any) -> Found:
        return {} if answer is None else {self.answer: answer}


class NearestTexts(AnsweredByText):
    """For each text the others nearest to it; where a table has a ``pair`` of each, its place among all pairs too."""

    kind = "nearest texts"
    architecture = ResonanceForSentenceEmbedding
    answer = "pair"

    def figures(self, found: Sequence[Found]) -> list[Figure]:
        return recalls(found, len({one["pair"] for one in found if "pair" in one}))

    def said(self, inputs: Sequence[Found], **how: Any) -> list[Found]:
        found = super().said(inputs, **how)
        paired = [one for one in found if "pair" in one]
        column = {pair: i for i, pair in enumerate(dict.fromkeys(one["pair"] for one in paired))}
        pairs = [pair["embedding"] for pair in super().said([{"input": pair} for pair in column], **how)]
        candidates = torch.stack(pairs) if pairs else torch.empty(0)
        for one in paired:
            similarity = candidates @ one["embedding"]
            one["rank"] = int((similarity > similarity[column[one["pair"]]]).sum()) + 1
        return found

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        return [{"embedding": vector} for vector in out.embeddings.float().cpu()]

    def finish(self, found: list[Found]) -> list[Found]:
        vectors = torch.stack([one["embedding"] for one in found])
        similarity = (vectors @ vectors.T).fill_diagonal_(-2.0)
        for i, one in enumerate(found):
            best = similarity[i].topk(min(self.top, len(found) - 1))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            one["nearest"] = [{"text": found[j]["input"], "name": found[j]["name"], "score": s} for j, s in pairs]
            one["label"] = one["nearest"][0]["text"] if one["nearest"] else ""
            one["score"] = one["nearest"][0]["score"] if one["nearest"] else None
            one["embedding"] = [round(v, 6) for v in one["embedding"].tolist()]
        return found


class Translations(AnsweredByText):
    """By beam search; judged by BLEU and ROUGE-L where a table has the ``target`` too."""

    kind = "translations"
    architecture = ResonanceForConditionalGeneration
    columns, answer = ("source", "text"), "target"

    def figures(self, found: Sequence[Found]) -> list[Figure]:
        known = [one for one in found if "target" in one]
        if not known:
            return []
        of = f"of the {len(known):,} texts whose translation is known"
        if importlib.util.find_spec("sacrebleu") is None:
            return [Figure("bleu", None, f"BLEU {of} needs sacrebleu; {EXTRA}")]
        judged = scores([one["label"] for one in known], [one["target"] for one in known])
        words = {"eval_bleu": "BLEU {:.2f}", "eval_rouge_l": "ROUGE-L {:.3f}"}
        return [
            Figure(name.removeprefix("eval_"), value, f"{words[name].format(value)} {of}")
            for name, value in judged.items()
        ]

    def __call__(
        self, inputs: Sequence[Found], *, batch_size: int = 32, precision: str = "fp32", progress: bool = False
    ) -> list[Found]:
        with autocast(precision, self.model.device.type):
            made = translate(self.model, self.processor, [one["input"] for one in inputs], progress=progress)
        return [{**one, "label": text} for one, text in zip(inputs, made, strict=True)]

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        raise NotImplementedError("a translation is made token by token")


def words_of(one: Found) -> list[str]:
    return one["tokens"] if "tokens" in one else one["input"].split()


def column_of(path: str, names: Sequence[str]) -> str:
    """The first of these columns that a table has, or the last of all: that of a .tsv without a line of names."""
    try:
        first = read_table(path, ())[0]
    except DataError:  # reading that column says it again
        return names[-1]
    return next((name for name in names if name in first), names[-1])
