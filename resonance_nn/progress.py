"""What a person at a terminal sees of a training run, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LINE_SECONDS = 10.0  # between two lines where there is no terminal


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped the training after ``step`` of ``steps``; a checkpoint of that step was saved."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped after step {step:,} of {steps:,}; a checkpoint was saved")
        self.step, self.steps = step, steps


class InterruptCallback(TrainerCallback):
    """As a context: the first SIGINT ends the training after the current step with a checkpoint, a second at once.

    Does nothing in a thread, and in a run of several processes, which would not stop at the same step.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> InterruptCallback:
        if self.enabled:
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\ninterrupted: saving after this step (Ctrl-C again to abort at once)", file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True


class ProgressCallback(TrainerCallback):
    """A bar on a terminal, otherwise a line now and then: step, losses, tokens or examples a second, time left."""

    def __init__(self, per_step: int, unit: str = "tokens", enabled: bool = True) -> None:
        self.per_step, self.unit = per_step, unit
        self.enabled = enabled
        self.terminal = sys.stderr.isatty()
        self.steps = 0
        self.seconds = 0.0  # inside steps, not in evaluation and saving
        self._fields: dict[str, str] = {}
        self._bar: tqdm | None = None
        self._begin = self._last_line = 0.0

    @property
    def units_per_second(self) -> float | None:
        return self.steps * self.per_step / self.seconds if self.seconds else None

    def say(self, text: str) -> None:
        """A line on standard error."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> ProgressCallback:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.enabled and state.global_step:
            self.say(f"resuming after step {state.global_step:,}")
        if self.enabled and self.terminal:
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, bar_format=form, dynamic_ncols=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps += 1
        self.seconds += time.perf_counter() - self._begin
        if self._bar is not None:
            self._bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if not self.enabled or not ("loss" in logs or "eval_loss" in logs):
            return
        for name, label, form in (
            ("loss", "loss", ".3f"),
            ("learning_rate", "lr", ".1e"),
            ("eval_loss", "held out", ".3f"),
        ):
            if name in logs:
                self._fields[label] = format(logs[name], form)
        if self.units_per_second is not None:
            self._fields["tok/s" if self.unit == "tokens" else f"{self.unit}/s"] = f"{self.units_per_second:,.0f}"
        if self._bar is not None:
            self._bar.set_postfix(self._fields)
            return
        now = time.monotonic()
        if "eval_loss" in logs or now - self._last_line >= LINE_SECONDS or state.global_step == state.max_steps:
            self._last_line = now
            left = self.seconds / max(self.steps, 1) * (state.max_steps - state.global_step)
            text = "  ".join(f"{name} {value}" for name, value in self._fields.items())
            self.say(f"step {state.global_step:,}/{state.max_steps:,}  {text}  {tqdm.format_interval(left)} left")
