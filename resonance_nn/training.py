"""Training on ``transformers.Trainer``: arguments -> data -> model -> checkpoints -> a finished model.

output_dir/  data/           the tokenizer, the encoded corpus (tokenizer/, train/, eval/), and run.json: the arguments
                             and data that a resumed run must share
             checkpoint-N/   whole checkpoints; one being written is in .partial/ until it is renamed
             model, tokenizer, log.jsonl, loss.png and, last of all, train.json: a finished run
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Subset
from transformers import (
    DefaultDataCollator,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as hf_logging

from resonance_nn.arguments import FREE, OPTIMIZERS, TrainArguments
from resonance_nn.config import ResonanceConfig
from resonance_nn.data import (
    Document,
    Documents,
    PackedDataset,
    TokenStore,
    document_token_id,
    find_documents,
    read_texts,
    split_documents,
    tokenizer_vocab_size,
    train_tokenizer,
)
from resonance_nn.evaluation import finite, report, resolve_device, resolve_precision, row
from resonance_nn.loading import load_model, load_tokenizer
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.ops.fla_backend import check_backend
from resonance_nn.optim import build_optimizer
from resonance_nn.plots import plot_loss
from resonance_nn.progress import InterruptCallback, ProgressCallback, TrainingInterrupted
from resonance_nn.rundir import PARTIAL, RunFolder, write_errors

__all__ = ["TrainArguments", "TrainingInterrupted", "train"]

EVAL_TOKENS = 1 << 17  # of held-out text, at most, in one evaluation while training


def train(arguments: TrainArguments) -> dict[str, Any]:
    """Train a language model, or go on training one; the content of train.json.

    Raises:
        ValueError: arguments, data or the output folder cannot be used; nothing was written.
        TrainingInterrupted: Ctrl-C; a checkpoint was saved.
    """
    arguments.check()
    device = resolve_device(arguments.device)
    precision = resolve_precision(arguments.precision, device)
    model, tokenizer = _initial_model(arguments)
    check_backend(model.config.backend, device)
    trainer_arguments = _trainer_arguments(arguments, device, precision, model.config)
    folder = RunFolder(Path(arguments.output_dir))
    run = _run_settings(arguments, trainer_arguments, device, precision)
    if trainer_arguments.process_index == 0:
        folder.check(arguments.resume, arguments.overwrite, run)
    with trainer_arguments.main_process_first(desc="data"):
        if trainer_arguments.process_index == 0:
            documents = _documents(arguments)
            if arguments.resume:
                folder.check_data(documents)
            else:
                with folder.preparing() as partial:
                    run["data"] = _write_data(arguments, documents, tokenizer, partial / "data")
                    folder.begin(run)
    if arguments.resume and folder.is_finished():
        return folder.result()
    tokenizer = load_tokenizer(folder.data / "tokenizer")
    stores = [TokenStore.open(folder.data / part) for part in ("train", "eval")]
    train_set, eval_set = _windows(stores, arguments.seq_len)
    if not arguments.init:
        model = _new_model(arguments, tokenizer)
    steps = _set_steps(arguments, trainer_arguments, len(train_set))
    trainer = _Trainer(
        model=model,
        args=trainer_arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=DefaultDataCollator(),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    tokens_per_step = arguments.batch_size * arguments.accumulate * trainer_arguments.world_size * arguments.seq_len
    progress = ProgressCallback(tokens_per_step, enabled=arguments.progress and trainer_arguments.process_index == 0)
    interrupt = InterruptCallback(enabled=trainer_arguments.world_size == 1)
    trainer.add_callback(progress)
    trainer.add_callback(interrupt)
    trainer.keep, trainer.optimizer_name = arguments.keep, arguments.optimizer
    progress.say(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {steps:,} steps of "
        f"{tokens_per_step:,} tokens, {stores[0].num_tokens:,} tokens of text, {precision} on {device}"
    )
    checkpoint = folder.last_checkpoint()
    begin = time.perf_counter()
    with interrupt, progress, _no_progress_bars():
        trainer.run(checkpoint)
    if trainer.state.global_step < steps:
        raise TrainingInterrupted(trainer.state.global_step, steps)
    seconds = time.perf_counter() - begin
    summary = {
        **_losses(trainer.state, stores[1]),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": model.config.vocab_size,
        "seconds": seconds,
        "tokens_per_second": progress.tokens_per_second,
        "precision": precision,
        "device": device,
        "output_dir": str(folder.path),
    }
    measured = ("loss", "eval_loss", "eval_bits_per_byte_in_windows", "tokens_per_second")
    result = report("train", device, [row("train", name, summary[name]) for name in measured], summary)
    if trainer_arguments.process_index == 0:
        saving = write_errors(folder.path, "free some space and resume")
        with saving, folder.finishing(result) as partial, _no_progress_bars():
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            log = "".join(json.dumps(finite(entry), allow_nan=False) + "\n" for entry in trainer.state.log_history)
            (partial / "log.jsonl").write_text(log, encoding="utf-8")
            plot_loss(trainer.state.log_history, partial / "loss.png", folder.path.name)
    return result


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


class _Trainer(Trainer):
    """Weight decay on linear maps and embeddings only, and checkpoints that are whole or not there."""

    keep = 2
    optimizer_name = "adamw"
    _saving = False

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        if self.optimizer is None and self.optimizer_name == "muon":
            whole = self.model if model is None else model
            assert whole is not None
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = build_optimizer(whole, "muon", lr=rate, weight_decay=decay)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end from a checkpoint, which may be of the last step."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(self._get_output_dir(trial))
        self._saving = True
        try:
            with write_errors(output, "free some space and resume"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    partial = output / PARTIAL / f"checkpoint-{self.state.global_step}"
                    (partial / "training_args.bin").unlink()  # a pickle, which nobody should have to load
                    os.rename(partial, output / partial.name)
                    for old in RunFolder(output).checkpoints()[: -self.keep]:
                        os.rename(old, output / PARTIAL / old.name)
        finally:
            self._saving = False
            if self.args.should_save:
                shutil.rmtree(output / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _initial_model(arguments: TrainArguments) -> tuple[ResonanceForCausalLM, PreTrainedTokenizerBase | None]:
    """The model to start from, or the new one's shape on the meta device, which checks every field; its tokenizer."""
    if arguments.init:
        model, tokenizer = load_model(arguments.init, dtype=torch.float32)
        changes = {k: v for k, v in arguments.training_fields().items() if v is not None}
        ResonanceConfig(**{**model.config.to_dict(), **changes})  # checks them
        for name, value in changes.items():
            setattr(model.config, name, value)
        for block in model.model.backbone.blocks:
            block.dropout = model.config.dropout  # pyright: ignore[reportArgumentType]
        return model, tokenizer
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    with torch.device("meta"):
        return ResonanceForCausalLM(arguments.model_config()), tokenizer


def _new_model(arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> ResonanceForCausalLM:
    config = arguments.model_config()
    config.vocab_size = tokenizer_vocab_size(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
    config.pad_token_id = tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
    set_seed(arguments.seed)
    try:
        return ResonanceForCausalLM(config)
    except (MemoryError, RuntimeError) as error:
        raise ValueError(
            f"the model does not fit into memory ({str(error).splitlines()[0]}); take a smaller one"
        ) from error


def _trainer_arguments(
    arguments: TrainArguments, device: str, precision: str, config: ResonanceConfig
) -> TrainingArguments:
    lr = arguments.lr
    if lr is None:
        of_width_256 = OPTIMIZERS[arguments.optimizer]
        lr = of_width_256 * min(1.0, 256 / config.hidden_size) * (0.1 if arguments.init else 1.0)
    result = TrainingArguments(
        output_dir=str(arguments.output_dir),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        learning_rate=lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
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
        prediction_loss_only=True,
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


def _set_steps(arguments: TrainArguments, trainer_arguments: TrainingArguments, windows: int) -> int:
    """Turn the budget into steps, and what follows from their number."""
    a = arguments
    batch = a.batch_size * trainer_arguments.world_size
    if a.steps is not None:
        steps = a.steps
    elif a.tokens is not None:
        steps = math.ceil(a.tokens / (batch * a.accumulate * a.seq_len))
    else:
        steps = math.ceil((a.epochs or 1.0) * math.ceil(math.ceil(windows / batch) / a.accumulate))
    every = min(1000, max(1, steps // 10))
    trainer_arguments.max_steps = steps
    trainer_arguments.warmup_steps = round(a.warmup * steps) if a.warmup < 1 else int(a.warmup)
    trainer_arguments.save_steps = a.save_every or every
    trainer_arguments.eval_steps = a.eval_every or every
    trainer_arguments.logging_steps = max(1, min(10, steps // 100))
    return steps


def _run_settings(
    arguments: TrainArguments, trainer_arguments: TrainingArguments, device: str, precision: str
) -> dict[str, Any]:
    """What a resumed run must share with its beginning, as JSON."""
    settings = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name not in FREE}
    settings |= {"mixers": list(arguments.mixers) if arguments.mixers else None, "device": device}
    settings |= {"precision": precision, "lr": trainer_arguments.learning_rate}
    return {"settings": {**settings, "processes": trainer_arguments.world_size}}


def _documents(arguments: TrainArguments) -> Sequence[list[Document]]:
    """The documents to train on and those held out."""

    def find(specs: Sequence[str]) -> Documents:
        a = arguments
        found = find_documents(specs, text_field=a.text_field, binary=a.binary, leave_out=a.output_dir)
        if found.left_out and a.progress:
            print(found.summary(), file=sys.stderr)
        return found

    found = find(arguments.data)
    return [found, find(arguments.eval_data)] if arguments.eval_data else list(split_documents(found))


def _write_data(
    arguments: TrainArguments,
    documents: Sequence[list[Document]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> dict[str, str]:
    """Write tokenizer and token stores; their fingerprints."""
    if tokenizer is None:
        tokenizer = train_tokenizer(read_texts(documents[0]), arguments.vocab_size or 8192, progress=arguments.progress)
    document_token_id(tokenizer)
    with write_errors(folder):
        tokenizer.save_pretrained(folder / "tokenizer")
    stores = [
        TokenStore.build(part, tokenizer, folder / name, progress=arguments.progress)
        for part, name in zip(documents, ("train", "eval"), strict=True)
    ]
    _windows(stores, arguments.seq_len)
    return {name: store.fingerprint for store, name in zip(stores, ("train", "eval"), strict=True)}


def _windows(stores: list[TokenStore], seq_len: int) -> tuple[PackedDataset, Dataset[Any]]:
    """Training windows, and at most EVAL_TOKENS of held-out ones, spread evenly."""
    train_set = PackedDataset(stores[0], seq_len)
    eval_set = PackedDataset(stores[1], min(seq_len, stores[1].num_tokens))
    count = max(1, EVAL_TOKENS // seq_len)
    if len(eval_set) <= count:
        return train_set, eval_set
    return train_set, Subset(eval_set, [i * len(eval_set) // count for i in range(count)])


def _losses(state: TrainerState, held_out: TokenStore) -> dict[str, float | None]:
    """The last tenth's mean training loss and the last held-out loss. The latter is of separate windows, each from a
    fresh state; ``resonance eval`` carries the state and gives a lower, exact figure."""
    training = [entry["loss"] for entry in state.log_history if "loss" in entry]
    last = training[-max(1, len(training) // 10) :]
    eval_loss = next((entry["eval_loss"] for entry in reversed(state.log_history) if "eval_loss" in entry), None)
    bits = None if eval_loss is None else eval_loss / math.log(2) * held_out.num_tokens / held_out.num_bytes
    return {
        "loss": sum(last) / len(last) if last else None,
        "eval_loss": eval_loss,
        "eval_bits_per_byte_in_windows": bits,
    }
