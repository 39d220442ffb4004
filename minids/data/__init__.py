"""Real text to rows of tokens (V3 4.1, 4.2): corpus -> filters -> tokenizer -> packing; build joins them."""

from .build import Data, DataConfig, build_data
from .corpus import Document, read_corpus
from .filters import filter_documents
from .packing import PackedRows
from .tokenizer import BytePairTokenizer, train_tokenizer

__all__ = [
    "BytePairTokenizer",
    "Data",
    "DataConfig",
    "Document",
    "PackedRows",
    "build_data",
    "filter_documents",
    "read_corpus",
    "train_tokenizer",
]
