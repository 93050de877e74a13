"""The loop of the suites that train: one model learns one task, and the run can be resumed.

folder/  run.json                 the settings, which a resumed run must share
         log.jsonl                a line an evaluation: step, loss, accuracies, learning rate, seconds
         checkpoint.safetensors   weights, AdamW's moments and counters of an unfinished run, in one file
         model/                   what was learned, by save_pretrained
         result.json              last of all: a finished run

Every random choice of a step follows from the seed and the step's number. So models and learning rates see the same
batches in the same order, and a resumed run goes on exactly, without the state of any generator.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import Generator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from resonance_nn.bench.models import check_causal, count
from resonance_nn.bench.runs import PRECISIONS, Plan, check_settings, clear, described, locked
from resonance_nn.data.synthetic import Batch
from resonance_nn.evaluation import finite
from resonance_nn.files import atomic_path
from resonance_nn.optim import build_optimizer
from resonance_nn.progress import InterruptCallback, TrainingInterrupted
from resonance_nn.rundir import write_errors

TRAINING, WATCHED, FINAL = range(3)  # streams of random numbers that never meet
SAVE_SECONDS = 60.0
RESUME = "free some space and resume"


class Learnable(Protocol):
    """A task: what to train on, and named cells to measure. Random choices come from the generators passed in."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def cells(self) -> Mapping[str, Any]: ...

    @property
    def watched(self) -> Sequence[str]:
        """The cells measured while training."""
        ...

    def training_batch(self, rng: Generator, tokens: int, step: int) -> Batch:
        """About ``tokens`` tokens to learn from, of this step."""
        ...

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """What to minimise, and the part of it that is the task's, in nats."""
        ...

    def measure(self, model: Any, cell: str, rng: Generator, tokens: int) -> dict[str, float]:
        """Figures of the model at a cell, from about ``tokens`` tokens."""
        ...

    def reached(self, cells: Mapping[str, Mapping[str, float]], target: float) -> bool:
        """Whether the figures of the watched cells are good enough to stop."""
        ...


@dataclass
class Progress:
    """Where a run is, saved with it and shown while it goes on."""

    step: int = 0
    seconds: float = 0.0
    evaluating: float = 0.0  # of the seconds
    streak: int = 0  # evaluations in a row with every watched cell at the target
    loss_sum: float = 0.0  # since the last line of the log
    loss_count: int = 0


def learn(
    folder: Path,
    task: Learnable,
    build: Callable[[], PreTrainedModel],
    plan: Plan,
    settings: dict[str, Any],
    *,
    resume: bool = False,
    report: Callable[[float, dict[str, Any]], None] = lambda spent, line: None,
) -> dict[str, Any]:
    """Train a model, or go on training it; the content of result.json.

    Args:
        folder: of this run alone; made if missing.
        task: what to learn and what to measure.
        build: makes the model; called after the seed is set.
        plan: how to learn.
        settings: what else the run depends on, as JSON.
        resume: go on with the run in the folder, if there is one; a finished one is not repeated. Otherwise it is
            deleted.
        report: told after every step the share of the budget used and the last line of the log.

    Raises:
        ValueError: the folder holds a run with other settings, or another process is at work on it.
        TrainingInterrupted: Ctrl-C; a checkpoint was saved.
    """
    plan.check()
    settings = json.loads(json.dumps(described(settings, plan)))
    with locked(folder):
        if not resume:
            clear(folder)
        check_settings(folder, settings)
        if (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text(encoding="utf-8"))
        run = _Run(folder, task, build, plan)
        with write_errors(folder), atomic_path(folder / "run.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return run.learn(settings, report)


class _Run:
    def __init__(self, folder: Path, task: Learnable, build: Callable[[], PreTrainedModel], plan: Plan) -> None:
        self.folder, self.task, self.plan = folder, task, plan
        torch.manual_seed(plan.seed)
        self.model = build()
        nn.Module.to(self.model, plan.device).train()
        check_causal(self.model, task.vocab_size)
        self.named = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.model, plan.optimizer, lr=plan.lr, weight_decay=plan.weight_decay)
        self.progress = Progress()
        self.log: list[dict[str, Any]] = []
        self._load()

    def learn(self, settings: dict[str, Any], report: Callable[[float, dict[str, Any]], None]) -> dict[str, Any]:
        plan, progress = self.plan, self.progress
        before, begin, saved = progress.seconds, time.perf_counter(), time.perf_counter()
        stopped = None
        with InterruptCallback() as interrupt:
            while stopped is None:
                self._step(plan.rate(progress.step, progress.seconds))
                progress.seconds = before + time.perf_counter() - begin
                spent = plan.spent(progress.step, progress.seconds)
                if progress.step % plan.eval_every == 0 or spent >= 1:
                    self._evaluate()
                    progress.evaluating -= progress.seconds
                    progress.seconds = before + time.perf_counter() - begin
                    progress.evaluating += progress.seconds
                    if self.log[-1]["loss"] is None:  # not finite
                        stopped = "diverged"
                    elif progress.streak == 2:
                        stopped = "reached"
                    elif spent >= 1:
                        stopped = "budget"
                report(min(1.0, spent), self.log[-1] if self.log else {})
                if stopped is None and (interrupt.requested or time.perf_counter() - saved > SAVE_SECONDS):
                    self._save()
                    saved = time.perf_counter()
                    if interrupt.requested:
                        raise TrainingInterrupted(progress.step, plan.steps or progress.step)
        assert stopped is not None
        return self._finish(settings, stopped)

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.plan.precision]
        return torch.autocast(torch.device(self.plan.device).type, dtype=dtype, enabled=dtype != torch.float32)

    def _step(self, rate: float) -> None:
        plan, progress = self.plan, self.progress
        sequence = np.random.SeedSequence([TRAINING, plan.seed, progress.step])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))  # for models that draw noise
        ids, targets = self.task.training_batch(np.random.default_rng(sequence), plan.tokens_per_batch, progress.step)
        with self._autocast():
            objective, loss = self.task.loss(self.model, Batch(ids.to(plan.device), targets.to(plan.device)))
        objective.backward()
        nn.utils.clip_grad_norm_(self.named.values(), plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.loss_sum += loss.item()
        progress.loss_count += 1

    def _measure(self, cell: str, stream: int, tokens: int) -> dict[str, float]:
        """With random numbers that are the same for every model, learning rate and seed."""
        rng = np.random.default_rng([stream, list(self.task.cells).index(cell)])
        with self._autocast():
            return self.task.measure(self.model, cell, rng, tokens)

    def _evaluate(self) -> None:
        plan, progress = self.plan, self.progress
        cells = {cell: self._measure(cell, WATCHED, 4 * plan.tokens_per_batch) for cell in self.task.watched}
        progress.streak = progress.streak + 1 if self.task.reached(cells, plan.target) else 0
        line = {
            "step": progress.step,
            "loss": progress.loss_sum / max(1, progress.loss_count),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(progress.seconds, 3),
            "training_seconds": round(progress.seconds - progress.evaluating, 3),
            "cells": {cell: finite(figures) for cell, figures in cells.items()},
        }
        progress.loss_sum, progress.loss_count = 0.0, 0
        self.log.append(finite(line))
        with write_errors(self.folder, RESUME), (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.log[-1], allow_nan=False) + "\n")

    def _finish(self, settings: dict[str, Any], stopped: str) -> dict[str, Any]:
        self.model.eval()
        result = {
            "settings": settings,
            "parameters": count(self.model),
            "steps": self.progress.step,
            "tokens": self.progress.step * self.plan.tokens_per_batch,
            "seconds": self.progress.seconds,
            "training_seconds": self.progress.seconds - self.progress.evaluating,
            "stopped": stopped,
            "cells": {
                cell: finite(self._measure(cell, FINAL, 16 * self.plan.tokens_per_batch)) for cell in self.task.cells
            },
            "curve": self.log,
        }
        with write_errors(self.folder, RESUME):
            self.model.save_pretrained(self.folder / "model")
            with atomic_path(self.folder / "result.json") as temporary:
                temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return result

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, p in self.named.items():
            tensors[f"model.{name}"] = p.detach()
            tensors |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[p].items()}
        with write_errors(self.folder, RESUME), atomic_path(self.folder / "checkpoint.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(self.progress))})

    def _load(self) -> None:
        """The last checkpoint, and the log up to it; nothing where there is none."""
        path = self.folder / "checkpoint.safetensors"
        lines: list[str] = []
        if path.is_file():
            with safe_open(path, framework="pt", device=self.plan.device) as file, torch.no_grad():
                self.progress = Progress(**json.loads(file.metadata()["progress"]))
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    kind, _, name = key.partition(".")
                    if kind == "model":
                        self.named[name].copy_(file.get_tensor(key))
                    else:
                        field, _, name = name.partition(".")
                        self.optimizer.state[self.named[name]][field] = file.get_tensor(key)
            lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if self.progress.step else []
        for text in lines:
            try:
                line = json.loads(text)
            except ValueError:  # cut short by a kill
                break
            if line["step"] <= self.progress.step:
                self.log.append(line)
        with write_errors(self.folder, RESUME), atomic_path(self.folder / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.log), encoding="utf-8")
