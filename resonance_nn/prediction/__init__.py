"""Trained models on files: what ``resonance predict`` does. Each kind of model has a :class:`Predictor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from resonance_nn.data.documents import DataError
from resonance_nn.loading import load_any
from resonance_nn.prediction.base import Found, Predictor
from resonance_nn.prediction.images import ImageClasses
from resonance_nn.prediction.multimodal import MultimodalClasses, MultimodalMatches
from resonance_nn.prediction.sounds import SoundClasses, SoundEvents
from resonance_nn.prediction.texts import HiddenWords, NearestTexts, TextClasses, Translations, WordClasses

PREDICTORS: dict[str, type[Predictor]] = {
    one.architecture.__name__: one
    for one in (
        *(TextClasses, WordClasses, HiddenWords, NearestTexts, Translations),
        *(ImageClasses, SoundClasses, SoundEvents),
        *(MultimodalClasses, MultimodalMatches),
    )
}


def load_predictor(name: str, *, device: str = "cpu", top: int | None = None) -> Predictor:
    """The predictor of a model: a folder, a bundled name or hub:org/name. ``top``: how many labels, tokens or
    neighbours to name, None: 3, or 5 matches. Raises ValueError."""
    kinds = {name: one.architecture for name, one in PREDICTORS.items()}
    model, folder = load_any(name, kinds, device=device)
    one = PREDICTORS[type(model).__name__]
    return one(model, one.load_processor(folder), top)


def find_inputs(predictor: Predictor, paths: Sequence[str], texts: Sequence[str]) -> Iterator[Found]:
    """What files, folders and given texts hold. Raises DataError."""
    if texts and not predictor.takes_text:
        raise DataError(f"--text: this model gives {predictor.kind} of {predictor.what}; name files or folders")
    if not paths and not texts:
        raise DataError("nothing to predict: name files or folders" + (", or --text" if predictor.takes_text else ""))
    for path in paths:
        yield from predictor.files(path)
    for i, text in enumerate(texts, 1):
        yield {"name": f"text {i}", "input": text}


__all__ = ["PREDICTORS", "Found", "Predictor", "find_inputs", "load_predictor"]
