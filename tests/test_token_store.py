"""Token stores and windows: every byte arrives, whole or not at all."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import FILES, ROOT, jsonl, raises_one_line, write

from resonance_nn.data import (
    PackedDataset,
    TokenStore,
    decode_bytes,
    encode_bytes,
    find_documents,
    split_documents,
    text,
    train_tokenizer,
)

# --- token stores


def test_store_holds_every_byte(folder, tokenizer, tmp_path):
    found = find_documents([str(folder)])
    store = TokenStore.build(found, tokenizer, tmp_path / "out" / "train", progress=False)
    assert store.num_documents == len(FILES)
    assert store.num_bytes == sum(map(len, FILES.values()))
    assert store.tokens.dtype == np.uint16
    stream = []
    for i, name in enumerate(sorted(FILES)):
        ids = store.document(i)
        assert (ids[0], ids[-1]) == (0, 0)
        assert ids[1:-1].tolist() == encode_bytes(tokenizer, FILES[name])
        assert decode_bytes(tokenizer, ids) == FILES[name]
        stream += ids.tolist()
    assert store.tokens.tolist() == stream
    assert store.num_tokens == len(stream)
    assert stream.count(0) == 2 * len(FILES)  # the literal <|endoftext|> is text
    with pytest.raises(IndexError):
        store.document(len(FILES))
    assert {p.name for p in (tmp_path / "out" / "train").iterdir()} == {"tokens.bin", "documents.npy", "meta.json"}


def test_store_is_reused_only_for_the_same_data(folder, tokenizer, tmp_path, monkeypatch):
    builds = []
    real = text._write
    monkeypatch.setattr(text, "_write", lambda *args: (builds.append(1), real(*args)))

    def built(docs, tok=tokenizer) -> bool:
        before = len(builds)
        TokenStore.build(docs, tok, tmp_path / "store", progress=False)
        return len(builds) > before

    assert built(find_documents([str(folder)]))
    assert not built(find_documents([str(folder)]))
    tokenizer("some text", padding="max_length", max_length=8, truncation=True)  # leaves the tokenizer padding
    assert not built(find_documents([str(folder)]))
    assert built(find_documents([str(folder)])[:-1])
    assert built(find_documents([str(folder)]))
    assert built(find_documents([str(folder)]), train_tokenizer([b"ab ab ab"], 300, progress=False))
    assert built(find_documents([str(folder)]))
    os.utime(folder / "a.txt", ns=(1, 1))
    assert built(find_documents([str(folder)]))
    (folder / "a.txt").write_bytes(b"another text")
    assert built(find_documents([str(folder)]))
    (document,) = find_documents([f"{folder}/long.txt"])
    assert built(split_documents([document])[0])
    assert built(split_documents([document])[1])
    assert built(split_documents([document], 0.3)[1])
    path = jsonl(tmp_path / "d.jsonl", {"text": "same", "body": "size"})
    assert built(find_documents([str(path)]))
    assert built(find_documents([str(path)], text_field="body"))
    (tmp_path / "store" / "tokens.bin").write_bytes(b"\0\0")
    assert built(find_documents([str(path)], text_field="body"))  # damaged


def test_damaged_stores(folder, tokenizer, tmp_path):
    store = TokenStore.build(find_documents([str(folder)]), tokenizer, tmp_path / "store", progress=False).folder
    with raises_one_line("no token store in .*corpus"):
        TokenStore.open(folder)
    whole = {p.name: p.read_bytes() for p in store.iterdir()}
    offsets = np.load(store / "documents.npy")
    for name, data in {
        "tokens.bin": whole["tokens.bin"][:-2],
        "documents.npy": whole["documents.npy"][:-8],
        "meta.json": whole["meta.json"][:40],
    }.items():
        for broken in (data, b"", None):
            (store / name).unlink() if broken is None else (store / name).write_bytes(broken)
            with raises_one_line(r"is damaged: .*delete it|no meta\.json"):
                TokenStore.open(store)
        (store / name).write_bytes(whole[name])
    np.save(store / "documents.npy", offsets[::-1])
    with raises_one_line("does not fit"):
        TokenStore.open(store)
    (store / "documents.npy").write_bytes(whole["documents.npy"])
    meta = json.loads(whole["meta.json"])
    (store / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))
    with raises_one_line("format version 99"):
        TokenStore.open(store)


def test_interrupted_build_leaves_nothing(folder, tokenizer, tmp_path, monkeypatch):
    target = tmp_path / "out" / "store"
    real = text.encode_pieces

    def interrupt(*args):
        ids = real(*args)
        yield next(ids)
        raise KeyboardInterrupt

    found = find_documents([str(folder)])
    monkeypatch.setattr(text, "encode_pieces", interrupt)
    with pytest.raises(KeyboardInterrupt):
        TokenStore.build(found, tokenizer, target, progress=False)
    assert [p.name for p in target.parent.iterdir()] == [".store.lock"]
    monkeypatch.undo()
    TokenStore.build(found, tokenizer, target, progress=False)
    monkeypatch.setattr(text, "encode_pieces", interrupt)
    with pytest.raises(KeyboardInterrupt):
        TokenStore.build(found[:-1], tokenizer, target, progress=False)
    assert TokenStore.open(target).num_documents == len(found)  # the former one still stands


def test_killed_build_is_built_again(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import os, sys\n"
        "from transformers import AutoTokenizer\n"
        "from resonance_nn.data import TokenStore, find_documents, text\n"
        "real = text.encode_pieces\n"
        "kill = lambda k, ids: ids if k < 3 else os.kill(os.getpid(), 9)\n"
        "text.encode_pieces = lambda *a: (kill(k, ids) for k, ids in enumerate(real(*a)))\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r})\n"
        f"TokenStore.build(find_documents([{str(folder)!r}]), t, {str(tmp_path / 'store')!r}, progress=False)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / ".store.building" / "tokens.bin").exists()
    with raises_one_line("no token store"):
        TokenStore.open(tmp_path / "store")
    store = TokenStore.build(find_documents([str(folder)]), tokenizer, tmp_path / "store", progress=False)
    assert store.num_bytes == sum(map(len, FILES.values()))
    assert not (tmp_path / ".store.building").exists()


def test_full_disk(folder, tokenizer, tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        return open("/dev/full" if Path(path).name == "tokens.bin" else path, *args, **kwargs)

    monkeypatch.setattr(text, "open", full, raising=False)
    with raises_one_line("cannot write .*store: the disk is full"):
        TokenStore.build(find_documents([str(folder)]), tokenizer, tmp_path / "store", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".store.lock", "corpus"]


def test_build_spares_other_folders_and_stops_at_bad_data(folder, tokenizer, tmp_path):
    found = find_documents([str(folder)])
    with raises_one_line("exists and is not a token store"):
        TokenStore.build(found, tokenizer, folder, progress=False)
    assert (folder / "a.txt").read_bytes() == FILES["a.txt"]
    (folder / "c.py").unlink()
    with raises_one_line(r"cannot read .*c\.py: No such file"):
        TokenStore.build(found, tokenizer, tmp_path / "store", progress=False)
    with raises_one_line("no text to encode"):
        TokenStore.build([], tokenizer, tmp_path / "store", progress=False)
    assert not (tmp_path / "store").exists()


def test_large_vocabularies_take_four_bytes(folder, tmp_path):
    tokenizer = train_tokenizer(FILES.values(), 300, progress=False)
    tokenizer.add_tokens([f"extra{i}" for i in range(1 << 16)])
    store = TokenStore.build(find_documents([f"{folder}/a.txt"]), tokenizer, tmp_path / "store", progress=False)
    assert store.tokens.dtype == np.uint32
    assert decode_bytes(tokenizer, TokenStore.open(tmp_path / "store").document(0)) == FILES["a.txt"]


# --- windows


def test_windows_and_resets_against_a_naive_construction(tokenizer, tmp_path):
    rng = random.Random(0)
    sizes = [1, 1, 2, 3, 40, 7, 1, 200, 5, 90]
    write(tmp_path / "c", {f"{k:02}.txt": bytes(rng.choices(b"ab \n", k=n)) for k, n in enumerate(sizes)})
    docs = find_documents([f"{tmp_path}/c"])
    store = TokenStore.build(docs, tokenizer, tmp_path / "store", progress=False)
    stream, starts = [], []
    for document in docs:
        ids = encode_bytes(tokenizer, document.read())
        stream += [0, *ids, 0]
        starts += [True] + [False] * (len(ids) + 1)
    for seq_len in (2, 3, 7, 64, len(stream)):
        dataset = PackedDataset(store, seq_len)
        assert len(dataset) == len(stream) // seq_len
        for i in reversed(range(len(dataset))):
            item = dataset[i]
            window = slice(i * seq_len, (i + 1) * seq_len)
            assert item["input_ids"].tolist() == item["labels"].tolist() == stream[window]
            assert item["reset"].tolist() == starts[window]
        assert (item["input_ids"].dtype, item["labels"].dtype, item["reset"].dtype) == (
            torch.int64,
            torch.int64,
            torch.bool,
        )
        for i in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError):
                dataset[i]


def test_windows_are_picklable_and_batch(folder, tokenizer, tmp_path):
    store = TokenStore.build(find_documents([str(folder)]), tokenizer, tmp_path / "store", progress=False)
    dataset = PackedDataset(store, 32)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000  # the path, not the tokens
    copy = pickle.loads(pickled)
    assert isinstance(copy.store.tokens, np.memmap)
    for key, value in copy[1].items():
        assert torch.equal(value, dataset[1][key])
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4)))
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(batch, (4, 32))


def test_window_errors(folder, tokenizer, tmp_path):
    store = TokenStore.build(find_documents([f"{folder}/a.txt"]), tokenizer, tmp_path / "store", progress=False)
    with raises_one_line(rf"{store.num_tokens} tokens, fewer than one window of 1000: use a smaller --seq-len"):
        PackedDataset(store, 1000)
    with pytest.raises(ValueError, match="seq_len=1 must be >= 2"):
        PackedDataset(store, 1)
    assert len(PackedDataset(store, store.num_tokens)) == 1
