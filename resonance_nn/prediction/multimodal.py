"""Rows of texts, pictures and sounds, any of them missing: their class, and what belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from resonance_nn.config_checks import MODALITIES
from resonance_nn.data.documents import DataError
from resonance_nn.data.images import read_image
from resonance_nn.data.tables import Row
from resonance_nn.loading import load_processor
from resonance_nn.models.multimodal import ResonanceForContrastive, ResonanceForMultimodalClassification
from resonance_nn.plots import plot_retrieval
from resonance_nn.prediction.base import Batch, Figure, Found, OneClass, Predictor, any_script, recalls
from resonance_nn.processor import ResonanceProcessor
from resonance_nn.tasks.multimodal import ORIGIN, MultimodalBatch, read_rows

SHOWN = 8  # queries of a sheet
THUMBNAIL = 256  # pixels of a side at least, where a picture is larger


class MultimodalPredictor(Predictor):
    """Tables with any of text, image and audio."""

    what, takes_text = "tables", False

    @classmethod
    def load_processor(cls, folder: Path) -> Any:
        return load_processor(folder, ResonanceProcessor)

    def files(self, path: str) -> list[Found]:
        kinds = self.model.config.modalities
        found: list[Found] = []
        for row in read_rows(path):
            if not any(row[name] for name in kinds):
                raise DataError(f"{row[ORIGIN]}: has none of {', '.join(kinds)}, which this model reads; leave it out")
            own = {"name": row[ORIGIN], "input": said_of(row, kinds), **{name: row[name] for name in MODALITIES}}
            found.append({**own, **self.truth(self.answer_of(row, row[ORIGIN]))})
        return found

    def batch(self, inputs: list[Found]) -> Batch:
        return MultimodalBatch(self.processor, self.model.config)(inputs)


class MultimodalClasses(OneClass, MultimodalPredictor):
    """The class of each row."""

    architecture = ResonanceForMultimodalClassification


class MultimodalMatches(MultimodalPredictor):
    """For what each row has of the first of the model's modalities, the rows that are nearest by all others."""

    kind = "best matches"
    architecture = ResonanceForContrastive
    can_draw = True
    default_top: ClassVar[int] = 5

    def read_off(self, inputs: list[Found], batch: Batch, out: Any) -> list[Found]:
        nothing = torch.zeros(len(inputs), self.model.config.hidden_size)
        sides = (nothing if x is None else x.float().cpu() for x in (out.query_embeddings, out.target_embeddings))
        return [{"query": query, "target": target} for query, target in zip(*sides, strict=True)]

    def finish(self, found: list[Found]) -> list[Found]:
        """``matches``, best first, and ``rank``, the place of what belongs to the query; None where it is not known."""
        asked, *others = self.model.config.modalities
        query, target = (torch.stack([one.pop(side) for one in found]) for side in ("query", "target"))
        asks, answers = (side.norm(dim=-1) > 0.5 for side in (query, target))  # 1, or 0 where there is nothing
        similarity = (query @ target.T).masked_fill(~answers, -torch.inf)
        best = similarity.topk(min(self.top, int(answers.sum())))
        for i, one in enumerate(found):
            pairs = zip(best.values[i].tolist(), best.indices[i].tolist(), strict=True) if asks[i] else ()
            one["matches"] = [
                {"name": found[j]["name"], "input": said_of(found[j], others), "score": score, "right": i == j}
                for score, j in pairs
            ]
            one["rank"] = int((similarity[i] > similarity[i, i]).sum()) + 1 if asks[i] and answers[i] else None
            first = one["matches"][0] if one["matches"] else {"input": f"no {asked}", "score": None}
            one |= {"input": said_of(one, [asked]) or one["input"], "label": first["input"], "score": first["score"]}
        return found

    def figures(self, found: Sequence[Found]) -> list[Figure]:
        _, *others = self.model.config.modalities
        return recalls(found, sum(any(one[name] for name in others) for one in found))

    @any_script()
    def draw(self, found: list[Found], path: str) -> None:
        """A sheet of eight queries, taken evenly, with their best matches."""
        asked, *others = self.model.config.modalities
        named = {one["name"]: one for one in found}
        rows = []
        asking = [one for one in found if one["matches"]]
        if not asking:
            wanted = ", ".join(others)
            asks = any(one[asked] for one in found)
            lack = f"no row has {wanted} to be found by {asked}" if asks else f"no row has {asked} to find {wanted} by"
            raise ValueError(f"--picture {path!r}: {lack}; --json keeps what there is")
        for one in asking[:: -(-len(asking) // SHOWN)]:
            matches = [(self.shown(named[m["name"]], others), m["score"], m["right"]) for m in one["matches"]]
            rows.append((self.shown(one, [asked]), one["rank"], matches))
        plot_retrieval(rows, path)

    def shown(self, row: Row, kinds: list[str]) -> str | np.ndarray:
        """The picture of a row, small, if it has one among ``kinds``, else what it says."""
        if "image" not in kinds or not row["image"]:
            return said_of(row, kinds)
        pixels = read_image(row["image"], self.model.config.num_channels)
        step = max(1, min(pixels.shape[:2]) // THUMBNAIL)
        return pixels[::step, ::step]


def said_of(row: Row, kinds: Any) -> str:
    """A row in a line: its text, the names of its files."""
    values = {name: row[name] for name in kinds if row[name]}
    return " · ".join(value if name == "text" else Path(value).name for name, value in values.items())
