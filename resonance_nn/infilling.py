"""Holes in texts: filled by a model trained with ``train --fim``, and how often it finds the very line that was there.

prefix, suffix -> one prompt (``data.fim``) -> prefill, in chunks: memory does not grow -> the middle, to its end token
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from resonance_nn.data import DataError, Document, encode_bytes
from resonance_nn.data.fim import Sentinels, line_spans
from resonance_nn.evaluation import autocast, resolve_precision, wilson
from resonance_nn.generation import Completion, Sampling, complete, encode_prompt, prefill
from resonance_nn.models import ResonanceForCausalLM

LENGTHS = ((1, 10), (11, 20), (21, 40), (41, None))  # characters of hidden lines, by which they are counted


def infill(
    model: ResonanceForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prefix: str | bytes,
    suffix: str | bytes,
    sampling: Sampling | None = None,
    *,
    order: str = "spm",
    context: int | None = None,
    write: Callable[[str], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Completion]:
    """What may stand between two texts.

    Args:
        model: trained with ``resonance train --fim``, or by ``data.fim`` and with ``config.fim_rate`` set.
        tokenizer: byte-level, of the model.
        prefix: the text before the hole.
        suffix: the text after it.
        sampling: how the next token is chosen; None samples as ``resonance generate`` does.
        order: in which the two are read: "spm", the prefix last, or "psm". The model knows both.
        context: how many tokens to read on either side of the hole, those next to it; None: all.
        write: called with the text as it comes; for one sequence without beams.
        interrupted: asked after each token whether to stop.

    Returns:
        ``num_return_sequences`` completions. ``finish_reason`` is "end" where the model saw that the suffix follows.

    Raises:
        ValueError: the model or its tokenizer knows no holes, a value is out of range.
    """
    prompt = infill_prompt(model, tokenizer, _bytes(prefix), _bytes(suffix), order, context)
    sampling = of_hole(Sampling() if sampling is None else sampling)
    return complete(model, tokenizer, [prompt], sampling, write=write, interrupted=interrupted)[0]


def of_hole(sampling: Sampling) -> Sampling:
    """The same, without a model's own repetition penalty: what fills a hole repeats the names around it."""
    return replace(sampling, repetition_penalty=1.0) if sampling.repetition_penalty is None else sampling


def infill_prompt(
    model: ResonanceForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prefix: bytes,
    suffix: bytes,
    order: str = "spm",
    context: int | None = None,
) -> list[int]:
    """The token ids that a middle follows. Raises ValueError as :func:`infill`."""
    sentinels = Sentinels.of(tokenizer)
    if not model.config.fim_rate:
        raise ValueError(
            "the model has not learned to fill in the middle (fim_rate = 0); train one with `resonance train --fim "
            "0.5`, or this one further with --init and --fim"
        )
    if context is not None and context < 1:
        raise ValueError(f"context = {context}: must be ≥ 1 tokens, or None for all")
    before, after = encode_bytes(tokenizer, prefix), encode_bytes(tokenizer, suffix)
    if context is not None:
        before, after = before[-context:], after[:context]
    return sentinels.prompt(before, after, order)


@dataclass(frozen=True)
class Hole:
    """Bytes [start, stop) of a document, hidden: a line without its indentation and its line break."""

    document: Document
    line: int  # from 1
    start: int
    stop: int


def hide_lines(documents: Sequence[Document], count: int, seed: int = 0) -> list[Hole]:
    """At most ``count`` lines that are not blank, at random, the same each time for the same documents.

    One a document while there are documents that no line was taken of, then a second, and so on. Raises DataError
    where there is none.
    """
    rng = random.Random(seed)
    order = list(documents)
    rng.shuffle(order)
    found: list[list[Hole]] = []
    for document in order:
        if len(found) == count:
            break
        text = document.read()
        if spans := line_spans(text):
            chosen = rng.sample(spans, min(count, len(spans)))
            found.append([Hole(document, text.count(b"\n", 0, a) + 1, a, b) for _, a, b in chosen])
    if not found:
        raise DataError("there is no line to hide: every document is blank")
    rounds = range(max(map(len, found)))
    return [holes[k] for k in rounds for holes in found if k < len(holes)][:count]


def evaluate_infilling(
    model: ResonanceForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    lines: int = 300,
    seed: int = 0,
    order: str = "spm",
    context: int | None = None,
    precision: str = "fp32",
    progress: bool = False,
) -> dict[str, Any]:
    """How often a hidden line is filled in as it was, and how probable it was; also from the left alone.

    The model fills each hole greedily, given all of the document around it. It is right if it ends by itself and what
    it gave is the line, white space at their ends aside. "left" is the same model as a language model: it goes on from
    what stands before the hole to the end of the line.

        bits per byte = Σ −log2 p(token of a line | what is given, and the line's tokens before it) / bytes of the lines

    Args:
        model: left in the mode it came in.
        tokenizer: byte-level, of the model.
        documents: from ``find_documents``; held out, or the figures say what was learned by heart.
        lines: how many lines to hide, each by itself, see :func:`hide_lines`.
        seed: of which.
        order: as :func:`infill` takes it.
        context: as :func:`infill` takes it; the left alone is read from the document's beginning.
        precision: "auto", "bf16", "fp16" or "fp32", of the matmuls.
        progress: draw a progress bar.

    Returns:
        ``lines``, ``documents``, ``bytes``, and of both sides and, with ``left_`` before the name, of the left alone:
        ``exact_match`` (a share), ``exact_match_interval`` (95%, Wilson), ``bits_per_byte``; ``by_length`` (the same
        shares by characters of the line), ``holes`` (each one), ``order``, ``context``, ``seed``, ``seconds``.

    Raises:
        ValueError: as :func:`infill`; nothing to hide.
    """
    if lines < 1:
        raise ValueError(f"lines = {lines}: must be ≥ 1")
    precision = resolve_precision(precision, model.device.type)
    infill_prompt(model, tokenizer, b"", b"", order, context)  # refuses at once what cannot be
    holes = hide_lines(documents, lines, seed)
    begin, was_training = time.perf_counter(), model.training
    model.eval()
    bar = tqdm(holes, desc="filling in", unit=" lines", delay=2, leave=False, disable=not progress)
    try:
        with bar, torch.no_grad(), autocast(precision, model.device.type):
            results = [_fill(model, tokenizer, hole, order, context) for hole in bar]
    finally:
        model.train(was_training)
    size = sum(hole.stop - hole.start for hole in holes)
    by_length = []
    for low, high in LENGTHS:
        some = [r for r in results if low <= len(r["hidden"]) and (high is None or len(r["hidden"]) <= high)]
        if some:
            characters = f"{low} to {high}" if high else f"{low} or more"
            by_length.append({"characters": characters, "lines": len(some), **_exact(some)})
    return {
        "lines": len(holes),
        "documents": len({hole.document for hole in holes}),
        "bytes": size,
        **_exact(results),
        "bits_per_byte": sum(r["bits"] for r in results) / size,
        "left_bits_per_byte": sum(r["left_bits"] for r in results) / size,
        "by_length": by_length,
        "holes": results,
        "order": order,
        "context": context,
        "seed": seed,
        "precision": precision,
        "seconds": time.perf_counter() - begin,
    }


def _fill(
    model: ResonanceForCausalLM, tokenizer: PreTrainedTokenizerBase, hole: Hole, order: str, context: int | None
) -> dict[str, Any]:
    """One hole, from both sides and from the left."""
    text = hole.document.read()
    prefix, hidden, suffix = text[: hole.start], text[hole.start : hole.stop], text[hole.stop :]
    middle = encode_bytes(tokenizer, hidden)
    result: dict[str, Any] = {"document": hole.document.name, "line": hole.line, "hidden": _text(hidden)}
    for side, prompt, stop in (
        ("", infill_prompt(model, tokenizer, prefix, suffix, order, context), ()),
        ("left_", encode_prompt(tokenizer, prefix), ("\n",)),
    ):
        cache = prefill(model, torch.tensor([prompt], device=model.device))
        ids = torch.tensor([[prompt[-1], *middle]], device=model.device)
        logits = model(ids[:, :-1], past_key_values=copy.deepcopy(cache), use_cache=True).logits[0].float()
        result[f"{side}bits"] = float(F.cross_entropy(logits, ids[0, 1:], reduction="sum")) / math.log(2)
        if not math.isfinite(result[f"{side}bits"]):
            raise ValueError("the model's logits are not finite: its training diverged; train it anew")
        sampling = Sampling(max_new_tokens=16 + 2 * len(middle), greedy=True, stop=stop)
        ((completion,),) = complete(model, tokenizer, [prompt], sampling, cache=cache)
        ended = completion.finish_reason in ("end", "stop")
        result[f"{side}filled"] = completion.text
        result[f"{side}exact"] = ended and completion.text.rstrip() == result["hidden"].rstrip()
    return result


def _exact(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The shares that are right, and their intervals."""
    shares: dict[str, Any] = {}
    for side in ("", "left_"):
        right = sum(r[f"{side}exact"] for r in results)
        shares[f"{side}exact_match"] = right / len(results)
        shares[f"{side}exact_match_interval"] = wilson(right, len(results))
    return shares


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
