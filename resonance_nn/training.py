"""Training on ``transformers.Trainer``: arguments -> data -> model -> checkpoints -> a finished model.

output_dir/  data/           the tokenizer, the encoded corpus (tokenizer/, train/, eval/), and run.json: the arguments
                             and data that a resumed run must share
             checkpoint-N/   whole checkpoints; one being written is in .partial/ until it is renamed
             model, tokenizer, log.jsonl, loss.png and, last of all, train.json: a finished run
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainingArguments
from transformers.utils import logging as hf_logging

from resonance_nn.arguments import FREE, OPTIMIZERS, TrainArguments
from resonance_nn.config import ResonanceConfig
from resonance_nn.data import DataError
from resonance_nn.evaluation import finite, report, resolve_device, resolve_precision, row
from resonance_nn.ops.fla_backend import check_backend
from resonance_nn.plots import plot_loss
from resonance_nn.progress import InterruptCallback, ProgressCallback, TrainingInterrupted
from resonance_nn.rundir import RunFolder, write_errors
from resonance_nn.tasks import TASKS, Build, Task
from resonance_nn.trainer import ResonanceTrainer

__all__ = ["TrainArguments", "TrainingInterrupted", "train"]


def train(arguments: TrainArguments, build: Build | None = None) -> dict[str, Any]:
    """Train a model, or go on training one; the content of train.json.

    ``build``: makes the model of a configuration, where it is not to be the task's own.

    Raises:
        ValueError: arguments, data or the output folder cannot be used; nothing was written.
        TrainingInterrupted: Ctrl-C; a checkpoint was saved.
    """
    arguments.check()
    if arguments.task not in TASKS:
        raise ValueError(f"task = {arguments.task!r}: must be one of {', '.join(TASKS)}")
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    task = TASKS[arguments.task](arguments, build)
    arguments, config = task.arguments, task.initial()
    check_backend(config.backend, device)
    batch_size = arguments.batch_size or task.batch_size
    trainer_arguments = _trainer_arguments(arguments, device, precision, config, batch_size, task)
    folder = RunFolder(Path(arguments.output_dir))
    run = _run_settings(task, trainer_arguments, device, precision, batch_size)
    main = trainer_arguments.process_index == 0
    if main:
        folder.check(arguments.resume, arguments.overwrite, run)
    with trainer_arguments.main_process_first(desc="data"):
        examples = task.read()
        if main and arguments.resume:
            _check_data(folder, task.fingerprints(examples, folder.data))
        elif main:
            with folder.preparing() as partial:
                (partial / "data").mkdir()
                run["data"] = task.write(examples, partial / "data")
                folder.begin(run)
    if arguments.resume and folder.is_finished():
        return folder.result()
    learning = task.learning(examples, folder.data)
    model = learning.model
    steps = _set_steps(arguments, trainer_arguments, batch_size, len(learning.train_set))  # type: ignore[arg-type]
    trainer_arguments.prediction_loss_only = learning.metrics is None
    trainer_arguments.label_names = list(learning.labels)
    trainer = ResonanceTrainer(
        model=model,
        args=trainer_arguments,
        train_dataset=learning.train_set,
        eval_dataset=learning.eval_set,
        data_collator=learning.collate,
        processing_class=learning.processor,
        compute_metrics=learning.metrics,
    )
    trainer.remove_callback(PrinterCallback)
    per_step = batch_size * arguments.accumulate * trainer_arguments.world_size * learning.per_example
    progress = ProgressCallback(per_step, learning.unit, enabled=arguments.progress and main)
    interrupt = InterruptCallback(enabled=trainer_arguments.world_size == 1)
    trainer.add_callback(progress)
    trainer.add_callback(interrupt)
    trainer.keep, trainer.optimizer_name, trainer.augment = arguments.keep, arguments.optimizer, learning.augment
    trainer.r_drop, trainer.lengths = arguments.r_drop, learning.lengths
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    progress.say(
        f"{parameters / 1e6:.2f}M parameters, {steps:,} steps of {per_step:,} {learning.unit}, {learning.text}, "
        f"{precision} on {device}{task.note(model)}"
    )
    checkpoint = folder.last_checkpoint()
    begin = time.perf_counter()
    with interrupt, progress, _no_progress_bars():
        trainer.run(checkpoint)
    if trainer.state.global_step < steps:
        raise TrainingInterrupted(trainer.state.global_step, steps)
    seconds = time.perf_counter() - begin
    figures = task.summary(trainer.state, learning)
    speed = f"{learning.unit}_per_second"
    summary = {
        **figures,
        "task": task.name,
        "steps": steps,
        learning.unit: steps * per_step,
        "parameters": parameters,
        "vocab_size": getattr(model.config, "vocab_size", None),
        "seconds": seconds,
        speed: progress.units_per_second,
        "precision": precision,
        "device": device,
        "output_dir": str(folder.path),
    }
    result = report("train", device, [row("train", name, summary[name]) for name in (*figures, speed)], summary)
    if main:
        saving = write_errors(folder.path, "free some space and resume")
        with saving, folder.finishing(result) as partial, _no_progress_bars():
            model.save_pretrained(partial)
            learning.processor.save_pretrained(partial)
            log = "".join(json.dumps(finite(entry), allow_nan=False) + "\n" for entry in trainer.state.log_history)
            (partial / "log.jsonl").write_text(log, encoding="utf-8")
            plot_loss(trainer.state.log_history, partial / "loss.png", folder.path.name, learning.loss_unit)
    return result


def _check_data(folder: RunFolder, found: dict[str, str]) -> None:
    """Refuse, by DataError, to resume on other data than the run began with."""
    began = folder.run()["data"]
    for name, value in found.items():
        if value != began[name]:
            raise DataError(
                f"resume: the {'training' if name == 'train' else 'held-out'} data is not what the run began with "
                "(other files, or changed ones); restore it, or --overwrite to start anew"
            )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws one for each file it saves."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _trainer_arguments(
    arguments: TrainArguments, device: str, precision: str, config: ResonanceConfig, batch_size: int, task: Task
) -> TrainingArguments:
    lr = arguments.lr
    if lr is None:
        of_width_256 = OPTIMIZERS[arguments.optimizer]
        lr = of_width_256 * min(1.0, 256 / config.hidden_size) * (0.1 if arguments.init else task.rate)
    result = TrainingArguments(
        output_dir=str(arguments.output_dir),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        learning_rate=lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": task.last_rate},
        weight_decay=arguments.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=arguments.clip,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=arguments.gradient_checkpointing,
        torch_compile=arguments.compile,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        use_cache=True,  # what the saved config says; the model keeps no cache in training
        seed=arguments.seed,
        data_seed=arguments.seed,
        use_cpu=device == "cpu",
        report_to=arguments.log_to,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
    )
    if result.n_gpu > 1:
        result._n_gpu = 1  # one device a process; torchrun takes more of them
    return result


def _set_steps(arguments: TrainArguments, trainer_arguments: TrainingArguments, batch_size: int, examples: int) -> int:
    """Turn the budget into steps, and what follows from their number."""
    a = arguments
    batch = batch_size * trainer_arguments.world_size
    if a.steps is not None:
        steps = a.steps
    elif a.tokens is not None:
        steps = math.ceil(a.tokens / (batch * a.accumulate * a.seq_len))
    else:
        steps = math.ceil((a.epochs or 1.0) * math.ceil(math.ceil(examples / batch) / a.accumulate))
    every = min(1000, max(1, steps // 10))
    trainer_arguments.max_steps = steps
    trainer_arguments.warmup_steps = round(a.warmup * steps) if a.warmup < 1 else int(a.warmup)
    trainer_arguments.save_steps = a.save_every or every
    trainer_arguments.eval_steps = a.eval_every or every
    trainer_arguments.logging_steps = max(1, min(10, steps // 100))
    return steps


def _run_settings(
    task: Task, trainer_arguments: TrainingArguments, device: str, precision: str, batch_size: int
) -> dict[str, Any]:
    """What a resumed run must share with its beginning, as JSON."""
    arguments = task.arguments
    settings = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name not in FREE}
    settings |= {"mixers": list(arguments.mixers) if arguments.mixers else None, "device": device}
    settings |= {"precision": precision, "lr": trainer_arguments.learning_rate}
    if task.usual:  # what it takes of its own, for the next version's may be another
        of_model = {} if arguments.init else task.new_fields()
        settings |= {"batch_size": batch_size, "last_rate": task.last_rate, "fields": of_model}
    return {"settings": {**settings, "processes": trainer_arguments.world_size}}
