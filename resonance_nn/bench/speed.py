"""Training speed: a step of our language model beside one of transformers' Llama (SDPA) of equal size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from resonance_nn.allocator import keep_freed_memory
from resonance_nn.bench.common import Row, interleaved, rate_row, result
from resonance_nn.config import ResonanceConfig
from resonance_nn.models import ResonanceForCausalLM

PEER = "Llama (SDPA)"


@dataclass(frozen=True)
class SpeedOptions:
    """What to measure. A batch has ``tokens_per_batch`` tokens, or one sequence if that is longer."""

    lengths: Sequence[int] = (512, 2048, 8192)
    hidden_size: int = 512
    layers: int = 4
    vocab_size: int = 8192
    mixers: tuple[str, ...] | None = None
    repeats: int = 5
    dtype: torch.dtype = torch.bfloat16
    tokens_per_batch: int = 8192
    forward_only: bool = False
    device: str = "cpu"
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError naming the option, its value and what is allowed."""
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths = {self.lengths}: must be one or more numbers of tokens ≥ 2")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("hidden_size", "layers", "vocab_size", "repeats", "tokens_per_batch") and value < 1:
                raise ValueError(f"{field.name} = {value}: must be ≥ 1")


def run(options: SpeedOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Build both models, check that ours is causal, time them in turns, and return what is written as JSON.

    ``progress`` is told the steps done and their total.
    """
    options.check()
    kept = options.device == "cpu" and keep_freed_memory()  # as training does; both models gain
    torch.manual_seed(options.seed)
    ours, peer = build(options)
    check_causal(ours, options.vocab_size)
    sizes = {"ours": count(ours), "peer": count(peer)}
    total, done = 2 * (options.repeats + 1) * len(options.lengths), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    rows: list[Row] = []
    for length in options.lengths:
        batch = max(1, options.tokens_per_batch // length)
        ids = torch.randint(options.vocab_size, (batch, length), device=options.device)
        steps = {"ours": training_step(ours, ids, options), "peer": training_step(peer, ids, options)}
        seconds = interleaved(steps, options.repeats, advance)
        metric = "forward tokens/s" if options.forward_only else "training tokens/s"
        more = {"length": length, "batch": batch, "seconds": seconds}
        work = batch * length
        rows.append(rate_row(f"L={length} B={batch}", metric, work, seconds["ours"], seconds["peer"], PEER, **more))
    described = {f.name: getattr(options, f.name) for f in fields(options)}
    described |= {"dtype": str(options.dtype).removeprefix("torch."), "lengths": list(options.lengths)}
    described["mixers"] = list(ours.config.mixers)
    return result("speed", rows, options.device, options=described, parameters=sizes, keeps_freed_memory=kept)


def build(options: SpeedOptions) -> tuple[ResonanceForCausalLM, LlamaForCausalLM]:
    """Both models, with equal width, depth, heads and vocabulary, tied embeddings, and parameters within 2%."""
    chosen: dict[str, Any] = {} if options.mixers is None else {"mixers": options.mixers}
    config = ResonanceConfig(
        vocab_size=options.vocab_size, hidden_size=options.hidden_size, num_hidden_layers=options.layers, **chosen
    )

    def llama(intermediate_size: int) -> LlamaForCausalLM:
        fields: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": intermediate_size,
            "max_position_embeddings": max(options.lengths),
            "tie_word_embeddings": True,
            "attn_implementation": "sdpa",
        }
        return LlamaForCausalLM(LlamaConfig(**fields))

    with torch.device(options.device):
        ours = ResonanceForCausalLM(config)
    with torch.device("meta"):
        smallest, next_one = count(llama(8)), count(llama(16))
    intermediate_size = 8 + 8 * max(0, round((count(ours) - smallest) / (next_one - smallest)))
    with torch.device(options.device):
        peer = llama(intermediate_size)
    if abs(count(peer) / count(ours) - 1) > 0.02:
        raise ValueError(
            f"hidden_size = {options.hidden_size}: no Llama within 2% of our {count(ours):,} parameters (the nearest "
            f"has {count(peer):,}); use a larger width"
        )
    return ours.train(not options.forward_only), peer.train(not options.forward_only)


def count(model: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def check_causal(model: nn.Module, vocab_size: int, length: int = 96) -> None:
    """A number is worth nothing if the model reads its own answers: changing a token must leave all logits before it
    as they are, and change some after it. Raises RuntimeError otherwise."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.randint(vocab_size, (1, length), device=device)
    before = model(ids).logits
    for position in (1, length // 2, length - 1):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % vocab_size
        difference = (model(changed).logits - before).abs().amax(-1)[0]
        scale = before.abs().max()
        if difference[:position].max() > 1e-4 * scale or difference[position:].max() == 0:
            raise RuntimeError(f"the model is not causal at position {position}: nothing is measured")
    model.train(training)


def training_step(model: nn.Module, ids: Tensor, options: SpeedOptions) -> Callable[[], None]:
    """A call that runs a training step (or the forward pass alone) and waits for it."""
    kind = torch.device(options.device).type

    def step() -> None:
        with (
            torch.set_grad_enabled(not options.forward_only),
            torch.autocast(kind, dtype=options.dtype, enabled=options.dtype != torch.float32),
        ):
            loss = model(input_ids=ids, labels=ids).loss
        if not options.forward_only:
            loss.backward()
            model.zero_grad(set_to_none=True)
        loss.item()
        if kind == "cuda":
            torch.cuda.synchronize()

    return step
