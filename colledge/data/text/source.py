"""Text as labelled data: the rows that a causal model is trained on, every token the label of what precedes it."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from pydantic import Field

from colledge.data.labelled import Labelled
from colledge.data.text.reading.examples import Example, Noticed, read_examples
from colledge.data.text.reading.files import find_files
from colledge.data.text.rows import make_rows
from colledge.data.text.tokenizer import BYTES, ByteTokenizer, load_tokenizer
from colledge.data.text.tokens import Tokenizer
from colledge.errors import DataError
from colledge.records import Record

_log = logging.getLogger("colledge.data")


class TextSettings(Record):
    """How text becomes rows of `sequence_length` tokens, wherever it comes from.

    `tokenizer` is `bytes`, or a folder with one. `test_split` is the share of the documents of a common source that
    nobody trains on: what models are judged by.
    """

    tokenizer: str = Field(default=BYTES, min_length=1)
    sequence_length: int = Field(default=64, ge=2, strict=True)
    test_split: float = Field(default=0.1, gt=0, lt=1)

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ModelError: There is none in the folder.
        """
        return ByteTokenizer() if self.tokenizer == BYTES else load_tokenizer(Path(self.tokenizer))


def load_text(source: Path, tokenizer: Tokenizer, sequence_length: int) -> Labelled:
    """Return the examples of a file, or of all such files below a folder in the order of their paths, as packed rows.

    Args:
        source: .jsonl, .json, .parquet or .txt; other files of a folder are left alone.
        tokenizer: Of the model.
        sequence_length: Tokens a row.

    Returns:
        As `text_rows` does.

    Raises:
        DataError: There is no such file, or one cannot be read.
        ModelError: The tokenizer lacks what the examples need.
    """
    return text_rows(read_texts(source), tokenizer, sequence_length, str(source))


def read_texts(source: Path) -> list[Example]:
    """Return the examples of a file, or of all such files below a folder in the order of their paths.

    Raises:
        DataError: There is no such file, or one cannot be read.
    """
    found, noticed = find_files([source]), Noticed()
    examples = [example for path in found.files for example in read_examples(path, noticed=noticed)]
    _tell(source, found.left_out, noticed)
    return examples


def text_rows(examples: list[Example], tokenizer: Tokenizer, sequence_length: int, where: str) -> Labelled:
    """Return examples as packed rows, in their order.

    Args:
        examples: What `read_texts` returns.
        tokenizer: Of the model.
        sequence_length: Tokens a row.
        where: They come from, for messages.

    Returns:
        `input_ids` against labels, which are the same tokens, -100 where there is padding; the loss shifts them. Both
        int64, [rows, sequence_length].

    Raises:
        DataError: There is nothing to learn.
        ModelError: The tokenizer lacks what the examples need.
    """
    noticed = Noticed()
    try:
        rows = make_rows(examples, tokenizer, sequence_length, noticed=noticed)
    except DataError as fault:
        raise DataError(f"{where}: {fault.message}", fix=fault.fix) from None
    _tell(where, (), noticed)
    batch = rows.batch(torch.arange(rows.num_rows))
    # No attention mask: padding ends the last row, where nothing before it looks, and the loss does not count it.
    return Labelled({"input_ids": batch.inputs["input_ids"]}, batch.targets["labels"], len(tokenizer))


def _tell(where: Path | str, left_out: tuple[str, ...], noticed: Noticed) -> None:
    for sentence in (*left_out, *(f"{where}: {said}" for said in noticed.sentences())):
        _log.warning(sentence)
