"""What a training run is told: one dataclass, checked before any file is read."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resonance_nn.config import ResonanceConfig
from resonance_nn.data import SPECIAL_TOKENS
from resonance_nn.data.fim import SMALLEST_WINDOW

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
SET_BY_THE_RUN = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("format_version", "use_cache", "fim_rate"),
)
OPTIMIZERS = {"muon": 6e-3, "adamw": 3e-3}  # and the rate each does well with at a width of 256
LOGGERS = ("none", "tensorboard", "trackio", "wandb")
DOCUMENT_TASKS = ("text-generation", "fill-mask")  # the others read tables, or folders
# What may differ between a run and its resumption. Data is compared by what is in it.
FREE = ("data", "eval_data", "output_dir", "resume", "overwrite", "keep", "save_every", "log_to", "progress")


@dataclass
class TrainArguments:
    """What ``resonance train`` takes. Every None is derived, as its comment says.

    One of ``steps``, ``epochs`` and ``tokens`` is the budget; without any, the task's epochs, else one.
    """

    data: Sequence[str]  # files, folders, globs, "stdlib", "hub:org/name"
    output_dir: str | os.PathLike[str]
    task: str = "text-generation"  # of resonance_nn.tasks.TASKS
    eval_data: Sequence[str] = ()  # empty: the last 5% of the documents
    hold_out: str | None = None  # COLUMN=VALUE of the tables: the rows to hold out
    text_field: str = "text"  # of JSONL
    binary: bool = False

    size: str | None = None  # None: the task's width and depth, else "tiny"
    recipe: str | None = None  # of resonance_nn.config.RECIPES; None: "default"
    mixers: Sequence[str] | None = None  # None: the config's default
    vocab_size: int | None = None  # of the tokenizer to train; None: the task's, else 8192
    tokenizer: str | None = None  # a folder with a tokenizer to use instead
    init: str | None = None  # a model to go on from
    config: dict[str, Any] = field(default_factory=dict)  # further fields of ResonanceConfig
    dropout: float | None = None  # None: the task's, of init's the model's if of this task; so are the next two
    label_smoothing: float | None = None
    z_loss: float | None = None
    fim: float = 0.0  # share of the training documents to learn to fill in the middle of; text-generation only

    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    seq_len: int = 512
    batch_size: int | None = None  # windows or examples a process in one forward pass; None: the task's
    accumulate: int = 1  # forward passes a step
    lr: float | None = None  # None: 6e-3 of muon, 3e-3 of adamw, · 256 / width if less, · the task's, or 0.1 with init
    warmup: float = 0.05  # below 1 a share of the steps, else steps
    optimizer: str = "muon"  # or "adamw", see resonance_nn.optim
    weight_decay: float = 0.1
    clip: float = 1.0  # 0 turns it off
    r_drop: float = 0.0  # how much two passes with different dropout are to agree, see resonance_nn.trainer
    augment: Sequence[str] | None = None  # what to change training examples by at random; None: the task's
    precision: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0

    save_every: int | None = None  # None: ten times a run, at least every 1000 steps; so is eval_every
    keep: int = 2
    eval_every: int | None = None
    log_to: str = "none"
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def check(self) -> None:
        """Refuse what cannot work, before any file is read.

        Raises:
            ValueError: naming the argument, its value, what is allowed and the likely fix.
        """

        def refuse(name: str, allowed: str) -> None:
            raise ValueError(f"{name} = {getattr(self, name)!r}: must be {allowed}")

        if not self.data or isinstance(self.data, str):
            refuse("data", "one or more files, folders, globs, stdlib or hub:org/name")
        for name in ("output_dir", "init", "tokenizer"):
            if getattr(self, name) is not None and not str(getattr(self, name)):
                refuse(name, "a name, not an empty one")
        if self.init is not None and os.path.realpath(self.init) == os.path.realpath(self.output_dir):
            raise ValueError(f"init and output_dir are both {self.init!r}: write to another folder")
        if self.vocab_size is not None and self.vocab_size < SMALLEST_VOCABULARY:
            refuse("vocab_size", f"≥ {SMALLEST_VOCABULARY}, the 256 bytes and the special tokens; 8192 is usual")
        for name in self.config:
            if name not in ResonanceConfig.__annotations__ or name in SET_BY_THE_RUN:
                raise ValueError(f"config: {name!r} is not a field that can be set; see --help and ResonanceConfig")
        for name, minimum in (("seq_len", 2), ("accumulate", 1), ("keep", 1)):
            if getattr(self, name) < minimum:
                refuse(name, f"≥ {minimum}")
        for name in ("steps", "tokens", "save_every", "eval_every", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                refuse(name, "≥ 1")
        for name in ("lr", "epochs"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                refuse(name, "> 0 and finite")
        for name, most in (("steps", 10**9), ("epochs", 10**6), ("tokens", 10**15)):
            if (getattr(self, name) or 0) > most:
                refuse(name, f"≤ {most:,}")
        for name in ("warmup", "weight_decay", "clip", "r_drop"):
            if not 0 <= getattr(self, name) < math.inf:
                refuse(name, "≥ 0 and finite")
        if not 0 <= self.fim <= 1:
            refuse("fim", "a share of the documents, from 0 to 1; 0.5 is usual")
        if self.fim and self.task != "text-generation":
            raise ValueError(f"fim = {self.fim!r}: is for text-generation, not {self.task}; leave it out")
        if self.hold_out is not None:
            if not self.hold_out.partition("=")[0] or "=" not in self.hold_out:
                refuse("hold_out", "COLUMN=VALUE of the rows to hold out, such as speaker=ann")
            if self.eval_data:
                raise ValueError("hold_out and eval_data: each says what is held out; give one")
            if self.task in DOCUMENT_TASKS:
                raise ValueError(f"hold_out = {self.hold_out!r}: is of tables, and {self.task} reads none")
        if self.fim and self.seq_len < SMALLEST_WINDOW:
            refuse("seq_len", f"≥ {SMALLEST_WINDOW} with fim: a window holds what is around a middle too")
        if not 0 <= self.seed < 1 << 32:
            refuse("seed", "from 0 to 2^32 - 1")
        check_optimizer(self.optimizer)
        budgets = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)}: the budget is only one of steps, epochs and tokens")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite: one goes on with a run, the other starts anew; give one")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("tokenizer and vocab_size: a given tokenizer has its size; leave vocab_size out")
        if self.init:
            given = [n for n in ("size", "recipe", "mixers", "vocab_size", "tokenizer", "config") if getattr(self, n)]
            if given:
                raise ValueError(f"init and {', '.join(given)}: the model brings its own; leave {given[0]} out")
        if self.log_to not in LOGGERS:
            refuse("log_to", f"one of {', '.join(LOGGERS)}")
        if self.log_to != "none" and importlib.util.find_spec(self.log_to) is None:
            raise ValueError(
                f"log_to = {self.log_to!r}: the package is not installed; pip install 'resonance-nn[track]'"
            )

    def model_config(self, fields: Mapping[str, Any] | None = None, **facts: Any) -> ResonanceConfig:
        """The configuration of a new model, its vocabulary as wished for. ``fields`` of the task and ``facts`` of the
        data hold where no argument says otherwise."""
        given = {"mixers": self.mixers and tuple(self.mixers), **self.training_fields()}
        twice = [name for name in self.config if given.get(name) is not None or name == "vocab_size"]
        if twice:
            raise ValueError(f"config: {twice[0]} has an argument of its own; use that")
        given = {name: value for name, value in given.items() if value is not None}
        return ResonanceConfig.from_size(
            self.size or "tiny",
            recipe=self.recipe or "default",
            vocab_size=8192 if self.vocab_size is None else self.vocab_size,
            **{**facts, **dict(fields or {}), **given, **self.config},
        )

    def changed(self, config: ResonanceConfig) -> ResonanceConfig:
        """That of the model to start from, with the fields that change how it is trained. Raises ValueError."""
        changes = {name: value for name, value in self.training_fields().items() if value is not None}
        ResonanceConfig(**{**config.to_dict(), **changes})  # checks them
        for name, value in changes.items():
            setattr(config, name, value)
        return config

    def training_fields(self) -> dict[str, float | None]:
        """Fields of the config that change how a model is trained, and not the model."""
        return {
            "dropout": self.dropout,
            "label_smoothing": self.label_smoothing,
            "z_loss_weight": self.z_loss,
        }


def check_optimizer(name: str) -> None:
    """Raise ValueError if ``resonance_nn.optim`` has none of this name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer = {name!r}: must be {' or '.join(OPTIMIZERS)}")
