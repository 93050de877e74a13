"""Runs that train: how they learn, and their folders. What a run depends on is kept as its run.json, and only the same
goes on with it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from resonance_nn.arguments import check_optimizer
from resonance_nn.config import ResonanceConfig
from resonance_nn.rundir import changed_settings

REVISION = 3  # raised when the same settings come to mean another model or other batches: older runs are left alone
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """How a run learns.

    The ``optimizer`` is one of ``resonance_nn.optim``, with weight decay on linear maps and embeddings only. The rate
    rises linearly over ``warmup`` steps, stays, and falls linearly to 0 over the last ``cooldown`` of the budget:
    ``steps``, or ``minutes`` of this machine, whichever ends first. With ``minutes`` the schedule follows the clock, so
    two runs are equal only if they are given ``steps`` alone. A run ends early when every watched cell has reached
    ``target`` in two evaluations in a row. An evaluation takes the tokens of 4 batches a cell, the last one, of every
    cell and on other sequences, those of 16; text takes what its task says.
    """

    lr: float = 1e-3
    optimizer: str = "adamw"
    seed: int = 0
    steps: int | None = None
    minutes: float | None = None
    tokens_per_batch: int = 4096
    warmup: int = 100
    cooldown: float = 0.2
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 100
    target: float = 0.995
    precision: str = "bf16"
    device: str = "cpu"

    def check(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        if self.steps is None and self.minutes is None:
            raise ValueError("steps = None and minutes = None: give one of them, or both")
        for name in ("lr", "steps", "minutes", "tokens_per_batch", "cooldown", "clip", "eval_every", "target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be > 0")
        for name in ("seed", "warmup", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must be ≥ 0")
        if self.cooldown > 1:
            raise ValueError(f"cooldown = {self.cooldown}: must be ≤ 1, the share of the budget with a falling rate")
        check_optimizer(self.optimizer)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision = {self.precision!r}: must be {' or '.join(PRECISIONS)}")

    def spent(self, step: int, seconds: float) -> float:
        """The share of the budget used after ``step`` steps and ``seconds`` seconds."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        return max(by_steps, 0.0 if self.minutes is None else seconds / (60 * self.minutes))

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of the step that follows ``step`` steps and ``seconds`` seconds."""
        left = 1 - min(1.0, self.spent(step, seconds))
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup), left / self.cooldown)


def fields_of(config: ResonanceConfig) -> dict[str, Any]:
    """The configuration of a run's model, as :func:`described` wants it under "config"."""
    return {name: getattr(config, name) for name in sorted(ResonanceConfig.own_fields())}


def described(settings: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """All that a run depends on, as its run.json keeps it."""
    return {**settings, "plan": asdict(plan), "revision": REVISION}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made if missing. Raises ValueError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            raise ValueError(f"output_dir: another process is at work in {str(folder)!r}; wait for it") from None
        yield


def prepare(folder: Path, runs: Mapping[str, dict[str, Any]], *, resume: bool, overwrite: bool) -> None:
    """Make the folders of runs, by name with what :func:`described` says of them, ready for :func:`learn` with
    ``resume``. Nothing is deleted before all of them are free.

    Raises:
        ValueError: there is a run already, and neither to resume nor to overwrite it was asked for, or both; the one to
            resume was begun with other settings; another process is at work on one to overwrite.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite: choose one")
    if overwrite:
        with ExitStack() as stack:
            for name in runs:
                stack.enter_context(locked(folder / name))
            for name in runs:
                clear(folder / name)
        return
    for name, settings in runs.items():
        if resume:
            check_settings(folder / name, settings)
        elif (folder / name / "run.json").is_file():
            raise ValueError(
                f"output_dir = {str(folder)!r}: already holds {name!r}; --resume keeps what is finished and goes on "
                "with the rest, --overwrite deletes it"
            )


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse, by ValueError, to go on with a run that was begun with other settings. A folder without a run will do; a
    field that a run was begun before counts as at its default."""
    if not (folder / "run.json").is_file():
        return
    try:
        old = _flat(_completed(json.loads((folder / "run.json").read_text(encoding="utf-8"))))
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'}: damaged ({error}); --overwrite to start anew") from error
    if changed := changed_settings(old, _flat(settings)):
        raise ValueError(f"resume: {str(folder)!r}: {changed}: give the arguments the run began with, or --overwrite")


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the defaults of the plan's and the configuration's fields that they lack."""
    made = dict(settings)
    if "plan" in settings:
        made["plan"] = {**asdict(Plan()), **settings["plan"]}
    if "config" in settings:
        known = {name: value for name, value in settings["config"].items() if name in ResonanceConfig.own_fields()}
        upgraded = fields_of(ResonanceConfig.from_dict(known))
        made["config"] = {**settings["config"], **json.loads(json.dumps(upgraded))}
    return made


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: v for value in settings.values() if isinstance(value, dict) for name, v in value.items()} | {
        name: value for name, value in settings.items() if not isinstance(value, dict)
    }


def clear(folder: Path) -> None:
    """Delete a run: the result first, so that an interrupted deletion leaves an unfinished run or none."""
    for name in ("result.json", "checkpoint.safetensors", "log.jsonl", "run.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "model", ignore_errors=True)
