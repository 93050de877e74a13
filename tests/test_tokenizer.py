"""The tokenizer: exact on any bytes, deterministic, and at home in transformers."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from resonance_nn.data import (
    SPECIAL_TOKENS,
    IncrementalDecoder,
    cut_pieces,
    decode_bytes,
    document_token_id,
    encode_bytes,
    encode_pieces,
    tokenizer_fingerprint,
    tokenizer_vocab_size,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]
CORPUS = [
    b"def area(width, height):\n    if width < 0:\n        raise ValueError('width')\n    return width * height\n" * 20,
    "Ein Märchen, drei Wörter: naïve café 12345. <|endoftext|> 😀😀\r\n\r\n".encode() * 20,
    b"\xff\xfe broken " * 5,
]
NASTY = [
    b"",
    b"\n",
    b"\r\n\r\n  x\r",
    b" leading and trailing  \t ",
    "emoji 👩‍👩‍👧‍👦 ü e\u0301 \u2028 \x85 \ufeff".encode(),
    "".join(SPECIAL_TOKENS).encode() * 2,
    b"<|endoftext|>" + bytes(range(256)) + b"<|pad|>",
    b"\xed\xa0\x80 \xc0\x80 \xf4\x90\x80\x80 \xe2\x82",  # surrogate, overlong, too high, cut short
    b"\x00\x00\xff",
    b"a" * 200_000,
    "é".encode() * 100_000,
    b"\x80" * 100_000,
    b"\n" * 100_000,
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, 340, progress=False)


def foreign(model, pre_tokenizer=None, **kwargs) -> PreTrainedTokenizerFast:
    core = Tokenizer(model)
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=core, **kwargs)


def byte_vocab() -> dict[str, int]:
    return {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.mark.parametrize("data", NASTY, ids=range(len(NASTY)))
def test_round_trip_of_nasty_bytes(tokenizer, data):
    ids = encode_bytes(tokenizer, data)
    assert decode_bytes(tokenizer, ids) == data
    assert decode_bytes(tokenizer, ids, skip_special_tokens=False) == data
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)


def test_round_trip_fuzz(tokenizer):
    rng = random.Random(0)
    atoms = [
        *NASTY[:9],
        b" ",
        b"\n    ",
        b"word",
        b"123",
        b"\xf0\x9f",
        "日本".encode(),
        *map(str.encode, SPECIAL_TOKENS),
    ]
    for _ in range(300):
        parts = [rng.choice(atoms) if rng.random() < 0.7 else rng.randbytes(rng.randrange(8)) for _ in range(12)]
        data = b"".join(parts)
        assert decode_bytes(tokenizer, encode_bytes(tokenizer, data)) == data
    pieces = [rng.randbytes(rng.randrange(3000)) for _ in range(800)]  # more than one batch
    assert [decode_bytes(tokenizer, ids) for ids in encode_pieces(tokenizer, pieces)] == pieces


def test_pieces_do_not_depend_on_the_chunks_and_keep_characters_whole():
    rng = random.Random(1)
    for alphabet in (["a", "\n"], ["é", "😀"], ["x", "日", "\r\n"]):
        data = "".join(rng.choices(alphabet, k=3000)).encode()
        whole = list(cut_pieces([data], limit=64))
        assert b"".join(whole) == data
        assert max(map(len, whole)) <= 64
        for piece in whole:
            piece.decode()
            assert not piece.endswith(b"\r")
        cuts = sorted(rng.choices(range(len(data)), k=40))
        chunks = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert list(cut_pieces(chunks, limit=64)) == whole


def test_vocabulary(tokenizer):
    assert tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS)))) == list(SPECIAL_TOKENS)
    assert len(tokenizer) == tokenizer_vocab_size(tokenizer) == 340
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.mask_token == "<|mask|>"
    assert tokenizer.model_max_length > 10**12
    assert document_token_id(tokenizer) == 0


def test_splits_indentation_and_digits(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("if x:\n        y_z = 1234567  # it's\n\n")
    split = [bytes(ord(c) if ord(c) < 256 else ord(c) - 0x100 for c in piece).decode() for piece, _ in pieces]
    expected = ["if", " x", ":", "\n        ", "y", "_z", " =", " ", "123", "456", "7", " ", " #", " it", "'s", "\n\n"]
    assert split == expected
    assert len(encode_bytes(tokenizer, b"\n        ")) == 1


@pytest.mark.parametrize("size", [0, 255, 256 + len(SPECIAL_TOKENS) - 1])
def test_too_small_a_vocabulary(size):
    with pytest.raises(ValueError, match=rf"vocab_size={size}.*>= 266"):
        train_tokenizer(CORPUS, size, progress=False)


def test_smallest_vocabulary_and_small_corpus():
    for texts, size in (([], 300), ([b"ab"], 5000), (CORPUS, 266)):
        tokenizer = train_tokenizer(texts, size, progress=False)
        assert len(tokenizer) <= size
        assert decode_bytes(tokenizer, encode_bytes(tokenizer, NASTY[6])) == NASTY[6]


def test_training_is_deterministic_across_processes(tokenizer):
    code = (
        "import resonance_nn.data as d, tests.test_tokenizer as t\n"
        "print(d.tokenizer_fingerprint(d.train_tokenizer(t.CORPUS, 340, progress=False)))"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert other.stdout.strip() == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(train_tokenizer(CORPUS[:1], 340, progress=False)) != other.stdout.strip()


def test_agrees_with_the_tokenizer_called(tokenizer):
    text = CORPUS[0].decode() + "  naïve 😀\n\tx"
    assert tokenizer(text)["input_ids"] == [0, *encode_bytes(tokenizer, text.encode())]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == encode_bytes(tokenizer, text.encode())
    assert tokenizer.decode(encode_bytes(tokenizer, text.encode())) == text
    assert tokenizer.decode(encode_bytes(tokenizer, b"a , b . i 'm")) == "a , b . i 'm"  # no clean-up
    batch = tokenizer(["a", "a b c d"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id  # on the left, for generation


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "resonance"}')  # as in a checkpoint
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded("a<|end|> b")["input_ids"] == tokenizer("a<|end|> b")["input_ids"]
    assert loaded("a")["input_ids"][0] == 0
    assert (loaded.bos_token_id, loaded.pad_token_id, loaded.padding_side) == (0, 1, "left")
    assert loaded.model_max_length > 10**12
    for data in NASTY[:9]:
        assert encode_bytes(loaded, data) == encode_bytes(tokenizer, data)
    chat = [{"role": "user", "content": "x"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)


def test_chat_template(tokenizer):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|endoftext|><|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    role = tokenizer.convert_tokens_to_ids
    assert ids[:2] == [0, role("<|system|>")]
    assert ids[-2:] == [role("<|end|>"), role("<|assistant|>")]
    assert ids.count(0) == 1
    with pytest.raises(Exception, match="role must be system, user or assistant, got robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": ""}], tokenize=False)


def test_special_tokens_in_decode(tokenizer):
    ids = [0, *encode_bytes(tokenizer, b"x"), 8, 1]
    assert decode_bytes(tokenizer, ids) == b"x"
    assert decode_bytes(tokenizer, torch.tensor(ids), skip_special_tokens=False) == b"<|endoftext|>x<|end|><|pad|>"
    for bad in (-1, 340):
        with pytest.raises(ValueError, match=rf"token id {bad} is not in .* \(0 to 339\)"):
            decode_bytes(tokenizer, [bad])


def test_tokenizer_is_left_as_it_was(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(5)
    try:
        before = tokenizer.backend_tokenizer.to_str()
        assert decode_bytes(tokenizer, encode_bytes(tokenizer, NASTY[6] * 9)) == NASTY[6] * 9
        assert tokenizer.backend_tokenizer.to_str() == before
        assert tokenizer("<|end|>")["input_ids"] == [0, 8]
    finally:
        tokenizer.backend_tokenizer.no_truncation()


def test_incremental_decoder(tokenizer):
    text = "é😀 日本 <|end|> ok\n"
    ids = [0, *encode_bytes(tokenizer, text.encode())]
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.decode([i]) for i in ids]
    assert "".join(parts) == text
    assert "" in parts[1:]  # something was held back
    assert decoder.decode(encode_bytes(tokenizer, "😀".encode()[:2])) == ""
    assert decoder.decode([], final=True) == "\ufffd"


def test_foreign_byte_level_tokenizer():
    core = foreign(models.BPE(byte_vocab(), []), pre_tokenizers.ByteLevel(add_prefix_space=False), eos_token="</s>")
    core.backend_tokenizer.normalizer = normalizers.NFC()  # would change the text
    for data in NASTY[:9]:
        assert decode_bytes(core, encode_bytes(core, data)) == data
    assert document_token_id(core) == core.eos_token_id == 256
    core.add_tokens(["extra"])  # noticed: the tables are made anew
    assert decode_bytes(core, [257]) == b"extra"
    assert decode_bytes(core, encode_bytes(core, b"extra</s>")) == b"extra</s>"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: foreign(models.WordLevel({"a": 0}, unk_token="a")), "not byte-level BPE but WordLevel"),
        (lambda: foreign(models.BPE({"a": 0, "b": 1}, [])), "254 of the 256 bytes have no token"),
        (
            lambda: foreign(models.BPE(byte_vocab(), []), pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "prefix space",
        ),
        (lambda: foreign(models.BPE(byte_vocab(), []), pre_tokenizers.Whitespace()), "drops characters"),
    ],
)
def test_other_tokenizers_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        encode_bytes(make(), b"text")


def test_document_token_is_required():
    bare = foreign(models.BPE(byte_vocab(), []), pre_tokenizers.ByteLevel(add_prefix_space=False))
    with pytest.raises(ValueError, match="neither a bos nor an eos"):
        document_token_id(bare)
