"""Decoding: milliseconds a token and bytes of state over the context, beside transformers' Llama with its KV cache.

Greedy decoding through each model's forward and cache. ``generate()`` adds the same work to both, timed on request.
Our state is what a model has after really reading the context (one sequence, repeated for a batch). The keys and values
of Llama are random numbers of the right shape and dtype: attention takes as long over them as over computed ones. Llama
runs with its ``DynamicCache``, which copies all keys and values at every token, and with its ``StaticCache``, which
does not; the faster one counts. On a CPU the weights of both lie as its matmul kernels read them.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench.caches import check_decoding, filled_caches, kv_bytes
from resonance_nn.bench.common import (
    Progress,
    Row,
    figure,
    interleaved,
    log_axes,
    no_progress,
    ratios,
    result,
    time_row,
)
from resonance_nn.bench.inference import available_memory, converted, synchronize, weight_bytes
from resonance_nn.bench.models import ModelOptions, build_beside, build_ours, check_causal, count
from resonance_nn.bench.peers import PEER
from resonance_nn.cache import ResonanceCache
from resonance_nn.generation import PREFILL_CHUNK, prefill
from resonance_nn.models import ResonanceForCausalLM
from resonance_nn.packing import pack_weights

FULL_CONTEXTS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
METRIC = "ms a token"
PEER_TOKENS = 4  # decoded in a timed call, at least, however slow
PEER_WORK = 1 << 17  # keys a timed call of the peer's may look at, rows times context, before it decodes fewer tokens


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(ModelOptions):
    """What to measure.

    Args:
        contexts: tokens already read, ascending.
        batch_sizes: sequences decoded at once, ascending.
        tokens: decoded in a timed call; the peer, at long contexts, decodes fewer.
        repeats: timed rounds, after one to warm up.
        peer_max_context: the longest context of the peer; 0 leaves it out.
        read_tokens: how much of a context is really read by ours, at most; None means all of it.
        generate: time ``generate()`` end to end too.
        packed: prepare both models with ``pack_weights``, as ``resonance generate`` does; on a CPU only.
    """

    contexts: Sequence[int] = (1024, 4096, 16_384)
    batch_sizes: Sequence[int] = (1, 16)
    tokens: int = 32
    repeats: int = 5
    peer_max_context: int = 65_536
    read_tokens: int | None = None
    generate: bool = False
    packed: bool = True

    def check(self) -> None:
        for name in ("contexts", "batch_sizes"):
            values = list(getattr(self, name))
            if not values or min(values) < 1 or sorted(set(values)) != values:
                raise ValueError(f"{name} = {values}: must be one or more numbers ≥ 1, ascending")
        self.at_least(1, "tokens", "repeats", "read_tokens")
        if self.peer_max_context < 0:
            raise ValueError(f"peer_max_context = {self.peer_max_context}: must be ≥ 0; 0 leaves the peer out")
        super().check()

    def read(self, context: int) -> int:
        """Tokens of a context that are really read."""
        return context if self.read_tokens is None else min(context, self.read_tokens)


def run(options: DecodeOptions, progress: Progress = no_progress) -> dict[str, Any]:
    """Check that both models decode what they compute in one pass, then time them in turns at each context.

    ``progress`` is told chunks read and calls timed, and the total of both (the most there can be).
    """
    options.check()
    kept = options.device == "cpu" and keep_freed_memory()
    torch.manual_seed(options.seed)
    ours, peer = _models(options)
    sizes = {"ours": count(ours), "peer": count(peer)}
    read = ResonanceCache(options.layers)
    ids = torch.randint(options.vocab_size, (1, options.read(options.contexts[-1]) + 1), device=options.device)
    chunks = -(-(ids.shape[1] - 1) // PREFILL_CHUNK) + len(options.contexts)
    calls = 1 + len(options.batch_sizes) * (8 if options.generate else 6)  # of a round, at most
    total, done = chunks + len(options.contexts) * (options.repeats + 1) * calls, 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    weights = _reading(weight_bytes(ours), options)
    first: dict[str, Callable[[], None]] = {}
    rows: list[Row] = []
    for context in options.contexts:
        while (start := read.get_seq_length()) < options.read(context):
            prefill(ours, ids[:, : min(start + PREFILL_CHUNK, options.read(context)) + 1], None, read)
            advance()
        seconds, measured = _measure(ours, peer, read, context, options, {"weights": weights, **first}, advance)
        if not first:
            first = {f"first {B}": measured.calls[f"ours {B}"] for B in options.batch_sizes}
            seconds |= {f"first {B}": seconds[f"ours {B}"] for B in options.batch_sizes}
        for B in options.batch_sizes:
            rows += _rows(context, B, seconds, measured, options)
    progress(total, total)
    return result(
        "decode",
        rows,
        options.device,
        options=options.described(),
        parameters=sizes,
        weight_bytes=weight_bytes(ours),
        keeps_freed_memory=kept,
    )


@dataclass
class _Measured:
    """What one context's rounds ran: the calls, tokens of each, and why there is no peer."""

    calls: dict[str, Callable[[], None]]
    tokens: dict[str, int]
    state_bytes: dict[int, int]
    kv_bytes: dict[int, int]
    skipped: dict[int, str | None]


def _models(options: DecodeOptions) -> tuple[ResonanceForCausalLM, LlamaForCausalLM]:
    ours = build_ours(options)
    peer: Any = build_beside(ours, ("llama",), options.contexts[-1] + 2 * options.tokens)[0][PEER]
    check_causal(ours, options.vocab_size)
    check_decoding(ours, {"ResonanceCache": lambda: ResonanceCache(options.layers)})
    check_decoding(
        peer,
        {
            "DynamicCache": lambda: DynamicCache(config=peer.config),
            "StaticCache": lambda: StaticCache(config=peer.config, max_cache_len=80),
        },
    )
    ours, peer = converted(ours, options.dtype), converted(peer, options.dtype)
    if options.packed:
        for model in (ours, peer):
            pack_weights(model)
    return ours, peer


def _measure(
    ours: ResonanceForCausalLM,
    peer: LlamaForCausalLM,
    read: ResonanceCache,
    context: int,
    options: DecodeOptions,
    others: Mapping[str, Callable[[], None]],
    advance: Callable[[], None],
) -> tuple[dict[str, list[float]], _Measured]:
    """Seconds a token of every call at this context, in turns, ``others`` among them.

    Each model decodes a token first that does not count, since its weights are not in the processor's cache after
    another's turn. The calls at the first context stand right before those at this one.
    """
    made = _Measured({}, {}, {}, {}, {})

    def add(name: str, tokens: int, call: Callable[[], None]) -> None:
        made.calls[name], made.tokens[name] = call, tokens

    for B in options.batch_sizes:
        cache = copy.deepcopy(read)
        cache.batch_repeat_interleave(B)
        made.state_bytes[B], made.kv_bytes[B] = cache.num_bytes(), kv_bytes(peer, context, B)
        if options.generate:
            branch = copy.deepcopy(cache)
            add(f"ours generate {B}", options.tokens, _generating(ours, branch, B, options, lambda: None))
        add(f"warm {B}", 1, _decoding(ours, cache, B, 1, options, lambda: None))
        if f"first {B}" in others:
            add(f"first {B}", options.tokens, others[f"first {B}"])
        add(f"ours {B}", options.tokens, _decoding(ours, cache, B, options.tokens, options, lambda: None))
        made.skipped[B] = _why_not(peer, context, B, options)
        if made.skipped[B] is not None:
            continue
        tokens = max(min(PEER_TOKENS, options.tokens), min(options.tokens, PEER_WORK // (context * B)))
        dynamic, static = filled_caches(peer, context, B, tokens)

        def crop(dynamic: DynamicCache = dynamic) -> None:
            dynamic.crop(context - dynamic.get_seq_length())

        def rewind(static: StaticCache = static) -> None:
            for layer in static.layers:
                layer.cumulative_length.fill_(context)  # pyright: ignore[reportAttributeAccessIssue]

        add(f"warm peer {B}", 1, _decoding(peer, dynamic, B, 1, options, crop))
        add(f"DynamicCache {B}", tokens, _decoding(peer, dynamic, B, tokens, options, crop))
        add(f"StaticCache {B}", tokens, _decoding(peer, static, B, tokens, options, rewind))
        if options.generate:
            add(f"peer generate {B}", options.tokens, _generating(peer, dynamic, B, options, crop))
    tokens = {**made.tokens, **dict.fromkeys(others, options.tokens)}
    seconds = interleaved({**made.calls, **others}, options.repeats, advance)
    return {name: [s / tokens[name] for s in values] for name, values in seconds.items()}, made


def _why_not(peer: LlamaForCausalLM, context: int, batch_size: int, options: DecodeOptions) -> str | None:
    if context > options.peer_max_context:
        return f"context above peer_max_context = {options.peer_max_context}"
    needed = round((2 + 2 / options.layers) * kv_bytes(peer, context, batch_size))  # two caches, a layer's copy
    available = available_memory(options.device)
    if available is not None and needed > 0.9 * available:
        return f"its caches need {needed / 2**30:.1f} GB, {available / 2**30:.1f} GB are available"
    return None


def _decoding(
    model: PreTrainedModel,
    cache: Cache,
    batch_size: int,
    tokens: int,
    options: DecodeOptions,
    after: Callable[[], None],
) -> Callable[[], None]:
    """A call that decodes ``tokens`` tokens of each row, the most probable ones, then ``after``."""
    token = torch.zeros(batch_size, 1, dtype=torch.long, device=options.device)

    @torch.no_grad()
    def call() -> None:
        nonlocal token
        for _ in range(tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        synchronize(options.device)
        after()

    return call


def _generating(
    model: PreTrainedModel, cache: Cache, batch_size: int, options: DecodeOptions, after: Callable[[], None]
) -> Callable[[], None]:
    """A call of ``generate()`` that goes on from the cache by ``tokens`` tokens."""

    def call() -> None:
        branch = copy.deepcopy(cache) if isinstance(cache, ResonanceCache) else cache
        ids = torch.zeros(batch_size, int(branch.get_seq_length()) + 1, dtype=torch.long, device=options.device)
        model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=branch,
            max_new_tokens=options.tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        synchronize(options.device)
        after()

    return call


def _reading(size: int, options: DecodeOptions) -> Callable[[], None]:
    """A call that reads ``size`` bytes once for each token: the floor of decoding one. A sum in float32 is the fastest
    way that PyTorch has to read memory on a CPU."""
    numbers = torch.ones(-(-size // 4), device=options.device)

    def call() -> None:
        for _ in range(options.tokens):
            numbers.sum()
        synchronize(options.device)

    return call


def _rows(
    context: int, B: int, seconds: Mapping[str, Sequence[float]], measured: _Measured, options: DecodeOptions
) -> list[Row]:
    peers = {name: seconds[f"{name} {B}"] for name in ("DynamicCache", "StaticCache") if f"{name} {B}" in seconds}
    best = min(peers, key=lambda name: statistics.median(peers[name]), default=None)
    ours, smallest = seconds[f"ours {B}"], options.batch_sizes[0]
    more = {
        "context": context,
        "batch_size": B,
        "tokens_read": options.read(context),
        "tokens_per_second": B / statistics.median(ours),
        "batch_gain": B / smallest * _ratio(seconds[f"ours {smallest}"], ours),
        "over_weights": _ratio(ours, seconds["weights"]),
        "weights_ms": 1e3 * statistics.median(seconds["weights"]),
        "over_first_context": _ratio(ours, seconds[f"first {B}"]),
        "state_bytes": measured.state_bytes[B],
        "peer_state_bytes": measured.kv_bytes[B],
        "peer_ms": {name: 1e3 * statistics.median(values) for name, values in peers.items()},
        "peer_skipped": measured.skipped[B],
        "seconds": {"ours": list(ours), **{name: list(values) for name, values in peers.items()}},
    }
    peer_name = f"{PEER}, {best}" if best else PEER
    rows = [time_row(f"context={context} B={B}", METRIC, ours, peers.get(best or ""), peer_name, **more)]
    if options.generate:
        pair = seconds[f"ours generate {B}"], seconds.get(f"peer generate {B}")
        more = {"context": context, "batch_size": B}
        rows.append(
            time_row(f"context={context} B={B}", f"{METRIC}, generate()", *pair, f"{PEER}, DynamicCache", **more)
        )
    return rows


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(ratios(a, b))


def plot(payload: Mapping[str, Any], path: str | Path) -> None:
    """Milliseconds a token over the context, a line a model and batch size, both axes logarithmic."""
    rows = [row for row in payload["rows"] if row["metric"] == METRIC]
    with figure(path, payload, size=(7, 4.2)) as (axes,):
        for i, B in enumerate(payload["options"]["batch_sizes"]):
            for key, label, style in (("ours", "resonance_nn", "-o"), ("peer", PEER, "--s")):
                points = [(row["context"], row[key]) for row in rows if row["batch_size"] == B and row[key] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=f"{label}, batch {B}")
        log_axes(axes, "context, tokens", "ms a token of every row")
