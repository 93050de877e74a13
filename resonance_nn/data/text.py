"""Documents -> a file of token ids -> windows to train on.

documents --encode_bytes--> tokens.bin: [<|endoftext|>] text [<|endoftext|>], one after the other   (memory-mapped)
                            a share of them in parts, each with its middle last, see fim.py
window i = tokens[i·L : (i+1)·L],  reset = True at each <|endoftext|> that begins a document

The same token begins a document and ends it: from the one the text's first token is predicted, the other is predicted
by its last. What begins the next document is no target: models leave out targets at a reset.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from resonance_nn.data.documents import (
    DataError,
    Document,
    Documents,
    disk_error,
    find_documents,
    lzma_bits_per_byte,
    read_texts,
    split_documents,
)
from resonance_nn.data.fim import FillInTheMiddle
from resonance_nn.data.tokenizer import (
    PIECE_BYTES,
    cut_pieces,
    document_token_id,
    encode_pieces,
    tokenizer_fingerprint,
    tokenizer_vocab_size,
)

__all__ = [
    "DataError",
    "Document",
    "Documents",
    "PackedDataset",
    "TokenStore",
    "find_documents",
    "lzma_bits_per_byte",
    "read_texts",
    "split_documents",
]

FORMAT_VERSION = 1
STORE_FILES = {"tokens.bin", "documents.npy", "meta.json"}


class TokenStore:
    """A corpus as token ids on disk, memory-mapped: `tokens.bin`, `documents.npy` (n + 1 offsets), `meta.json`."""

    def __init__(self, folder: Path, meta: dict, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self.folder = folder
        self.tokens = tokens  # (num_tokens,) uint16 or uint32
        self.offsets = offsets  # (num_documents + 1,) int64: where each document, or part of one, begins, and the end
        self.vocab_size: int = meta["vocab_size"]
        self.num_bytes: int = meta["num_bytes"]  # of text; the token before each document stands for none
        self.fingerprint: str = meta["fingerprint"]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        """The ids of document i, its first token <|endoftext|> included."""
        i = range(self.num_documents)[i]
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def __reduce__(self):
        return TokenStore.open, (self.folder,)  # a worker maps the file itself

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "TokenStore":
        """The store in `folder`. Raises DataError if there is none, or it is damaged."""
        folder = Path(folder)
        if not (folder / "meta.json").is_file():
            raise DataError(f"there is no token store in {folder} (no meta.json)")
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {meta['format_version']}, this release reads {FORMAT_VERSION}")
            tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
            offsets = np.load(folder / "documents.npy")
            if len(tokens) != meta["num_tokens"]:
                raise ValueError(f"tokens.bin has {len(tokens)} tokens, meta.json says {meta['num_tokens']}")
            ends = (0, meta["num_tokens"], meta["num_documents"] + 1)
            if (int(offsets[0]), int(offsets[-1]), len(offsets)) != ends or (np.diff(offsets) <= 0).any():
                raise ValueError("documents.npy does not fit tokens.bin")
            return cls(folder, meta, tokens, offsets)
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
            raise DataError(f"the token store {folder} is damaged: {error}; delete it to rebuild") from error

    @classmethod
    def build(
        cls,
        documents: Sequence[Document],
        tokenizer: PreTrainedTokenizerBase,
        folder: str | os.PathLike[str],
        *,
        fim: FillInTheMiddle | None = None,
        progress: bool = True,
    ) -> "TokenStore":
        """Encodes `documents` into `folder`, some rearranged as `fim` says, or opens what was built from the same.

        The same: names, sizes, modification times and parts of the documents, the tokenizer, `fim`. Memory is bounded.
        The store appears under its name only when whole; of several processes one builds and the others wait.
        Raises DataError if a document cannot be read, the disk is full, or `folder` holds anything else.
        """
        folder = Path(folder)
        fingerprint = documents_fingerprint(documents, tokenizer, fim)
        if store := cls._matching(folder, fingerprint):
            return store
        if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - STORE_FILES):
            raise DataError(f"{folder} exists and is not a token store; choose another folder")
        temporary = folder.with_name(f".{folder.name}.building")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if store := cls._matching(folder, fingerprint):
                    return store
                shutil.rmtree(temporary, ignore_errors=True)  # a killed build's
                temporary.mkdir()
                try:
                    _write(documents, tokenizer, temporary, fingerprint, fim, progress)
                    if folder.exists():
                        shutil.rmtree(folder)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        return cls.open(folder)

    @classmethod
    def _matching(cls, folder: Path, fingerprint: str) -> "TokenStore | None":
        try:
            store = cls.open(folder)
        except DataError:
            return None
        return store if store.fingerprint == fingerprint else None


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Windows of L = `seq_len` tokens over a store's whole stream; the last, partial one is dropped.

    Item i: `input_ids` (L,) int64; `labels` (L,), the same ids, since models shift inside; `reset` (L,) bool, True at
    each document's first token and nowhere else. Random access without loading the corpus; picklable.
    Raises ValueError if `seq_len` < 2, DataError if the store is shorter than one window.
    """

    def __init__(self, store: TokenStore, seq_len: int) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len={seq_len} must be >= 2: each token is predicted from those before it")
        if store.num_tokens < seq_len:
            raise DataError(
                f"the data has {store.num_tokens} tokens, fewer than one window of {seq_len}: "
                "use a smaller --seq-len or more data"
            )
        self.store = store
        self.seq_len = seq_len

    def __len__(self) -> int:
        return self.store.num_tokens // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = range(len(self))[index] * self.seq_len  # IndexError, and -1 for the last
        end = start + self.seq_len
        input_ids = torch.from_numpy(self.store.tokens[start:end].astype(np.int64))  # (L,)
        first, last = np.searchsorted(self.store.offsets, [start, end])
        reset = torch.zeros(self.seq_len, dtype=torch.bool)
        reset[torch.from_numpy(self.store.offsets[first:last] - start)] = True
        return {"input_ids": input_ids, "labels": input_ids.clone(), "reset": reset}


def _write(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    fingerprint: str,
    fim: FillInTheMiddle | None,
    progress: bool,
) -> None:
    """Streams the documents' ids to the three files."""
    vocab_size = tokenizer_vocab_size(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    boundary = [document_token_id(tokenizer)]
    sources: deque[tuple[int, int, int]] = deque()  # of each piece read ahead: its document, number in it, and bytes

    def pieces() -> Iterator[bytes]:
        for i, document in enumerate(documents):
            limit = PIECE_BYTES if fim is None else max(PIECE_BYTES, 8 * fim.window)  # more text than a window holds
            for k, piece in enumerate(cut_pieces(document.chunks(), limit)):
                sources.append((i, k, len(piece)))
                yield piece

    total = sum(document.size for document in documents)
    bar = tqdm(total=total, desc="encoding", unit="B", unit_scale=True, delay=2, leave=False, disable=not progress)
    num_tokens = num_bytes = 0
    offsets: list[int] = []
    with bar, open(folder / "tokens.bin", "wb") as out:

        def append(ids: Sequence[int]) -> None:
            nonlocal num_tokens
            num_tokens += out.write(np.array(ids, dtype).tobytes()) // dtype.itemsize

        is_open = False  # a document without the token that ends it
        for ids in encode_pieces(tokenizer, pieces()):
            i, k, size = sources.popleft()
            if k == 0 and is_open:
                append(boundary)
                is_open = False
            if fim is not None and fim.changes(i):
                for part in fim.parts(tokenizer, ids, num_tokens % fim.window, i, k):
                    offsets.append(num_tokens)
                    append(part)
            else:
                if k == 0:
                    offsets.append(num_tokens)
                    append(boundary)
                    is_open = True
                append(ids)
            num_bytes += size
            bar.update(size)
        if is_open:
            append(boundary)
    if not offsets:
        raise DataError("there is no text to encode")
    np.save(folder / "documents.npy", np.array([*offsets, num_tokens], np.int64))
    meta = {
        "format_version": FORMAT_VERSION,
        "vocab_size": vocab_size,
        "dtype": dtype.name,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_documents": len(offsets),
        "fingerprint": fingerprint,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def documents_fingerprint(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, fim: FillInTheMiddle | None = None
) -> str:
    """A hash of what decides the tokens: each document's name, part, time and field, the tokenizer, and ``fim``."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {tokenizer_fingerprint(tokenizer)}".encode())
    for d in documents:
        digest.update(repr((os.path.abspath(d.path), d.start, d.stop, d.modified, d.line, d.field, d.binary)).encode())
    if fim is not None:
        digest.update(repr(fim).encode())
    return digest.hexdigest()
