"""Examples to tokens: rendered, tokenised, and marked with what the loss counts.

With `loss_on` "answers" only completions and what the assistant says are learnt; what comes before is read. Documents
begin with what the tokenizer puts in front of a text (a Llama's BOS) and end with its end; chats as the template says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from colledge.data.text.chats.rendering import Chat, ChatTokenizer, render
from colledge.data.text.chats.templates import Message, Span
from colledge.data.text.pieces import PIECE_CHARS, PLAIN, Ids, Placed, place, place_in_pieces
from colledge.data.text.reading.examples import Example, Noticed, OnFault, check_columns, stop_at_fault
from colledge.errors import DataError, ModelError
from colledge.settings import LossOn

_EXAMPLES_AT_ONCE = 512  # tokenised together: all cores
_CHARS_AT_ONCE = 1 << 20
_SPACES = re.compile(r"\s*")
_MOST_OF_A_CHARACTER = 8  # tokens, of a tokenizer in Python


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
    """The tokens of one example, or of a part of it.

    Args:
        where: File and line of the example.
        ids: int64, [tokens].
        learnt: Whether the loss counts each token, [tokens]; None for all of them.
        goes_on: Whether the next tokens are of the same example, which is long.
    """

    where: str
    ids: Ids
    learnt: npt.NDArray[np.bool_] | None = None
    goes_on: bool = False

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
    noticed, left = noticed if noticed is not None else Noticed(), iter(examples)
    waiting: list[_Text] = []
    chars = 0  # of those that wait
    for example in left:
        try:
            one = _Text(example, *_text(example, tokenizer, loss_on, noticed))
        except DataError as fault:
            on_fault(fault)
            continue
        if example.goes_on or len(one.text) > PIECE_CHARS:
            yield from _finished(waiting, tokenizer, begin, end)
            waiting, chars = [], 0
            parts = _in_parts(one, _following(example, left), tokenizer)
            yield from parts if example.kind == "chat" else _with_ends(parts, begin, end)
            continue
        waiting.append(one)
        chars += len(one.text)
        if len(waiting) == _EXAMPLES_AT_ONCE or chars > _CHARS_AT_ONCE:
            yield from _finished(waiting, tokenizer, begin, end)
            waiting, chars = [], 0
    yield from _finished(waiting, tokenizer, begin, end)


def _finished(texts: Sequence[_Text], tokenizer: Tokenizer, begin: Ids, end: int) -> Iterator[Tokens]:
    for one, tokens in zip(texts, _together(texts, tokenizer), strict=True):
        yield from [tokens] if one.example.kind == "chat" else _with_ends([tokens], begin, end)


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
    options = {**PLAIN, "add_special_tokens": True}
    plain, whole = (tokenizer(["a"], **one)["input_ids"][0] for one in (PLAIN, options))
    added = len(whole) - len(plain)
    at = next((start for start in range(added + 1) if whole[start : start + len(plain)] == plain), 0)
    return np.array(whole[:at], dtype=np.int64)


def _text(
    example: Example, tokenizer: Tokenizer, loss_on: LossOn, noticed: Noticed
) -> tuple[str, list[Span] | None]:
    """Return an example as text, and where in it the answers stand; None where all is learnt."""
    if example.kind != "chat":
        texts = [text for _, text in example.parts]
        start = len(texts[0])
        answers = example.kind == "completion" and loss_on == "answers"
        return "".join(texts), [(start, start + len(texts[1]))] if answers else None
    chat = Chat(example.where, example.messages, example.columns, example.prompting)
    rendered = render(chat, tokenizer, answers=loss_on == "answers")
    check_columns(rendered.left, example.where, noticed)
    noticed.unread.update(f"messages' {key}" for key in rendered.unread)
    noticed.unprompted += rendered.unprompted
    return rendered.text, None if rendered.answers is None else list(rendered.answers)


# -- tokens ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """An example as text, and where in it the answers stand; None where all is learnt."""

    example: Example
    text: str
    answers: list[Span] | None

    def learnt(self, tokens: Placed) -> npt.NDArray[np.bool_] | None:
        """Return which of its tokens are learnt."""
        if self.answers is None:
            return None
        found = np.zeros(len(tokens.ids), dtype=bool)
        for start, stop in self.answers:
            found |= (start < tokens.ends) & (tokens.starts < stop)
        return found


def _together(texts: Sequence[_Text], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Yield the tokens of short examples."""
    whole = [one.text for one in texts if one.answers is None]
    ids_of = iter(tokenizer(whole, **PLAIN)["input_ids"] if whole else ())
    placed = iter(_with_places([one.text for one in texts if one.answers is not None], tokenizer))
    for one in texts:
        if one.answers is None:
            yield Tokens(one.example.where, np.array(next(ids_of), dtype=np.int64))
        else:
            tokens = next(placed)
            yield Tokens(one.example.where, tokens.ids, one.learnt(tokens))


def _in_parts(one: _Text, following: Iterator[str], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Yield the tokens of a long example, or of one that goes on, in parts."""
    parts = chain([one.text], following)
    try:
        list(place(["a"], tokenizer))
    except NotImplementedError:
        yield from _together([replace(one, text="".join(parts))], tokenizer)
        return
    last: Placed | None = None
    for tokens in place_in_pieces(parts, tokenizer):
        if last is not None:
            yield Tokens(one.example.where, last.ids, one.learnt(last), goes_on=True)
        last = tokens
    assert last is not None
    yield Tokens(one.example.where, last.ids, one.learnt(last))


def _following(example: Example, left: Iterator[Example]) -> Iterator[str]:
    """Yield the texts of the examples that an example goes on in."""
    while example.goes_on:
        example = next(left)
        yield example.parts[0][1]


def _with_ends(tokens: Iterable[Tokens], begin: Ids, end: int) -> Iterator[Tokens]:
    """Yield a document's tokens with what stands before and behind it; the end is learnt."""
    first = True
    for one in tokens:
        before, after = begin if first else begin[:0], [] if one.goes_on else [end]
        learnt = one.learnt
        if learnt is not None:
            learnt = np.concatenate(
                [np.zeros(len(before), dtype=bool), learnt, np.ones(len(after), dtype=bool)]
            )
        ids = np.concatenate([before, one.ids, np.array(after, dtype=np.int64)])
        yield replace(one, ids=ids, learnt=learnt)
        first = not one.goes_on


def _with_places(texts: list[str], tokenizer: Tokenizer) -> list[Placed]:
    """Return the tokens of texts, and where each begins and ends in its text."""
    if not texts:
        return []
    try:
        return list(place(texts, tokenizer))
    except NotImplementedError:
        return [_found_places(text, tokenizer) for text in texts]


def _found_places(text: str, tokenizer: Tokenizer) -> Placed:
    """Return what `_with_places` does for a tokenizer in Python: tokens are decoded until they are the text's next.

    Raises:
        ModelError: The decoded tokens are not the text.
    """
    ids: list[int] = tokenizer([text], **PLAIN)["input_ids"][0]
    places: list[Span] = []
    at = 0
    while len(places) < len(ids):
        for count in range(1, min(_MOST_OF_A_CHARACTER, len(ids) - len(places)) + 1):
            said = tokenizer.decode(ids[len(places) : len(places) + count])
            begin = at if text.startswith(said, at) else _SPACES.match(text, at).end()  # type: ignore[union-attr]
            if said and text.startswith(said, begin):
                places += [(at, begin + len(said))] * count
                at = begin + len(said)
                break
        else:
            if tokenizer.decode(ids[len(places) : len(places) + 1]):
                break
            places.append((at, at))  # a token of nothing, such as of a space before a text
    if at != len(text) or len(places) != len(ids):
        raise ModelError(
            "the tokenizer cannot say where in a text its tokens stand, which a loss on answers alone needs.",
            fix="use the model's fast tokenizer, or data.loss_on: all.",
        )
    starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return Placed(np.array(ids, dtype=np.int64), starts, ends)
