"""What every predictor is: a trained model on inputs, batch by batch."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from resonance_nn.data.documents import DataError
from resonance_nn.data.tables import Row, is_missing, is_table, path_of, read_table
from resonance_nn.evaluation import autocast
from resonance_nn.loading import load_processor

Found = dict[str, Any]  # what is said about one input: "input", "name", and more
Batch = dict[str, torch.Tensor]
FALLBACK_FONTS = (  # for what matplotlib's own font lacks, such as Chinese, Japanese and Korean, where installed
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("Hiragino Sans", "PingFang SC", "Arial Unicode MS", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic"),
)


@dataclass(frozen=True)
class Figure:
    """How good what was said is, where the right answers are known: a metric by the name it has in training, its value,
    and a sentence for people. None is a value that cannot be computed here."""

    metric: str
    value: float | None
    sentence: str


class Predictor(ABC):
    """A model and what makes its inputs."""

    kind: ClassVar[str]  # what it says, for people
    what: ClassVar[str]  # it says that of, for people
    architecture: ClassVar[type[Any]]
    takes_text: ClassVar[bool] = True  # and otherwise files only
    can_draw: ClassVar[bool] = False
    default_top: ClassVar[int] = 3
    judged: ClassVar[str] = "inputs"  # what :meth:`right` judges, for people
    answer: ClassVar[str] = "label"  # the column of a table with what is right, which may be missing

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

    def answer_of(self, row: Row, where: str) -> Any:
        """What a row says is right, as :meth:`truth` takes it; None where it is missing. Raises DataError."""
        answer = row.get(self.answer)
        return None if is_missing(answer) else answer

    def truth(self, answer: Any) -> Found:
        """The right answer, where a folder or a table tells one that the model could give."""
        return {}

    def right(self, one: Found) -> list[bool]:
        """Whether what was said is right, once for each answer that is known."""
        return []

    def figures(self, found: Sequence[Found]) -> list[Figure]:
        """How good all that was said is; none where no right answer is known."""
        right = [answer for one in found for answer in self.right(one)]
        if not right:
            return []
        share = sum(right) / len(right)
        sentence = f"{share:.2%} of the {len(right):,} {self.judged} whose label is known are right"
        return [Figure("accuracy", share, sentence)]

    def finish(self, found: list[Found]) -> list[Found]:
        """When all is known of each."""
        return found

    def __call__(
        self, inputs: Sequence[Found], *, batch_size: int = 32, precision: str = "fp32", progress: bool = False
    ) -> list[Found]:
        """What the model says of each input, in their order."""
        return self.finish(self.said(inputs, batch_size=batch_size, precision=precision, progress=progress))

    @torch.no_grad()
    def said(self, inputs: Sequence[Found], *, batch_size: int, precision: str, progress: bool) -> list[Found]:
        """The same before :meth:`finish`."""
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
        return found

    def draw(self, found: list[Found], path: str) -> None:
        """A PNG of inputs and what was said of them, where :attr:`can_draw`."""
        raise NotImplementedError


class OneClass(Predictor):
    """One of the model's classes for each input."""

    kind = "labels"

    def truth(self, answer: Any) -> Found:
        known = answer is not None and str(answer) in self.model.config.label2id
        return {"truth": str(answer)} if known else {}

    def right(self, one: Found) -> list[bool]:
        return [one["truth"] == one["label"]] if "truth" in one else []

    def figures(self, found: Sequence[Found]) -> list[Figure]:
        """The share of right classes, and where there are several its mean over them."""
        each: dict[str, list[bool]] = defaultdict(list)
        for one in found:
            if "truth" in one:
                each[one["truth"]] += self.right(one)
        figures = super().figures(found)
        if len(each) > 1:
            macro = sum(sum(right) / len(right) for right in each.values()) / len(each)
            figures.append(Figure("macro_accuracy", macro, f"{macro:.2%} in the mean over their {len(each)} labels"))
        return figures

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        return self.scores(out.logits)

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
    """Files of some kind; a folder stands for all in it, a table for those that it names."""

    takes_text = False
    suffixes: ClassVar[tuple[str, ...]]
    column: ClassVar[str]  # of a table, with paths from where it lies
    processor_class: ClassVar[type[Any]]

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        return load_processor(folder, cls.processor_class)

    def files(self, path: str) -> list[Found]:
        place = Path(path)
        if not place.exists():
            raise DataError(f"{path}: no such file or folder")
        if is_table(path) and place.is_file():
            return self.rows(path)
        files = (
            [file for file in place.rglob("*") if file.suffix.lower() in self.suffixes] if place.is_dir() else [place]
        )
        if not files:
            raise DataError(f"{path}: no {self.what} in it ({', '.join(self.suffixes)})")
        named = place.is_dir() and self.answer == "label"  # after a class, perhaps
        return [self.of_file(str(file), file.parent.name if named else None) for file in sorted(files)]

    def rows(self, path: str) -> list[Found]:
        """The files that a table names, and what is right of them, which may be missing. Raises DataError."""
        found: list[Found] = []
        for number, row in enumerate(read_table(path, (self.column,), (self.answer,)), 1):
            where = f"{path}: row {number}"
            file = path_of(row, self.column, where, Path(path).parent)
            if not os.path.isfile(file):
                raise DataError(
                    f"{where}: its {self.column} is {row[self.column]!r}, and there is no file {file}; it must be the "
                    "path of one from where the table lies"
                )
            found.append(self.of_file(file, self.answer_of(row, where)))
        return found

    def of_file(self, name: str, answer: Any) -> Found:
        return {"name": name, "input": name, **self.truth(answer)}


def recalls(found: Sequence[Found], candidates: int) -> list[Figure]:
    """How often what belongs to a query, at place ``rank`` of the candidates, is the first, and among the first ten."""
    ranks = [one["rank"] for one in found if one.get("rank") is not None]
    if not ranks:
        return []
    shares = {k: sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 10)}
    words = {1: "first", 10: "among the first ten"}
    return [
        Figure(f"recall@{k}", share, f"{share:.2%} of {len(ranks):,} known matches are {words[k]} of {candidates:,}")
        for k, share in shares.items()
    ]


@contextmanager
def any_script() -> Iterator[None]:
    """Drawing texts of any script: by more fonts, where there are some, and in silence about what they all lack."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    families = [*matplotlib.rcParams["font.family"], *(name for name in FALLBACK_FONTS if name in installed)]
    with warnings.catch_warnings(), matplotlib.rc_context({"font.family": families}):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield
