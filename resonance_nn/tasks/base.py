"""What a task is to the training loop: data in, a model and batches out."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import DefaultDataCollator, EvalPrediction, PreTrainedModel, TrainerState, set_seed

from resonance_nn import models
from resonance_nn.arguments import TrainArguments
from resonance_nn.config import ResonanceConfig
from resonance_nn.config_checks import MODALITIES
from resonance_nn.data.documents import DataError
from resonance_nn.loading import load_config, load_weights
from resonance_nn.models.audio import AudioEncoder
from resonance_nn.models.base import ResonancePreTrainedModel
from resonance_nn.models.multimodal import MultimodalEncoder
from resonance_nn.models.seq2seq import ResonanceForConditionalGeneration
from resonance_nn.models.vision import ResonanceForImageClassification
from resonance_nn.tasks.augment import CHANGES, IMAGE_CHANGES, check_changes
from resonance_nn.unread import refuse_unread, unread_fields

Build = Callable[[ResonanceConfig], PreTrainedModel]
INPUTS: dict[str, type[ResonancePreTrainedModel]] = {  # of models: the first that a class is of
    "images": ResonanceForImageClassification,
    "sounds": AudioEncoder,
    "rows of several modalities": MultimodalEncoder,
    "texts and their translations": ResonanceForConditionalGeneration,
    "texts": ResonancePreTrainedModel,
}


@dataclass
class Learning:
    """What the Trainer needs."""

    model: PreTrainedModel
    processor: Any  # what makes inputs: saved beside the model
    train_set: Dataset[Any]
    eval_set: Dataset[Any]
    per_example: int = 1  # units an example, for the progress bar
    unit: str = "examples"
    collate: Callable[[list[Any]], dict[str, Any]] = field(default_factory=DefaultDataCollator)
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    labels: tuple[str, ...] = ("labels",)  # inputs that a batch has where a loss can be computed
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # random changes of a batch to train on
    lengths: Sequence[int] | None = None  # of the training examples, where batches are padded
    loss_unit: str = "nats"
    text: str = ""  # about the data, for people


class Task(ABC):
    """One thing to train a model for, in the order in which the training loop calls.

    Nothing is written before :meth:`initial` and :meth:`read` have returned.
    """

    name: ClassVar[str]
    data: ClassVar[str]  # what --data names, for people
    architecture: ClassVar[type[ResonancePreTrainedModel]]
    fields: ClassVar[Mapping[str, Any]] = {}  # of the configuration, unless a recipe is asked for
    width_and_depth: ClassVar[Mapping[str, int]] = {}  # unless a size is
    usual: ClassVar[Mapping[str, Any]] = {}  # arguments, where nobody says otherwise: docs/tasks.md has them all
    rate: ClassVar[float] = 1.0  # times that of the optimiser, of a new model
    last_rate: ClassVar[float] = 0.1  # of the highest, where the cosine ends
    batch_size: ClassVar[int] = 64
    metric: ClassVar[str] = "eval_loss"  # the one to name first
    changes: ClassVar[tuple[str, ...]] = ()  # of examples, that --augment may name
    predicts_classes: ClassVar[bool] = False  # one class, or one after the other: what --r-drop is for

    def __init__(self, arguments: TrainArguments, build: Build | None = None) -> None:
        self.given = arguments
        self.of_init = load_config(arguments.init) if arguments.init else None
        self.arguments = replace(arguments, **self._unsaid(arguments))
        self.build: Build = self.architecture if build is None else build

    def note(self, model: PreTrainedModel) -> str:
        """The random changes of what a model is trained on, for people, and which a missing package keeps away."""
        wanted = self.usual.get("augment", ()) if self.given.augment is None else self.given.augment
        known = [name for kind in getattr(model.config, "modalities", MODALITIES) for name in CHANGES[kind]]
        done = [name for name in wanted if name in known and name in (self.arguments.augment or ())]
        lacking = [name for name in wanted if name in known and name not in done]
        text = f", changed by {', '.join(done)}" if done else ""
        return text + (f" (not by {', '.join(lacking)}: pip install 'resonance-nn[images]')" if lacking else "")

    def _unsaid(self, a: TrainArguments) -> dict[str, Any]:
        """Of ``usual``, what the arguments leave open."""
        found = {name: value for name, value in self.usual.items() if getattr(a, name) is None and name not in a.config}
        taken = ("epochs",) if a.steps or a.tokens else ()
        if a.init or a.tokenizer:
            taken += ("vocab_size",)
        if self.of_init is not None and (self.of_init.architectures or [""])[0] == self.architecture.__name__:
            taken += tuple(a.training_fields())  # it goes on as it was trained
        if "augment" in found and importlib.util.find_spec("kornia") is None:
            found["augment"] = tuple(name for name in found["augment"] if name not in IMAGE_CHANGES)
        return {name: value for name, value in found.items() if name not in taken}

    def initial(self) -> ResonanceConfig:
        """Check what can be checked without data, and load what the run starts from; the configuration as far as it
        is known. Raises ValueError."""
        a = self.arguments
        check_changes(a.augment, self.changes, self.name)
        self.start = a.model_config(self.new_fields()) if self.of_init is None else a.changed(self.of_init)
        if a.init:
            self._check_inputs(a.init)
        else:
            refuse_unread(a.config, self.unread())
        if a.r_drop and not self.predicts_classes:
            raise ValueError(f"r_drop = {a.r_drop!r}: {self.name} has no classes to agree on; leave it out")
        if a.r_drop and not self.start.dropout:
            raise ValueError(
                f"r_drop = {a.r_drop!r}: both passes are the same without dropout; give --dropout 0.1, say"
            )
        return self.start

    def new_fields(self) -> dict[str, Any]:
        """Of a new model's configuration, where no argument says otherwise."""
        a = self.arguments
        return {**({} if a.recipe else self.fields), **({} if a.size else self.width_and_depth)}

    def unread(self) -> list[str]:
        """Which of the fields that were set no part of a new model reads, whatever modalities it has."""
        a, patch = self.arguments, self.arguments.config.get("patch_size", ResonanceConfig.patch_size)
        config = a.model_config(self.new_fields(), image_size=(8 * patch, 8 * patch))
        config.modalities = MODALITIES
        return unread_fields(self.architecture, config, a.config)

    def _check_inputs(self, init: str) -> None:
        """Raise ValueError where the model to start from is of other inputs, by the class that it names."""
        own = (self.start.architectures or [""])[0]
        kind: Any = getattr(models, own, None)
        needed = inputs_of(self.architecture)
        ours = isinstance(kind, type) and issubclass(kind, ResonancePreTrainedModel)
        if ours and inputs_of(kind) != needed:
            raise ValueError(f"init = {init!r}: is a {own}; go on from a model of {needed}")

    @abstractmethod
    def read(self) -> Any:
        """The data. Raises DataError."""

    @abstractmethod
    def write(self, examples: Any, folder: Path) -> dict[str, str]:
        """Write into ``folder`` what a resumed run must share, such as a tokenizer; fingerprints of the data."""

    @abstractmethod
    def fingerprints(self, examples: Any, folder: Path) -> dict[str, str]:
        """Those that :meth:`write` gave for the same data."""

    @abstractmethod
    def learning(self, examples: Any, folder: Path) -> Learning:
        """The model and its batches, from what :meth:`write` wrote."""

    def model_config(self, **facts: Any) -> ResonanceConfig:
        """That of the model to start from; else a new one's, with ``facts`` of the data where no argument says
        otherwise."""
        if self.arguments.init:
            return copy.deepcopy(self.start)
        return self.arguments.model_config(self.new_fields(), **facts)

    def new_model(self, config: ResonanceConfig) -> PreTrainedModel:
        """From the run's seed, or with the weights to start from. Raises ValueError where memory is too small."""
        set_seed(self.arguments.seed)
        if self.arguments.init:
            return load_weights(self.arguments.init, self.architecture, config)
        try:
            return self.build(config)
        except (MemoryError, RuntimeError) as error:
            raise ValueError(
                f"the model does not fit into memory ({str(error).splitlines()[0]}); take a smaller one"
            ) from error

    def summary(self, state: TrainerState, learning: Learning) -> dict[str, Any]:
        """Figures of a finished run."""
        return {**training_loss(state), **last_metrics(state)}


class ExamplesTask(Task):
    """A task whose data are examples: rows of tables, or files in folders."""

    @abstractmethod
    def find(self, path: str) -> list[Any]:
        """The examples of a table or folder. Raises DataError."""

    def row(self, example: Any) -> Mapping[str, Any]:
        """The row of the table that an example is from; empty of one from elsewhere."""
        return example

    def read(self) -> tuple[list[Any], list[Any]]:
        """The examples to train on and those held out: of ``eval_data``, of one value of a column, or 5%."""
        a = self.arguments
        found = self._found(a.data)
        if a.eval_data:
            return found, self._found(a.eval_data)
        if a.hold_out is None:
            return split_examples(found)
        column, _, value = a.hold_out.partition("=")
        chosen = [own == value for own in self._values(found, column)]
        held_out = [example for example, held in zip(found, chosen, strict=True) if held]
        train = [example for example, held in zip(found, chosen, strict=True) if not held]
        if not held_out or not train:
            raise DataError(f"hold_out = {a.hold_out!r}: {'no' if train else 'every'} example has this value")
        return train, held_out

    def values(self, column: str) -> list[str]:
        """What the examples have in a column of their tables, each once, sorted, numbers by value. Raises DataError."""
        return sorted_names(set(self._values(self._found(self.arguments.data), column)))

    def check_labels(self, train: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Raise DataError where held-out rows have a label that no training row has."""
        learned, asked = ([str(row.get("label")) for row in map(self.row, part)] for part in (train, held_out))
        if self.predicts_classes and "None" not in learned:
            label_names(learned, asked)

    def _found(self, paths: Iterable[str]) -> list[Any]:
        return [example for path in paths for example in self.find(path)]

    def _values(self, examples: Sequence[Any], column: str) -> list[str]:
        for number, row in enumerate(map(self.row, examples), 1):
            if column not in row:
                known = f"it has {', '.join(map(str, row))}" if row else "only tables have columns"
                raise DataError(f"hold_out = {column!r}: no column of example {number:,} of the data; {known}")
            if row[column] in (None, ""):
                raise DataError(f"hold_out = {column!r}: is empty in example {number:,} of the data")
        return [str(self.row(example)[column]) for example in examples]


def inputs_of(kind: type[ResonancePreTrainedModel]) -> str:
    """What a class of models reads."""
    return next(name for name, base in INPUTS.items() if issubclass(kind, base))


def training_loss(state: TrainerState) -> dict[str, float | None]:
    """The mean training loss of the last tenth of the steps."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    last = losses[-max(1, len(losses) // 10) :]
    return {"loss": sum(last) / len(last) if last else None}


def last_metrics(state: TrainerState) -> dict[str, float]:
    """The figures of the last evaluation, their names beginning with eval_."""
    measured = next((entry for entry in reversed(state.log_history) if "eval_loss" in entry), {})
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return {name: value for name, value in measured.items() if name.startswith("eval_") and name not in timing}


def check_files(paths: Iterable[str], read: Callable[[str], Any], *, progress: bool) -> None:
    """Read every file once: whatever is wrong with one is said before anything is trained. Raises DataError."""
    once = list(dict.fromkeys(paths))
    for path in tqdm(once, desc="checking", unit="file", delay=2, leave=False, disable=not progress):
        read(path)


def fingerprint(values: Any) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def split_examples(examples: Sequence[Any], share: float = 0.05, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """A random share held out, the same each time: of all examples, at least one.

    Raises:
        DataError: there are fewer than two.
    """
    if len(examples) < 2:
        raise DataError(f"{len(examples)} example: two or more are needed, one to train on and one held out")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = max(1, round(share * len(examples)))
    return [examples[i] for i in sorted(order[held_out:])], [examples[i] for i in sorted(order[:held_out])]


def name_labels(config: ResonanceConfig, labels: Sequence[str]) -> None:
    """Write the classes into a configuration."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}


def label_names(labels: Sequence[str], held_out: Sequence[str] = ()) -> list[str]:
    """The classes in the training data, sorted, numbers by value.

    Raises:
        DataError: there is only one, or the held-out data have one of their own.
    """
    found = set(labels)
    if len(found) < 2:
        raise DataError(f"the training data have one label, {min(found, default='none')!r}; two or more are needed")
    if new := set(held_out) - found:
        raise DataError(f"the held-out data have the label {min(new)!r}, which the training data do not have")
    return sorted_names(found)


def sorted_names(names: Iterable[str]) -> list[str]:
    """In order, by value if all are numbers."""
    found = list(names)
    numbers = all(name.lstrip("-").isdigit() for name in found)
    return sorted(found, key=(lambda name: (int(name), name)) if numbers else None)
