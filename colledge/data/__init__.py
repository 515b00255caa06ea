"""Training data as batches of rows: read, tokenised, packed or padded, and drawn by (seed, step) alone."""

from colledge.data.batch import Batch
from colledge.data.images import ImageSettings, image_settings, load_images
from colledge.data.labelled import Labelled
from colledge.data.partition import SplitSettings, deal
from colledge.data.sampler import rows_for_step
from colledge.data.text.examples import Example, read_examples, split_examples
from colledge.data.text.rows import IGNORED_LABEL, Rows, make_rows
from colledge.data.text.source import TextSettings, load_text, read_texts, text_rows
from colledge.data.text.tokenizer import ByteTokenizer, load_tokenizer, vocabulary_digest
from colledge.data.text.tokens import Tokenizer, Tokens, tokenize

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "ByteTokenizer",
    "Example",
    "ImageSettings",
    "Labelled",
    "Rows",
    "SplitSettings",
    "TextSettings",
    "Tokenizer",
    "Tokens",
    "deal",
    "image_settings",
    "load_images",
    "load_text",
    "load_tokenizer",
    "make_rows",
    "read_examples",
    "read_texts",
    "rows_for_step",
    "split_examples",
    "text_rows",
    "tokenize",
    "vocabulary_digest",
]
