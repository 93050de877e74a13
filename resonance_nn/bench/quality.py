"""Loss a token, a second and a parameter: language models of equal size from scratch on the same batches, every model
with the learning rate that suits it best.

output_dir/  data/                          the tokenizer and the encoded corpus
             LENGTH/MODEL/lr-RATE-seed-N/   a run, see ``learning``; can be resumed

First every model is trained with every rate at the first length and seed, then with its best one at the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from resonance_nn.bench.accelerated import accelerate, accelerated_delta_rule
from resonance_nn.bench.common import Row, result
from resonance_nn.bench.fit import confidence95
from resonance_nn.bench.learning import learn
from resonance_nn.bench.peers import PEERS, build_peer, count
from resonance_nn.bench.quality_options import DEFAULT, NOTES, OURS, Case, QualityOptions
from resonance_nn.bench.runs import described, fields_of, prepare
from resonance_nn.bench.text import HELD_OUT, TextTask, text_task, text_tokenizer
from resonance_nn.bench.zero_shot import Measurement, figures, measurements
from resonance_nn.data import find_documents
from resonance_nn.evaluation import resolve_device
from resonance_nn.models import ResonanceForCausalLM

LOSS = "held-out loss, nats a token"

Outcomes = Mapping[Case, Mapping[str, Any]]


def build(options: QualityOptions, case: Case) -> PreTrainedModel:
    """The model of a run, from the global seed."""
    if case.model in OURS:
        return ResonanceForCausalLM(options.config(case.model))
    return accelerate(_peer(options, case))


def _peer(options: QualityOptions, case: Case, device: str = "cpu") -> PreTrainedModel:
    """A model of transformers' with as many parameters as our default."""
    reference = options.config(DEFAULT)
    with torch.device("meta"):
        parameters = count(ResonanceForCausalLM(reference))
    return build_peer(case.model, reference, parameters, case.length, device)[0]


def run(
    options: QualityOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, Case, float, Mapping[str, Any]], None] = lambda *_: None,
) -> dict[str, Any]:
    """Train what is missing in ``output_dir``; what is written as JSON.

    ``progress`` is told the number of this run, how many there are, its case, the share of its budget used and the last
    line of its log.

    Raises:
        ValueError: as :meth:`QualityOptions.check`; a folder with runs and neither flag, or with other ones.
    """
    options.check()
    budget, folder = options.budget, options.output_dir
    documents = find_documents(list(options.data), leave_out=folder)
    outcomes: dict[Case, dict[str, Any]] = {}
    total = sum(len(options.tried(model)) + len(budget.lengths) * budget.seeds - 1 for model in options.models)
    tasks: dict[int, TextTask] = {}
    tokenizer = cache(partial(text_tokenizer, documents, budget.vocab_size))

    def train(cases: Sequence[Case], resume: bool) -> None:
        settings = {case: _settings(options, case) for case in cases}
        runs = {case.folder: described(settings[case], options.plan_of(case)) for case in cases}
        prepare(folder, runs, resume=resume, overwrite=overwrite)
        for case in cases:
            if case.length not in tasks:
                tasks[case.length] = text_task(documents, folder / "data", case.length, budget.vocab_size, tokenizer())
            outcomes[case] = learn(
                folder / case.folder,
                replace(tasks[case.length], order=case.seed),
                lambda case=case: build(options, case),
                options.plan_of(case),
                settings[case],
                resume=True,
                report=lambda spent, line, case=case: progress(len(outcomes), total, case, spent, line),
            )

    elsewhere = measurements(tokenizer, budget.lengths, folder / "data", options.texts, options.pairs)
    with accelerated_delta_rule():
        train(list(_all_rates(options)), resume)
        train(list(_at_best_rates(options, outcomes)), not overwrite)
        judged = _judge(options, outcomes, elsewhere, progress)
    return result(
        "quality",
        rows(options, outcomes) + judged,
        resolve_device(options.plan.device),
        options={**asdict(options), "output_dir": str(options.output_dir)},
        runs=[{**asdict(case), **_kept(outcome)} for case, outcome in outcomes.items()],
    )


def _all_rates(options: QualityOptions) -> Iterator[Case]:
    for rates in zip_longest(*map(options.tried, options.models)):  # all models with one rate after the other
        for model, lr in zip(options.models, rates, strict=True):
            if lr is not None:
                yield Case(options.budget.lengths[0], model, lr, 0)


def _at_best_rates(options: QualityOptions, outcomes: Outcomes) -> Iterator[Case]:
    """What is left when all rates have been tried."""
    best = {model: best_rate(outcomes, model) for model in options.models}
    for seed in range(options.budget.seeds):
        for length in options.budget.lengths:
            for model in options.models:
                case = Case(length, model, best[model], seed)
                if case not in outcomes:
                    yield case


def best_rate(outcomes: Outcomes, model: str) -> float:
    """The rate with the least final loss at the first length and seed, where all have been tried."""
    first = min(case for case in outcomes if case.model == model)
    tried = {
        case.lr: final_loss(outcome)
        for case, outcome in outcomes.items()
        if (case.length, case.model, case.seed) == (first.length, model, 0)
    }
    return min(tried, key=tried.__getitem__)


def final_loss(outcome: Mapping[str, Any]) -> float:
    """Held-out nats a token of a finished run; infinite if it was lost."""
    loss = outcome["cells"][HELD_OUT]["loss"]
    return math.inf if loss is None or outcome["stopped"] == "diverged" else loss


def _settings(options: QualityOptions, case: Case) -> dict[str, Any]:
    """What a run depends on beside its plan."""
    made: dict[str, Any] = {"data": list(options.data), "length": case.length, "model": case.model}
    if case.model in OURS:
        return {**made, "config": fields_of(options.config(case.model))}
    peer = json.dumps(_peer(options, case, "meta").config.to_diff_dict())
    return {**made, "peer": json.loads(peer, parse_constant=str)}  # Mamba-2's time steps are bounded by infinity


def _kept(outcome: Mapping[str, Any]) -> dict[str, Any]:
    names = ("parameters", "steps", "tokens", "seconds", "training_seconds", "stopped", "cells", "curve")
    return {name: outcome[name] for name in names}


def rows(options: QualityOptions, outcomes: Outcomes) -> list[Row]:
    """A row of each model and length, at its best rate; ``peer`` is Llama where there is one."""
    made: list[Row] = []
    best = best_cases(options, outcomes)
    for length in options.budget.lengths:
        groups = {model: [outcomes[case] for case in best[length, model]] for model in options.models}
        peer = groups.get("llama")
        for model, group in groups.items():
            losses = [final_loss(outcome) for outcome in group]
            others = None if peer is None else [final_loss(outcome) for outcome in peer]
            tokens, seconds = crossing(group, peer) if peer is not None else (None, None)
            rate = best[length, model][0].lr
            made.append(
                {
                    "case": f"{model}, {length:,} tokens",
                    "metric": LOSS,
                    **compared(losses, others),
                    "model": model,
                    "length": length,
                    "lr": rate,
                    "lr_at_edge": len(options.tried(model)) > 2 and rate in (min(options.lrs), max(options.lrs)),
                    "bits_per_byte": _finite(fmean([_bits(outcome) for outcome in group])),
                    "share_of_tokens": tokens,
                    "share_of_seconds": seconds,
                    "parameters": group[0]["parameters"],
                    "training_seconds": fmean([outcome["training_seconds"] for outcome in group]),
                    "note": NOTES.get(model, ""),
                }
            )
    return made


def compared(values: Sequence[float], peer: Sequence[float] | None) -> Row:
    """Figures of the seeds of a model, and Llama's where there are some: the means, the difference seed by seed, and
    the half-widths of the 95% intervals of both."""
    differences = [] if peer is None else [a - b for a, b in zip(values, peer, strict=True)]
    return {
        "ours": _finite(fmean(values)),
        "peer": None if peer is None else _finite(fmean(peer)),
        "peer_name": None if peer is None else PEERS["llama"].label,
        "ratio": None,
        "values": [_finite(value) for value in values],
        "interval": confidence95(values),
        "difference": _finite(sum(differences) / len(differences)) if differences else None,
        "difference_interval": confidence95(differences),
    }


def _judge(
    options: QualityOptions, outcomes: Outcomes, elsewhere: Sequence[Measurement], progress: Callable[..., None]
) -> list[Row]:
    """What the models at their best rates are worth elsewhere: a row of each measurement, model and length."""
    if not elsewhere:
        return []
    groups, found = best_cases(options, outcomes), {}
    cases = [case for group in groups.values() for case in group]
    for i, case in enumerate(cases):
        progress(i, len(cases), case, 0.0, {})
        make = partial(build, options, case)
        found[case] = figures(options.output_dir / case.folder, make, elsewhere, case.length, options.plan)
    made: list[Row] = []
    for metric in (one.metric for one in elsewhere):
        values = {of: [found[case][metric] for case in group] for of, group in groups.items()}
        for (length, model), own in values.items():
            about = {"case": f"{model}, {length:,} tokens", "metric": metric, "model": model, "length": length}
            made.append({**about, **compared(own, values.get((length, "llama")))})
    return made


def best_cases(options: QualityOptions, outcomes: Outcomes) -> dict[tuple[int, str], list[Case]]:
    """The runs of each length and model at its best rate, by seed."""
    best = {model: best_rate(outcomes, model) for model in options.models}
    return {
        (length, model): [
            case for case in sorted(outcomes) if (case.length, case.model, case.lr) == (length, model, lr)
        ]
        for length in options.budget.lengths
        for model, lr in best.items()
    }


def crossing(
    group: Sequence[Mapping[str, Any]], peer: Sequence[Mapping[str, Any]]
) -> tuple[float | None, float | None]:
    """After which share of the peer's tokens, and of its training seconds, the held-out curve of these runs is at the
    peer's final loss or below, from evaluation to evaluation along a line; means over the seeds, each against the
    peer's run of the same seed. None if one never is."""
    shares: list[tuple[float, float]] = []
    for ours, theirs in zip(group, peer, strict=True):
        reached = _reached(ours["curve"], final_loss(theirs))
        if reached is None:
            return None, None
        step, seconds = reached
        shares.append((step / theirs["steps"], seconds / theirs["training_seconds"]))
    return fmean([a for a, _ in shares]), fmean([b for _, b in shares])


def _reached(curve: Sequence[Mapping[str, Any]], target: float) -> tuple[float, float] | None:
    before: tuple[float, float, float] | None = None
    for line in curve:
        loss = line["cells"][HELD_OUT]["loss"]
        if loss is None:
            return None
        now = (float(line["step"]), float(line["training_seconds"]), loss)
        if loss <= target:
            if before is None:
                return now[:2]
            share = (before[2] - target) / (before[2] - loss)
            return before[0] + share * (now[0] - before[0]), before[1] + share * (now[1] - before[1])
        before = now
    return None


def _bits(outcome: Mapping[str, Any]) -> float:
    bits = outcome["cells"][HELD_OUT]["bits_per_byte"]
    return math.inf if bits is None else bits


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
