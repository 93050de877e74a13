"""``multimodal-classification``, a class for what a text, a picture and a sound tell, and ``multimodal-retrieval``,
which of them belong together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction, Wav2Vec2FeatureExtractor

from resonance_nn.arguments import SMALLEST_VOCABULARY
from resonance_nn.config import ResonanceConfig
from resonance_nn.data import tokenizer_vocab_size, train_tokenizer
from resonance_nn.data.audio import read_audio
from resonance_nn.data.documents import DataError
from resonance_nn.data.images import channels_of
from resonance_nn.data.tables import Row, read_table
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.models.multimodal import ResonanceForContrastive, ResonanceForMultimodalClassification
from resonance_nn.processor import MODALITIES, ResonanceProcessor
from resonance_nn.rundir import write_errors
from resonance_nn.tasks.audio import HIGHEST, rate_of
from resonance_nn.tasks.base import Learning, Task, label_names, name_labels, split_examples
from resonance_nn.tasks.images import SAMPLED, accuracy
from resonance_nn.tasks.text import Examples, retrieval


class MultimodalClassification(Task):
    """Rows with any of text, image and audio (paths from the table; empty where one is missing) and a label. The model
    has a tower for each that the training rows have, unless ``modalities`` says otherwise."""

    name = "multimodal-classification"
    data = "tables (.jsonl, .csv) with any of text, image, audio, and label"
    metric = "eval_accuracy"
    batch_size = 32
    columns: ClassVar[tuple[str, ...]] = ("label",)
    labels: ClassVar[tuple[str, ...]] = ("labels",)
    architecture: ClassVar[Any] = ResonanceForMultimodalClassification

    def read(self) -> tuple[list[Row], list[Row]]:
        """The rows to train on and those held out."""
        a = self.arguments
        found = [row for path in a.data for row in self.rows(path)]
        if a.eval_data:
            return found, [row for path in a.eval_data for row in self.rows(path)]
        return split_examples(found)

    def rows(self, path: str) -> list[Row]:
        """Those of a table. Raises DataError."""
        rows, place = read_table(path, self.columns), Path(path).parent
        for number, row in enumerate(rows, 1):
            for name in MODALITIES:
                value = row.get(name) or None
                if value is not None and not isinstance(value, str):
                    raise DataError(f"{path}: row {number}: its {name} is {value!r}, not a text or a path")
                row[name] = str(place / value) if value and name != "text" else value
            if not any(row[name] for name in MODALITIES):
                raise DataError(f"{path}: row {number}: has none of {', '.join(MODALITIES)}")
        return rows

    def write(self, examples: tuple[list[Row], list[Row]], folder: Path) -> dict[str, str]:
        a, rows = self.arguments, examples[0]
        found = [name for name in MODALITIES if any(row[name] for row in rows)]
        facts: dict[str, Any] = {"modalities": list(a.config.get("modalities", found)), **self.facts(examples)}
        texts = [row["text"].encode() for row in rows if row["text"]]
        tokenizer = train_tokenizer(texts, a.vocab_size or (8192 if texts else SMALLEST_VOCABULARY), progress=False)
        images, sounds = ([row[name] for row in rows if row[name]] for name in ("image", "audio"))
        image_processor = ResonanceImageProcessor()
        if images and "image" in facts["modalities"]:
            image_processor, size = self._image_processor(images[:: max(1, len(images) // SAMPLED)])
            facts |= {"image_size": size, "num_channels": image_processor.num_channels}
        rates = [rate for rate in map(rate_of, sounds[:200]) if rate]
        facts["sampling_rate"] = a.config.get(
            "sampling_rate", min(HIGHEST, max(set(rates), key=rates.count, default=HIGHEST))
        )
        for row in (row for part in examples for row in part):  # whatever is wrong is said before anything is trained
            if row["image"]:
                image_processor.array(row["image"])
            if row["audio"]:
                read_audio(row["audio"], facts["sampling_rate"])
        extractor = Wav2Vec2FeatureExtractor(sampling_rate=facts["sampling_rate"], return_attention_mask=True)
        with write_errors(folder):
            ResonanceProcessor(tokenizer, image_processor, extractor).save_pretrained(folder / "processor")
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return self.fingerprints(examples, folder)

    def _image_processor(self, sample: list[str]) -> tuple[ResonanceImageProcessor, tuple[int, int]]:
        """What makes pictures, by some of them, and their size: the commonest, in whole patches."""
        fields = self.arguments.config
        channels = fields.get("num_channels", max(map(channels_of, sample)))
        arrays = [ResonanceImageProcessor(channels).array(path) for path in sample]
        shapes, patch = [array.shape[:2] for array in arrays], fields.get("patch_size", ResonanceConfig.patch_size)
        rows, columns = max(set(shapes), key=shapes.count)
        size = fields.get("image_size", (max(1, rows // patch) * patch, max(1, columns // patch) * patch))
        pixels = np.concatenate([array.reshape(-1, channels) for array in arrays]) / 255
        mean, std = pixels.mean(0).round(4).tolist(), np.maximum(pixels.std(0), 1e-2).round(4).tolist()
        return ResonanceImageProcessor(channels, mean, std), size

    def facts(self, examples: tuple[list[Row], list[Row]]) -> dict[str, Any]:
        """What the data say about the model. Raises DataError."""
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
    data = "tables (.jsonl, .csv) with two or more of text, image, audio"
    metric = "eval_recall@10"
    columns = ()
    labels = ("present",)
    architecture = ResonanceForContrastive

    def facts(self, examples: tuple[list[Row], list[Row]]) -> dict[str, Any]:
        return {}

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """How often what belongs to a query is the nearest of all held-out ones, and among the ten nearest."""
        query, target = (torch.from_numpy(np.asarray(side)) for side in prediction.predictions)
        both = (query.norm(dim=-1) > 0.5) & (target.norm(dim=-1) > 0.5)
        return {**retrieval(query[both] @ target[both].T), "candidates": float(both.sum())}


class MultimodalBatch:
    """Rows -> inputs."""

    def __init__(self, processor: Any, config: ResonanceConfig, max_length: int) -> None:
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
