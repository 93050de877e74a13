"""Byte-level BPE: training, and the exact map bytes <-> token ids.

A byte-level tokenizer writes each of the 256 bytes as one printable character, so its vocabulary can spell any byte
string. `encode_bytes` and `decode_bytes` use that directly: they are inverse on *any* bytes, valid UTF-8 or not, and
text that looks like a special token stays text. Calling the tokenizer itself (`tokenizer(text)`) gives the same ids
on text without special tokens, after the leading `<|endoftext|>`.
"""

import codecs
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",  # bos and eos at once: the first token of every document
    "<|pad|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|mask|>",
)

# What a merge may not cross. A line break takes the next line's indentation with it, so that code costs one token a
# line for its layout, and a prompt that ends in indentation is cut as the training text was.
SPLIT_PATTERN = "|".join(
    (
        r"[\r\n]+[ \t]*",  # line breaks and the indentation after them
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word with the space or sign before it
        r"\p{N}{1,3}",  # digits
        r" ?[^\s\p{L}\p{N}]+",  # signs
        r"[^\S\r\n]+(?!\S)",  # spaces, except the one that belongs to the next word
        r"\s",
    )
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('role must be system, user or assistant, got ' ~ message['role']) }}{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

PIECE_BYTES = 1 << 16  # inputs are encoded in pieces of at most this many bytes
BATCH_BYTES = 1 << 20  # and this many bytes at a time, over all cores


def train_tokenizer(texts: Iterable[bytes], vocab_size: int, *, progress: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens: SPECIAL_TOKENS, the 256 bytes, then merges by frequency.

    Deterministic. A corpus too small for that many merges gives fewer tokens: take `len(tokenizer)`. Invalid UTF-8 in
    `texts` is ignored for the merges only. Raises ValueError if `vocab_size` < 256 + len(SPECIAL_TOKENS).
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: it must be >= {smallest} "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens); 4096 or 8192 suit a small corpus"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),
    )
    core.train_from_iterator((text.decode("utf-8", errors="ignore") for text in texts), trainer)
    bos = SPECIAL_TOKENS[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=bos,
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in (bos, "<|pad|>", "<|mask|>")],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode_bytes(tokenizer: PreTrainedTokenizerBase, data: bytes) -> list[int]:
    """Token ids of `data`, without special tokens; `decode_bytes` gives exactly `data` back.

    Bytes that are not UTF-8 become single-byte tokens. Raises ValueError if the tokenizer is not byte-level.
    """
    return [i for ids in encode_pieces(tokenizer, cut_pieces([data])) for i in ids]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None = None) -> list[int]:
    """At most ``limit`` ids of a text by itself, behind the token that begins a document: as ``tokenizer(text)``."""
    return [document_token_id(tokenizer), *encode_bytes(tokenizer, text.encode())][:limit]


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[bytes]) -> Iterator[list[int]]:
    """The ids of each piece, in order; about a megabyte of pieces is read ahead and encoded on all cores."""
    codec = _byte_codec(tokenizer)
    batch: list[bytes] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= BATCH_BYTES:
            yield from codec.encode(batch)
            batch, size = [], 0
    yield from codec.encode(batch)


def cut_pieces(chunks: Iterable[bytes], limit: int = PIECE_BYTES) -> Iterator[bytes]:
    """Cuts a stream of bytes into pieces of at most `limit` (>= 8) bytes, the same however it came in chunks.

    A piece ends before a line break in its second half; without one, at the border of a UTF-8 character.
    """
    rest = b""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > limit:
            cut = rest.rfind(b"\n", start + limit // 2, start + limit)
            if cut < 0:
                cut = start + limit
                while cut > start + limit - 3 and rest[cut] & 0xC0 == 0x80:  # inside a character
                    cut -= 1
            elif rest[cut - 1 : cut] == b"\r":
                cut -= 1
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def decode_bytes(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], *, skip_special_tokens: bool = True) -> bytes:
    """The bytes that `ids` spell; special tokens are dropped, or kept as their text.

    Raises ValueError for an id outside the vocabulary, and for a tokenizer that is not byte-level.
    """
    codec = _byte_codec(tokenizer)
    parts = []
    for i in map(int, ids):
        part = codec.bytes_of.get(i)
        if part is None:
            raise ValueError(f"token id {i} is not in the tokenizer's vocabulary (0 to {codec.vocab_size - 1})")
        if not (skip_special_tokens and i in codec.special_ids):
            parts.append(part)
    return b"".join(parts)


def text_of_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes of every id that spells any; special tokens are left out."""
    codec = _byte_codec(tokenizer)
    return {i: text for i, text in codec.bytes_of.items() if text and i not in codec.special_ids}


class IncrementalDecoder:
    """Token ids, as they come, to text: a character cut between two tokens is held back until it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, ids: Iterable[int], *, final: bool = False) -> str:
        """The text that `ids` complete; `final=True` also gives what was held back (as U+FFFD)."""
        return self._utf8.decode(decode_bytes(self._tokenizer, ids, skip_special_tokens=self._skip), final)


def document_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands first in every document: bos, or eos where there is no bos (ValueError without either)."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError("the tokenizer has neither a bos nor an eos token; set tokenizer.bos_token to mark documents")


def special_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a special token, None if the tokenizer has no such one."""
    return next((i for i, added in tokenizer.added_tokens_decoder.items() if added.content == token), None)


def tokenizer_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The smallest `vocab_size` of a model that takes every id of this tokenizer."""
    return _byte_codec(tokenizer).vocab_size


def merged_pairs(tokenizer: PreTrainedTokenizerBase) -> dict[int, tuple[int, int]]:
    """Of each token that was made by a merge, the two tokens that it was made of."""
    model = json.loads(_byte_codec(tokenizer).core.to_str())["model"]
    ids: dict[str, int] = model["vocab"]
    pairs: dict[int, tuple[int, int]] = {}
    for merge in model["merges"]:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        pairs.setdefault(ids[a + b], (ids[a], ids[b]))
    return pairs


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides the ids of a document: equal for equal tokenizers, whatever their padding."""
    core = json.loads(_byte_codec(tokenizer).core.to_str())
    return hashlib.sha256(json.dumps([core, document_token_id(tokenizer)]).encode()).hexdigest()


class _ByteCodec:
    """Tables of one byte-level tokenizer. Its splitter and merges are shared, its own settings never touched."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.size = len(tokenizer)
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not isinstance(backend.model, models.BPE):
            kind = type(tokenizer if backend is None else backend.model).__name__
            raise ValueError(f"the tokenizer is not byte-level BPE but {kind}; train one with train_tokenizer")
        vocab: dict[str, int] = backend.get_vocab(with_added_tokens=False)
        byte_of = _byte_alphabet()
        missing = [byte for char, byte in byte_of.items() if char not in vocab]
        if missing:
            raise ValueError(
                f"the tokenizer is not byte-level: {len(missing)} of the 256 bytes have no token "
                f"(the first is 0x{missing[0]:02x}); train one with train_tokenizer"
            )
        added = tokenizer.added_tokens_decoder
        self.special_ids = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self.bytes_of = {i: bytes(byte_of[c] for c in s) for s, i in vocab.items() if all(c in byte_of for c in s)}
        self.bytes_of |= {i: token.content.encode() for i, token in added.items()}
        self.vocab_size = max(self.bytes_of) + 1
        self.byte_ids = {byte: vocab[char] for char, byte in byte_of.items()}
        self.core = Tokenizer(backend.model)  # no added tokens, no normaliser, no truncation
        if backend.pre_tokenizer is not None:
            self.core.pre_tokenizer = backend.pre_tokenizer
        probe = "word \n\t two  spaces' 12345 é 😀\r\n\n  <|end|>".encode()
        if b"".join(self.bytes_of.get(i, b"") for i in self.encode([probe])[0]) != probe:
            raise ValueError(
                "the tokenizer is byte-level but changes the text (a prefix space, or a splitter that drops "
                "characters), so bytes would not survive it; train one with train_tokenizer"
            )

    def encode(self, batch: list[bytes]) -> list[list[int]]:
        """Ids of each item. Bytes that are not UTF-8 arrive as lone surrogates, U+DC00 + byte."""
        texts = [data.decode("utf-8", errors="surrogateescape") for data in batch]
        runs = [[text] if text.isascii() else re.split("([\udc80-\udcff]+)", text) for text in texts]
        valid = iter(self.core.encode_batch_fast([r for run in runs for r in run[::2]], add_special_tokens=False))
        result = []
        for run in runs:
            ids: list[int] = []
            for k, part in enumerate(run):  # valid and invalid stretches alternate
                ids += [self.byte_ids[ord(c) - 0xDC00] for c in part] if k % 2 else next(valid).ids
            result.append(ids)
        return result


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte, as GPT-2 chose it: itself where printable, else U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + k): b for k, b in enumerate(others)}


_codecs: WeakKeyDictionary[PreTrainedTokenizerBase, _ByteCodec] = WeakKeyDictionary()


def _byte_codec(tokenizer: PreTrainedTokenizerBase) -> _ByteCodec:
    codec = _codecs.get(tokenizer)
    if codec is None or codec.size != len(tokenizer):  # tokens were added since
        codec = _codecs[tokenizer] = _ByteCodec(tokenizer)
    return codec
