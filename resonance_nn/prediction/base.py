"""What every predictor is: a trained model on inputs, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from resonance_nn.data.documents import DataError
from resonance_nn.evaluation import autocast
from resonance_nn.loading import load_processor

Found = dict[str, Any]  # what is said about one input: "input", "name", and more
Batch = dict[str, torch.Tensor]


class Predictor(ABC):
    """A model and what makes its inputs."""

    kind: ClassVar[str]  # what it says, for people
    what: ClassVar[str]  # it says that of, for people
    architecture: ClassVar[type[Any]]
    takes_text: ClassVar[bool] = True  # and otherwise files only
    can_draw: ClassVar[bool] = False
    default_top: ClassVar[int] = 3

    def __init__(self, model: Any, processor: Any, top: int | None = None) -> None:
        self.model, self.processor = model, processor
        self.top = self.default_top if top is None else top

    @classmethod
    @abstractmethod
    def load_processor(cls, folder: Path) -> Any:
        """What makes inputs, as saved with the model."""

    @abstractmethod
    def files(self, path: str) -> list[Found]:
        """The inputs that a file or folder holds. Raises DataError."""

    @abstractmethod
    def batch(self, inputs: list[Found]) -> Batch:
        """Inputs as the model takes them."""

    @abstractmethod
    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        """What the model's outputs for the batch that was made of them say of each input."""

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
                batch = self.batch(part)
                out = self.model(**{name: value.to(device) for name, value in batch.items()})
                found += [{**own, **said} for own, said in zip(part, self.read_off(part, batch, out), strict=True)]
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


class FilePredictor(Predictor):
    """Files of some kind; a folder stands for all in it."""

    takes_text = False
    suffixes: ClassVar[tuple[str, ...]]
    processor_class: ClassVar[type[Any]]

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        return load_processor(folder, cls.processor_class)

    def files(self, path: str) -> list[Found]:
        place = Path(path)
        if not place.exists():
            raise DataError(f"{path}: no such file or folder")
        files = (
            [file for file in place.rglob("*") if file.suffix.lower() in self.suffixes] if place.is_dir() else [place]
        )
        if not files:
            raise DataError(f"{path}: no {self.what} in it ({', '.join(self.suffixes)})")
        return [{"name": str(file), "input": str(file), **self.truth(place, file)} for file in sorted(files)]

    def truth(self, place: Path, file: Path) -> Found:
        """The class that a folder is named after, if it is one."""
        labels = set(self.model.config.id2label.values())
        return {"truth": file.parent.name} if place.is_dir() and file.parent.name in labels else {}

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        return self.scores(out.logits)
