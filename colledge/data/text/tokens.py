"""Examples to tokens: rendered, tokenised, and marked with what the loss counts.

With `loss_on` "answers" only completions and what the assistant says are learnt; what comes before is read. Documents
begin with what the tokenizer puts in front of a text (a Llama's BOS) and end with its end; chats as the template says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from colledge.data.text.chats import ChatTokenizer, read_by_template, render
from colledge.data.text.examples import Example, Noticed, OnFault, check_columns, stop_at_fault
from colledge.data.text.templates import Message
from colledge.errors import DataError, ModelError
from colledge.settings import LossOn

Ids = npt.NDArray[np.int64]

_EXAMPLES_AT_ONCE = 512  # tokenised together: all cores
_PIECE_CHARS = 1 << 16  # a document longer than this is tokenised in pieces: less memory, all cores
_PIECES_AT_ONCE = 64
_CONTEXT_CHARS = 512  # of its neighbours, that a piece is tokenised with
_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


class Tokenizer(ChatTokenizer, Protocol):
    """What is needed of a tokenizer; those of Hugging Face have it."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document."""

    def __len__(self) -> int:
        """Return the size of the vocabulary, added tokens counted."""

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, Any]:
        """Return `input_ids`, the tokens of every text, and `offset_mapping`, their (start, end) in it, if asked."""

    def decode(self, token_ids: list[int]) -> str:
        """Return tokens as text."""

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """Return a chat as text."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one example.

    Args:
        where: File and line of the example.
        ids: int64, [tokens].
        learnt: Whether the loss counts each token, [tokens]; None for all of them.
    """

    where: str
    ids: Ids
    learnt: npt.NDArray[np.bool_] | None = None

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Whether the loss counts each token, [tokens]."""
        return np.ones(len(self.ids), dtype=bool) if self.learnt is None else self.learnt

    @property
    def num_learnt(self) -> int:
        """The tokens that the loss counts."""
        return len(self.ids) if self.learnt is None else int(self.learnt.sum())


def tokenize(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    loss_on: LossOn = "all",
    on_fault: OnFault = stop_at_fault,
    noticed: Noticed | None = None,
) -> Iterator[Tokens]:
    """Yield the tokens of every example in order; few examples are in memory at a time.

    Args:
        examples: What `iterate_examples` yields.
        tokenizer: Of the model.
        loss_on: What the loss counts.
        on_fault: Told of each example that cannot be rendered, which is left out if it returns.
        noticed: What else is noticed is added to it.

    Raises:
        ModelError: The tokenizer has no end, no chat template, or cannot say where its tokens stand.
    """
    begin, end = begin_of(tokenizer), end_of(tokenizer)
    columns = read_by_template(tokenizer)
    noticed, left = noticed if noticed is not None else Noticed(), iter(examples)
    while group := list(islice(left, _EXAMPLES_AT_ONCE)):
        texts: list[tuple[Example, str, list[tuple[int, int]] | None]] = []
        for example in group:
            try:
                texts.append((example, *_text(example, tokenizer, loss_on, columns, noticed)))
            except DataError as fault:
                on_fault(fault)
        for (example, _, spans), ids, starts, ends in _encoded(texts, tokenizer):
            learnt = None
            if spans is not None:
                learnt = np.zeros(len(ids), dtype=bool)
                for start, stop in spans:
                    learnt |= (start < ends) & (starts < stop)
            if example.kind != "chat":
                ids = np.concatenate([begin, ids, [end]])
                if learnt is not None:
                    learnt = np.concatenate([np.zeros(len(begin), dtype=bool), learnt, [True]])
            yield Tokens(example.where, ids, learnt)


def end_of(tokenizer: Tokenizer) -> int:
    """Return the token that ends a document.

    Raises:
        ModelError: There is none.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token to join documents with.",
            fix="set eos_token in tokenizer_config.json.",
        )
    return end


def begin_of(tokenizer: Tokenizer) -> Ids:
    """Return the tokens that a tokenizer puts in front of a text, such as BOS."""
    options = {**_PLAIN, "add_special_tokens": True}
    plain, whole = (tokenizer(["a"], **one)["input_ids"][0] for one in (_PLAIN, options))
    added = len(whole) - len(plain)
    at = next((start for start in range(added + 1) if whole[start : start + len(plain)] == plain), 0)
    return np.array(whole[:at], dtype=np.int64)


def _text(
    example: Example, tokenizer: Tokenizer, loss_on: LossOn, columns: frozenset[str], noticed: Noticed
) -> tuple[str, list[tuple[int, int]] | None]:
    """Return an example as text, and where in it the answers stand; None where all is learnt."""
    if example.kind != "chat":
        texts = [text for _, text in example.parts]
        start = len(texts[0])
        answers = example.kind == "completion" and loss_on == "answers"
        return "".join(texts), [(start, start + len(texts[1]))] if answers else None
    given = {key: value for key, value in example.columns.items() if key in columns}
    others = {key: value for key, value in example.columns.items() if key not in columns}
    rendered = render(example.messages, given, tokenizer, example.where, answers=loss_on == "answers")
    check_columns(others, example.where, noticed)
    noticed.unread.update(f"messages' {key}" for key in rendered.unread)
    return rendered.text, None if rendered.answers is None else list(rendered.answers)


# -- tokens ------------------------------------------------------------------------------------------------------

_Text = tuple[Example, str, list[tuple[int, int]] | None]


def _encoded(texts: Sequence[_Text], tokenizer: Tokenizer) -> Iterator[tuple[_Text, Ids, Ids, Ids]]:
    """Yield texts with their tokens, and where each token begins and ends (nowhere, if that is not asked for)."""
    short = [text for text in texts if len(text[1]) <= _PIECE_CHARS]
    plain = [text for text in short if text[2] is None]
    ids_of = iter(tokenizer([text for _, text, _ in plain], **_PLAIN)["input_ids"] if plain else ())
    placed = iter(_with_places([text for _, text, spans in short if spans is not None], tokenizer))
    nowhere = np.zeros(0, dtype=np.int64)
    for one in texts:
        if len(one[1]) > _PIECE_CHARS:
            yield one, *_in_pieces(one[1], tokenizer, one[2] is not None)
        elif one[2] is None:
            yield one, np.array(next(ids_of), dtype=np.int64), nowhere, nowhere
        else:
            yield one, *next(placed)


def _with_places(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[Ids, Ids, Ids]]:
    """Return the tokens of texts, and where each begins and ends in its text."""
    if not texts:
        return []
    try:
        return list(_placed(texts, tokenizer))
    except NotImplementedError:
        return [_found_places(text, tokenizer) for text in texts]


def _placed(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[Ids, Ids, Ids]]:
    encoded = tokenizer(list(texts), **_PLAIN, return_offsets_mapping=True)
    if "offset_mapping" not in encoded:
        raise NotImplementedError("a tokenizer in Python")
    for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
        yield np.array(ids, dtype=np.int64), starts, ends


def _found_places(text: str, tokenizer: Tokenizer) -> tuple[Ids, Ids, Ids]:
    """Return what `_with_places` does for a tokenizer in Python, which does not say where its tokens stand.

    Raises:
        ModelError: The tokens, decoded one by one, are not the text.
    """
    ids = tokenizer([text], **_PLAIN)["input_ids"][0]
    pieces = [tokenizer.decode([token]) for token in ids]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    if "".join(pieces) != text:
        raise ModelError(
            "the tokenizer cannot say where in a text its tokens stand, which a loss on answers alone needs.",
            fix="use the model's fast tokenizer, or data.loss_on: all.",
        )
    return np.array(ids, dtype=np.int64), np.concatenate([[0], ends[:-1]]), ends


def _in_pieces(text: str, tokenizer: Tokenizer, with_places: bool) -> tuple[Ids, Ids, Ids]:
    """Return the tokens of a long text as of the whole: pieces are tokenised with a part of their neighbours.

    Where two neighbours do not agree about the tokens around their border, they are tokenised as one piece.
    """
    cuts = [0, *_cuts(text), len(text)]
    try:
        pieces = _windows(text, cuts, tokenizer)
    except NotImplementedError:
        ids = np.array(tokenizer([text], **_PLAIN)["input_ids"][0], dtype=np.int64)
        return _found_places(text, tokenizer) if with_places else (ids, ids, ids)
    while torn := [at for at in range(1, len(pieces)) if not _agree(pieces[at - 1], pieces[at], cuts[at])]:
        cuts = [cut for at, cut in enumerate(cuts) if at not in torn]
        pieces = _windows(text, cuts, tokenizer)
    parts = []
    for (ids, starts, ends), begin, stop in zip(pieces, cuts[:-1], cuts[1:], strict=True):
        own = (begin <= starts) & (starts < stop) if stop < len(text) else begin <= starts
        parts.append((ids[own], starts[own], ends[own]))
    ids, starts, ends = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return ids, starts, ends


def _cuts(text: str) -> Iterator[int]:
    """Yield where a long text may be cut: behind a line, else before a word."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        least, most = start + _PIECE_CHARS // 2, start + _PIECE_CHARS
        start = text.rfind("\n", least, most) + 1 or max(text.rfind(" ", least, most), 0) or most
        yield start


def _windows(text: str, cuts: Sequence[int], tokenizer: Tokenizer) -> list[tuple[Ids, Ids, Ids]]:
    """Return the tokens of pieces with a part of their neighbours, and where they stand in the text."""
    begins = [max(0, start - _CONTEXT_CHARS) for start in cuts[:-1]]
    stops = [stop + _CONTEXT_CHARS for stop in cuts[1:]]
    found: list[tuple[Ids, Ids, Ids]] = []
    for at in range(0, len(begins), _PIECES_AT_ONCE):
        some = slice(at, at + _PIECES_AT_ONCE)
        windows = [text[begin:stop] for begin, stop in zip(begins[some], stops[some], strict=True)]
        for begin, (ids, starts, ends) in zip(begins[some], _placed(windows, tokenizer), strict=True):
            found.append((ids, starts + begin, ends + begin))
    return found


def _agree(left: tuple[Ids, Ids, Ids], right: tuple[Ids, Ids, Ids], cut: int) -> bool:
    """Return whether two pieces have the same tokens around their border, none of which lies across it."""
    near = []
    for ids, starts, ends in (left, right):
        inside = (starts >= cut - _CONTEXT_CHARS // 2) & (ends <= cut + _CONTEXT_CHARS // 2)
        near.append(np.stack([ids[inside], starts[inside], ends[inside]]))
        if bool(((starts < cut) & (ends > cut)).any()):
            return False
    return near[0].shape == near[1].shape and bool((near[0] == near[1]).all())
