"""Tokens to rows: packed or padded to one length.

Packed (the default), examples are joined and cut into rows, so that no token is wasted on padding but in the last
row; a row's later examples see its earlier ones. Padded, every example has a row of its own:

    doc A ■ doc B ■ doc C ■      packed  [doc A ■ doc][ B ■ doc C][ ■ · · · ·]      ■ end  · padding
                                 padded  [doc A ■ · ·][doc B ■ · ·][doc C ■ · ·]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from colledge.data.batch import Batch
from colledge.data.text.examples import Example
from colledge.data.text.tokens import Tokenizer, Tokens, end_of, tokenize
from colledge.errors import DataError
from colledge.settings import LossOn

IGNORED_LABEL = -100  # as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, all of one length.

    Args:
        ids: int64, [num_rows, sequence_length].
        lengths: Tokens of each row that are not padding, int64, [num_rows].
        learnt: Whether the loss counts a token, bool, [num_rows, sequence_length]; None: all but padding.
        num_cut: Examples that were longer than a row and lost their end.
        num_dropped: Rows left out, as the loss would count nothing in them.
    """

    ids: Tensor
    lengths: Tensor
    learnt: Tensor | None = None
    num_cut: int = 0
    num_dropped: int = 0

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.ids)

    @property
    def sequence_length(self) -> int:
        """Tokens a row."""
        return self.ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return int(self.lengths.sum())

    def batch(self, indices: Tensor) -> Batch:
        """Return rows as a batch.

        Args:
            indices: Rows wanted, int64.

        Returns:
            `input_ids` (and `attention_mask`, if a row has padding) against `labels`, which are the same tokens, -100
            where the loss counts nothing; the loss shifts them. All int64, [len(indices), sequence_length].
        """
        input_ids, lengths = self.ids[indices], self.lengths[indices]
        inputs, labels = {"input_ids": input_ids}, input_ids
        if self.learnt is not None:
            labels = labels.masked_fill(~self.learnt[indices], IGNORED_LABEL)
        if bool((lengths < self.sequence_length).any()):
            padding = torch.arange(self.sequence_length) >= lengths[:, None]
            inputs["attention_mask"] = (~padding).long()
            labels = labels.masked_fill(padding, IGNORED_LABEL)
        return Batch(inputs, {"labels": labels})


def make_rows(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    packing: bool = True,
    loss_on: LossOn = "all",
) -> Rows:
    """Return examples as rows.

    Args:
        examples: What `read_examples` returns.
        tokenizer: Of the model.
        sequence_length: Tokens a row.
        packing: Join examples; else each has a row of its own, padded or cut.
        loss_on: What the loss counts.

    Raises:
        DataError: An example cannot be rendered, or there is nothing to learn in any of them.
        ModelError: The tokenizer lacks what the examples need.
    """
    tokens = list(tokenize(examples, tokenizer, loss_on))
    end = end_of(tokenizer)
    return (_packed if packing else _padded)(tokens, sequence_length, end)


# -- rows --------------------------------------------------------------------------------------------------------


def _packed(tokens: Sequence[Tokens], sequence_length: int, end: int) -> Rows:
    """Join all tokens and cut them into rows; the last is padded."""
    ids = np.concatenate([one.ids for one in tokens]) if tokens else np.zeros(0, dtype=np.int64)
    learnt = None
    if any(one.learnt is not None for one in tokens):
        learnt = np.concatenate(
            [np.ones(len(one.ids), dtype=bool) if one.learnt is None else one.learnt for one in tokens]
        )
    whole, rest = divmod(len(ids), sequence_length)
    num_rows = whole + int(rest > 1)  # one token has nothing to predict
    num_tokens = min(len(ids), num_rows * sequence_length)
    shape, lengths = (num_rows, sequence_length), np.full(num_rows, sequence_length)
    if num_rows:
        lengths[-1] = num_tokens - (num_rows - 1) * sequence_length
    return _kept(
        _filled(ids[:num_tokens], shape, end),
        lengths,
        None if learnt is None else _filled(learnt[:num_tokens], shape, False),
    )


def _padded(tokens: Sequence[Tokens], sequence_length: int, end: int) -> Rows:
    """Give every example a row of its own."""
    shape = len(tokens), sequence_length
    ids, learnt = np.full(shape, end, dtype=np.int64), np.zeros(shape, dtype=bool)
    lengths = np.array([min(len(one.ids), sequence_length) for one in tokens], dtype=np.int64)
    for row, (one, length) in enumerate(zip(tokens, lengths, strict=True)):
        ids[row, :length] = one.ids[:length]
        learnt[row, :length] = True if one.learnt is None else one.learnt[:length]
    whole = all(one.learnt is None for one in tokens)
    num_cut = sum(len(one.ids) > sequence_length for one in tokens)
    return _kept(ids, lengths, None if whole else learnt, num_cut)


def _filled(values: npt.NDArray[Any], shape: tuple[int, int], rest: int | bool) -> npt.NDArray[Any]:
    filled = np.full(shape, rest, dtype=values.dtype)
    filled.reshape(-1)[: len(values)] = values
    return filled


def _kept(
    ids: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    learnt: npt.NDArray[np.bool_] | None,
    num_cut: int = 0,
) -> Rows:
    """Return the rows in which there is a token to predict that the loss counts."""
    keep = lengths > 1 if learnt is None else learnt[:, 1:].any(axis=1)
    if not keep.any():
        raise DataError(
            "there is nothing to learn: wanted a row with a token after its first that the loss counts.",
            fix="give more text, or longer rows where answers are cut off.",
        )
    return Rows(
        torch.from_numpy(ids[keep]),
        torch.from_numpy(lengths[keep]),
        None if learnt is None else torch.from_numpy(learnt[keep]),
        num_cut,
        int((~keep).sum()),
    )
