"""Training data as batches of rows: read, tokenised, packed or padded, and drawn by (seed, step) alone.

Names are loaded when they are asked for: a device needs batches, and none of what reads files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colledge.data.batch import Batch
    from colledge.data.images import ImageSettings, image_settings, load_images
    from colledge.data.labelled import Labelled
    from colledge.data.partition import SplitSettings, deal
    from colledge.data.sampler import rows_for_step
    from colledge.data.text.reading.examples import Example, read_examples, split_examples, split_numbers
    from colledge.data.text.reading.files import find_files
    from colledge.data.text.rows import IGNORED_LABEL, Indices, Rows, Stream, make_rows, rows_of
    from colledge.data.text.source import TextSettings, load_text, read_texts, text_rows
    from colledge.data.text.store import Say, stored_tokens
    from colledge.data.text.tokenizer import ByteTokenizer, load_tokenizer, vocabulary_digest
    from colledge.data.text.tokens import Tokenizer, Tokens, end_of, tokenize

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "ByteTokenizer",
    "Example",
    "ImageSettings",
    "Indices",
    "Labelled",
    "Rows",
    "Say",
    "SplitSettings",
    "Stream",
    "TextSettings",
    "Tokenizer",
    "Tokens",
    "deal",
    "end_of",
    "find_files",
    "image_settings",
    "load_images",
    "load_text",
    "load_tokenizer",
    "make_rows",
    "read_examples",
    "read_texts",
    "rows_for_step",
    "rows_of",
    "split_examples",
    "split_numbers",
    "stored_tokens",
    "text_rows",
    "tokenize",
    "vocabulary_digest",
]

_MODULES = (
    "batch",
    "images",
    "labelled",
    "partition",
    "sampler",
    "text.reading.examples",
    "text.reading.files",
    "text.rows",
    "text.source",
    "text.store",
    "text.tokenizer",
    "text.tokens",
)


def __getattr__(name: str) -> Any:
    """Return a name of `__all__` from its module (PEP 562)."""
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
