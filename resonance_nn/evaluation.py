"""Loss, perplexity and bits per byte over whole texts, the state carried from window to window."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from resonance_nn.data import (
    DataError,
    Document,
    cut_pieces,
    document_token_id,
    encode_pieces,
    lzma_bits_per_byte,
    tokenizer_vocab_size,
)
from resonance_nn.machine import machine_info, versions
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.ops.cross_entropy import linear_cross_entropy
from resonance_nn.ops.precision import computes_in_bf16

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def evaluate_documents(
    model: ResonanceForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    window: int = 2048,
    batch_size: int = 8,
    precision: str = "fp32",
    lzma: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """How well the model predicts whole documents, each from a fresh state.

    A document of n tokens x_1..x_n is read as x_0 x_1 .. x_n with x_0 = <|endoftext|>, ``window`` tokens at a time,
    and predicts x_1 .. x_n x_0: each token of the text and the document's end, once each. The result does not depend
    on ``window`` and ``batch_size``, but for rounding.

        bits per byte = Σ −log2 p(token | all before it in the document) / bytes of the text

    Args:
        model: left in the mode (training or evaluation) it came in, on the device it is on.
        tokenizer: byte-level, of the model.
        documents: from ``find_documents``.
        window: tokens a document in one forward pass, ≥ 1.
        batch_size: documents at a time; more of them where they are shorter than a window.
        precision: "auto", "bf16", "fp16" or "fp32", of the matmuls.
        lzma: also compress the same text with ``xz -9e``.
        progress: draw a progress bar.

    Returns:
        ``loss`` (nats a token), ``perplexity``, ``bits_per_token``, ``bits_per_byte``, ``lzma_bits_per_byte`` and
        ``verdict`` (a sentence; both None without lzma), ``documents``, ``tokens``, ``bytes``, ``seconds``,
        ``tokens_per_second``, ``precision``, ``window``, ``batch_size``.

    Raises:
        ValueError: a value out of range, a tokenizer that does not fit the model, no text.
    """
    for name, value in (("window", window), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be ≥ 1")
    if tokenizer_vocab_size(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_vocab_size(tokenizer)} ids, the model only {model.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    if not documents:
        raise DataError("there are no documents to evaluate")
    device = model.device
    precision = resolve_precision(precision, device.type)
    num_bytes = sum(document.size for document in documents)
    nats, num_tokens, seconds = 0.0, 0, 0.0
    was_training = model.training
    model.eval()
    bar = tqdm(total=num_bytes, desc="evaluating", unit="B", unit_scale=True, leave=False, disable=not progress)
    try:
        with bar, torch.no_grad(), autocast(precision, device.type):
            for rows, size in _batches(tokenizer, documents, batch_size, window):
                begin = time.perf_counter()
                nats += _rows_nats(model, rows, window)
                seconds += time.perf_counter() - begin
                num_tokens += sum(len(row) for row in rows)
                bar.update(size)
    finally:
        model.train(was_training)
    loss = nats / num_tokens
    bits_per_byte = nats / math.log(2) / num_bytes
    lzma_bits = lzma_bits_per_byte(documents) if lzma else None
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_token": loss / math.log(2),
        "bits_per_byte": bits_per_byte,
        "lzma_bits_per_byte": lzma_bits,
        "verdict": None if lzma_bits is None else verdict(bits_per_byte, lzma_bits),
        "documents": len(documents),
        "tokens": num_tokens,
        "bytes": num_bytes,
        "seconds": seconds,
        "tokens_per_second": num_tokens / max(seconds, 1e-9),
        "precision": precision,
        "window": window,
        "batch_size": batch_size,
    }


def verdict(bits_per_byte: float, lzma_bits_per_byte: float) -> str:
    """Who compresses the text better, in one sentence."""
    if bits_per_byte < lzma_bits_per_byte:
        return f"The model wins: {bits_per_byte:.3f} bits per byte, lzma (xz -9e) {lzma_bits_per_byte:.3f}."
    return f"lzma wins: {lzma_bits_per_byte:.3f} bits per byte (xz -9e), the model {bits_per_byte:.3f}."


def _batches(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], batch_size: int, window: int
) -> Iterator[tuple[list[Tensor], int]]:
    """Documents of like lengths together, longest first: their ids, each after <|endoftext|>, and their bytes.

    At most ``batch_size`` · ``window`` tokens go through the model at once, so short documents come more at a time.
    """
    boundary = document_token_id(tokenizer)
    rows: list[Tensor] = []
    size = longest = 0
    for document in sorted(documents, key=lambda d: d.size, reverse=True):
        pieces = encode_pieces(tokenizer, cut_pieces(document.chunks()))
        ids = np.concatenate([[boundary], *(np.asarray(piece, np.int64) for piece in pieces)])
        if rows and (len(rows) + 1) * min(window, max(longest, len(ids))) > batch_size * window:
            yield rows, size
            rows, size, longest = [], 0, 0
        rows.append(torch.from_numpy(ids))
        size += document.size
        longest = max(longest, len(ids))
    yield rows, size


def _rows_nats(model: ResonanceForCausalLM, rows: list[Tensor], window: int) -> float:
    """Σ −log p of every row's next tokens, its first token being also what follows its last."""
    rows = sorted(rows, key=len, reverse=True)
    lengths = [len(row) for row in rows]
    cache, nats = None, 0.0
    for begin in range(0, lengths[0], window):
        active = sum(length > begin for length in lengths)
        if cache is not None and active < len(rows):  # rows that have ended leave
            cache.batch_select_indices(torch.arange(active, device=model.device))
        rows = rows[:active]
        L = min(window, lengths[0] - begin)
        ids = torch.zeros(active, L, dtype=torch.long)
        targets = torch.full((active, L), -100)
        for b, row in enumerate(rows):
            part = row[begin : begin + L]
            following = torch.cat([row[begin + 1 : begin + L + 1], row[:1]])[: len(part)]
            ids[b, : len(part)], targets[b, : len(part)] = part, following
        # What stands right of a row's end is read too, but nothing after it counts: the model is causal.
        out = model.model(ids.to(model.device), past_key_values=cache, use_cache=lengths[0] > window)
        cache = out.past_key_values
        assert out.last_hidden_state is not None
        _, total = linear_cross_entropy(
            out.last_hidden_state.flatten(0, 1), model.lm_head.weight, targets.flatten().to(model.device)
        )
        nats += float(total)
    return nats


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which is never empty, not even at 0 and 1."""
    z, share = 1.959964, hits / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def resolve_device(device: str) -> str:
    """The device type meant by "auto", "cpu", "cuda", "mps" or "xpu".

    Raises:
        ValueError: an unknown name, or a device that this machine does not have.
    """
    if device not in DEVICES:
        raise ValueError(
            f"device = {device!r}: must be one of {', '.join(DEVICES)} (choose among several with CUDA_VISIBLE_DEVICES)"
        )
    present = torch.accelerator.current_accelerator(check_available=True)
    found = present.type if present is not None else "cpu"
    if device not in ("auto", "cpu", found):
        raise ValueError(f"device = {device!r}: this machine has none that PyTorch can use; use cpu or auto")
    return found if device == "auto" else device


def resolve_precision(precision: str, device: str) -> str:
    """The precision of the matmuls: "auto" is bf16 where the device computes in it, else fp32.

    Raises:
        ValueError: an unknown name, or one that the device cannot train in.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision = {precision!r}: must be one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and device == "cpu":
        raise ValueError("precision = 'fp16': not on a CPU; use bf16, fp32 or auto")
    if precision != "auto":
        return precision
    return "bf16" if computes_in_bf16(device) else "fp32"


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """The autocast context of a resolved precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16 if precision == "bf16" else torch.float16)


def report(suite: str, device: str, rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """The JSON that a command writes: what was run where, with what, and what came out."""
    return {
        "suite": suite,
        "machine": machine_info(device),
        "versions": versions(),
        "rows": [finite(row) for row in rows],
        "summary": finite(summary),
    }


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for numbers that are not finite, which JSON does not know."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def row(case: str, metric: str, ours: float | None, peer: float | None = None, peer_name: str = "") -> dict[str, Any]:
    """One row of a report: our figure, and a peer's beside it where there is one."""
    ratio = ours / peer if ours is not None and peer else None
    return {
        "case": case,
        "metric": metric,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name or None,
        "ratio": ratio,
    }
