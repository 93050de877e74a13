"""Prompts -> completions: a prompt read once in chunks, its state saved and continued, text as it comes.

ids -> prefill (all but the last token, in chunks) -> ResonanceCache -> transformers' generate -> Completion
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from resonance_nn.cache import ResonanceCache
from resonance_nn.config import ResonanceConfig
from resonance_nn.data.fim import SENTINELS
from resonance_nn.data.tokenizer import (
    document_token_id,
    encode_bytes,
    special_token_id,
    tokenizer_vocab_size,
)
from resonance_nn.healing import BeginWith, cut_space
from resonance_nn.models.causal_lm import ResonanceForCausalLM
from resonance_nn.streaming import StopAtText, StopText, StopWhen, TextStreamer

SAMPLED = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}  # top_k 0: all
PREFILL_CHUNK = 8192  # tokens of a prompt in one forward pass: memory does not grow with the prompt


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``check`` refuses what is out of range or without effect.

    Sampling, unless ``greedy`` or ``num_beams`` > 1. Then what is None is as the model's ``generation_config.json``
    says, and where that says nothing the temperature is 0.8 and the rule left out. Greedy decoding and beams take no
    repetition penalty from there; settings that are not named here are the file's, as everywhere in transformers.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    greedy: bool = False
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def samples(self) -> bool:
        return not self.greedy and self.num_beams == 1

    def check(self) -> None:
        """Raise ValueError naming the setting, its value and what is allowed."""
        for name, valid, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 0, "≥ 0"),
            (
                "temperature",
                self.temperature is None or 1e-4 < self.temperature < math.inf,
                "> 0.0001; greedy decoding is temperature 0",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 63, "from 0 to 2^63 - 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "≥ 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "> 0; 1 is none"),
            ("num_beams", self.num_beams >= 1, "≥ 1"),
            ("num_return_sequences", self.num_return_sequences >= 1, "≥ 1"),
            ("stop", all(self.stop), "text that is not empty"),
        ):
            if not valid:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be {allowed}")
        if self.greedy and self.num_beams > 1:
            raise ValueError("greedy and num_beams > 1 exclude each other")
        if not self.samples:
            how = "greedy decoding" if self.greedy else "beam search"
            for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} = {getattr(self, name)!r}: has no effect on {how}; leave one of them out")
            if self.num_return_sequences > self.num_beams:
                raise ValueError(
                    f"num_return_sequences = {self.num_return_sequences}: {how} gives at most {self.num_beams}"
                )

    def generation_config(self, model: ResonanceForCausalLM, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """The same, as transformers takes it. Generation ends at the token that begins a document."""
        end = document_token_id(tokenizer)
        ends = [end] if (turn := special_token_id(tokenizer, "<|end|>")) is None else [end, turn]
        unknown = list(range(tokenizer_vocab_size(tokenizer), model.config.vocab_size))
        if model.config.fim_rate:  # it has seen sentinels follow text, but no text begins with them or holds them
            unknown += [i for token in SENTINELS if (i := special_token_id(tokenizer, token)) is not None]
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.samples,
            num_beams=self.num_beams,
            num_return_sequences=self.num_return_sequences,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            suppress_tokens=unknown or None,  # ids that are no text
            eos_token_id=ends,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        if self.samples:
            for name, otherwise in SAMPLED.items():
                given, own = getattr(self, name), getattr(model.generation_config, name, None)
                setattr(config, name, given if given is not None else otherwise if own is None else own)
        return config


@dataclass(frozen=True)
class Completion:
    """One continuation: its tokens without the one that ended it, its text up to a stop string, and why it ended."""

    ids: list[int]
    text: str
    finish_reason: str  # "length", "end" (of document or turn), "stop" (string), "interrupted"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: bytes) -> list[int]:
    """The ids of a document that begins with ``prompt``, exactly its bytes."""
    return [document_token_id(tokenizer), *encode_bytes(tokenizer, prompt)]


@torch.no_grad()
def prefill(
    model: ResonanceForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    cache: ResonanceCache | None = None,
    chunk_size: int = PREFILL_CHUNK,
) -> ResonanceCache:
    """Read a prompt (B, L), but for its last token, into a cache, ``chunk_size`` tokens at a time.

    Tokens the cache has seen already are not read again. The last one is left for ``generate``, whose first step needs
    its logits.
    """
    cache = ResonanceCache(model.config.num_hidden_layers) if cache is None else cache
    while (start := cache.get_seq_length()) < input_ids.shape[1] - 1:
        stop = min(start + chunk_size, input_ids.shape[1] - 1)
        mask = None if attention_mask is None else attention_mask[:, start:stop]
        ids = input_ids[:, start:stop]
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def complete(
    model: ResonanceForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    cache: ResonanceCache | None = None,
    write: Callable[[str], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    chunk_size: int = PREFILL_CHUNK,
    heal: bool = False,
) -> list[list[Completion]]:
    """Continue each prompt (token ids, ≥ 1), all in one left-padded batch.

    Args:
        cache: the state after the first tokens of a single prompt; the rest is read into it. With one sequence to
            generate it goes on to the last token but one of the completion, else copies of it do.
        write: called with the text of the completion as it comes; for one prompt and one sequence, without beams.
        interrupted: asked after each token whether to stop.
        heal: let the model spell the white space at a prompt's end anew, see ``healing``: ``Completion.ids`` then begin
            with it, its text does not.

    Returns:
        ``num_return_sequences`` completions for each prompt.
    """
    sampling.check()
    rows = sampling.num_return_sequences
    if write is not None and (len(prompts) > 1 or rows > 1 or sampling.num_beams > 1):
        raise ValueError("text can be streamed for one prompt and one sequence without beams only")
    if sampling.max_new_tokens == 0:
        return [[Completion([], "", "length") for _ in range(rows)] for _ in prompts]
    begins = [b""] * len(prompts)
    if heal:
        read = 1 if cache is None else max(1, cache.get_seq_length() + 1)
        prompts, begins = zip(*(cut_space(tokenizer, ids, read) for ids in prompts), strict=True)
    skips = [len(begin) for begin in begins]
    config = sampling.generation_config(model, tokenizer)
    ends: list[int] = config.eos_token_id
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    input_ids = torch.tensor([[config.pad_token_id] * n + list(p) for n, p in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (length - n) for n in padding])
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)

    cache = prefill(model, input_ids, mask, cache, chunk_size)
    if (copies := max(rows, sampling.num_beams)) > 1:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(copies)
    criteria = StoppingCriteriaList([StopWhen(interrupted)])
    if sampling.stop:
        criteria.append(StopAtText(tokenizer, sampling.stop, length, skips))
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    generate: Callable[..., Tensor] = model.generate  # pyright: ignore[reportAttributeAccessIssue] (its protocol)
    try:
        output = generate(
            input_ids,
            attention_mask=mask,
            generation_config=config,
            past_key_values=cache,
            stopping_criteria=criteria,
            logits_processor=[BeginWith(tokenizer, begins, length)] if any(skips) else None,
            streamer=None if write is None else TextStreamer(tokenizer, write, sampling.stop, skips[0]),
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ValueError("the model's logits are not finite: its training diverged; train it anew") from error
    read = partial(_completion, tokenizer, sampling, ends)
    completions = [read(ids, skips[row // rows]) for row, ids in enumerate(output[:, length:].tolist())]
    return [completions[i : i + rows] for i in range(0, len(completions), rows)]


def _completion(
    tokenizer: PreTrainedTokenizerBase, sampling: Sampling, ends: Sequence[int], ids: list[int], skip: int
) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    reader = StopText(tokenizer, sampling.stop, skip)
    text = reader.push(ids, final=True)
    if reader.stopped:
        reason = "stop"
    elif end is not None:
        reason = "end"
    else:
        reason = "length" if len(ids) >= sampling.max_new_tokens else "interrupted"
    return Completion(ids, text, reason)


def save_state(
    path: str | os.PathLike[str], model: ResonanceForCausalLM, cache: ResonanceCache, ids: Sequence[int]
) -> None:
    """Write the state of a prompt, its token ids, and which model read it."""
    if cache.get_seq_length() == 0:
        raise ValueError(f"state file {str(path)!r}: there is nothing to save; give a prompt")
    cache.save(path, input_ids=torch.tensor(ids), model=fingerprint(model))


def load_state(path: str | os.PathLike[str], model: ResonanceForCausalLM) -> tuple[ResonanceCache, list[int]]:
    """The cache and the token ids that :func:`save_state` wrote; ValueError if another model read them."""
    cache, extra = ResonanceCache.load(path, device=model.device)
    if "input_ids" not in extra or "model" not in extra:
        raise ValueError(f"state file {str(path)!r}: holds no prompt; write it with --save-state")
    if not torch.equal(extra["model"].cpu(), fingerprint(model)):
        raise ValueError(f"state file {str(path)!r}: was saved by another model; read the prompt again with this one")
    return cache, extra["input_ids"].tolist()


@torch.no_grad()
def fingerprint(model: ResonanceForCausalLM) -> Tensor:
    """32 bytes that tell models apart: a hash of the configuration and of a sample of every weight.

    In bfloat16, so that a model loaded in another precision is still the same one.
    """
    config = model.config
    fields = [(name, getattr(config, name)) for name in sorted(ResonanceConfig.architecture())]
    digest = hashlib.sha256(repr(fields).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16).view(torch.int16).cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


class Chat:
    """A conversation whose state is kept between turns: each turn feeds its new tokens only.

    ``ids`` is the conversation as the tokenizer's chat template writes it; ``cache`` is the state after all of them
    but the last one or two.
    """

    def __init__(self, model: ResonanceForCausalLM, tokenizer: PreTrainedTokenizerBase, system: str = "") -> None:
        roles = {role: special_token_id(tokenizer, f"<|{role}|>") for role in ("system", "user", "assistant", "end")}
        self._role = {role: i for role, i in roles.items() if i is not None}
        if missing := [f"<|{role}|>" for role in roles if role not in self._role]:
            raise ValueError(f"the model's tokenizer has no {', '.join(missing)}, so it cannot chat; use generate")
        self.model, self.tokenizer, self._system = model, tokenizer, system
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, but for the system prompt."""
        self.ids = [document_token_id(self.tokenizer)]
        self.cache = ResonanceCache(self.model.config.num_hidden_layers)
        if self._system:
            self._say("system", self._system)

    def reply(
        self,
        text: str,
        sampling: Sampling,
        *,
        write: Callable[[str], None] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """The assistant's answer to ``text``; ``sampling`` is for one sequence without beams."""
        self._say("user", text)
        self.ids.append(self._role["assistant"])
        ((completion,),) = complete(
            self.model, self.tokenizer, [self.ids], sampling, cache=self.cache, write=write, interrupted=interrupted
        )
        self.ids += [*completion.ids, self._role["end"]]
        return completion

    def save(self, path: str | os.PathLike[str]) -> None:
        save_state(path, self.model, self.cache, self.ids)

    def load(self, path: str | os.PathLike[str]) -> None:
        self.cache, self.ids = load_state(path, self.model)

    def _say(self, role: str, text: str) -> None:
        content = encode_bytes(self.tokenizer, text.encode("utf-8", errors="surrogateescape"))
        self.ids += [self._role[role], *content, self._role["end"]]
