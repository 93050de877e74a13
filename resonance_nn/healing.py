"""White space at a prompt's end, which a tokenizer cuts otherwise there than within a text.

"def f():\\n" ends in a token "\\n"; within a text that line break and the indentation after it are one, "\\n   ". A
model that never saw the first before code takes it for the end of the file. So the white space is taken off the prompt,
and what is generated has to begin with it, in whatever tokens the model likes best ("token healing", Lundberg 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from resonance_nn.data.tokenizer import decode_bytes, text_of_tokens

SPACE = b" \t\r\n"  # a byte each, and a character each


def cut_space(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], keep: int = 1) -> tuple[list[int], bytes]:
    """The ids without the white space at their end, and that white space; the first ``keep`` ids stay."""
    end = len(ids)
    while end > keep and (text := decode_bytes(tokenizer, ids[end - 1 : end])) and not text.strip(SPACE):
        end -= 1
    return list(ids[:end]), decode_bytes(tokenizer, ids[end:])


class BeginWith(LogitsProcessor):
    """Each row's text begins with bytes of its own: a token that does not fit has no chance.

    It fits if it goes on in the bytes that are left, or if it begins with all of them. Stateless, since beam search
    reorders the rows (of one prompt, which share their bytes).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, begins: Sequence[bytes], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._begins = begins
        self._texts = text_of_tokens(tokenizer)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        copies = len(input_ids) // len(self._begins)
        forbidden = torch.zeros_like(scores, dtype=torch.bool)
        for row, ids in enumerate(input_ids[:, self._prompt_length :].tolist()):
            begin = self._begins[row // copies]
            if rest := begin[len(decode_bytes(self._tokenizer, ids)) :]:
                fits = [i for i, text in self._texts.items() if rest.startswith(text) or text.startswith(rest)]
                forbidden[row] = True
                forbidden[row, fits] = False
        return scores.masked_fill(forbidden, -torch.inf)
