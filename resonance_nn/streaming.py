"""Generated token ids -> text as it comes, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from resonance_nn.data.tokenizer import IncrementalDecoder, decode_bytes


class StopText:
    """Token ids, as they come, to text that ends before the first stop string.

    What may become a stop string, or is a character cut between two tokens, is held back. The first ``skip`` characters
    are left out: they are of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), skip: int = 0) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop = tuple(stop)
        self._skip = skip
        self._held = ""
        self.stopped = False

    def push(self, ids: Sequence[int], *, final: bool = False) -> str:
        """The text that is certain now; with ``final``, all that is left."""
        if self.stopped:
            return ""
        text = self._decoder.decode(ids, final=final)
        skipped = min(self._skip, len(text))
        self._skip -= skipped
        text = self._held + text[skipped:]
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0
        if not final:  # the longest end of the text that some stop string begins with
            begins = {stop[:n] for stop in self._stop for n in range(1, len(stop))}
            held = max((len(begin) for begin in begins if text.endswith(begin)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


class TextStreamer(BaseStreamer):
    """Gives ``write`` the completion's text while transformers generates it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], stop: Sequence[str] = (), skip: int = 0
    ) -> None:
        self._text = StopText(tokenizer, stop, skip)
        self._write = write
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        if self._in_prompt:  # transformers hands over the prompt first
            self._in_prompt = False
        elif text := self._text.push(value.flatten().tolist()):
            self._write(text)

    def end(self) -> None:
        if text := self._text.push([], final=True):
            self._write(text)


class StopAtText(StoppingCriteria):
    """Stops a row once its completion holds one of the stop strings. Stateless, since beam search reorders rows.

    ``skips``: for each prompt how many bytes of what follows it are its own, see ``healing``.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int, skips: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [text.encode() for text in stop]
        self._skips = skips
        self._window = max(map(len, self._stop))  # every token but a special one spells a byte or more
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
        begin, skips = input_ids.shape[1] - self._window, [0] * len(self._skips)
        if begin < self._prompt_length + max(self._skips):  # the prompt's own bytes may be among them
            begin, skips = self._prompt_length, self._skips
        tails = input_ids[:, begin:].tolist()
        copies = len(tails) // len(skips)
        texts = [decode_bytes(self._tokenizer, tail)[skips[row // copies] :] for row, tail in enumerate(tails)]
        return torch.tensor([any(s in text for s in self._stop) for text in texts], device=input_ids.device)


class StopWhen(StoppingCriteria):
    """Stops all rows once ``condition()`` holds (Ctrl-C)."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self._condition(), device=input_ids.device)
