"""``text-generation``: the next token of packed documents."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase, TrainerState

from resonance_nn.config import ResonanceConfig
from resonance_nn.data import (
    Document,
    Documents,
    FillInTheMiddle,
    PackedDataset,
    TokenStore,
    document_token_id,
    find_documents,
    read_texts,
    split_documents,
    tokenizer_vocab_size,
    train_tokenizer,
)
from resonance_nn.data.fim import Sentinels
from resonance_nn.data.text import documents_fingerprint
from resonance_nn.loading import load_tokenizer, load_weights, resolve_model
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.rundir import write_errors
from resonance_nn.tasks.base import Learning, Task, training_loss

EVAL_TOKENS = 1 << 17  # of held-out text, at most, in one evaluation while training


class LanguageModelling(Task):
    """Documents end to end, in windows of ``seq_len`` tokens."""

    name = "text-generation"
    data = "texts: files, folders, globs, stdlib, hub:org/name"
    batch_size = 8
    architecture = ResonanceForCausalLM

    def initial(self) -> ResonanceConfig:
        a, config = self.arguments, super().initial()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if a.init:
            load_weights(a.init, self.architecture, config)  # that they can be is checked before anything is written
            self.tokenizer = load_tokenizer(resolve_model(a.init))
        else:
            self.tokenizer = load_tokenizer(a.tokenizer) if a.tokenizer else None
            with torch.device("meta"):
                self.build(config)  # the shape alone: checks every field
        if a.fim and self.tokenizer is not None:
            Sentinels.of(self.tokenizer)
        return config

    def read(self) -> Sequence[list[Document]]:
        """The documents to train on and those held out."""
        a = self.arguments

        def find(specs: Sequence[str]) -> Documents:
            found = find_documents(specs, text_field=a.text_field, binary=a.binary, leave_out=a.output_dir)
            if found.left_out and a.progress:
                print(found.summary(), file=sys.stderr)
            return found

        found = find(a.data)
        return [found, find(a.eval_data)] if a.eval_data else list(split_documents(found))

    def write(self, examples: Sequence[list[Document]], folder: Path) -> dict[str, str]:
        """The tokenizer and the token stores."""
        a, tokenizer = self.arguments, self.tokenizer
        if tokenizer is None:
            tokenizer = train_tokenizer(read_texts(examples[0]), a.vocab_size or 8192, progress=a.progress)
        document_token_id(tokenizer)
        with write_errors(folder):
            tokenizer.save_pretrained(folder / "tokenizer")
        stores = [
            TokenStore.build(part, tokenizer, folder / name, fim=fim, progress=a.progress)
            for part, name, fim in zip(examples, ("train", "eval"), self._fim(), strict=True)
        ]
        _windows(stores, a.seq_len)
        return {name: store.fingerprint for store, name in zip(stores, ("train", "eval"), strict=True)}

    def fingerprints(self, examples: Sequence[list[Document]], folder: Path) -> dict[str, str]:
        tokenizer = load_tokenizer(folder / "tokenizer")
        parts = zip(("train", "eval"), examples, self._fim(), strict=True)
        return {name: documents_fingerprint(part, tokenizer, fim) for name, part, fim in parts}

    def _fim(self) -> tuple[FillInTheMiddle | None, None]:
        """Of the documents to train on; those held out stay as they are, so that losses can be compared."""
        a = self.arguments
        return (FillInTheMiddle(a.fim, a.seq_len, a.seed) if a.fim else None), None

    def learning(self, examples: Any, folder: Path) -> Learning:
        a = self.arguments
        tokenizer = load_tokenizer(folder / "tokenizer")
        self.stores = [TokenStore.open(folder / part) for part in ("train", "eval")]
        train_set, eval_set = _windows(self.stores, a.seq_len)
        text = f"{self.stores[0].num_tokens:,} tokens of text"
        config = self.model_config()
        if a.fim:
            config.fim_rate = a.fim
        if not a.init:
            config.vocab_size = tokenizer_vocab_size(tokenizer)
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id  # pyright: ignore[reportAttributeAccessIssue]
            config.pad_token_id = tokenizer.pad_token_id  # pyright: ignore[reportAttributeAccessIssue]
        model = self.new_model(config)
        return Learning(
            model,
            tokenizer,
            train_set,
            eval_set,
            per_example=a.seq_len,
            unit="tokens",
            loss_unit="nats a token",
            text=text,
        )

    def summary(self, state: TrainerState, learning: Learning) -> dict[str, float | None]:
        """The last held-out loss is of separate windows, each from a fresh state; ``resonance eval`` carries the state
        and gives a lower, exact figure."""
        held_out = self.stores[1]
        eval_loss = next((entry["eval_loss"] for entry in reversed(state.log_history) if "eval_loss" in entry), None)
        bits = None if eval_loss is None else eval_loss / math.log(2) * held_out.num_tokens / held_out.num_bytes
        return {**training_loss(state), "eval_loss": eval_loss, "eval_bits_per_byte_in_windows": bits}


def _windows(stores: list[TokenStore], seq_len: int) -> tuple[PackedDataset, Dataset[Any]]:
    """Training windows, and at most EVAL_TOKENS of held-out ones, spread evenly."""
    train_set = PackedDataset(stores[0], seq_len)
    eval_set = PackedDataset(stores[1], min(seq_len, stores[1].num_tokens))
    count = max(1, EVAL_TOKENS // seq_len)
    if len(eval_set) <= count:
        return train_set, eval_set
    return train_set, Subset(eval_set, [i * len(eval_set) // count for i in range(count)])
