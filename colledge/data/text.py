"""Text to rows of tokens: read, tokenise, pack.

Documents are joined with the tokenizer's end-of-sequence token and cut into rows of one length, so that no
token is wasted on padding but in the last row:

    doc A ■ doc B ■ doc C ■      ->      [doc A ■ doc][ B ■ doc C][ ■ · · · ·]      ■ end  · padding
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from colledge.data.batch import Batch
from colledge.errors import DataError, ModelError

IGNORED_LABEL = -100  # as in torch.nn.functional.cross_entropy

_PIECE_CHARS = 1 << 16  # a document longer than this is tokenised in pieces: less memory, all cores
_PIECES_AT_ONCE = 256


class Tokenizer(Protocol):
    """What packing needs of a tokenizer; those of Hugging Face have it."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, return_attention_mask: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]:
        """Return `input_ids`: the tokens of every text."""


def read_texts(path: Path) -> list[str]:
    """Return the documents of a file: one a line of `{"text": ...}` in a .jsonl, the whole of a .txt.

    Raises:
        DataError: The file is missing, empty or malformed; the message names the file, the line and the key.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(
            f"{path}: saw a {path.suffix or 'nameless'} file, wanted .jsonl or .txt.",
            fix='write one {"text": ...} a line into a .jsonl file, or plain text into a .txt file.',
        )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.", fix="set data.train to an existing file.") from None
    except OSError as fault:
        raise DataError(f"{path}: cannot be read ({fault.strerror}).", fix="give a readable file.") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    texts = list(_json_lines(path, content)) if path.suffix == ".jsonl" else [_decode(path, content)]
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{path}: holds no text.", fix="give a file with at least one row of text.")
    return texts


def _decode(path: Path, content: bytes, line: int = 1) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        line += content.count(b"\n", 0, fault.start)
        raise DataError(
            f"{path}, line {line}: byte {content[fault.start]:#04x} is not UTF-8.",
            fix=f"convert the file, such as with `iconv -f latin1 -t utf-8 {path.name}`.",
        ) from None


def _json_lines(path: Path, content: bytes) -> Iterator[str]:
    for line, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            value = json.loads(_decode(path, raw, line))
        except (ValueError, RecursionError) as fault:
            raise DataError(
                f"{path}, line {line}: not JSON ({fault}).", fix='write one {"text": ...} a line.'
            ) from None
        yield _text_of(value, f"{path}, line {line}")


def _text_of(value: object, where: str) -> str:
    if not isinstance(value, dict):
        raise DataError(
            f'{where}: saw {type(value).__name__}, wanted an object {{"text": ...}}.',
            fix='write one {"text": ...} a line.',
        )
    if "text" not in value:
        seen = ", ".join(repr(key) for key in list(value)[:8]) or "none"
        raise DataError(f"{where}: key 'text' is missing; the keys are {seen}.", fix="name the key `text`.")
    text = value["text"]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: key 'text' holds {type(text).__name__}, wanted a string.", fix="quote the text."
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: legal JSON, but no text
        raise DataError(
            f"{where}: key 'text' holds a lone surrogate, wanted Unicode text.",
            fix="write the character itself.",
        ) from None
    return text


@dataclass(frozen=True)
class TokenizedText:
    """Packed rows of tokens.

    Args:
        rows: int64, [num_rows, sequence_length].
        last_row_tokens: Tokens of the last row that are not padding.
    """

    rows: Tensor
    last_row_tokens: int

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def sequence_length(self) -> int:
        """Tokens a row."""
        return self.rows.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return (self.num_rows - 1) * self.sequence_length + self.last_row_tokens

    def batch(self, indices: Tensor) -> Batch:
        """Return rows as a batch.

        Args:
            indices: Rows wanted, int64.

        Returns:
            `input_ids` (and `attention_mask`, if a row has padding) against `labels`, which are the same
            tokens, -100 at padding; the loss shifts them. All int64, [len(indices), sequence_length].
        """
        input_ids = self.rows[indices]
        padded = indices == self.num_rows - 1
        if self.last_row_tokens == self.sequence_length or not bool(padded.any()):
            return Batch({"input_ids": input_ids}, {"labels": input_ids})
        padding = padded[:, None] & (torch.arange(self.sequence_length) >= self.last_row_tokens)
        return Batch(
            {"input_ids": input_ids, "attention_mask": (~padding).long()},
            {"labels": input_ids.masked_fill(padding, IGNORED_LABEL)},
        )


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> TokenizedText:
    """Return documents as packed rows.

    Args:
        texts: The documents.
        tokenizer: Of the model.
        sequence_length: Tokens a row.

    Raises:
        DataError: There is too little text for one row of two tokens.
        ModelError: The tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token to join documents with.",
            fix="set eos_token in tokenizer_config.json.",
        )
    stream = np.concatenate(list(_token_pieces(texts, tokenizer, end)))
    if len(stream) < 2:  # one to read and one to predict
        raise DataError(
            f"the training data holds {len(stream)} token(s), wanted at least 2.",
            fix="give more text in data.train.",
        )
    last = len(stream) % sequence_length
    if last == 1:  # a row of one token has nothing to predict
        stream, last = stream[:-1], 0
    rows = np.full((-(-len(stream) // sequence_length), sequence_length), end, dtype=np.int64)
    rows.reshape(-1)[: len(stream)] = stream
    return TokenizedText(torch.from_numpy(rows), last or sequence_length)


def _token_pieces(texts: Sequence[str], tokenizer: Tokenizer, end: int) -> Iterator[np.ndarray]:
    """Yield the tokens of all documents in order, each document with its end."""
    pieces = [piece for text in texts for piece in _pieces(text)]
    for start in range(0, len(pieces), _PIECES_AT_ONCE):
        chunk = pieces[start : start + _PIECES_AT_ONCE]
        encoded = tokenizer(
            [text for text, _ in chunk], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        for (_, is_last), tokens in zip(chunk, encoded, strict=True):
            yield np.asarray([*tokens, end] if is_last else tokens, dtype=np.int64)


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield a document in pieces that end with a line, and whether each is the last one."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        yield text[start:cut], False
        start = cut
    yield text[start:], True
