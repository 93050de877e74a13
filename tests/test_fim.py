"""Fill in the middle: nothing of a document is lost, and no part of one leaves its window."""

from __future__ import annotations

import random

import numpy as np
import pytest
from corpus import FILES, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resonance_nn.data import FillInTheMiddle, TokenStore, decode_bytes, encode_bytes, find_documents
from resonance_nn.data.fim import SENTINELS, Sentinels, cut, line_spans


def random_text(rng: random.Random, size: int) -> bytes:
    """Of pieces that are hard to cut: characters of 1 to 4 bytes, line ends, indentation, bytes that are no UTF-8."""
    kinds = ["word ", "x = 1\n", "\r\n    ", "\n\n\t\t", "é", "日本", "😀", "<|fim_middle|>", "  ", "\u0301"]
    pieces = [rng.choice(kinds).encode() if rng.random() < 0.9 else rng.randbytes(3) for _ in range(size)]
    return b"".join(pieces)


def restored(tokenizer, part: list[int]) -> tuple[bytes, str]:
    """The text of a part in its own order, and the order it came in."""
    s = Sentinels.of(tokenizer)
    assert part[0] == s.boundary
    counts = {part.count(i) for i in (s.prefix, s.suffix, s.middle)}
    if counts == {0}:
        return decode_bytes(tokenizer, part), "plain"
    assert counts == {1}
    assert part[-1] == s.boundary
    assert part.count(s.boundary) == 2
    first, second, middle = sorted(part.index(i) for i in (s.prefix, s.suffix, s.middle))
    assert (first, part[middle]) == (1, s.middle)
    before, after, text = (decode_bytes(tokenizer, p) for p in (part[first:second], part[second:middle], part[middle:]))
    if part[first] == s.suffix:
        return after + text + before, "spm"
    return before + text + after, "psm"


@pytest.mark.parametrize("window", [64, 100, 257, 4096])
def test_all_bytes_once_and_no_part_leaves_its_window(tokenizer, window):
    rng, orders = random.Random(window), []
    for n in range(60):
        text = random_text(rng, rng.choice((1, 5, 60, 400, 1500)))
        place = start = rng.randrange(window)
        parts = list(FillInTheMiddle(1.0, window, n).parts(tokenizer, encode_bytes(tokenizer, text), place, n))
        for part in parts:
            assert 1 <= len(part) <= window - place
            place = (place + len(part)) % window
        texts, found = zip(*(restored(tokenizer, part) for part in parts), strict=True)
        assert b"".join(texts) == text
        orders += found
        assert parts == list(FillInTheMiddle(1.0, window, n).parts(tokenizer, encode_bytes(tokenizer, text), start, n))
    assert set(orders) == {"spm", "psm", "plain"}
    assert 0.3 < orders.count("spm") / (orders.count("spm") + orders.count("psm")) < 0.7


def test_parts_fill_their_windows_and_end_where_lines_do(tokenizer):
    text = b"".join(b"def name_%d(argument):\n    return argument * %d\n" % (i, i) for i in range(600))
    parts = list(FillInTheMiddle(1.0, 512).parts(tokenizer, encode_bytes(tokenizer, text), 0, 0))
    texts, orders = zip(*(restored(tokenizer, part) for part in parts), strict=True)
    rearranged = [t for t, order in zip(texts, orders, strict=True) if order != "plain"]
    assert sum(map(len, rearranged)) > 0.94 * len(text)
    follow = [t for k, t in enumerate(texts) if k and orders[k - 1] != "plain" and t]
    assert all(t.startswith(b"\n") for t in follow)


def test_cuts_are_between_characters_and_of_every_kind():
    text = "class Größe:\n    maß = 'é😀'\r\n\n\tdef f(self): return 'ü'\n".encode()
    borders = {len(text.decode()[:i].encode()) for i in range(len(text.decode()) + 1)}
    cuts = [cut(text, random.Random(seed)) for seed in range(4000)]
    assert {place for pair in cuts for place in pair} == borders
    assert all(start <= stop for start, stop in cuts)
    lines = line_spans(text)
    assert [text[i:stop] for _, i, stop in lines] == [
        "class Größe:".encode(),
        "maß = 'é😀'".encode(),
        "def f(self): return 'ü'".encode(),
    ]
    for start, indented, stop in lines:
        for whole in ((start, stop), (indented, stop)):
            assert 0.02 < cuts.count(whole) / len(cuts) < 0.2
    ends = {stop for _, _, stop in lines}
    assert 0.45 < sum(stop in ends for _, stop in cuts) / len(cuts) < 0.6
    for nothing in (b"", b"\n", b"\x80\x80\x80\x80\x80"):
        cuts = [cut(nothing, random.Random(seed)) for seed in range(50)]
        assert all(0 <= start <= stop <= len(nothing) for start, stop in cuts)


def test_rate_and_seed():
    changed = [i for i in range(4000) if FillInTheMiddle(0.3, 64, 7).changes(i)]
    assert len(changed) == pytest.approx(1200, abs=100)
    assert changed == [i for i in range(4000) if FillInTheMiddle(0.3, 4096, 7).changes(i)]
    assert changed != [i for i in range(4000) if FillInTheMiddle(0.3, 64, 8).changes(i)]
    assert not any(FillInTheMiddle(0.0, 64).changes(i) for i in range(100))
    assert all(FillInTheMiddle(1.0, 64).changes(i) for i in range(100))
    for wrong in ({"rate": -0.1}, {"rate": 1.5}, {"rate": float("nan")}, {"window": 63}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
            FillInTheMiddle(**{"rate": 0.5, "window": 64, **wrong})


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_stores(tokenizer, folder, tmp_path, rate):
    """Documents that are left alone stay as they are; the others hold their bytes; nothing crosses a window."""
    write(folder, {f"more/{i}.txt": b"text number %d\n" % i * (20 * i + 1) for i in range(12)})
    found = find_documents([str(folder)])
    fim = FillInTheMiddle(rate, 128, 3)

    def build(name: str, fim: FillInTheMiddle | None) -> TokenStore:
        return TokenStore.build(found, tokenizer, tmp_path / name, fim=fim, progress=False)

    plain, store = build("plain", None), build("fim", fim)
    assert store.num_bytes == plain.num_bytes
    changed = [i for i in range(len(found)) if fim.changes(i)]
    assert bool(changed) == (rate > 0)
    assert (len(changed) == len(found)) == (rate == 1)
    if rate == 0:
        assert np.array_equal(store.tokens, plain.tokens)
    k = 0
    for i, document in enumerate(found):
        if i not in changed:
            assert np.array_equal(store.document(k), plain.document(i))
            k += 1
            continue
        text = b""
        while len(text) < document.size:
            begin, end = store.offsets[k], store.offsets[k + 1]
            assert begin // 128 == (end - 1) // 128
            text += restored(tokenizer, store.document(k).tolist())[0]
            k += 1
        assert text == document.read() == FILES.get(document.path.removeprefix(f"{folder}/"), text)
    assert k == store.num_documents
    again = TokenStore.build(found, tokenizer, tmp_path / "again", fim=fim, progress=False)
    assert np.array_equal(store.tokens, again.tokens)
    prints = {s.fingerprint for s in (plain, store, build("seed", FillInTheMiddle(rate, 128, 4)))}
    prints |= {build("window", FillInTheMiddle(rate, 64, 3)).fingerprint}
    assert len(prints) == 4
    assert build("fim", None).fingerprint == plain.fingerprint  # another store in its place


def test_prompts(tokenizer):
    s = Sentinels.of(tokenizer)
    assert tuple(tokenizer.convert_ids_to_tokens([s.prefix, s.suffix, s.middle])) == SENTINELS
    assert s.prompt([50, 51], [60], "psm") == [s.boundary, s.prefix, 50, 51, s.suffix, 60, s.middle]
    assert s.prompt([50, 51], [60]) == [s.boundary, s.suffix, 60, s.prefix, 50, 51, s.middle]
    with pytest.raises(ValueError, match="order = 'mps': must be spm or psm"):
        s.prompt([], [], "mps")


def test_a_tokenizer_without_sentinels_is_refused():
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    other = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", extra_special_tokens=[SENTINELS[1]])
    with pytest.raises(ValueError, match=r"no <\|fim_prefix\|>, <\|fim_middle\|>, so it cannot.*`resonance train`"):
        Sentinels.of(other)
