"""Chats to text by the tokenizer's own template, and where in it the assistant's answers stand.

The template is run a second time with marks (`templates`), which say what it writes for whom:

    <|user|>kettle <|assistant|>moss<|end|> <|user|>lantern <|assistant|><think></think>tide<|end|>
                   [ message 1            ][ message 2     ][ message 3                           ]
                   ( prompt    )( learnt )                  ( prompt    )( learnt                )

An answer begins behind what prompts it and ends where the next message begins: as far as TRL's training templates mark
it, whatever the template makes of earlier turns. So one text is trained, the template's own of the whole chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from jinja2 import TemplateError

from colledge.data.text.chats.losses import Texts, unread_names
from colledge.data.text.chats.templates import Marked, Message, Span, names_read, run_with_marks
from colledge.errors import DataError, ModelError

ASSISTANT = "assistant"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks answers
_THINKING = re.compile(r"[<\[][^<>\[\]]*think[^<>\[\]]*[>\]]", re.IGNORECASE)  # a tag, such as <think>
_FLAGS = {
    "train": True,
    "trainable": True,
    "loss": True,
    "mask": False,
}  # other trainers' words for weight: 1


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer for chats; those of Hugging Face have it."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """How a chat becomes text, in Jinja; or several of them by name."""

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """Return a chat as text."""


@dataclass(frozen=True)
class Chat:
    """A chat, and what stands beside its messages.

    Args:
        where: File and line, for messages.
        messages: Null is a key that a message has not.
        columns: What stands beside them, such as `tools`.
        prompting: How many messages, from the first on, only ask: of them nothing is learnt.
    """

    where: str
    messages: Sequence[Message]
    columns: Mapping[str, Any]
    prompting: int = 0


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Args:
        text: What the template writes.
        answers: Where the answers stand that are to be learnt; None where they were not asked for.
        unread: Keys of messages that the template left out, and that only name things.
        left: The columns that the template does not read.
        unprompted: Whether the template has nothing before an answer but what belongs to it: with it that is learnt.
    """

    text: str
    answers: tuple[Span, ...] | None
    unread: tuple[str, ...]
    left: Mapping[str, Any]
    unprompted: bool = False


class _Lost(DataError):
    """A template takes a chat, and leaves a part of it out."""


@dataclass(frozen=True)
class _Writing:
    """How one chat is written: by which template of which tokenizer, with what beside the messages."""

    tokenizer: ChatTokenizer
    template: str
    columns: Mapping[str, Any]
    where: str

    def official(self, chat: list[Message], **more: bool) -> str:
        """Return what transformers makes of a chat."""
        try:
            text: str = self.tokenizer.apply_chat_template(chat, tokenize=False, **self.columns, **more)
        except Exception as fault:  # a template raises whatever its expressions do
            raise _refused(self.where, fault) from None
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{self.where}: the messages hold a lone surrogate, wanted Unicode text.",
                fix="write the character itself.",
            ) from None
        return text

    def marked(self, chat: Sequence[Message], columns: Mapping[str, Any], *, prompt: bool = False) -> Marked:
        """Return what the template writes with marks."""
        names = {**getattr(self.tokenizer, "special_tokens_map", {}), **columns}
        try:
            return run_with_marks(self.template, chat, names, prompt=prompt)
        except Exception as fault:
            raise _refused(self.where, fault) from None


def render(chat: Chat, tokenizer: ChatTokenizer, *, answers: bool) -> Rendered:
    """Return a chat as the tokenizer's template writes it.

    Args:
        chat: The messages, and what stands beside them.
        tokenizer: Of the model.
        answers: Whether the places of the answers are wanted.

    Raises:
        DataError: The template refuses the chat, leaves a part of it out, or does not tell where its answers are.
        ModelError: There is no template.
    """
    if answers and not any(message["role"] == ASSISTANT for message in chat.messages):
        raise DataError(
            f"{chat.where}: no message is the assistant's, so there is no answer to learn.",
            fix='add {"role": "assistant", "content": ...}, or use data.loss_on: all.',
        )
    weights = [_weight(one, chat.where, number, answers) for number, one in enumerate(chat.messages)]
    learnt = [weight and number >= chat.prompting for number, weight in enumerate(weights)]
    template = _template_of(tokenizer, bool(chat.columns.get("tools")), chat.where)
    read = names_read(template)
    writing = _Writing(
        tokenizer, template, {key: value for key, value in chat.columns.items() if key in read}, chat.where
    )
    left = {key: value for key, value in chat.columns.items() if key not in read}
    fault: DataError | None = None
    for messages in _variants([_without_weight(message) for message in chat.messages]):
        try:
            text, marked, owned = _written(messages, writing)
        except DataError as found:
            fault = (
                found
                if fault is None or (isinstance(found, _Lost) and not isinstance(fault, _Lost))
                else fault
            )
            continue
        unread = unread_names(messages, marked.read)
        spans = tuple(_answers(messages, learnt, writing, marked, owned, text)) if answers else None
        return Rendered(
            text, spans, unread, left, bool(spans) and _is_unprompted(messages, writing, text, spans)
        )
    assert fault is not None
    raise fault


def _written(chat: list[Message], writing: _Writing) -> tuple[str, Marked, list[bool]]:
    """Return what a template writes for a chat, as it is and with marks, and which turns hold what their message says.

    Raises:
        DataError: It refuses the chat, or leaves a part of it out.
    """
    text, texts = writing.official(chat), Texts()
    tried = texts.marked_chat(chat), texts.marked_columns(writing.columns)
    try:
        marked = writing.marked(*tried)
    except DataError:  # it looks into a text, where there is a mark now
        texts.unmark()
        marked = writing.marked(chat, writing.columns)
    lost = texts.lost(chat, marked, text)
    if lost is not None:
        raise _Lost(
            f"{writing.where}: the chat template does not write {lost}, so it would be lost.",
            fix="use a template that writes it, or take it out of the data.",
        )
    owned = texts.owned(marked)
    if marked.text != text:
        marked = writing.marked(chat, writing.columns)
    return text, marked, owned if len(owned) == len(marked.turns) else [False] * len(marked.turns)


# -- what may differ -----------------------------------------------------------------------------------------------


def _weight(message: Message, where: str, number: int, answers: bool) -> bool:
    """Return whether a message is learnt, as far as its weight says; 0 or 1, as in OpenAI's chats."""
    at = f"{where}, messages[{number}]"
    for key, learnt in _FLAGS.items():
        if isinstance(message.get(key), bool) and message[key] != learnt:
            raise DataError(
                f"{at}: key {key!r} is not read.", fix="write weight: 0 for what is not to be learnt."
            )
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(
            f"{at}: key 'weight' is {weight!r}, wanted 0 or 1.", fix="learn an answer, or do not."
        )
    if weight == 0 and not answers:
        raise DataError(
            f"{at}: key 'weight' is 0, and data.loss_on: all learns every message.",
            fix="use data.loss_on: answers, or take the weight out.",
        )
    return bool(weight)


def _without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def _variants(chat: list[Message]) -> Iterator[list[Message]]:
    """Yield a chat as it is, and then as some templates want it.

    Parts of content joined, or text as a part; null or "" where there is none; arguments as objects, or as JSON.
    """
    tried: list[list[Message]] = []
    for content, empty, arguments in product(
        (None, _joined, _as_part), ({}, _NULL, _NOTHING), (None, _parsed, _dumped)
    ):
        variant = [{**empty, **message} for message in chat]
        if content is not None:
            variant = [{**m, "content": content(m["content"])} if "content" in m else m for m in variant]
        if arguments is not None:
            variant = [_with_arguments(message, arguments) for message in variant]
        if variant not in tried:
            tried.append(variant)
            yield variant


_NULL: Message = {"content": None}
_NOTHING: Message = {"content": ""}


def _joined(content: Any) -> Any:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _as_part(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) and content else content


def _parsed(arguments: Any) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    return arguments


def _dumped(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(message: Message, change: Any) -> Message:
    """Return a message whose calls of tools have other arguments."""
    calls = message.get("tool_calls")
    return message if calls is None else {**message, "tool_calls": [_changed(call, change) for call in calls]}


def _changed(call: Message, change: Any) -> Message:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _changed(call["function"], change)}
    return {**call, "arguments": change(call["arguments"])} if call.get("arguments") is not None else call


# -- the template --------------------------------------------------------------------------------------------------


def _template_of(tokenizer: ChatTokenizer, with_tools: bool, where: str) -> str:
    """Return the template that transformers takes: of several, `tool_use` where there are tools, else `default`."""
    templates = tokenizer.chat_template
    if not templates:
        raise ModelError(
            f"{where}: the data has messages and the tokenizer has no chat template.",
            fix="save a chat_template.jinja beside the model, or write prompt and completion.",
        )
    if isinstance(templates, str):
        return templates
    name = "tool_use" if with_tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ModelError(
            f"{where}: the tokenizer has chat templates {', '.join(templates)}, and none called default.",
            fix="save the one to use as chat_template.jinja beside the model.",
        )
    return templates[name]


def _refused(where: str, fault: Exception) -> DataError:
    said = " ".join(str(fault).split())[:200]
    why = said if isinstance(fault, TemplateError) and said else f"{type(fault).__name__}: {said}"
    return DataError(
        f"{where}: the chat template refuses these messages ({why}).",
        fix="change the roles or their order, or mend the template.",
    )


# -- where answers are -----------------------------------------------------------------------------------------------


def _answers(
    chat: list[Message],
    learnt: Sequence[bool],
    writing: _Writing,
    marked: Marked,
    owned: Sequence[bool],
    text: str,
) -> list[Span]:
    """Return where the answers stand that are to be learnt: what the template marks, else what follows its prompts."""
    answers = [number for number, message in enumerate(chat) if message["role"] == ASSISTANT]
    wanted = {number for number in answers if learnt[number]}
    own = [turn for turn, is_own in zip(marked.turns, owned, strict=True) if is_own]
    if marked.text == text and _GENERATION.search(writing.template):
        return _without_unlearnt(marked, set(answers) - wanted, writing.where)
    if marked.text == text and {number for number, _, _ in own} >= wanted:
        prompt = _prompt(chat[: answers[0]] or chat, writing)
        others = [(start, stop) for number, start, stop in marked.turns if number not in wanted]
        return [
            part
            for number, start, stop in own
            if number in wanted
            for part in _without(
                (start + _header(prompt, text[start:stop]), len(text) if stop == marked.end else stop), others
            )
        ]
    return [_between(chat, number, writing, text) for number in sorted(wanted)]


def _is_unprompted(
    chat: Sequence[Message], writing: _Writing, text: str, spans: Sequence[Span] | None
) -> bool:
    """Return whether what is learnt of the first answer begins with what a template writes before every answer."""
    if not spans or _GENERATION.search(writing.template):
        return False
    first = next(number for number, message in enumerate(chat) if message["role"] == ASSISTANT)
    said = chat[first].get("content")
    learnt = text[slice(*spans[0])].lstrip()
    return (
        isinstance(said, str) and not learnt.startswith(said.strip()) and not _prompt(chat[:first], writing)
    )


def _without_unlearnt(marked: Marked, left: set[int], where: str) -> list[Span]:
    """Return what a template marks as answers, without what is in turns that are not to be learnt."""
    untold = left - {number for number, _, _ in marked.turns}
    if untold:
        raise DataError(
            f"{where}: the chat template does not tell where messages[{min(untold)}] stands, "
            "which is not to be learnt.",
            fix="use a template that loops over the messages, or take the weight out.",
        )
    skipped = [(start, stop) for number, start, stop in marked.turns if number in left]
    return [span for span in marked.generated if not any(start <= span[0] < stop for start, stop in skipped)]


def _without(span: Span, others: Sequence[Span]) -> Iterator[Span]:
    """Yield what of a span is not of others inside it, such as results of tools that stand in an answer."""
    at, end = span
    for start, stop in sorted(other for other in others if span[0] <= other[0] and other[1] <= span[1]):
        if at < start:
            yield at, start
        at = max(at, stop)
    if at < end:
        yield at, end


def _header(prompt: str, turn: str) -> int:
    """Return how much of a turn is what prompts it, behind what separates it; nothing if only a few characters are."""
    for start in (0, len(turn) - len(turn.lstrip())):
        alike = _common(prompt, turn[start:])
        if 2 * alike >= len(prompt):
            return start + alike
    return 0


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _prompt(chat: Sequence[Message], writing: _Writing) -> str:
    """Return what the template writes to have the assistant speak; thinking that it begins is a part of the answer."""
    try:
        asked = writing.marked(chat, writing.columns, prompt=True)
    except DataError:
        return ""
    return _THINKING.split(asked.text[asked.end :])[0]


def _between(chat: list[Message], number: int, writing: _Writing, text: str) -> Span:
    """Return where an answer stands by what it adds to what prompts it, for templates that have no loop of messages."""
    try:
        before = writing.official(chat[:number], add_generation_prompt=True) if number else ""
        after = writing.official(chat[: number + 1])
    except DataError:
        before, after = "", "\0"  # a part of a chat is no chat to it
    if not (after.startswith(before) and text.startswith(after)):
        raise DataError(
            f"{writing.where}: the chat template changes earlier messages when messages[{number}] is added, so its "
            "answers cannot be told from what prompts them.",
            fix="mark them in the template with {% generation %}, or use data.loss_on: all.",
        )
    return len(before), len(after)
