"""Tasks on texts by themselves: their class, that of their tokens, what is hidden in them, which belong together."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase

from resonance_nn.config import ResonanceConfig
from resonance_nn.data import encode_bytes, encode_text, tokenizer_fingerprint, tokenizer_vocab_size, train_tokenizer
from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import Row, label_of, read_table, text_of
from resonance_nn.loading import load_tokenizer, model_folder
from resonance_nn.models.encoder import (
    ResonanceForSentenceEmbedding,
    ResonanceForSequenceClassification,
    ResonanceForTokenClassification,
)
from resonance_nn.rundir import write_errors
from resonance_nn.tasks.augment import TEXT_CHANGES, batch_changes
from resonance_nn.tasks.base import ExamplesTask, Learning, fingerprint, label_names, name_labels

ENCODER = {"mixers": ("spectral_gate", "reversed:spectral_gate")}
IGNORE = -100


class Examples(Dataset[Any]):
    """A list of examples; :meth:`change`, if any, is applied to each as it is taken."""

    def __init__(self, examples: Sequence[Any], change: Callable[[Any, int], Any] | None = None) -> None:
        self.examples, self.change = examples, change

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Any:
        return self.examples[i] if self.change is None else self.change(self.examples[i], i)


class TextTask(ExamplesTask):
    """Rows of tables, of which some fields are texts, a tokenizer trained on these, and an encoder."""

    data = "tables (.tsv, .csv, .jsonl)"
    columns: ClassVar[tuple[str, ...]]  # that a row must have
    texts: ClassVar[tuple[str, ...]]  # those that are texts
    labels: ClassVar[tuple[str, ...]] = ("labels",)
    written: ClassVar[tuple[str, ...]] = ()  # those of the labels that are tokens of a text
    fields = ENCODER

    def initial(self) -> ResonanceConfig:
        a, config = self.arguments, super().initial()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if a.init:
            self.tokenizer = load_tokenizer(model_folder(a.init))
            return config
        self.tokenizer = load_tokenizer(a.tokenizer) if a.tokenizer else None
        with torch.device("meta"):
            self.build(config)
        return config

    def find(self, path: str) -> list[Row]:
        rows = read_table(path, self.columns)
        for number, row in enumerate(rows, 1):
            where = f"{path}: row {number}"
            for name in self.texts:
                text_of(row, name, where)
            if "label" in self.columns:
                label_of(row["label"], where)
        return rows

    def write(self, examples: tuple[list[Row], list[Row]], folder: Path) -> dict[str, str]:
        a, tokenizer = self.arguments, self.tokenizer
        if tokenizer is None:
            texts = (row[name].encode() for row in examples[0] for name in self.texts)
            tokenizer = train_tokenizer(texts, a.vocab_size or 8192, progress=a.progress)
        with write_errors(folder):
            tokenizer.save_pretrained(folder / "tokenizer")
            (folder / "facts.json").write_text(json.dumps(self.facts(examples), indent=2) + "\n", encoding="utf-8")
        return self.fingerprints(examples, folder)

    def facts(self, examples: tuple[list[Row], list[Row]]) -> dict[str, Any]:
        """What the data say about the model, such as its labels. Raises DataError."""
        return {}

    def fingerprints(self, examples: tuple[list[Row], list[Row]], folder: Path) -> dict[str, str]:
        of_tokens = tokenizer_fingerprint(load_tokenizer(folder / "tokenizer"))
        return {name: fingerprint([of_tokens, rows]) for name, rows in zip(("train", "eval"), examples, strict=True)}

    def learning(self, examples: tuple[list[Row], list[Row]], folder: Path) -> Learning:
        tokenizer = load_tokenizer(folder / "tokenizer")
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.collator = PaddedBatch(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
        train_set, eval_set = (self.encoded(rows, tokenizer, facts) for rows in examples)
        config = self.model_config()
        if not self.arguments.init:
            config.vocab_size = tokenizer_vocab_size(tokenizer)
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id  # type: ignore[assignment]
            config.pad_token_id = tokenizer.pad_token_id  # type: ignore[assignment]
        self.describe(config, facts)
        return Learning(
            self.new_model(config),
            tokenizer,
            train_set,
            eval_set,
            collate=self.collator,
            labels=self.labels,
            metrics=self.metrics,
            augment=batch_changes(self.arguments.augment, tokenizer=tokenizer, targets=self.written),
            lengths=[sum(len(ids) for ids in row.values() if isinstance(ids, list)) for row in train_set.examples],
            text=f"{len(train_set):,} examples and {len(eval_set):,} held out",
        )

    def describe(self, config: ResonanceConfig, facts: dict[str, Any]) -> None:
        """Write what the data say about the model into a new one's configuration."""
        if labels := facts.get("labels"):
            name_labels(config, labels)

    @abstractmethod
    def encoded(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> Examples:
        """Rows as examples of ids."""

    def ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """At most ``seq_len`` tokens of a text."""
        return encode_text(tokenizer, text, self.arguments.seq_len)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy over what has a label."""
        labels = np.asarray(prediction.label_ids)
        right = np.asarray(prediction.predictions).argmax(-1) == labels
        return {"accuracy": float(right[labels != IGNORE].mean())}


class TextClassification(TextTask):
    """A class for a text."""

    name = "text-classification"
    predicts_classes = True
    data = "tables (.tsv, .csv, .jsonl) with text and label"
    columns, texts = ("text", "label"), ("text",)
    metric = "eval_accuracy"
    changes = TEXT_CHANGES
    width_and_depth = {"hidden_size": 128, "num_hidden_layers": 2}  # noqa: RUF012
    usual = {"epochs": 10, "dropout": 0.3, "augment": ("split", "drop"), "vocab_size": 4000}  # noqa: RUF012
    rate = 1 / 3
    batch_size = 32
    architecture = ResonanceForSequenceClassification

    def facts(self, examples: tuple[list[Row], list[Row]]) -> dict[str, Any]:
        return {"labels": label_names(*([str(row["label"]) for row in rows] for rows in examples))}

    def encoded(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> Examples:
        classes = {name: i for i, name in enumerate(facts["labels"])}
        return Examples(
            [{"input_ids": self.ids(tokenizer, row["text"]), "labels": classes[str(row["label"])]} for row in rows]
        )


class TokenClassification(TextTask):
    """A class for every word: rows with ``tokens``, a list of words, and ``tags``, a list of as many classes. A word's
    class is asked for at its first token."""

    name = "token-classification"
    predicts_classes = True
    data = "tables (.jsonl) with tokens and tags, lists of equal length"
    columns, texts = ("tokens", "tags"), ()
    metric = "eval_accuracy"
    architecture = ResonanceForTokenClassification

    def find(self, path: str) -> list[Row]:
        rows = super().find(path)
        for number, row in enumerate(rows, 1):
            lists = isinstance(row["tokens"], list) and isinstance(row["tags"], list)
            if not lists or len(row["tokens"]) != len(row["tags"]) or not row["tokens"]:
                raise DataError(f"{path}: row {number}: tokens and tags must be lists of equal length, not empty")
            for name in ("token", "tag"):
                for i, value in enumerate(row[f"{name}s"], 1):
                    label_of(value, f"{path}: row {number}", f"{name} {i}")
            row["text"] = " ".join(map(str, row["tokens"]))
        return rows

    def facts(self, examples: tuple[list[Row], list[Row]]) -> dict[str, Any]:
        return {"labels": label_names(*([str(tag) for row in rows for tag in row["tags"]] for rows in examples))}

    def encoded(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> Examples:
        classes = {name: i for i, name in enumerate(facts["labels"])}
        examples: list[dict[str, list[int]]] = []
        for row in rows:
            ids, labels = encode_text(tokenizer, ""), [IGNORE]
            for i, (word, tag) in enumerate(zip(row["tokens"], row["tags"], strict=True)):
                of_word = encode_bytes(tokenizer, f"{' ' if i else ''}{word}".encode())
                ids += of_word
                labels += [classes[str(tag)], *[IGNORE] * (len(of_word) - 1)][: len(of_word)]
            length = self.arguments.seq_len
            examples.append({"input_ids": ids[:length], "labels": labels[:length]})
        return Examples(examples)


class SentenceEmbedding(TextTask):
    """Vectors of texts, those of a row close together: rows with text and pair, such as a sentence and its translation,
    or a question and its answer. Each is told from the others of the batch."""

    name = "sentence-embedding"
    data = "tables (.tsv, .csv, .jsonl) with text and pair"
    columns, texts = ("text", "pair"), ("text", "pair")
    metric = "eval_recall@1"
    changes = TEXT_CHANGES
    labels = ("pair_input_ids",)
    architecture = ResonanceForSentenceEmbedding

    def encoded(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> Examples:
        return Examples(
            [
                {"input_ids": self.ids(tokenizer, row["text"]), "pair_input_ids": self.ids(tokenizer, row["pair"])}
                for row in rows
            ]
        )

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of held-out texts whose pair is the nearest of all, and among the ten nearest."""
        own, other = (torch.from_numpy(np.asarray(part)) for part in prediction.predictions)
        return retrieval(own @ other.T)


def retrieval(similarity: Tensor) -> dict[str, float]:
    """Of queries × candidates, where i belongs to i: how often it is the nearest, and among the ten nearest."""
    nearer = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {f"recall@{k}": float((nearer < k).float().mean()) for k in (1, 10)}


class PaddedBatch:
    """Examples of ids of different lengths as right-padded batches with their masks.

    ``input_ids`` and every key that ends in it become tensors (B, longest) with an ``attention_mask``, the key's prefix
    before it; lists under ``labels`` are padded with −100; numbers become (B).
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name, value in examples[0].items():
            values = [example[name] for example in examples]
            if not isinstance(value, list):
                batch[name] = torch.tensor(values)
                continue
            of_ids = name.endswith("input_ids")
            batch[name] = padded(values, self.pad_token_id if of_ids else IGNORE)
            if of_ids:
                mask = name.removesuffix("input_ids") + "attention_mask"
                batch[mask] = padded([[1] * len(ids) for ids in values], 0)
        return batch


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest), filled up with ``value`` on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
