"""Minimal pairs: does a language model find the acceptable one of two sentences more probable? (BLiMP, Warstadt et al.
2020.)"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from resonance_nn.data import DataError, document_token_id

Pairs = dict[str, list[tuple[str, str]]]
TOKENS_AT_ONCE = 4096


def read_pairs(paths: Sequence[str]) -> Pairs:
    """(good, bad) sentences by phenomenon: JSONL files, or folders of them, in BLiMP's format, a phenomenon each.

    Raises:
        DataError: a path that does not exist, a folder without .jsonl files, a line that is no pair.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise DataError(f"pairs: {str(path)!r}: no such file, or a folder without .jsonl files")
        files += found
    pairs: Pairs = {}
    for file in files:
        if file.stem in pairs:
            raise DataError(f"pairs: {file.stem!r} is named twice; each file once, and names must differ")
        pairs[file.stem] = list(_lines(file))
    return pairs


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"pairs: {str(file)!r}: cannot be read as UTF-8 text ({error})") from error
    if lines == [""]:
        raise DataError(f"pairs: {str(file)!r} is empty")
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            good, bad = fields["sentence_good"], fields["sentence_bad"]
        except (ValueError, KeyError, TypeError):
            good = bad = None
        if not (isinstance(good, str) and isinstance(bad, str)):
            raise DataError(f'pairs: {file}:{number}: must be JSON with texts "sentence_good" and "sentence_bad"')
        yield good, bad


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Accuracy by phenomenon and their mean: the share of pairs with log p(good) ≥ log p(bad).

    log p is the sum over all tokens of " " + sentence after <|endoftext|>, and a tie counts, as lm-evaluation-harness
    has it (tests/test_minimal_pairs.py).

    Args:
        model: any causal language model of transformers', in evaluation mode.
        tokenizer: byte-level, of the model.
        pairs: by phenomenon, from :func:`read_pairs`.

    Returns:
        ``accuracy`` (mean over the phenomena), ``pairs`` (how many), ``phenomena`` (name: accuracy); NaN where a score
        is not finite.
    """
    boundary = document_token_id(tokenizer)
    sentences = [" " + sentence for group in pairs.values() for pair in group for sentence in pair]
    encoded = tokenizer(sentences, add_special_tokens=False)["input_ids"]
    scores = _log_probabilities(model, [[boundary, *ids] for ids in encoded], progress)
    right = (scores[0::2] >= scores[1::2]).double()
    right[~(scores[0::2] + scores[1::2]).isfinite()] = math.nan
    parts = right.split([len(group) for group in pairs.values()])
    phenomena = {name: float(part.mean()) for name, part in zip(pairs, parts, strict=True)}
    return {"accuracy": statistics.fmean(phenomena.values()), "pairs": len(right), "phenomena": phenomena}


def _log_probabilities(model: PreTrainedModel, rows: Sequence[Sequence[int]], progress: bool) -> Tensor:
    """Σ log p(token | those before it) of each row, its first token given; rows of like lengths at a time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = torch.empty(len(rows), dtype=torch.float64)
    bar = tqdm(total=len(rows), desc="scoring", unit=" sentences", leave=False, disable=not progress)
    with bar:
        while order:
            longest = len(rows[order[-1]])
            rows_at_once = max(1, TOKENS_AT_ONCE // longest)
            taken, order = order[-rows_at_once:], order[:-rows_at_once]
            # What is filled up stands right of what counts, which a causal model cannot see.
            ids = torch.tensor([[*rows[i], *[0] * (longest - len(rows[i]))] for i in taken], device=model.device)
            targets = torch.tensor([[*rows[i][1:], *[-100] * (longest - len(rows[i]))] for i in taken])
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            nats = F.cross_entropy(logits.transpose(1, 2), targets.to(logits.device), reduction="none")
            scores[taken] = -nats.double().sum(1).cpu()
            bar.update(len(taken))
    return scores
