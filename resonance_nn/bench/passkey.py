"""Passkeys and needles: what a model still knows of a sentence after up to hundreds of thousands of tokens of text."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resonance_nn.bench.accelerated import accelerated_delta_rule
from resonance_nn.bench.common import Row, figure, result
from resonance_nn.bench.learning import learn
from resonance_nn.bench.quality import build
from resonance_nn.bench.quality_options import OURS, Budget, Case, QualityOptions
from resonance_nn.bench.runs import Plan, described, prepare
from resonance_nn.bench.tasks import answer_loss, answers
from resonance_nn.bench.text import text_task, text_tokenizer
from resonance_nn.bench.zero_shot import Measurement, figures
from resonance_nn.data import Documents, encode_bytes, find_documents
from resonance_nn.data.synthetic import IGNORE, Batch
from resonance_nn.evaluation import resolve_device, row, wilson

DIGITS = 5  # of a key
NAMES = string.ascii_uppercase
TOKENS_AT_ONCE = 1 << 14  # of a forward pass in evaluation, or one sequence
FILLERS = ("sentences", "text")
SENTENCES = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class Passkeys:
    """Sequences of filler with sentences that tell keys of five digits, and a question at the end (Mohtashami & Jaggi
    2023). With one needle it is "the pass key"; with more each has a letter for a name, and one is asked for.

        … The pass key of B is 52901. Remember it. … filler … What is the pass key of B? The pass key of B is 52901

    Every digit is a token. A digit is asked for after those before it; the sequence ends before the last one.
    ``filler`` are token ids, read from any place on and over again where they end.
    """

    tokenizer: PreTrainedTokenizerBase
    filler: np.ndarray
    length: int
    needles: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= len(NAMES):
            raise ValueError(f"needles = {self.needles}: must be in 1 … {len(NAMES)}, a letter each")
        shortest = max(self.needles * len(a) + len(b) for a, b in (self.parts(name, [0] * DIGITS) for name in NAMES))
        if self.length < shortest:
            raise ValueError(
                f"train_lengths or lengths: {self.length} is too short, as the sentences take up to {shortest} tokens; "
                "give longer ones, fewer needles or a larger vocab_size"
            )

    @cached_property
    def digits(self) -> list[int]:
        """The tokens of 0 … 9."""
        return [encode_bytes(self.tokenizer, str(digit).encode())[0] for digit in range(10)]

    def parts(self, name: str, digits: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of a needle, and those of the question up to the last digit but one."""
        of = "" if self.needles == 1 else f" of {name}"
        key = [self.digits[digit] for digit in digits]
        tell, end = (
            encode_bytes(self.tokenizer, text) for text in (f"\nThe pass key{of} is ".encode(), b". Remember it.\n")
        )
        ask = encode_bytes(self.tokenizer, f"\nWhat is the pass key{of}? The pass key{of} is ".encode())
        return [*tell, *key, *end], [*ask, *key[:-1]]

    def draw(self, rng: Generator, sequences: int, depth: float | None = None) -> Batch:
        """``depth`` is where the needle that is asked for stands, as a share of the filler; None is anywhere."""
        drawn = [self._one(rng, depth) for _ in range(sequences)]
        return Batch(*(torch.from_numpy(np.stack(each)) for each in zip(*drawn, strict=True)))

    def _one(self, rng: Generator, depth: float | None) -> tuple[np.ndarray, np.ndarray]:
        names = rng.permutation(list(NAMES))[: self.needles]
        keys = rng.integers(10, size=(self.needles, DIGITS))
        parts = [self.parts(str(name), list(key)) for name, key in zip(names, keys, strict=True)]
        question = parts[0][1]  # the first is asked for
        room = self.length - sum(len(needle) for needle, _ in parts) - len(question)
        at = rng.integers(room + 1, size=self.needles)
        if depth is not None:
            at[0] = round(depth * room)
        start = rng.integers(len(self.filler))
        text = np.take(self.filler, np.arange(start, start + room), mode="wrap").astype(np.int64)
        pieces, last = [], 0
        for i in np.argsort(at, kind="stable"):
            pieces += [text[last : at[i]], parts[i][0]]
            last = at[i]
        ids = np.concatenate([*pieces, text[last:], question]).astype(np.int64)
        targets = np.full(self.length, IGNORE)
        targets[-DIGITS:] = [self.digits[digit] for digit in keys[0]]
        return ids, targets


@dataclass(frozen=True)
class PasskeyTask:
    """Trained at the lengths of ``train``: short ones show the task first, long ones then ask for it to hold. Batches
    of one length are drawn with shares ∝ 1/length in the first of ``steps`` steps, ∝ length in the last, and
    ∝ length^(2·step/steps − 1) between. The longest is watched."""

    train: tuple[Passkeys, ...]
    watch: Passkeys
    vocab_size: int
    sequences: int
    steps: int

    @property
    def cells(self) -> Mapping[str, Passkeys]:
        return {str(self.watch.length): self.watch}

    @property
    def watched(self) -> Sequence[str]:
        return list(self.cells)

    def training_batch(self, rng: Generator, tokens: int, step: int) -> Batch:
        shares = np.array([one.length ** (2 * step / self.steps - 1) for one in self.train])
        one = self.train[rng.choice(len(self.train), p=shares / shares.sum())]
        return one.draw(rng, max(1, tokens // one.length))

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return answer_loss(model, batch)

    def measure(self, model: Any, cell: str, rng: Generator, tokens: int) -> dict[str, float]:
        found = which_are_found(model, self.cells[cell], self.sequences, rng)
        return {"accuracy": sum(found) / len(found)}

    def reached(self, cells: Mapping[str, Mapping[str, float]], target: float) -> bool:
        return all(figures["accuracy"] >= target for figures in cells.values())


@torch.no_grad()
def which_are_found(model: Any, task: Passkeys, sequences: int, rng: Generator) -> list[bool]:
    """Of keys at depths spread evenly, from the first token to the last, those with all digits right."""
    training = model.training
    model.eval()
    found: list[bool] = []
    depths, rows = np.linspace(0, 1, sequences), max(1, TOKENS_AT_ONCE // task.length)
    for some in np.split(depths, range(rows, sequences, rows)):
        parts = [task.draw(rng, 1, float(depth)) for depth in some]
        batch = Batch(*(torch.cat(each).to(model.device) for each in zip(*parts, strict=True)))
        logits, targets, _ = answers(model, batch)
        found += (logits.argmax(-1) == targets).view(-1, DIGITS).all(1).tolist()
    model.train(training)
    return found


@dataclass(frozen=True)
class PasskeyOptions:
    """What to train, at which lengths, and where to ask. ``fields`` are of our configuration."""

    models: tuple[str, ...] = ("memory",)
    data: tuple[str, ...] = ("stdlib",)
    filler: str = "sentences"
    output_dir: Path = Path("runs/bench-passkey")
    train_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    lengths: tuple[int, ...] = (4096, 16_384, 65_536, 262_144)
    peer_max_length: int = 16_384
    needles: int = 1
    sequences: int = 40
    hidden_size: int = 128
    layers: int = 2
    vocab_size: int = 2048
    plan: Plan = field(default_factory=lambda: Plan(lr=3e-3, steps=1200, target=2.0))
    fields: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name in ("train_lengths", "lengths"):
            values = list(getattr(self, name))
            if not values or sorted(set(values)) != values:
                raise ValueError(f"{name} = {values}: must be ascending, each once")
        if self.filler not in FILLERS:
            raise ValueError(f"filler = {self.filler!r}: must be {' or '.join(FILLERS)}")
        if self.sequences < 2:
            raise ValueError(f"sequences = {self.sequences}: must be ≥ 2")
        self.plan.check()
        self.quality().check()

    def quality(self) -> QualityOptions:
        """What builds the models: ours as wide and deep as said, peers of equal size."""
        lengths = (max(*self.train_lengths, self.peer_max_length),)
        budget = Budget(self.hidden_size, self.layers, self.vocab_size, tokens=1, lengths=lengths, seeds=1)
        return QualityOptions(self.models, budget, self.data, lrs=(self.plan.lr,), plan=self.plan, fields=self.fields)


def run(
    options: PasskeyOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, Trained, float, Mapping[str, Any]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train what is missing in ``output_dir``; what is written as JSON.

    Raises:
        ValueError: as :meth:`PasskeyOptions.check`; a folder with runs and neither flag, or with other ones.
    """
    options.check()
    plan, folder = options.plan, options.output_dir
    documents = find_documents(list(options.data), leave_out=folder)
    tokenizer = text_tokenizer(documents, options.vocab_size)
    train, held_out, source = _fillers(options, documents, tokenizer)

    def passkeys(length: int, filler: np.ndarray) -> Passkeys:
        return Passkeys(tokenizer, filler, length, options.needles)

    trained = tuple(passkeys(length, train) for length in options.train_lengths)
    watch = passkeys(options.train_lengths[-1], held_out)
    task = PasskeyTask(trained, watch, options.vocab_size, options.sequences, plan.steps or 1)
    asked = [_asked(passkeys(length, held_out), source, options.sequences) for length in options.lengths]
    cases = [Trained(model, plan.lr, plan.seed) for model in options.models]
    settings = {case: _settings(options, case) for case in cases}
    prepare(folder, {c.model: described(settings[c], plan) for c in cases}, resume=resume, overwrite=overwrite)
    made: list[Row] = []
    with accelerated_delta_rule():
        for i, case in enumerate(cases):
            outcome = learn(
                folder / case.model,
                task,
                partial(case.build, options),
                plan,
                settings[case],
                resume=True,
                report=lambda spent, line, i=i, case=case: progress(i, len(cases), case, spent, line),
            )
            longest = math.inf if case.model in OURS else options.peer_max_length
            wanted = [one for one, length in zip(asked, options.lengths, strict=True) if length <= longest]
            found = figures(folder / case.model, partial(case.build, options), wanted, 0, plan)
            made += [_row(case.model, int(length), which, outcome) for length, which in found.items()]
    return result("passkey", made, resolve_device(plan.device), options={**asdict(options), "output_dir": str(folder)})


@dataclass(frozen=True)
class Trained:
    """One run."""

    model: str
    lr: float
    seed: int

    @property
    def title(self) -> str:
        return f"{self.model}, rate {self.lr:g}, seed {self.seed}"

    def build(self, options: PasskeyOptions) -> PreTrainedModel:
        """The model, from the global seed."""
        quality = options.quality()
        return build(quality, Case(quality.budget.lengths[0], self.model, self.lr, self.seed))


def _fillers(
    options: PasskeyOptions, documents: Documents, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray, str]:
    """The tokens around needles in training and held-out sequences, and what tells the latter from others."""
    if options.filler == "sentences":
        tokens = np.array(encode_bytes(tokenizer, SENTENCES.encode()))
        return tokens, tokens, f"sentences {tokens.tolist()}"
    text = text_task(documents, options.output_dir / "data", 2, options.vocab_size, tokenizer)
    return np.asarray(text.train.tokens), np.asarray(text.held_out.tokens), text.held_out.fingerprint


def _asked(task: Passkeys, source: str, sequences: int) -> Measurement:
    key = f"{source} {task.length} {task.needles} {sequences}"
    return Measurement(
        str(task.length), key, lambda model, _: which_are_found(model, task, sequences, np.random.default_rng(1))
    )


def _settings(options: PasskeyOptions, case: Trained) -> dict[str, Any]:
    """What a run depends on beside its plan."""
    names = ("data", "filler", "train_lengths", "peer_max_length", "needles", "sequences", "hidden_size", "layers")
    chosen = {name: getattr(options, name) for name in names}
    return {**chosen, "model": case.model, "vocab_size": options.vocab_size, "fields": dict(options.fields)}


def _row(model: str, length: int, found: Sequence[bool], outcome: Mapping[str, Any]) -> Row:
    """The share of keys found, its 95% interval (Wilson), and which were."""
    low, high = wilson(sum(found), len(found))
    share = row(f"{model}, {length:,} tokens", "keys found", sum(found) / len(found))
    about = {name: outcome[name] for name in ("parameters", "steps", "training_seconds")}
    return {**share, "model": model, "length": length, "low": low, "high": high, "found": list(found), **about}


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Which keys were found: a column a length, a place a depth, a panel a model."""
    models = list(dict.fromkeys(row["model"] for row in payload["rows"]))
    with figure(path, payload, panels=len(models)) as panels:
        for axes, model in zip(panels, models, strict=True):
            of_model = [row for row in payload["rows"] if row["model"] == model]
            grid = np.array([row["found"] for row in of_model], dtype=float).T
            axes.imshow(
                grid, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1, origin="upper", extent=(0, len(of_model), 1, 0)
            )
            labels = [f"{row['length']:,}\n{row['ours']:.0%}" for row in of_model]
            axes.set_xticks(np.arange(len(of_model)) + 0.5, labels, fontsize="small")
            axes.set_xlabel("tokens, and keys found")
            axes.set_ylabel("where the key stands, from 0 (first) to 1 (last)")
            axes.set_title(f"{model}: green is found", fontsize="small")
