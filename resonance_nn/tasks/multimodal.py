"""``multimodal-classification``, a class for what a text, a picture and a sound tell, and ``multimodal-retrieval``,
which of them belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, Wav2Vec2FeatureExtractor

from resonance_nn.arguments import SMALLEST_VOCABULARY
from resonance_nn.config import ResonanceConfig
from resonance_nn.config_checks import MODALITIES
from resonance_nn.data import tokenizer_vocab_size, train_tokenizer
from resonance_nn.data.audio import read_audio
from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import Row, is_missing, label_of, path_of, read_table, text_of
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.loading import load_processor, load_tokenizer, model_folder
from resonance_nn.models.multimodal import ResonanceForContrastive, ResonanceForMultimodalClassification
from resonance_nn.processor import ResonanceProcessor
from resonance_nn.rundir import write_errors
from resonance_nn.tasks.audio import common_rate
from resonance_nn.tasks.augment import CHANGES, batch_changes
from resonance_nn.tasks.base import ExamplesTask, Learning, check_files, label_names, name_labels
from resonance_nn.tasks.images import accuracy, fitted_processor
from resonance_nn.tasks.text import Examples, retrieval

ORIGIN = "<origin>"  # of a row, beside its columns, which may have any name


def read_rows(path: str, columns: Sequence[str] = ()) -> list[Row]:
    """Those of a table with ``columns`` and any of text, image and audio, paths as from here, None where one is
    missing; each with where it is from, as ``ORIGIN``. Raises DataError."""
    rows, place = read_table(path, columns), Path(path).parent
    for number, row in enumerate(rows, 1):
        row[ORIGIN] = where = f"{path}: row {number}"
        for name in MODALITIES:
            if is_missing(row.get(name)):
                row[name] = None
            else:
                row[name] = text_of(row, name, where) if name == "text" else path_of(row, name, where, place)
        if not any(row[name] for name in MODALITIES):
            raise DataError(f"{where}: has none of {', '.join(MODALITIES)}")
        if "label" in columns:
            label_of(row["label"], where)
    return rows


class MultimodalClassification(ExamplesTask):
    """Rows with any of text, image and audio (paths from the table; empty where one is missing) and a label. The model
    has a tower for each that the training rows have, unless ``modalities`` says otherwise."""

    name = "multimodal-classification"
    predicts_classes = True
    data = "tables (.jsonl, .csv) with any of text, image, audio, and label"
    metric = "eval_accuracy"
    fields = {"modality_dropout": 0.3}  # noqa: RUF012
    width_and_depth = {"hidden_size": 96, "num_hidden_layers": 2}  # noqa: RUF012
    usual: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "dropout": 0.1,
        "vocab_size": 1000,
        "augment": ("drop", "flip", "crop"),
    }
    rate = 0.5
    batch_size = 32
    changes = tuple(name for names in CHANGES.values() for name in names)
    columns: ClassVar[tuple[str, ...]] = ("label",)
    labels: ClassVar[tuple[str, ...]] = ("labels",)
    architecture: ClassVar[Any] = ResonanceForMultimodalClassification

    def initial(self) -> ResonanceConfig:
        a, config = self.arguments, super().initial()
        if a.mixers or a.recipe or "mixers" in a.config:
            given = f"recipe = {a.recipe!r}" if a.recipe else f"mixers = {a.mixers or a.config['mixers']}"
            raise ValueError(
                f"{given}: {self.name} has an encoder a modality; set encoder_mixers (of texts), image_mixers or "
                "audio_mixers"
            )
        self.processor = load_processor(model_folder(a.init), ResonanceProcessor) if a.init else None
        self.tokenizer = load_tokenizer(a.tokenizer) if a.tokenizer else None
        return config

    def find(self, path: str) -> list[Row]:
        return read_rows(path, self.columns)

    def write(self, examples: tuple[list[Row], list[Row]], folder: Path) -> dict[str, str]:
        a, (train, held_out) = self.arguments, examples
        kinds = self.modalities(train)
        for kind, names in CHANGES.items():
            if kind not in kinds and (vain := [name for name in self.given.augment or () if name in names]):
                has = ", ".join(kinds)
                raise DataError(f"augment = {vain[0]!r}: is of {kind}, and the model has {has}; leave it out")
        facts: dict[str, Any] = {"modalities": kinds, **self.facts(examples, kinds)}
        processor: Any = self.processor
        if processor is None:
            processor, fields = self.fitted(train, kinds)
            facts |= fields
        rate = processor.feature_extractor.sampling_rate
        for name, read in (
            ("image", processor.image_processor.array),
            ("audio", lambda path: read_audio(path, rate)),
        ):
            paths = [row[name] for row in (*train, *held_out) if row[name]]
            check_files(paths if name in kinds else [], read, progress=a.progress)
        with write_errors(folder):
            processor.save_pretrained(folder / "processor")
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return self.fingerprints(examples, folder)

    def modalities(self, rows: list[Row]) -> tuple[str, ...]:
        """Of the model: its own, those asked for, or those that the rows have. Raises DataError."""
        a, found = self.arguments, tuple(name for name in MODALITIES if any(row[name] for row in rows))
        if a.init:
            return self.start.modalities
        kinds = self.start.modalities if "modalities" in a.config else found
        if lacking := [name for name in kinds if name not in found]:
            raise DataError(f"modalities = {kinds}: no training row has {lacking[0]}; leave it out")
        return kinds

    def fitted(self, rows: list[Row], kinds: Sequence[str]) -> tuple[ResonanceProcessor, dict[str, Any]]:
        """What makes inputs of the training rows, and the fields of the configuration that go with it."""
        a = self.arguments
        texts, images, sounds = ([row[m] for row in rows if row[m] and m in kinds] for m in MODALITIES)
        tokenizer = self.tokenizer
        if tokenizer is None:
            vocab_size = a.vocab_size if texts and a.vocab_size else SMALLEST_VOCABULARY
            tokenizer = train_tokenizer((text.encode() for text in texts), vocab_size, progress=a.progress)
        rate = self.start.sampling_rate if "sampling_rate" in a.config else common_rate(sounds)
        fields: dict[str, Any] = {"sampling_rate": rate}
        image_processor = ResonanceImageProcessor()
        if images:
            image_processor, size = fitted_processor(images, self.start, a.config.get("num_channels"))
            fields |= {"image_size": size, "num_channels": image_processor.num_channels}
        extractor = Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=True)
        return ResonanceProcessor(tokenizer, image_processor, extractor), fields

    def facts(self, examples: tuple[list[Row], list[Row]], kinds: Sequence[str]) -> dict[str, Any]:
        """What the data say about the model beside its modalities. Raises DataError."""
        for row in (row for rows in examples for row in rows):
            if not any(row[name] for name in kinds):
                raise DataError(f"{row[ORIGIN]}: has none of {', '.join(kinds)}")
        return {"labels": label_names(*([str(row["label"]) for row in rows] for rows in examples))}

    def fingerprints(self, examples: tuple[list[Row], list[Row]], folder: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, rows in zip(("train", "eval"), examples, strict=True):
            digest = hashlib.sha256()
            for row in rows:
                digest.update(repr((row["text"], row.get("label"))).encode())
                for path in (row["image"], row["audio"]):
                    digest.update(Path(path).read_bytes() if path else b"")
            found[name] = digest.hexdigest()
        return found

    def learning(self, examples: tuple[list[Row], list[Row]], folder: Path) -> Learning:
        a, facts = self.arguments, json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        processor: Any = ResonanceProcessor.from_pretrained(folder / "processor", local_files_only=True)
        own = ("modalities", "image_size", "num_channels", "sampling_rate")
        config = self.model_config(**{name: facts[name] for name in own if name in facts})
        if not a.init:
            config.vocab_size = tokenizer_vocab_size(processor.tokenizer)
            config.pad_token_id = processor.tokenizer.pad_token_id
        if "labels" in facts:
            name_labels(config, facts["labels"])
        train_set, eval_set = (Examples(rows) for rows in examples)
        return Learning(
            self.new_model(config),
            processor,
            train_set,
            eval_set,
            collate=MultimodalBatch(processor, config, a.seq_len),
            labels=self.labels,
            metrics=self.metrics,
            augment=batch_changes(a.augment, sampling_rate=config.sampling_rate, tokenizer=processor.tokenizer),
            text=f"{len(train_set):,} examples of {', '.join(config.modalities)} and {len(eval_set):,} held out",
        )

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of right classes, and its mean over the classes."""
        labels = np.asarray(prediction.label_ids)
        right = np.asarray(prediction.predictions).argmax(-1) == labels
        macro = float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
        return {**accuracy(prediction), "macro_accuracy": macro}


class MultimodalRetrieval(MultimodalClassification):
    """Rows without labels: the first of ``modalities`` is to find the others of its row among those of the batch."""

    name = "multimodal-retrieval"
    predicts_classes = False
    fields = {}  # noqa: RUF012
    usual = {**MultimodalClassification.usual, "epochs": 30}  # noqa: RUF012
    batch_size = 64
    data = "tables (.jsonl, .csv) with two or more of text, image, audio"
    metric = "eval_recall@10"
    columns = ()
    labels = ("present",)
    architecture = ResonanceForContrastive

    def modalities(self, rows: list[Row]) -> tuple[str, ...]:
        kinds = super().modalities(rows)
        if len(kinds) < 2:
            raise DataError(f"modalities = {kinds}: one is to find another, so two or more are needed")
        return kinds

    def write(self, examples: tuple[list[Row], list[Row]], folder: Path) -> dict[str, str]:
        asked, *others = self.modalities(examples[0])
        for rows, of_what in zip(examples, ("training", "held-out"), strict=True):
            if not any(row[asked] and any(row[name] for name in others) for row in rows):
                raise DataError(f"the {of_what} data have no row with {asked} and {' or '.join(others)}, to find it by")
        return super().write(examples, folder)

    def facts(self, examples: tuple[list[Row], list[Row]], kinds: Sequence[str]) -> dict[str, Any]:
        return {}

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """How often what belongs to a query is the nearest of all held-out ones, and among the ten nearest."""
        query, target = (torch.from_numpy(np.asarray(side)) for side in prediction.predictions)
        both = (query.norm(dim=-1) > 0.5) & (target.norm(dim=-1) > 0.5)
        return {**retrieval(query[both] @ target[both].T), "candidates": float(both.sum())}


class MultimodalBatch:
    """Rows -> inputs."""

    def __init__(self, processor: Any, config: ResonanceConfig, max_length: int | None = None) -> None:
        self.processor, self.config, self.max_length = processor, config, max_length

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        kinds, config = self.config.modalities, self.config
        values = {name: [row[name] for row in rows] if name in kinds else None for name in MODALITIES}
        made = self.processor(
            values["text"],
            values["image"],
            values["audio"],
            modalities=kinds,
            size=config.image_size,
            max_length=self.max_length,
        )
        batch: dict[str, Tensor] = dict(made)
        if "label" in rows[0] and config.label2id:
            batch["labels"] = torch.tensor([config.label2id.get(str(row["label"]), -100) for row in rows])
        return batch
