"""Passkeys and needles: what a model still knows of a sentence after up to hundreds of thousands of tokens of text."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from resonance_nn.bench.accelerated import accelerated_delta_rule
from resonance_nn.bench.common import Row, figure, result
from resonance_nn.bench.learning import Plan, described, learn, prepare
from resonance_nn.bench.quality import RECIPES, Budget, Case, QualityOptions, build
from resonance_nn.bench.tasks import answer_loss, answers
from resonance_nn.bench.text import text_task, text_tokenizer
from resonance_nn.data import TokenStore, encode_bytes, find_documents
from resonance_nn.data.synthetic import IGNORE, Batch
from resonance_nn.evaluation import resolve_device

DIGITS = 5  # of a key
NAMES = string.ascii_uppercase
TOKENS_AT_ONCE = 1 << 14  # of a forward pass in evaluation, or one sequence


@dataclass(frozen=True)
class Passkeys:
    """Sequences of text with sentences that tell keys of five digits, and a question at the end (Mohtashami & Jaggi
    2023). With one needle it is "the pass key"; with more each has a letter for a name, and one is asked for.

        … text … The pass key of B is 52901. Remember it. … text … What is the pass key of B? The pass key of B is 52901

    Every digit is a token. A digit is asked for after those before it; the sequence ends before the last one.
    """

    tokenizer: PreTrainedTokenizerBase
    text: TokenStore
    length: int
    needles: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.needles <= len(NAMES):
            raise ValueError(f"needles = {self.needles}: must be in 1 … {len(NAMES)}, a letter each")
        needle, question = self._parts("Z", [0] * DIGITS)
        shortest = self.needles * len(needle) + len(question)
        if self.length < shortest:
            raise ValueError(f"length = {self.length}: must be ≥ {shortest}, as the sentences take that many tokens")

    def _parts(self, name: str, digits: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of a needle, and those of the question up to the last digit but one."""
        of = "" if self.needles == 1 else f" of {name}"
        key = [encode_bytes(self.tokenizer, str(digit).encode())[0] for digit in digits]
        tell, end = (
            encode_bytes(self.tokenizer, text) for text in (f"\nThe pass key{of} is".encode(), b". Remember it.\n")
        )
        ask = encode_bytes(self.tokenizer, f"\nWhat is the pass key{of}? The pass key{of} is".encode())
        return [*tell, *key, *end], [*ask, *key[:-1]]

    def draw(self, rng: Generator, sequences: int, depth: float | None = None) -> Batch:
        """``depth`` is where the needle that is asked for stands, as a share of the text; None is anywhere."""
        drawn = [self._one(rng, depth) for _ in range(sequences)]
        return Batch(*(torch.from_numpy(np.stack(each)) for each in zip(*drawn, strict=True)))

    def _one(self, rng: Generator, depth: float | None) -> tuple[np.ndarray, np.ndarray]:
        names = rng.permutation(list(NAMES))[: self.needles]
        keys = rng.integers(10, size=(self.needles, DIGITS))
        parts = [self._parts(str(name), list(key)) for name, key in zip(names, keys, strict=True)]
        question = parts[0][1]  # the first is asked for
        room = self.length - sum(len(needle) for needle, _ in parts) - len(question)
        at = rng.integers(room + 1, size=self.needles)
        if depth is not None:
            at[0] = round(depth * room)
        start = rng.integers(self.text.num_tokens)
        text = np.take(np.asarray(self.text.tokens), np.arange(start, start + room), mode="wrap").astype(np.int64)
        pieces, last = [], 0
        for i in np.argsort(at, kind="stable"):
            pieces += [text[last : at[i]], parts[i][0]]
            last = at[i]
        ids = np.concatenate([*pieces, text[last:], question]).astype(np.int64)
        targets = np.full(self.length, IGNORE)
        targets[-DIGITS:] = [encode_bytes(self.tokenizer, str(digit).encode())[0] for digit in keys[0]]
        return ids, targets


@dataclass(frozen=True)
class PasskeyTask:
    """Trained at ``train``, in shares ∝ 1/length; held out by length in ``held``; ``watched`` is the longest of the
    lengths trained on."""

    train: tuple[Passkeys, ...]
    held: Mapping[str, Passkeys]
    vocab_size: int
    sequences: int
    watched: tuple[str, ...]

    @property
    def cells(self) -> Mapping[str, Passkeys]:
        return self.held

    def training_batch(self, rng: Generator, tokens: int, step: int) -> Batch:
        shares = np.array([1 / one.length for one in self.train])
        one = self.train[rng.choice(len(self.train), p=shares / shares.sum())]
        return one.draw(rng, max(1, tokens // one.length))

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return answer_loss(model, batch)

    @torch.no_grad()
    def measure(self, model: Any, cell: str, rng: Generator, tokens: int) -> dict[str, Any]:
        """``accuracy``: the share of keys with all digits right, at depths spread evenly; ``found``: which of them."""
        training, one = model.training, self.held[cell]
        model.eval()
        found: list[bool] = []
        depths = np.linspace(0, 1, self.sequences)
        rows = max(1, TOKENS_AT_ONCE // one.length)
        for some in np.split(depths, range(rows, len(depths), rows)):
            parts = [one.draw(rng, 1, float(depth)) for depth in some]
            batch = Batch(*(torch.cat(each).to(model.device) for each in zip(*parts, strict=True)))
            logits, targets, _ = answers(model, batch)
            found += (logits.argmax(-1) == targets).view(-1, DIGITS).all(1).tolist()
        model.train(training)
        return {"accuracy": sum(found) / len(found), "found": found}

    def reached(self, cells: Mapping[str, Mapping[str, Any]], target: float) -> bool:
        return all(figures["accuracy"] >= target for figures in cells.values())


@dataclass(frozen=True)
class PasskeyOptions:
    """What to train, at which lengths, and where to ask. ``fields`` are of our configuration."""

    models: tuple[str, ...] = ("default",)
    data: tuple[str, ...] = ("stdlib",)
    output_dir: Path = Path("runs/bench-passkey")
    train_lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    lengths: tuple[int, ...] = (2048, 4096, 16_384, 65_536, 262_144)
    peer_max_length: int = 16_384
    needles: int = 1
    sequences: int = 40
    hidden_size: int = 128
    layers: int = 2
    vocab_size: int = 2048
    plan: Plan = field(default_factory=lambda: Plan(lr=3e-3, steps=2000, target=1.0))
    fields: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        for name in ("train_lengths", "lengths"):
            values = list(getattr(self, name))
            if not values or sorted(set(values)) != values:
                raise ValueError(f"{name} = {values}: must be ascending, each once")
        if self.sequences < 2:
            raise ValueError(f"sequences = {self.sequences}: must be ≥ 2")
        self.quality().check()

    def quality(self) -> QualityOptions:
        """What builds the models: ours as wide and deep as said, peers of equal size."""
        lengths = (max(*self.train_lengths, self.peer_max_length),)
        budget = Budget(self.hidden_size, self.layers, self.vocab_size, tokens=1, lengths=lengths, seeds=1)
        return QualityOptions(self.models, budget, self.data, self.output_dir, (self.plan.lr,), self.plan, self.fields)


def run(
    options: PasskeyOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, Case, float, Mapping[str, Any]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train what is missing in ``output_dir``; what is written as JSON.

    Raises:
        ValueError: as :meth:`PasskeyOptions.check`; a folder with runs and neither flag, or with other ones.
    """
    options.check()
    quality, folder = options.quality(), options.output_dir
    documents = find_documents(list(options.data), leave_out=folder)
    tokenizer = text_tokenizer(documents, options.vocab_size)
    text = text_task(documents, folder / "data", 2, options.vocab_size)
    cases = [Case(quality.budget.lengths[0], model, options.plan.lr, options.plan.seed) for model in options.models]
    settings = {case: _settings(options, case) for case in cases}
    prepare(folder, {c.model: described(settings[c], options.plan) for c in cases}, resume=resume, overwrite=overwrite)
    outcomes: dict[str, dict[str, Any]] = {}
    with accelerated_delta_rule():
        for case in cases:
            of_peer = case.model not in RECIPES
            lengths = [n for n in options.lengths if not of_peer or n <= options.peer_max_length]
            longest = options.train_lengths[-1]
            task = PasskeyTask(
                train=tuple(Passkeys(tokenizer, text.train, n, options.needles) for n in options.train_lengths),
                held={
                    str(n): Passkeys(tokenizer, text.held_out, n, options.needles) for n in sorted({longest, *lengths})
                },
                vocab_size=options.vocab_size,
                sequences=options.sequences,
                watched=(str(longest),),
            )
            outcomes[case.model] = learn(
                folder / case.model,
                task,
                lambda case=case: build(quality, case),
                options.plan,
                settings[case],
                resume=True,
                report=lambda spent, line, case=case: progress(len(outcomes), len(cases), case, spent, line),
            )
    described_options = {**asdict(options), "output_dir": str(folder)}
    return result("passkey", rows(outcomes), resolve_device(options.plan.device), options=described_options)


def _settings(options: PasskeyOptions, case: Case) -> dict[str, Any]:
    """What a run depends on beside its plan."""
    names = ("data", "train_lengths", "lengths", "peer_max_length", "needles", "sequences", "hidden_size", "layers")
    chosen = {name: getattr(options, name) for name in names}
    return {**chosen, "model": case.model, "vocab_size": options.vocab_size, "fields": dict(options.fields)}


def rows(outcomes: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row of each model and length: the share of keys found, its 95% interval (Wilson), and which were."""
    made: list[Row] = []
    for model, outcome in outcomes.items():
        for length, figures in outcome["cells"].items():
            low, high = wilson(sum(figures["found"]), len(figures["found"]))
            made.append(
                {
                    "case": f"{model}, {int(length):,} tokens",
                    "metric": "keys found",
                    "ours": figures["accuracy"],
                    "peer": None,
                    "peer_name": None,
                    "ratio": None,
                    "model": model,
                    "length": int(length),
                    "low": low,
                    "high": high,
                    "found": figures["found"],
                    "parameters": outcome["parameters"],
                    "steps": outcome["steps"],
                    "training_seconds": outcome["training_seconds"],
                }
            )
    return made


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which is never empty, not even at 0 and 1."""
    z, share = 1.959964, hits / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Which keys were found: a column a length, a place a depth, a panel a model."""
    models = payload["options"]["models"]
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
