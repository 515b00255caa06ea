"""Chats to text by the tokenizer's own template, and where in it the assistant's answers stand.

The template is run a second time with marks (`templates`), which say what of the text is whose:

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
from typing import Any, Protocol

from jinja2 import TemplateError

from colledge.data.text.formats import PROMPTING
from colledge.data.text.templates import REASONING, Marked, Message, Read, Span, names_read, run_with_marks
from colledge.errors import DataError, ModelError

ASSISTANT = "assistant"

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks answers
_THINKING = re.compile(r"[<\[][^<>\[\]]*think[^<>\[\]]*[>\]]", re.IGNORECASE)  # a tag, such as <think>
# Keys of a message that name it and say nothing: templates may leave them out.
_NAMES = frozenset(
    {
        "id",
        "tool_call_id",
        "name",
        "type",
        "index",
        "timestamp",
        "time",
        "date",
        "created",
        "created_at",
        "model",
    }
    | {"source", "lang", "language", "url", "uuid", "hash", "finish_reason", "metadata", "meta"}
)
_FLAGS = frozenset(("train", "trainable", "loss", "mask"))  # other trainers' words for `weight`


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer for chats; those of Hugging Face have it."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """How a chat becomes text, in Jinja; or several of them by name."""

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """Return a chat as text."""


@dataclass(frozen=True)
class Rendered:
    """A chat as text.

    Args:
        text: What the template writes.
        answers: Where the answers stand that are to be learnt; None where they were not asked for.
        unread: Keys of messages that the template left out, and that only name things.
    """

    text: str
    answers: tuple[Span, ...] | None
    unread: tuple[str, ...] = ()


def read_by_template(tokenizer: ChatTokenizer) -> frozenset[str]:
    """Return the names that a tokenizer's templates read beside the messages, such as `tools`."""
    templates = tokenizer.chat_template or {}
    sources = templates.values() if isinstance(templates, Mapping) else (templates,)
    return frozenset().union(*map(names_read, sources))


def render(
    messages: Sequence[Message],
    arguments: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    where: str,
    *,
    answers: bool,
) -> Rendered:
    """Return a chat as the tokenizer's template writes it.

    Args:
        messages: Of the chat; null is a key that a message has not.
        arguments: What the template reads beside them, such as `tools`.
        tokenizer: Of the model.
        where: File and line, for messages.
        answers: Whether the places of the answers are wanted.

    Raises:
        DataError: The template refuses the chat, leaves a part of it out, or does not tell where its answers are.
        ModelError: There is no template.
    """
    if answers and not any(message["role"] == ASSISTANT for message in messages):
        raise DataError(
            f"{where}: no message is the assistant's, so there is no answer to learn.",
            fix='add {"role": "assistant", "content": ...}, or use data.loss_on: all.',
        )
    weights = [_weight(message, where, number, answers) for number, message in enumerate(messages)]
    plain = [{key: value for key, value in one.items() if key != "weight"} for one in messages]
    template = _template_of(tokenizer, bool(arguments.get("tools")), where)
    fault: DataError | None = None
    for chat in _variants(plain):
        try:
            text = _official(chat, arguments, tokenizer, where)
            marked = _run(chat, arguments, tokenizer, template, where)
        except DataError as found:
            fault = fault or found
            continue
        if _is_lossy(chat, marked.messages, arguments, text):
            fault = fault or _lost(chat, arguments, text, where)
            continue
        unread = _check_read(chat, marked.messages, where)
        if not answers:
            return Rendered(text, None, unread)
        spans = _answers(chat, weights, arguments, tokenizer, template, where, marked, text)
        return Rendered(text, tuple(spans), unread)
    assert fault is not None
    raise fault


# -- what may differ -----------------------------------------------------------------------------------------------


def _weight(message: Message, where: str, number: int, answers: bool) -> bool:
    """Return whether a message is learnt, as far as its weight says; 0 or 1, as in OpenAI's chats."""
    at = f"{where}, messages[{number}]"
    for key in _FLAGS & message.keys():
        if isinstance(message[key], bool | int) and not message[key]:
            raise DataError(
                f"{at}: key {key!r} is not read.", fix="write weight: 0 for what is not to be learnt."
            )
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise DataError(
            f"{at}: key 'weight' is {weight!r}, wanted 0 or 1.", fix="learn an answer, or do not."
        )
    if weight == 0 and weight is not PROMPTING and not answers:
        raise DataError(
            f"{at}: key 'weight' is 0, and data.loss_on: all learns every message.",
            fix="use data.loss_on: answers, or take the weight out.",
        )
    return bool(weight)


def _variants(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield a chat as it is, and then as some templates want it: text parts joined, arguments as objects."""
    chat = list(messages)
    yield chat
    joined = [
        {**m, "content": _joined(m["content"])} if isinstance(m.get("content"), list) else m for m in chat
    ]
    parted = [{**m, "content": [{"type": "text", "text": m["content"]}]} if _is_text(m) else m for m in chat]
    for variant in (joined, [_with_objects(m) for m in chat], [_with_objects(m) for m in joined], parted):
        if variant != chat:
            yield variant


def _is_text(message: Message) -> bool:
    return isinstance(message.get("content"), str) and bool(message["content"])


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def _with_objects(message: Message) -> Message:
    """Return a message whose calls of tools have their arguments as objects, where they are JSON."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    found = []
    for call in calls:
        inner = call.get("function") if isinstance(call, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("arguments"), str):
            with suppress(ValueError):
                call = {**call, "function": {**inner, "arguments": json.loads(inner["arguments"])}}
        found.append(call)
    return {**message, "tool_calls": found}


def _is_lossy(chat: Sequence[Message], read: Sequence[Read], arguments: Mapping[str, Any], text: str) -> bool:
    """Return whether a template left something out, or wrote lists as Python does or JSON within JSON."""
    if _lost_part(chat, arguments, text) is not None:
        return True
    for message, seen in zip(chat, read, strict=True):
        if isinstance(message.get("content"), list) and not all("text" in part._read for part in seen._parts):
            return True
        for _, given in _calls(message):
            if isinstance(given, str) and '"' in given and json.dumps(given, ensure_ascii=False) in text:
                return True
    return False


def _lost_part(chat: Sequence[Message], arguments: Mapping[str, Any], text: str) -> str | None:
    """Return in words what of a chat is not in a text, None if all is; thinking may be taken out of some turns."""
    for number, message in enumerate(chat):
        if not _is_written(message, text):
            return f"the content of messages[{number}]"
        for name, given in _calls(message):
            if not all(_has(text, part) for part in (name, *_leaves(given))):
                return f"all of key 'tool_calls' of messages[{number}]"
    tools = (tool.get("function", tool) for tool in arguments.get("tools") or ())
    if not all(_has(text, tool.get("name", "")) for tool in tools if isinstance(tool, dict)):
        return "all of key 'tools'"
    thoughts = [
        (f"key {key!r} of messages[{number}]", message[key].strip())
        for number, message in enumerate(chat)
        for key in REASONING
        if isinstance(message.get(key), str)
    ]
    return None if not thoughts or any(_has(text, said) for _, said in thoughts) else thoughts[0][0]


def _is_written(message: Message, text: str) -> bool:
    """Return whether a message's content is in a text, spaces aside, and an answer's finished thinking."""
    content = message.get("content", "")
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    if message["role"] == ASSISTANT:
        parts = [part.rpartition("</think>")[2] for part in parts]
    return all(_has(text, part.strip()) for part in parts)


def _has(text: str, part: object) -> bool:
    said = part if isinstance(part, str) else json.dumps(part)
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text or str(part) in text


def _calls(message: Message) -> Iterator[tuple[str, Any]]:
    """Yield name and arguments of a message's calls of tools."""
    for call in message.get("tool_calls") or ():
        inner = call.get("function", call)
        if isinstance(inner, dict):
            yield str(inner.get("name", "")), inner.get("arguments", {})


def _leaves(given: Any) -> Iterator[object]:
    """Yield the values in the arguments of a call; of JSON, those that it says."""
    if isinstance(given, str):
        with suppress(ValueError):
            given = json.loads(given)
    if isinstance(given, dict | list):
        for inner in given.values() if isinstance(given, dict) else given:
            yield from _leaves(inner) if isinstance(inner, dict | list) else [inner]
    else:
        yield given


def _lost(chat: Sequence[Message], arguments: Mapping[str, Any], text: str, where: str) -> DataError:
    what = _lost_part(chat, arguments, text) or "lists of parts or calls of tools"
    return DataError(
        f"{where}: the chat template does not write {what}, so it would be lost.",
        fix="use a template that writes it, or take it out of the data.",
    )


def _check_read(chat: Sequence[Message], read: Sequence[Read], where: str) -> tuple[str, ...]:
    """Refuse a chat of which the template leaves something out; return left out keys that only name things."""
    unread = []
    for number, (message, seen) in enumerate(zip(chat, read, strict=True)):
        at = f"{where}, messages[{number}]"
        missed = [key for key in message if key not in seen._read and message[key] not in ("", [], {})]
        if any(key in seen._read for key in REASONING):
            missed = [key for key in missed if key not in REASONING]
        for key in missed:
            if key == "role" and "content" in seen._read:
                continue
            if key in _NAMES or (isinstance(message[key], bool | int | float) and key not in _FLAGS):
                unread.append(key)
                continue
            who = f" of a message of role {message['role']!r}" if key in ("role", "content") else ""
            raise DataError(
                f"{at}: the chat template does not read key {key!r}{who}, so it would be lost.",
                fix=f"use a template that reads {key}, or take it out of the data.",
            )
    return tuple(unread)


# -- running the template --------------------------------------------------------------------------------------------


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


def _refused(
    where: str, why: str, fix: str = "change the roles or their order, or mend the template"
) -> DataError:
    return DataError(f"{where}: the chat template refuses these messages ({why}).", fix=f"{fix}.")


def _official(
    chat: list[Message], arguments: Mapping[str, Any], tokenizer: ChatTokenizer, where: str, **more: bool
) -> str:
    """Return what transformers makes of a chat."""
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, **arguments, **more)
    except Exception as fault:  # a template raises whatever its expressions do
        raise _refused(where, _line(fault)) from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: the messages hold a lone surrogate, wanted Unicode text.",
            fix="write the character itself.",
        ) from None
    return text


def _line(fault: Exception) -> str:
    said = " ".join(str(fault).split())[:200]
    return said if isinstance(fault, TemplateError) and said else f"{type(fault).__name__}: {said}"


def _run(
    chat: Sequence[Message],
    arguments: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    template: str,
    where: str,
    prompt: bool = False,
) -> Marked:
    names = {**getattr(tokenizer, "special_tokens_map", {}), **arguments}
    try:
        return run_with_marks(chat, template, names, prompt)
    except Exception as fault:  # as above
        raise _refused(where, _line(fault)) from None


# -- where answers are -----------------------------------------------------------------------------------------------


def _answers(
    chat: list[Message],
    weights: Sequence[bool],
    arguments: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    template: str,
    where: str,
    marked: Marked,
    text: str,
) -> list[Span]:
    """Return where the answers stand that are to be learnt: what the template marks, else what follows its prompts."""
    told = {number for number, _, _ in marked.turns} if marked.text == text else set()
    learnt = [
        number for number, message in enumerate(chat) if message["role"] == ASSISTANT and weights[number]
    ]
    left = [
        number for number, message in enumerate(chat) if message["role"] == ASSISTANT and not weights[number]
    ]
    if marked.text == text and _GENERATION.search(template):
        if not told >= set(left):
            raise DataError(
                f"{where}: the chat template does not tell where messages[{left[0]}] stands, whose weight is 0.",
                fix="use a template that loops over the messages, or take the weight out.",
            )
        skipped = [(a, b) for number, a, b in marked.turns if number in left]
        return [span for span in marked.generated if not any(a <= span[0] < b for a, b in skipped)]
    own = [turn for turn in marked.turns if _is_written(chat[turn[0]], text[turn[1] : turn[2]])]
    if {number for number, _, _ in own} >= set(learnt):
        first = next(number for number, message in enumerate(chat) if message["role"] == ASSISTANT)
        prompt = _prompt(chat[:first] or chat, arguments, tokenizer, template, where)
        spans: list[Span] = []
        for number, start, stop in own:
            if number in learnt:
                begin = start + _prompted(prompt, text[start:stop])
                end = len(text) if stop == marked.end else stop
                within = [(a, b) for n, a, b in marked.turns if n != number and begin <= a and b <= stop]
                spans += _without((begin, end), within)
        return spans
    return [_between(chat, number, arguments, tokenizer, where, text) for number in learnt]


def _without(span: Span, others: Sequence[Span]) -> list[Span]:
    """Return a span without what others take of it, such as a tool's answer that stands within the assistant's."""
    parts, at = [], span[0]
    for start, stop in sorted(others):
        if at < start:
            parts.append((at, start))
        at = max(at, stop)
    return [*parts, (at, span[1])] if at < span[1] else parts


def _prompted(prompt: str, turn: str) -> int:
    """Return how many characters a turn begins with that prompt it, behind what separates it from the turn before."""
    apart = len(turn) - len(turn.lstrip())
    behind = _common(prompt, turn[apart:])
    return apart + behind if behind > _common(prompt, turn) else _common(prompt, turn)


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _prompt(
    chat: Sequence[Message], arguments: Mapping[str, Any], tokenizer: ChatTokenizer, template: str, where: str
) -> str:
    """Return what the template writes to have the assistant speak; thinking that it begins is a part of the answer."""
    try:
        asked = _run(chat, arguments, tokenizer, template, where, prompt=True)
    except DataError:
        return ""
    return _THINKING.split(asked.text[asked.end :])[0]


def _between(
    chat: list[Message],
    number: int,
    arguments: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    where: str,
    text: str,
) -> Span:
    """Return where an answer stands by what it adds to what prompts it, for templates that have no loop of messages."""
    try:
        before = (
            _official(chat[:number], arguments, tokenizer, where, add_generation_prompt=True)
            if number
            else ""
        )
        after = _official(chat[: number + 1], arguments, tokenizer, where)
    except DataError:
        before, after = "", "\0"  # a part of a chat is no chat to it
    if not (after.startswith(before) and text.startswith(after)):
        raise DataError(
            f"{where}: the chat template changes earlier messages when messages[{number}] is added, so its "
            "answers cannot be told from what prompts them.",
            fix="mark them in the template with {% generation %}, or use data.loss_on: all.",
        )
    return len(before), len(after)
