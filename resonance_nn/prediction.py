"""Trained models on files: what ``resonance predict`` does. Each kind of model has a :class:`Predictor`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from resonance_nn.data import encode_bytes
from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import KINDS, read_lines, read_table
from resonance_nn.evaluation import autocast
from resonance_nn.image_processor import ResonanceImageProcessor
from resonance_nn.loading import load_any, load_tokenizer
from resonance_nn.models.encoder import (
    ResonanceForMaskedLM,
    ResonanceForSentenceEmbedding,
    ResonanceForSequenceClassification,
    ResonanceForTokenClassification,
)
from resonance_nn.models.vision import ResonanceForImageClassification
from resonance_nn.plots import plot_pictures
from resonance_nn.tasks.images import SUFFIXES
from resonance_nn.tasks.text import padded

Found = dict[str, Any]  # what is said about one input: "input", "name", and more


class Predictor(ABC):
    """A model and what makes its inputs."""

    kind: ClassVar[str]  # what it says, for people
    architecture: ClassVar[type[Any]]
    takes_text: ClassVar[bool] = True  # and otherwise files only
    can_draw: ClassVar[bool] = False

    def __init__(self, model: Any, processor: Any, top: int = 3) -> None:
        self.model, self.processor, self.top = model, processor, top

    @classmethod
    @abstractmethod
    def load_processor(cls, folder: Path) -> Any:
        """What makes inputs, as saved with the model."""

    @abstractmethod
    def files(self, path: str) -> list[Found]:
        """The inputs that a file or folder holds. Raises DataError."""

    @abstractmethod
    def batch(self, inputs: list[Found]) -> dict[str, torch.Tensor]:
        """Inputs as the model takes them."""

    @abstractmethod
    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        """What the model's outputs for a batch say of each input."""

    def finish(self, found: list[Found]) -> list[Found]:
        """When all is known of each."""
        return found

    @torch.no_grad()
    def __call__(
        self, inputs: Sequence[Found], *, batch_size: int = 32, precision: str = "fp32", progress: bool = False
    ) -> list[Found]:
        """What the model says of each input, in their order."""
        found: list[Found] = []
        device = self.model.device
        bar = tqdm(total=len(inputs), unit="input", delay=2, leave=False, disable=not progress)
        with bar, autocast(precision, device.type):
            for begin in range(0, len(inputs), batch_size):
                part = list(inputs[begin : begin + batch_size])
                out = self.model(**{name: value.to(device) for name, value in self.batch(part).items()})
                found += [{**own, **said} for own, said in zip(part, self.read_off(part, out), strict=True)]
                bar.update(len(part))
        return self.finish(found)

    def draw(self, found: list[Found], path: str) -> None:
        """A PNG of inputs and what was said of them, where :attr:`can_draw`."""
        raise NotImplementedError

    def scores(self, logits: torch.Tensor) -> list[Found]:
        """Classes by probability, of the last dimension of logits (B, labels)."""
        names = self.model.config.id2label
        said: list[Found] = []
        for p in logits.float().softmax(-1).cpu():
            best = p.topk(min(self.top, len(p)))
            ranked = [
                {"label": names[int(i)], "score": float(s)} for s, i in zip(best.values, best.indices, strict=True)
            ]
            said.append({"label": ranked[0]["label"], "score": ranked[0]["score"], "scores": ranked})
        return said


class TextPredictor(Predictor):
    """Texts: the lines of a file, or the field ``text`` of a table."""

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        return load_tokenizer(folder)

    def files(self, path: str) -> list[Found]:
        name = path.removesuffix(".gz")
        if name.endswith(KINDS):
            field = "label" if name.endswith(".tsv") else None
            try:
                rows = read_table(path, ("text", "label") if field else ("text",))
            except DataError:
                rows = read_table(path, ("text",))
            return [{"name": f"{path}:{i}", "input": str(row["text"]), **_truth(row)} for i, row in enumerate(rows, 1)]
        lines = [(i, line) for i, line in enumerate(read_lines(path), 1) if line.strip()]
        if not lines:
            raise DataError(f"{path}: holds no text")
        return [{"name": f"{path}:{i}", "input": line} for i, line in lines]

    def batch(self, inputs: list[Found]) -> dict[str, torch.Tensor]:
        ids = [self.ids(one["input"]) for one in inputs]
        mask = padded([[1] * len(row) for row in ids], 0)
        return {"input_ids": padded(ids, self.processor.pad_token_id or 0), "attention_mask": mask}

    def ids(self, text: str) -> list[int]:
        """At least one token."""
        return encode_bytes(self.processor, text.encode()) or [self.processor.bos_token_id]


class TextClasses(TextPredictor):
    kind = "labels"
    architecture = ResonanceForSequenceClassification

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        return self.scores(out.logits)


class WordClasses(TextPredictor):
    kind = "labels of words"
    architecture = ResonanceForTokenClassification

    def batch(self, inputs: list[Found]) -> dict[str, torch.Tensor]:
        ids: list[list[int]] = []
        for one in inputs:
            one["first"], row = [], []
            for i, word in enumerate(one["input"].split()):
                one["first"].append(len(row))
                row += encode_bytes(self.processor, f"{' ' if i else ''}{word}".encode())
            ids.append(row or [self.processor.bos_token_id])
        mask = padded([[1] * len(row) for row in ids], 0)
        return {"input_ids": padded(ids, self.processor.pad_token_id or 0), "attention_mask": mask}

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        names, said = self.model.config.id2label, []
        for one, p in zip(inputs, out.logits.float().softmax(-1).cpu(), strict=True):
            best = p[one.pop("first")].max(-1)
            words = zip(one["input"].split(), best.indices.tolist(), best.values.tolist(), strict=True)
            tags = [{"word": word, "label": names[i], "score": score} for word, i, score in words]
            said.append({"label": " ".join(f"{tag['word']}/{tag['label']}" for tag in tags), "words": tags})
        return said


class HiddenWords(TextPredictor):
    """What stands behind each <|mask|>."""

    kind = "hidden tokens"
    architecture = ResonanceForMaskedLM

    def ids(self, text: str) -> list[int]:
        mask = self.processor.mask_token
        parts = text.split(mask)
        if len(parts) < 2:
            raise DataError(f"text {text!r}: has no {mask}, behind which something could be hidden")
        ids = [self.processor.bos_token_id]
        for i, part in enumerate(parts):
            ids += ([self.processor.mask_token_id] if i else []) + encode_bytes(self.processor, part.encode())
        return ids

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        said: list[Found] = []
        for one, logits in zip(inputs, out.logits.float().cpu(), strict=True):
            ids = self.ids(one["input"])
            holes: list[list[Found]] = []
            for place in (i for i, token in enumerate(ids) if token == self.processor.mask_token_id):
                best = logits[place].softmax(-1).topk(self.top)
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                holes.append([{"token": self.processor.decode([i]), "score": score} for i, score in pairs])
            said.append({"label": " | ".join(hole[0]["token"] for hole in holes), "masks": holes})
        return said


class NearestTexts(TextPredictor):
    """For each text the others nearest to it."""

    kind = "nearest texts"
    architecture = ResonanceForSentenceEmbedding

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
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


class ImageClasses(Predictor):
    """Pictures, in the size trained at unless ``size`` says otherwise."""

    kind = "labels"
    architecture = ResonanceForImageClassification
    takes_text = False
    can_draw = True

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        if not (folder / "preprocessor_config.json").is_file():
            raise ValueError(f"model {str(folder)!r}: has no preprocessor_config.json; save its processor beside it")
        return ResonanceImageProcessor.from_pretrained(str(folder), local_files_only=True)

    def files(self, path: str) -> list[Found]:
        place = Path(path)
        if not place.exists():
            raise DataError(f"{path}: no such file or folder")
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        files = [file for file in files if place.is_file() or file.suffix.lower() in SUFFIXES]
        if not files:
            raise DataError(f"{path}: no pictures in it ({', '.join(SUFFIXES)})")
        labels = set(self.model.config.id2label.values())
        of_folder = [file.parent.name if place.is_dir() and file.parent.name in labels else None for file in files]
        return [
            {"name": str(file), "input": str(file), **({} if truth is None else {"truth": truth})}
            for file, truth in zip(files, of_folder, strict=True)
        ]

    def batch(self, inputs: list[Found]) -> dict[str, torch.Tensor]:
        size = self.model.config.image_size
        arrays = np.stack([self.processor.array(one["input"], size) for one in inputs])
        return {"pixel_values": self.processor.normalise(torch.from_numpy(arrays))}

    def read_off(self, inputs: list[Found], out: Any) -> list[Found]:
        return self.scores(out.logits)

    def draw(self, found: list[Found], path: str) -> None:
        """A grid of the first 48 pictures; a wrong label is red where the right one is known."""
        pictures = [(self.processor.array(one["input"]), one) for one in found[:48]]
        plot_pictures([(pixels, f"{one['label']} {one['score']:.0%}", _wrong(one)) for pixels, one in pictures], path)


PREDICTORS: dict[str, type[Predictor]] = {
    one.architecture.__name__: one for one in (TextClasses, WordClasses, HiddenWords, NearestTexts, ImageClasses)
}


def load_predictor(name: str, *, device: str = "cpu", top: int = 3) -> Predictor:
    """The predictor of a model: a folder, a bundled name or hub:org/name. Raises ValueError."""
    kinds = {name: one.architecture for name, one in PREDICTORS.items()}
    model, folder = load_any(name, kinds, device=device)
    one = PREDICTORS[type(model).__name__]
    return one(model, one.load_processor(folder), top)


def find_inputs(predictor: Predictor, paths: Sequence[str], texts: Sequence[str]) -> Iterator[Found]:
    """What files, folders and given texts hold. Raises DataError."""
    if texts and not predictor.takes_text:
        raise DataError(f"--text: this model gives {predictor.kind} of files; name files or folders")
    if not paths and not texts:
        raise DataError("nothing to predict: name files or folders" + (", or --text" if predictor.takes_text else ""))
    for path in paths:
        yield from predictor.files(path)
    for i, text in enumerate(texts, 1):
        yield {"name": f"text {i}", "input": text}


def _wrong(one: Found) -> bool:
    return "truth" in one and one["truth"] != one["label"]


def _truth(row: dict[str, Any]) -> Found:
    return {"truth": str(row["label"])} if row.get("label") is not None else {}
