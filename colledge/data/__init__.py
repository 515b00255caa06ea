"""Training data as batches of rows: read, tokenised, packed or padded, and drawn by (seed, step) alone."""

from colledge.data.batch import Batch
from colledge.data.examples import Example, count_kinds, read_examples, split_examples
from colledge.data.rows import IGNORED_LABEL, Rows, Tokenizer, Tokens, make_rows, tokenize
from colledge.data.sampler import rows_for_step

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "Example",
    "Rows",
    "Tokenizer",
    "Tokens",
    "count_kinds",
    "make_rows",
    "read_examples",
    "rows_for_step",
    "split_examples",
    "tokenize",
]
