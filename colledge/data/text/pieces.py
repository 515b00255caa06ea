"""Long texts to the tokens of the whole, a piece at a time, so that little of them is in memory.

Pieces are tokenised with a part of their neighbours. Where two neighbours give the same tokens around the cut, those
that begin before it are taken from the first one, the others from the second one:

    ... the lantern and the | kettle of gravel ...
    [ piece      and its context ]
              [ context and the next piece      ]
                   ^^^^^^^^^^^^^^ both have the same tokens here

Neighbours that do not agree are tokenised as one piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
PIECE_CHARS = 1 << 16
_PIECES_AT_ONCE = 16
_CONTEXT_CHARS = 512


class Splits(Protocol):
    """A tokenizer."""

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, Any]:
        """Return `input_ids`, and `offset_mapping` if asked."""


@dataclass(frozen=True)
class Placed:
    """Tokens, and where in a text each begins and ends. All int64, [tokens]."""

    ids: Ids
    starts: Ids
    ends: Ids

    def of(self, which: npt.NDArray[np.bool_]) -> Placed:
        """Return some of the tokens."""
        return Placed(self.ids[which], self.starts[which], self.ends[which])


def place(texts: list[str], tokenizer: Splits) -> Iterator[Placed]:
    """Yield the tokens of texts.

    Raises:
        NotImplementedError: The tokenizer is one in Python, which does not know where its tokens stand.
    """
    encoded = tokenizer(texts, **PLAIN, return_offsets_mapping=True)
    if "offset_mapping" not in encoded:
        raise NotImplementedError("a tokenizer in Python")
    for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
        yield Placed(np.array(ids, dtype=np.int64), starts, ends)


def place_in_pieces(text: Iterable[str], tokenizer: Splits) -> Iterator[Placed]:
    """Yield the tokens of a long text, some after others.

    Args:
        text: The text, in parts of any length.
        tokenizer: One that knows where its tokens stand.
    """
    last: tuple[_Window, Placed] | None = None
    begin = 0
    for window, tokens in _windows_placed(text, tokenizer):
        if last is not None:
            if _agree(last[1], tokens, window.cut):
                yield last[1].of((begin <= last[1].starts) & (last[1].starts < window.cut))
                begin = window.cut
            else:
                window = last[0].joined(window)
                (found,) = place([window.text], tokenizer)
                tokens = Placed(found.ids, found.starts + window.start, found.ends + window.start)
        last = window, tokens
    if last is not None:
        yield last[1].of(begin <= last[1].starts)


@dataclass(frozen=True)
class _Window:
    """A piece with a part of its neighbours: where that begins in the text, and where the piece does."""

    start: int
    cut: int
    text: str

    def joined(self, following: _Window) -> _Window:
        return _Window(self.start, self.cut, self.text[: following.start - self.start] + following.text)


def _windows_placed(text: Iterable[str], tokenizer: Splits) -> Iterator[tuple[_Window, Placed]]:
    windows = _windows(iter(text))
    while some := list(islice(windows, _PIECES_AT_ONCE)):
        for window, found in zip(some, place([one.text for one in some], tokenizer), strict=True):
            yield window, Placed(found.ids, found.starts + window.start, found.ends + window.start)


def _windows(parts: Iterator[str]) -> Iterator[_Window]:
    """Yield a text's pieces with a part of their neighbours."""
    held, start, cut = "", 0, 0  # text that is held, where it begins and where the next piece begins
    while True:
        while len(held) + start - cut <= PIECE_CHARS + _CONTEXT_CHARS:
            part = next(parts, None)
            if part is None:
                yield _Window(start, cut, held)
                return
            held += part
        stop = _cut(held, cut - start) + start
        yield _Window(start, cut, held[: stop + _CONTEXT_CHARS - start])
        held, start = held[max(0, stop - _CONTEXT_CHARS - start) :], max(start, stop - _CONTEXT_CHARS)
        cut = stop


def _cut(text: str, start: int) -> int:
    """Return where the piece that begins at `start` may end: behind a line, else before a word."""
    least, most = start + PIECE_CHARS // 2, start + PIECE_CHARS
    return text.rfind("\n", least, most) + 1 or max(text.rfind(" ", least, most), 0) or most


def _agree(left: Placed, right: Placed, cut: int) -> bool:
    """Return whether two pieces have the same tokens around a cut."""
    near = [
        one.of((one.starts >= cut - _CONTEXT_CHARS // 2) & (one.ends <= cut + _CONTEXT_CHARS // 2))
        for one in (left, right)
    ]
    return all(
        np.array_equal(getattr(near[0], name), getattr(near[1], name)) for name in ("ids", "starts", "ends")
    )
