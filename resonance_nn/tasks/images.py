"""``image-classification``: a class for a picture."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EvalPrediction

from resonance_nn.config import ResonanceConfig
from resonance_nn.data.documents import DataError
from resonance_nn.data.images import channels_of, read_idx
from resonance_nn.data.tables import is_table, label_of, path_of, read_table
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.loading import load_processor, model_folder
from resonance_nn.models.vision import ResonanceForImageClassification
from resonance_nn.rundir import write_errors
from resonance_nn.tasks.augment import IMAGE_CHANGES, batch_changes
from resonance_nn.tasks.base import ExamplesTask, Learning, check_files, label_names, name_labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SAMPLED = 2000  # pictures that mean and deviation are taken of


@dataclass(frozen=True)
class Picture:
    """A file, or bytes (rows, columns), and its class."""

    source: str | np.ndarray
    label: str
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)  # of the table, where there is one


def find_pictures(path: str) -> list[Picture]:
    """Of a folder with a folder a class, of a table (.csv, .tsv, .jsonl) with image (a path from there) and label, or
    of an IDX file of images, beside which lies that of their labels. Raises DataError."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = [
            Picture(str(file), folder.name)
            for folder in sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise DataError(
                f"{path}: no pictures in folders in it; a folder holds one for each class, with its pictures"
            )
        return found
    if not place.is_file():
        raise DataError(f"{path}: no such file or folder")
    if is_table(place):
        pictures: list[Picture] = []
        for number, row in enumerate(read_table(place, ("image", "label")), 1):
            where = f"{path}: row {number}"
            pictures.append(Picture(path_of(row, "image", where, place.parent), label_of(row["label"], where), row))
        return pictures
    images = read_idx(place)
    beside = place.parent / place.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
    if images.ndim != 3 or beside == place or not beside.is_file():
        raise DataError(
            f"{path}: an IDX file of images is called …images-idx3-ubyte, and …labels-idx1-ubyte lies beside it"
        )
    labels = read_idx(beside)
    if labels.shape != images.shape[:1]:
        raise DataError(f"{beside}: has {len(labels):,} labels for {len(images):,} images")
    return [Picture(image, str(label)) for image, label in zip(images, labels.tolist(), strict=True)]


def fitted_processor(
    sources: Sequence[str | np.ndarray], config: ResonanceConfig, num_channels: int | None = None
) -> tuple[ResonanceImageProcessor, tuple[int, int]]:
    """What makes pictures, by up to SAMPLED of these: of so many channels, None: 1 if all are grey, else 3, with their
    mean and deviation. And the size to bring them to: the configuration's, or the commonest, in whole patches."""
    sample = sources[:: max(1, len(sources) // SAMPLED)]
    channels = max(map(channels_of, sample)) if num_channels is None else num_channels
    reader, shapes = ResonanceImageProcessor(channels), Counter[tuple[int, ...]]()
    pixels, sums = 0, np.zeros((2, channels))  # of x and x²
    for source in sample:
        array = reader.array(source)
        shapes[array.shape[:2]] += 1
        x = array.reshape(-1, channels) / 255
        pixels += len(x)
        sums += np.stack((x.sum(0), (x * x).sum(0)))
    mean, square = sums / pixels
    std = np.sqrt(np.maximum(square - mean * mean, 1e-4))
    size = config.image_size
    if size is None:
        rows, columns = (max(1, n // config.patch_size) * config.patch_size for n in shapes.most_common(1)[0][0])
        size = (rows, columns)
    assert isinstance(size, tuple)
    return ResonanceImageProcessor(channels, mean.round(4).tolist(), std.round(4).tolist()), size


class Pictures(Dataset[Any]):
    """Bytes (rows, columns, channels) of one size, and classes."""

    def __init__(
        self, pictures: Sequence[Picture], classes: Sequence[str], processor: ResonanceImageProcessor,
        size: tuple[int, int],
    ) -> None:  # fmt: skip
        self.pictures, self.processor, self.size = pictures, processor, size
        self.classes = {name: i for i, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture = self.pictures[i]
        pixels = self.processor.array(picture.source, self.size)
        return {"pixels": pixels, "labels": self.classes[picture.label]}


class ImageClassification(ExamplesTask):
    """Pictures in one size, which is the commonest of the training ones unless ``image_size`` is given."""

    name = "image-classification"
    predicts_classes = True
    data = "a folder with a folder a class, a table with image and label, or MNIST's files (…images-idx3-ubyte.gz)"
    fields = {"mixers": ("global_filter",)}  # noqa: RUF012
    width_and_depth = {"hidden_size": 128, "num_hidden_layers": 4}  # noqa: RUF012
    usual = {"epochs": 15, "dropout": 0.05, "label_smoothing": 0.1, "augment": ("flip", "crop", "zoom")}  # noqa: RUF012
    last_rate = 0.01
    batch_size = 128
    metric = "eval_accuracy"
    changes = IMAGE_CHANGES
    architecture = ResonanceForImageClassification

    def initial(self) -> ResonanceConfig:
        config, init = super().initial(), self.arguments.init
        self.processor = load_processor(model_folder(init), ResonanceImageProcessor) if init else None
        return config

    def find(self, path: str) -> list[Picture]:
        return find_pictures(path)

    def row(self, example: Picture) -> Mapping[str, Any]:
        return example.row

    def write(self, examples: tuple[list[Picture], list[Picture]], folder: Path) -> dict[str, str]:
        a, (train, held_out) = self.arguments, examples
        labels = label_names(*([picture.label for picture in part] for part in examples))
        processor, size = self.processor, self.start.image_size
        if processor is None:
            processor, size = fitted_processor([p.source for p in train], self.start, a.config.get("num_channels"))
        files = (p.source for p in (*train, *held_out) if isinstance(p.source, str))
        check_files(files, processor.array, progress=a.progress)
        facts = {
            "labels": labels,
            "image_size": size,
            "num_channels": processor.num_channels,
            "mean": processor.image_mean,
            "std": processor.image_std,
        }
        with write_errors(folder):
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return self.fingerprints(examples, folder)

    def fingerprints(self, examples: tuple[list[Picture], list[Picture]], folder: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, part in zip(("train", "eval"), examples, strict=True):
            digest = hashlib.sha256()
            for picture in part:
                source = picture.source
                content = Path(source).read_bytes() if isinstance(source, str) else source.tobytes()
                digest.update(f"{picture.label} ".encode())
                digest.update(content)
            found[name] = digest.hexdigest()
        return found

    def learning(self, examples: tuple[list[Picture], list[Picture]], folder: Path) -> Learning:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        processor = ResonanceImageProcessor(facts["num_channels"], facts["mean"], facts["std"])
        config = self.model_config(image_size=facts["image_size"], num_channels=facts["num_channels"])
        name_labels(config, facts["labels"])
        size = config.image_size
        assert isinstance(size, tuple)
        train_set, eval_set = (Pictures(part, facts["labels"], processor, size) for part in examples)
        shape = f"{facts['num_channels']} × {size[0]} × {size[1]}"
        return Learning(
            self.new_model(config),
            processor,
            train_set,
            eval_set,
            unit="images",
            collate=PictureBatch(processor),
            metrics=accuracy,
            augment=batch_changes(self.arguments.augment),
            text=f"{len(train_set):,} images of {shape} and {len(eval_set):,} held out",
        )


class PictureBatch:
    """Bytes -> pixel values."""

    def __init__(self, processor: ResonanceImageProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.stack([example["pixels"] for example in examples]))
        labels = torch.tensor([example["labels"] for example in examples])
        return {"pixel_values": self.processor.normalise(pixels), "labels": labels}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of right classes."""
    right = np.asarray(prediction.predictions).argmax(-1) == np.asarray(prediction.label_ids)
    return {"accuracy": float(right.mean())}
