"""Training data as batches of rows: read, tokenised, packed, and drawn by (seed, step) alone."""

from colledge.data.batch import Batch
from colledge.data.sampler import rows_for_step
from colledge.data.text import IGNORED_LABEL, TokenizedText, Tokenizer, read_texts, tokenize

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "TokenizedText",
    "Tokenizer",
    "read_texts",
    "rows_for_step",
    "tokenize",
]
