"""Tokens to rows: packed or padded to one length.

Packed (the default), examples are joined and cut into rows, so that no token is wasted on padding but in the last
row; a row's later examples see its earlier ones. Padded, every example has a row of its own:

    doc A ■ doc B ■ doc C ■      packed  [doc A ■ doc][ B ■ doc C][ ■ · · · ·]      ■ end  · padding
                                 padded  [doc A ■ · ·][doc B ■ · ·][doc C ■ · ·]

Rows are places in a stream of tokens, which may lie on a disk: a row's tokens are looked up when a batch asks for it.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from colledge.data.batch import Batch
from colledge.data.text.reading.examples import Example, Noticed
from colledge.data.text.tokens import Tokenizer, Tokens, end_of, tokenize
from colledge.errors import DataError
from colledge.settings import LossOn

IGNORED_LABEL = -100  # as in torch.nn.functional.cross_entropy
_BLOCK_TOKENS = 1 << 20  # looked through at a time

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """The tokens of examples, one after another.

    Args:
        ids: Of an integer type, [tokens].
        ends: Where each example ends, int64, [examples].
        learnt: Whether the loss counts each token, bool, [tokens]; None for all of them.
        largest: The largest token, -1 if there is none.
        digest: Of the tokens and what is learnt; by it streams are told apart.
    """

    ids: npt.NDArray[Any]
    ends: Indices
    learnt: npt.NDArray[np.bool_] | None
    largest: int
    digest: str

    def release(self) -> None:
        """Give back the memory that reading files took; the system still caches what it has room for."""
        for array in (self.ids, self.ends, self.learnt):
            if array is not None and isinstance(array.base, mmap.mmap):
                array.base.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, all of one length.

    Args:
        stream: Where the tokens are.
        begins: Where each row begins among the tokens that are used, int64, [num_rows].
        lengths: Tokens of each row that are not padding, int64, [num_rows].
        sequence_length: Tokens a row, padding included.
        end: The token that rows are padded with.
        used: Of each run of tokens that are used, where it begins among them and in the stream, int64, [2, runs].
        num_cut: Examples that were longer than a row and lost their end.
        num_dropped: Rows left out, as the loss would count nothing in them.
    """

    stream: Stream
    begins: Indices
    lengths: Indices
    sequence_length: int
    end: int
    used: Indices
    num_cut: int = 0
    num_dropped: int = 0

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.begins)

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding not counted."""
        return int(self.lengths.sum())

    @property
    def largest(self) -> int:
        """A token that none in the rows is larger than."""
        return max(self.stream.largest, self.end)

    @property
    def digest(self) -> str:
        """Of all rows; by it data are told apart."""
        arrays = (self.begins, self.lengths, self.used, np.array([self.sequence_length, self.end]))
        made = hashlib.sha256(self.stream.digest.encode())
        for array in arrays:
            made.update(np.ascontiguousarray(array).tobytes())
        return made.hexdigest()

    def batch(self, indices: Tensor) -> Batch:
        """Return rows as a batch.

        Args:
            indices: Rows wanted, int64.

        Returns:
            `input_ids` (and `attention_mask`, if a row has padding) against `labels`, which are the same tokens, -100
            where the loss counts nothing; the loss shifts them. All int64, [len(indices), sequence_length].
        """
        shape = (len(indices), self.sequence_length)
        ids = np.full(shape, self.end, dtype=np.int64)
        learnt = np.zeros(shape, dtype=bool)
        for row, index in enumerate(indices.tolist()):
            begin, length = int(self.begins[index]), int(self.lengths[index])
            learnt[row, :length] = True
            for at, place, count in self._places(begin, length):
                ids[row, at : at + count] = self.stream.ids[place : place + count]
                if self.stream.learnt is not None:
                    learnt[row, at : at + count] = self.stream.learnt[place : place + count]
        self.stream.release()
        input_ids = torch.from_numpy(ids)
        inputs = {"input_ids": input_ids}
        lengths = torch.from_numpy(self.lengths[indices.numpy()])
        if bool((lengths < self.sequence_length).any()):
            inputs["attention_mask"] = (torch.arange(self.sequence_length) < lengths[:, None]).long()
        return Batch(inputs, {"labels": input_ids.masked_fill(~torch.from_numpy(learnt), IGNORED_LABEL)})

    def _places(self, begin: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield for a range of the used tokens: where a part of it begins in it, and in the stream; and its length."""
        starts, places = self.used
        run, at = int(np.searchsorted(starts, begin, side="right")) - 1, 0
        while at < length:
            stop = int(starts[run + 1]) if run + 1 < len(starts) else begin + length
            count = min(length - at, stop - begin - at)
            yield at, int(places[run]) + begin + at - int(starts[run]), count
            at, run = at + count, run + 1


def make_rows(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    packing: bool = True,
    loss_on: LossOn = "all",
    noticed: Noticed | None = None,
) -> Rows:
    """Return examples as rows, in memory.

    Args:
        examples: What `read_examples` returns.
        tokenizer: Of the model.
        sequence_length: Tokens a row.
        packing: Join examples; else each has a row of its own, padded or cut.
        loss_on: What the loss counts.
        noticed: What is noticed is added to it.

    Raises:
        DataError: An example cannot be rendered, or there is nothing to learn in any of them.
        ModelError: The tokenizer lacks what the examples need.
    """
    stream = joined(tokenize(examples, tokenizer, loss_on, noticed=noticed))
    return rows_of(stream, sequence_length, end_of(tokenizer), packing=packing)


def joined(tokens: Iterable[Tokens]) -> Stream:
    """Return the tokens of examples as one stream, in memory."""
    found = list(tokens)
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *(one.ids for one in found)])
    learnt = None
    if any(one.learnt is not None for one in found):
        learnt = np.concatenate([one.mask for one in found])
    ends = np.cumsum([len(one.ids) for one in found], dtype=np.int64)
    ends = ends[[not one.goes_on for one in found]] if found else ends
    digest = hashlib.sha256(ids.tobytes() + ends.tobytes() + (b"" if learnt is None else learnt.tobytes()))
    return Stream(ids, ends, learnt, int(ids.max(initial=-1)), digest.hexdigest())


def rows_of(
    stream: Stream, sequence_length: int, end: int, *, packing: bool, chosen: Indices | None = None
) -> Rows:
    """Return the rows of a stream.

    Args:
        stream: The tokens.
        sequence_length: Tokens a row.
        end: The token that ends a document, with which rows are padded.
        packing: Join examples; else each has a row of its own, padded or cut.
        chosen: The examples to use, rising; None for all of them.

    Raises:
        DataError: There is nothing to learn in any row.
    """
    stops = stream.ends if chosen is None else stream.ends[chosen]
    starts = np.concatenate([[0], stream.ends[:-1]]) if len(stream.ends) else stream.ends
    starts = starts if chosen is None else starts[chosen]
    whole = np.zeros((2, 1), dtype=np.int64)
    if not packing:
        lengths = np.minimum(stops - starts, sequence_length)
        num_cut = int((lengths < stops - starts).sum())
        return _kept(Rows(stream, starts, lengths, sequence_length, end, whole, num_cut))
    used = whole if chosen is None else _runs(starts, stops)
    total = int((stops - starts).sum())
    num_rows, rest = divmod(total, sequence_length)
    lengths = np.full(num_rows, sequence_length, dtype=np.int64)
    if rest > 1:  # one token has nothing to predict
        lengths = np.append(lengths, rest)
    return _kept(Rows(stream, np.arange(len(lengths)) * sequence_length, lengths, sequence_length, end, used))


def _runs(starts: Indices, stops: Indices) -> Indices:
    """Return where each run of examples that follow each other begins, counted in what is used and in the stream."""
    first = np.concatenate([[True], starts[1:] != stops[:-1]])
    before = np.concatenate([[0], np.cumsum(stops - starts)[:-1]])
    return np.stack([before[first], starts[first]]).astype(np.int64)


def _kept(rows: Rows) -> Rows:
    """Return the rows in which there is a token to predict that the loss counts."""
    keep = rows.lengths > 1
    if rows.stream.learnt is not None:
        keep &= np.concatenate([np.zeros(0, dtype=bool), *_with_answers(rows)])
    if not keep.any():
        raise DataError(
            "there is nothing to learn: wanted a row with a token after its first that the loss counts.",
            fix="give more text, or longer rows where answers are cut off.",
        )
    rows.stream.release()
    dropped = int((~keep).sum())
    if not dropped:
        return rows
    return replace(rows, begins=rows.begins[keep], lengths=rows.lengths[keep], num_dropped=dropped)


def _with_answers(rows: Rows) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield for some rows after others whether the loss counts a token behind a row's first."""
    learnt = rows.stream.learnt
    assert learnt is not None
    some = max(1, _BLOCK_TOKENS // rows.sequence_length)
    for at in range(0, rows.num_rows, some):
        begins, lengths = rows.begins[at : at + some], rows.lengths[at : at + some]
        base, stop = int(begins[0]), int(begins[-1] + lengths[-1])
        parts = [learnt[place : place + count] for _, place, count in rows._places(base, stop - base)]
        counts = np.concatenate([[0], np.cumsum(np.concatenate(parts), dtype=np.int64)])
        rows.stream.release()
        first = np.minimum(begins + 1, begins + lengths) - base
        yield counts[begins + lengths - base] > counts[first]
