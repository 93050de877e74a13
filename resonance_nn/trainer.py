"""transformers' Trainer with our optimizers, and checkpoints that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState

from resonance_nn.optim import build_optimizer
from resonance_nn.rundir import PARTIAL, RunFolder, write_errors


class ResonanceTrainer(Trainer):
    """Weight decay on linear maps and embeddings only, and checkpoints that are whole or not there."""

    keep = 2
    optimizer_name = "adamw"
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # of a batch to train on, by torch's generator
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self.augment is not None:  # here, not in the loader, which is a batch ahead of a checkpoint's generator
            changed = self.augment(inputs)
            if num_items_in_batch is not None and changed.get("labels") is not inputs.get("labels"):
                before, after = ((batch["labels"] != -100).sum() for batch in (inputs, changed))
                num_items_in_batch = num_items_in_batch * after / before  # of as many more targets, still the mean
            inputs = changed
        return super().training_step(model, inputs, num_items_in_batch)

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
