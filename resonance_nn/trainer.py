"""transformers' Trainer with our optimizers, and checkpoints that are whole or not there."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerState

from resonance_nn.data.lengths import SimilarLengths
from resonance_nn.optim import build_optimizer
from resonance_nn.rundir import PARTIAL, RunFolder, write_errors


class ResonanceTrainer(Trainer):
    """Weight decay on linear maps and embeddings only, checkpoints that are whole or not there, batches of similar
    lengths where ``lengths`` has those of the training examples, and R-Drop.

    With ``r_drop`` α every batch is read twice, with dropouts p and q of its own, and the loss is

        (CE_p + CE_q)/2 + α/4 Σ (p − q)(log p − log q)        meant over the classes asked for

    which is half of that of Liang et al. 2021: their α is ours.
    """

    keep = 2
    optimizer_name = "adamw"
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # of a batch to train on, by torch's generator
    r_drop = 0.0
    lengths: Sequence[int] | None = None
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

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        a = self.args
        of_step = a.train_batch_size * a.gradient_accumulation_steps * a.world_size
        return SimilarLengths(self.lengths, of_step, a.seed)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.augment is not None:  # here, not in the loader, which is a batch ahead of a checkpoint's generator
            changed = self.augment(inputs)
            if num_items_in_batch is not None and changed.get("labels") is not inputs.get("labels"):
                before, after = ((batch["labels"] != -100).sum().clamp(min=1) for batch in (inputs, changed))
                num_items_in_batch = num_items_in_batch * after / before  # more targets weigh as much together
            inputs = changed
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self.r_drop or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        twice: dict[str, Any] = {name: torch.cat((value, value)) for name, value in inputs.items()}
        if "return_logits" in inspect.signature(self.accelerator.unwrap_model(model).forward).parameters:
            twice["return_logits"] = True
        number = None if num_items_in_batch is None else 2 * num_items_in_batch
        loss, outputs = super().compute_loss(model, twice, True, number)
        asked = inputs["labels"] != -100
        logits: Tensor = outputs.logits  # type: ignore[union-attr]
        divergence = disagreement(*(part[asked] for part in logits.chunk(2)))
        of_step = num_items_in_batch if self.model_accepts_loss_kwargs else None
        if of_step is not None and self.args.average_tokens_across_devices:  # of all processes, whose mean is taken
            divergence = divergence * self.accelerator.num_processes
        loss = loss + self.r_drop / 4 * divergence / (asked.sum() if of_step is None else of_step)
        return (loss, outputs) if return_outputs else loss

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


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """Σ (p − q)(log p − log q) of rows of logits (N, K): both Kullback–Leibler divergences, in float32."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (a, b))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
