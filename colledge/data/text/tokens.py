"""Examples to tokens: rendered, tokenised, and marked with what the loss counts.

With `loss_on` "answers" only completions and what the assistant says are learnt; what comes before is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from jinja2 import TemplateError

from colledge.data.text.examples import Example, OnFault, stop_at_fault
from colledge.errors import DataError, ModelError
from colledge.settings import LossOn

_PIECE_CHARS = 1 << 16  # a document longer than this is tokenised in pieces: less memory, all cores
_PIECES_AT_ONCE = 256
_ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks answers in a chat template
_PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of Hugging Face have it."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document."""

    @property
    def chat_template(self) -> str | None:
        """How a chat becomes text, in Jinja."""

    def __len__(self) -> int:
        """Return the size of the vocabulary, added tokens counted."""

    def __call__(self, text: list[str], **options: bool) -> Mapping[str, Any]:
        """Return `input_ids`, the tokens of every text, and `offset_mapping`, their (start, end) in it, if asked."""

    def decode(self, token_ids: list[int]) -> str:
        """Return tokens as text."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: bool) -> Any:
        """Return a chat as text, or as tokens."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of one example.

    Args:
        where: File and line of the example.
        ids: int64, [tokens].
        learnt: Whether the loss counts each token, [tokens]; None for all of them.
    """

    where: str
    ids: npt.NDArray[np.int64]
    learnt: npt.NDArray[np.bool_] | None = None

    @property
    def num_learnt(self) -> int:
        """The tokens that the loss counts."""
        return len(self.ids) if self.learnt is None else int(self.learnt.sum())


def tokenize(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    loss_on: LossOn = "all",
    on_fault: OnFault = stop_at_fault,
) -> Iterator[Tokens]:
    """Yield the tokens of every example in order.

    A document and a completion end with the tokenizer's end; a chat as its template says.

    Args:
        examples: What `read_examples` returns.
        tokenizer: Of the model.
        loss_on: What the loss counts.
        on_fault: Told of each example that cannot be rendered, which is left out if it returns.

    Raises:
        ModelError: The tokenizer has no end, no chat template, or cannot say where its tokens stand.
    """
    end = end_of(tokenizer)
    waiting: list[Example] = []
    for example in examples:
        if example.kind == "text" or (example.kind == "completion" and loss_on == "all"):
            waiting.append(example)
            continue
        yield from _documents(waiting, tokenizer, end)
        waiting = []
        try:
            if example.kind == "chat":
                yield _chat(example, tokenizer, loss_on)
            else:
                (_, prompt), (_, completion) = example.parts
                spans = [(len(prompt), len(prompt) + len(completion))]
                ids, learnt = _within(prompt + completion, spans, tokenizer)
                yield Tokens(example.where, np.append(ids, end), np.append(learnt, True))
        except DataError as fault:
            on_fault(fault)
    yield from _documents(waiting, tokenizer, end)


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


# -- tokens ------------------------------------------------------------------------------------------------------


def _documents(examples: Sequence[Example], tokenizer: Tokenizer, end: int) -> Iterator[Tokens]:
    """Yield documents that the loss counts whole, each with its end; long ones are tokenised in pieces."""
    pieces = [
        (example, piece, last)
        for example in examples
        for piece, last in _pieces("".join(text for _, text in example.parts))
    ]
    begun: list[int] = []
    for start in range(0, len(pieces), _PIECES_AT_ONCE):
        chunk = pieces[start : start + _PIECES_AT_ONCE]
        encoded = tokenizer([text for _, text, _ in chunk], **_PLAIN)["input_ids"]
        for (example, _, last), ids in zip(chunk, encoded, strict=True):
            begun += ids
            if last:
                yield Tokens(example.where, np.array([*begun, end], dtype=np.int64))
                begun = []


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield a document in pieces that end with a line, and whether each is the last one."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = text.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        yield text[start:cut], False
        start = cut
    yield text[start:], True


def _within(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the tokens of a text, and whether each has a part in one of the spans of characters."""
    try:
        encoded = tokenizer([text], **_PLAIN, return_offsets_mapping=True)
    except NotImplementedError:
        raise ModelError(
            "the tokenizer cannot say where in a text its tokens stand, which a loss on answers alone needs.",
            fix="use the model's fast tokenizer, or data.loss_on: all.",
        ) from None
    ids = np.array(encoded["input_ids"][0], dtype=np.int64)
    starts, ends = np.array(encoded["offset_mapping"][0], dtype=np.int64).reshape(-1, 2).T
    learnt = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        learnt |= (start < ends) & (starts < stop)
    return ids, learnt


def _chat(example: Example, tokenizer: Tokenizer, loss_on: LossOn) -> Tokens:
    if not tokenizer.chat_template:
        raise ModelError(
            f"{example.where}: the data has messages and the tokenizer has no chat template.",
            fix="save a chat_template.jinja beside the model, or write prompt and completion.",
        )
    messages = [{"role": role, "content": content} for role, content in example.parts]
    try:
        if loss_on == "all":
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            return Tokens(
                example.where, np.array(tokenizer([text], **_PLAIN)["input_ids"][0], dtype=np.int64)
            )
        if not any(message["role"] == _ASSISTANT for message in messages):
            raise DataError(
                f"{example.where}: no message is the assistant's, so there is no answer to learn.",
                fix='add {"role": "assistant", "content": ...}, or use data.loss_on: all.',
            )
        if _GENERATION.search(tokenizer.chat_template):
            encoded = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            learnt = np.array(encoded["assistant_masks"], dtype=bool)
            return Tokens(example.where, np.array(encoded["input_ids"], dtype=np.int64), learnt)
        text, spans = _answers(messages, tokenizer, example.where)
    except TemplateError as fault:
        raise DataError(
            f"{example.where}: the chat template refuses these messages ({fault}).",
            fix="change the roles or their order.",
        ) from None
    return Tokens(example.where, *_within(text, spans, tokenizer))


def _answers(
    messages: list[dict[str, str]], tokenizer: Tokenizer, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """Return a chat as text, and where the assistant's answers stand: what a message adds to what prompts it."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == _ASSISTANT and number == 0:
            raise DataError(
                f"{where}: the first message is the assistant's: nothing prompts its answer.",
                fix="begin with the user's message, or use data.loss_on: all.",
            )
        if message["role"] == _ASSISTANT:
            before = tokenizer.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=True
            )
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{where}: the chat template changes earlier messages when messages[{number}] is added, so its "
                    "answers cannot be told from what prompts them.",
                    fix="mark them in the template with {% generation %}, or use data.loss_on: all.",
                )
            spans.append((len(before), len(after)))
    return text, spans
