"""Chats to text by the tokenizer's own template, and where in it the assistant's answers stand.

The template is run a second time with marks: at both ends of what it writes for a message, and where it marks
answers itself with {% generation %}. Without the marks both texts are the same, so the marks say what is whose:

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
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from colledge.errors import DataError, ModelError

Message = dict[str, Any]
Span = tuple[int, int]  # of characters, half-open

ASSISTANT = "assistant"

# Characters that are in no text: Unicode keeps them for programs' own use.
_BEGIN, _NUMBERED, _END, _ANSWER, _ANSWERED = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_MARKS = re.compile(f"{_BEGIN}(\\d+){_NUMBERED}|{_END}|{_ANSWER}|{_ANSWERED}")
_STANDARD = frozenset(
    ("messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")
)
_THINKING = re.compile(r"[<\[][^<>\[\]]*think[^<>\[\]]*[>\]]", re.IGNORECASE)  # a tag, such as <think>
# Names of one thing, the model's thinking: transformers gives a template all of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")
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
    found: set[str] = set()
    for source in templates.values() if isinstance(templates, Mapping) else (templates,):
        try:
            found |= meta.find_undeclared_variables(_environment().parse(source))
        except TemplateError:
            continue  # rendering says what is wrong with it
    return frozenset(found - _STANDARD - _environment().globals.keys())


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
        if _is_lossy(chat, marked.messages, text):
            fault = fault or _lost(chat, text, where)
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
    if weight == 0 and not answers:
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


def _is_lossy(chat: Sequence[Message], read: Sequence[_Read], text: str) -> bool:
    """Return whether a template left a message's content out, or wrote lists as Python does or JSON within JSON."""
    if _missing(chat, text) is not None:
        return True
    for message, seen in zip(chat, read, strict=True):
        if isinstance(message.get("content"), list) and not all("text" in part._read for part in seen._parts):
            return True
        for call in message.get("tool_calls") or ():
            inner = call.get("function") if isinstance(call, dict) else None
            given = inner.get("arguments") if isinstance(inner, dict) else None
            if isinstance(given, str) and '"' in given and json.dumps(given, ensure_ascii=False) in text:
                return True
    return False


def _missing(chat: Sequence[Message], text: str) -> int | None:
    """Return the number of a message whose content is not in a text, spaces and finished thinking aside."""
    for number, message in enumerate(chat):
        content = message.get("content", "")
        for part in [content] if isinstance(content, str) else [part["text"] for part in content]:
            said = part.rpartition("</think>")[2].strip()
            if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
                return number
    return None


def _lost(chat: Sequence[Message], text: str, where: str) -> DataError:
    number = _missing(chat, text)
    what = "lists of parts or calls of tools" if number is None else f"the content of messages[{number}]"
    return DataError(
        f"{where}: the chat template does not write {what}, so it would be lost.",
        fix="use a template that writes it, or take it out of the data.",
    )


def _check_read(chat: Sequence[Message], read: Sequence[_Read], where: str) -> tuple[str, ...]:
    """Refuse a chat of which the template leaves something out; return left out keys that only name things."""
    unread = []
    for number, (message, seen) in enumerate(zip(chat, read, strict=True)):
        at = f"{where}, messages[{number}]"
        missed = [key for key in message if key not in seen._read and message[key] not in ("", [], {})]
        if any(key in seen._read for key in _REASONING):
            missed = [key for key in missed if key not in _REASONING]
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


class _Read(dict[str, Any]):
    """A message, or a part of one, that notes which of its keys are read."""

    def __init__(self, values: Mapping[str, Any], number: int) -> None:
        super().__init__(values)
        self._number = number
        self._read: set[str] = set()
        self._parts: list[_Read] = []
        if isinstance(values.get("content"), list):
            self._parts = [_Read(part, -1) for part in values["content"]]
            super().__setitem__("content", self._parts)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self._read.update(self)
        return super().items()

    def values(self) -> Any:
        self._read.update(self)
        return super().values()


class _Answers(Extension):
    """{% generation %} ... {% endgeneration %}, with which templates mark what the model is to learn."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{_ANSWER}{caller()}{_ANSWERED}"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Return the environment in which transformers runs chat templates, and the marks beside it."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _raise, "strftime_now": _now, "_begin": _begin, "_end": _end}
    return made


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _begin(item: object) -> str:
    return f"{_BEGIN}{item._number}{_NUMBERED}" if isinstance(item, _Read) and item._number >= 0 else ""


def _end(item: object) -> str:
    return _END if isinstance(item, _Read) and item._number >= 0 else ""


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    """Return a template that marks what it writes for each message: in every loop, around its body."""
    environment = _environment()
    code = environment.compile(_Marker().visit(environment.parse(source)))
    return Template.from_code(environment, code, environment.make_globals(None))


class _Marker(NodeTransformer):
    """Puts marks around the body of every loop, and before what leaves it early."""

    def __init__(self) -> None:
        self._loops: list[nodes.For] = []

    def visit_For(self, loop: nodes.For) -> nodes.For:
        self._loops.append(loop)
        self.generic_visit(loop)
        self._loops.pop()
        if isinstance(loop.target, nodes.Name):
            loop.body = [_mark("_begin", loop), *loop.body, _mark("_end", loop)]
        return loop

    def _leaving(self, node: nodes.Node) -> list[nodes.Node]:
        loop = self._loops[-1] if self._loops else None
        return [_mark("_end", loop), node] if loop and isinstance(loop.target, nodes.Name) else [node]

    visit_Break = visit_Continue = _leaving


def _mark(function: str, loop: nodes.For) -> nodes.Node:
    item = nodes.Name(loop.target.name, "load")  # type: ignore[attr-defined] # a Name, as its caller knows
    call = nodes.Call(nodes.Name(function, "load"), [item], [], None, None)
    return nodes.Output([call]).set_lineno(loop.lineno)


@dataclass(frozen=True)
class _Marked:
    """What the marked template wrote: the text, where each message stands in it, and what it marks as answers."""

    text: str
    turns: tuple[tuple[int, int, int], ...]  # number, begin and end of what was written for a message
    generated: tuple[Span, ...]
    messages: tuple[_Read, ...]

    @property
    def end(self) -> int:
        """Where what is written for messages ends."""
        return max((stop for _, _, stop in self.turns), default=0)


def _run(
    chat: Sequence[Message],
    arguments: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    template: str,
    where: str,
    prompt: bool = False,
) -> _Marked:
    aliased = [_with_reasoning(message) for message in chat]
    messages = tuple(_Read(message, number) for number, message in enumerate(aliased))
    names = {**getattr(tokenizer, "special_tokens_map", {}), "tools": None, "documents": None, **arguments}
    try:
        written = _compiled(template).render(messages=list(messages), add_generation_prompt=prompt, **names)
    except Exception as fault:
        raise _refused(where, _line(fault)) from None
    text, at, last = [], 0, 0
    turns: list[tuple[int, int, int]] = []
    generated: list[Span] = []
    begun: list[tuple[int, int]] = []
    opened: list[int] = []
    for mark in _MARKS.finditer(written):
        text.append(written[last : mark.start()])
        at, last = at + mark.start() - last, mark.end()
        if mark.group(1) is not None:
            begun.append((int(mark.group(1)), at))
        elif mark.group() == _END and begun:
            turns.append((*begun.pop(), at))
        elif mark.group() == _ANSWER:
            opened.append(at)
        elif mark.group() == _ANSWERED and opened:
            generated.append((opened.pop(), at))
    text.append(written[last:])
    written_for = [turn for turn in turns if turn[1] < turn[2]]
    return _Marked("".join(text), tuple(written_for), tuple(generated), messages)


def _with_reasoning(message: Message) -> Message:
    """Return a message with its thinking under each name that templates read, as transformers gives it."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


# -- where answers are -----------------------------------------------------------------------------------------------


def _answers(
    chat: list[Message],
    weights: Sequence[bool],
    arguments: Mapping[str, Any],
    tokenizer: ChatTokenizer,
    template: str,
    where: str,
    marked: _Marked,
    text: str,
) -> list[Span]:
    """Return where the answers stand that are to be learnt: what the template marks, else what follows its prompts."""
    if marked.text == text and marked.generated:
        left_out = [(a, b) for number, a, b in marked.turns if not weights[number]]
        return [span for span in marked.generated if not any(a <= span[0] < b for a, b in left_out)]
    learnt = [
        number for number, message in enumerate(chat) if message["role"] == ASSISTANT and weights[number]
    ]
    if marked.text == text and {number for number, _, _ in marked.turns} >= set(learnt):
        first = next(number for number, message in enumerate(chat) if message["role"] == ASSISTANT)
        prompt = _prompt(chat[:first] or chat, arguments, tokenizer, template, where)
        return [
            (start + _common(prompt, text[start:stop]), len(text) if stop == marked.end else stop)
            for number, start, stop in marked.turns
            if number in learnt
        ]
    return [_between(chat, number, arguments, tokenizer, where, text) for number in learnt]


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
    before = (
        _official(chat[:number], arguments, tokenizer, where, add_generation_prompt=True) if number else ""
    )
    after = _official(chat[: number + 1], arguments, tokenizer, where)
    if not (after.startswith(before) and text.startswith(after)):
        raise DataError(
            f"{where}: the chat template changes earlier messages when messages[{number}] is added, so its "
            "answers cannot be told from what prompts them.",
            fix="mark them in the template with {% generation %}, or use data.loss_on: all.",
        )
    return len(before), len(after)
