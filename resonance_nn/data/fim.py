"""Fill in the middle: documents in an order that lets a causal model see what follows a hole before it fills it.

    text = prefix + middle + suffix, cut at places of the text, not of its tokens; each part tokenized by itself

    psm: <|endoftext|> <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle <|endoftext|>
    spm: <|endoftext|> <|fim_suffix|> suffix <|fim_prefix|> prefix <|fim_middle|> middle <|endoftext|>

Source: Bavarian et al. 2022, "Efficient training of language models to fill in the middle"; spm with a sentinel before
each part, as psm has it: a model must see where the middle begins to know where it ends. Deviations: half of the
middles are what people ask for, the rest of a line or of a few, instead of a random span; a long document is first cut
into parts of many lengths, none longer than a training window, so that no middle is parted from what is around it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from resonance_nn.data.tokenizer import (
    decode_bytes,
    document_token_id,
    encode_bytes,
    special_token_id,
)

SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
ORDERS = ("spm", "psm")
SMALLEST_WINDOW = 64  # tokens; also the smallest rest of a window that a middle is made in
FRAME = 5  # tokens that are not text: the sentinels and the document's two ends


@dataclass(frozen=True)
class Sentinels:
    """The ids of the tokens around the three parts of a document."""

    boundary: int
    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Sentinels:
        """Raises ValueError if the tokenizer lacks one."""
        ids = {token: special_token_id(tokenizer, token) for token in SENTINELS}
        found = [i for i in ids.values() if i is not None]
        if len(found) < len(ids):
            missing = ", ".join(token for token, i in ids.items() if i is None)
            raise ValueError(
                f"the tokenizer has no {missing}, so it cannot mark a hole in a text; take one that `resonance train` "
                "made, as it does without --tokenizer"
            )
        return cls(document_token_id(tokenizer), *found)

    def prompt(self, prefix: Sequence[int], suffix: Sequence[int], order: str = "spm") -> list[int]:
        """What a middle follows. Raises ValueError for an unknown order."""
        if order not in ORDERS:
            raise ValueError(f"order = {order!r}: must be {' or '.join(ORDERS)}")
        if order == "psm":
            return [self.boundary, self.prefix, *prefix, self.suffix, *suffix, self.middle]
        return [self.boundary, self.suffix, *suffix, self.prefix, *prefix, self.middle]


@dataclass(frozen=True)
class FillInTheMiddle:
    """Which documents are rearranged and how: all of it follows from these, the same each time.

    Args:
        rate: the share of documents, in [0, 1]; each is drawn by itself.
        window: tokens L of a training window, ≥ SMALLEST_WINDOW; of parts that fit into one.
        seed: of the draws.
    """

    rate: float
    window: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate = {self.rate!r}: must be a share of the documents, from 0 to 1")
        if self.window < SMALLEST_WINDOW:
            raise ValueError(f"window = {self.window!r}: must be ≥ {SMALLEST_WINDOW} tokens")

    def changes(self, document: int) -> bool:
        """Whether the document of this number is rearranged."""
        return self._rng(document).random() < self.rate

    def parts(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], place: int, *draw: int
    ) -> Iterator[list[int]]:
        """A text rearranged: parts that each begin as a document does, and all bytes of the text once.

        Args:
            ids: of the text.
            place: where the first part will begin in its window, in [0, window).
            draw: numbers of the text, such as that of its document: each has draws of its own.

        Yields:
            Token ids of parts of which none crosses the end of a window. A text that fits into what is left of one is
            one part; of others the lengths are log-uniform, up to a window, and a part ends before a line if the text
            goes on. What is left of a window and too small for a middle is filled with text as it is.
        """
        sentinels, rng = Sentinels.of(tokenizer), self._rng(*draw)
        begin = 0
        while begin < len(ids):
            length = room = self.window - place
            fits = len(ids) - begin + FRAME <= room
            if not fits:
                length = round(SMALLEST_WINDOW * (self.window / SMALLEST_WINDOW) ** rng.random())
                length = length if length <= room - SMALLEST_WINDOW else room
            part, taken = [], 0
            if fits or room >= SMALLEST_WINDOW:
                part, taken = _rearranged(tokenizer, sentinels, ids[begin : begin + length], length, rng)
            if not part:  # at the end of a window
                taken = min(room - 1, len(ids) - begin)
                part = [sentinels.boundary, *ids[begin : begin + taken]]
                if begin + taken == len(ids) and len(part) < room:
                    part.append(sentinels.boundary)
            yield part
            begin += taken
            place = (place + len(part)) % self.window

    def _rng(self, *numbers: int) -> random.Random:
        return random.Random(f"{self.seed} {numbers}")


def _rearranged(
    tokenizer: PreTrainedTokenizerBase,
    sentinels: Sentinels,
    ids: Sequence[int],
    room: int,
    rng: random.Random,
) -> tuple[list[int], int]:
    """The longest beginning of ``ids`` that has room, up to a line's end, as one document; how many ids it took.

    Cut in three it may have more tokens than before, so try with fewer; empty if none would fit.
    """
    limit = room - FRAME
    while limit > 0:
        taken = min(limit, len(ids))
        if taken < len(ids):  # up to a line in the second half, if one begins there
            taken = next((n for n in range(taken, taken // 2, -1) if _breaks_line(tokenizer, ids[n])), taken)
        text = decode_bytes(tokenizer, ids[:taken])
        start, stop = cut(text, rng)
        prefix, middle, suffix = (encode_bytes(tokenizer, t) for t in (text[:start], text[start:stop], text[stop:]))
        order = rng.choice(ORDERS)
        part = [*sentinels.prompt(prefix, suffix, order), *middle, sentinels.boundary]
        if len(part) <= room:
            return part, taken
        limit = min(limit, taken) - (len(part) - room)
    return [], 0


def cut(text: bytes, rng: random.Random) -> tuple[int, int]:
    """Where the middle of a text begins and ends, between characters.

    Half of the time two random places. Else it ends where a line does, that of a random line that is not blank, or one
    or a few lines later (each half as often), and begins with that line, after its indentation, or within it.
    """
    lines = [] if rng.random() < 0.5 else line_spans(text)
    if lines:
        k = rng.randrange(len(lines))
        start, indented, stop = lines[k]
        start = rng.choice((start, indented, rng.randint(indented, stop)))
        while k < len(lines) - 1 and rng.random() < 0.5:
            k += 1
        stop = lines[k][2]
    else:
        start, stop = sorted(rng.randint(0, len(text)) for _ in range(2))
    return _whole(text, start), _whole(text, stop)


def line_spans(text: bytes) -> list[tuple[int, int, int]]:
    """Of each line that is not blank: where it begins, its indentation ends, and it ends before the line break."""
    spans, start = [], 0
    for line in text.split(b"\n"):
        content = line.removesuffix(b"\r")
        if content.strip():
            spans.append((start, start + len(content) - len(content.lstrip(b" \t")), start + len(content)))
        start += len(line) + 1
    return spans


def _whole(text: bytes, place: int) -> int:
    """``place``, or the beginning of the character that it is in."""
    for back in range(min(4, place + 1)):
        if place - back == len(text) or text[place - back] & 0xC0 != 0x80:
            return place - back
    return place  # these bytes are no UTF-8


def _breaks_line(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return decode_bytes(tokenizer, [token]).startswith((b"\n", b"\r"))
