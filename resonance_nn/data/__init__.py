"""Files, folders and hub names -> documents -> token ids -> packed windows."""

from resonance_nn.data.documents import (
    DataError,
    Document,
    Documents,
    find_documents,
    lzma_bits_per_byte,
    read_texts,
    split_documents,
)
from resonance_nn.data.fim import FillInTheMiddle
from resonance_nn.data.text import PackedDataset, TokenStore
from resonance_nn.data.tokenizer import (
    SPECIAL_TOKENS,
    IncrementalDecoder,
    cut_pieces,
    decode_bytes,
    document_token_id,
    encode_bytes,
    encode_pieces,
    encode_text,
    tokenizer_fingerprint,
    tokenizer_vocab_size,
    train_tokenizer,
)

__all__ = [
    "SPECIAL_TOKENS",
    "DataError",
    "Document",
    "Documents",
    "FillInTheMiddle",
    "IncrementalDecoder",
    "PackedDataset",
    "TokenStore",
    "cut_pieces",
    "decode_bytes",
    "document_token_id",
    "encode_bytes",
    "encode_pieces",
    "encode_text",
    "find_documents",
    "lzma_bits_per_byte",
    "read_texts",
    "split_documents",
    "tokenizer_fingerprint",
    "tokenizer_vocab_size",
    "train_tokenizer",
]
