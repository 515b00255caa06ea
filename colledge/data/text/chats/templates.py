"""A chat template, run with marks: at both ends of what it writes for a message, and where it marks answers itself.

Without the marks its text is the one that transformers makes, so the marks say what in that is whose. Texts of the chat
may carry marks too (`losses`), by which it is known what the template has written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

Message = dict[str, Any]
Span = tuple[int, int]  # of characters, half-open

# Names of one thing, the model's thinking: transformers gives a template all of them.
REASONING = ("reasoning_content", "thinking", "reasoning")

# Characters that are in no text: Unicode keeps them for programs' own use.
_BEGIN, _NUMBERED, _END, _ANSWER, _ANSWERED, _TEXT = map(chr, range(0xFDD0, 0xFDD6))
_MARKS = re.compile(f"{_BEGIN}(\\d+){_NUMBERED}|{_TEXT}(\\d+){_NUMBERED}|{_END}|{_ANSWER}|{_ANSWERED}")
# Names that are the template's own, or a message's, whatever stands beside the messages.
_STANDARD = frozenset(
    {"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}
    | {"role", "content", "tool_calls", "system_message", "loop_messages", *REASONING}
)


@dataclass(frozen=True)
class Marked:
    """What a template wrote, and what the marks in it said.

    Args:
        text: Without marks.
        turns: The number, begin and end of what was written for a message, innermost loops first.
        generated: What the template itself marks as answers.
        written: Where the marks of texts were in it, by their numbers.
        read: The keys of each message that the template looked at.
    """

    text: str
    turns: tuple[tuple[int, int, int], ...]
    generated: tuple[Span, ...]
    written: Mapping[int, int]
    read: tuple[frozenset[str], ...]

    @property
    def end(self) -> int:
        """Where what is written for messages ends."""
        return max((stop for _, _, stop in self.turns), default=0)


def mark_text(text: str, number: int) -> str:
    """Return a text with a mark behind its last word, where trimming leaves it."""
    words = text.rstrip()
    return f"{words}{_TEXT}{number}{_NUMBERED}{text[len(words) :]}"


@lru_cache(maxsize=16)
def names_read(template: str) -> frozenset[str]:
    """Return the names that a template reads beside the messages, such as `tools`."""
    try:
        found = meta.find_undeclared_variables(_environment().parse(template))
    except (TemplateError, RecursionError):
        return frozenset()  # running it says what is wrong with it
    return frozenset(found - _STANDARD - _environment().globals.keys())


def run_with_marks(
    template: str, chat: Sequence[Message], names: Mapping[str, Any], *, prompt: bool = False
) -> Marked:
    """Return what a template writes for a chat; it raises whatever the template's expressions do.

    Args:
        template: In Jinja.
        chat: The messages.
        names: What the template reads beside them.
        prompt: Whether it is to have the assistant speak next.
    """
    messages = [_Read(_with_reasoning(message), number) for number, message in enumerate(chat)]
    given = {"tools": None, "documents": None, **names}
    text = _compiled(template).render(messages=messages, add_generation_prompt=prompt, **given)
    return _without_marks(text, messages)


def _without_marks(marked: str, messages: Sequence[_Read]) -> Marked:
    text, at, last = [], 0, 0
    turns: list[tuple[int, int, int]] = []
    generated: list[Span] = []
    written: dict[int, int] = {}
    begun: list[tuple[int, int]] = []
    opened: list[int] = []
    for mark in _MARKS.finditer(marked):
        text.append(marked[last : mark.start()])
        at, last = at + mark.start() - last, mark.end()
        if mark[1] is not None:
            begun.append((int(mark[1]), at))
        elif mark[2] is not None:
            written[int(mark[2])] = at
        elif mark[0] == _END and begun:
            turns.append((*begun.pop(), at))
        elif mark[0] == _ANSWER:
            opened.append(at)
        elif mark[0] == _ANSWERED and opened:
            generated.append((opened.pop(), at))
    text.append(marked[last:])
    return Marked(
        "".join(text),
        tuple(turn for turn in turns if turn[1] < turn[2]),
        tuple(generated),
        written,
        tuple(frozenset(message._seen) for message in messages),
    )


def _with_reasoning(message: Message) -> Message:
    """Return a message with its thinking under each name that templates read, as transformers gives it."""
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class _Read(dict[str, Any]):
    """A message that notes which of its keys are looked at."""

    def __init__(self, values: Mapping[str, Any], number: int) -> None:
        super().__init__(values)
        self._number = number
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._seen.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:  # so that dict(message) asks for each key
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self._seen.update(self)
        return super().items()

    def values(self) -> Any:
        self._seen.update(self)
        return super().values()

    def copy(self) -> _Read:
        self._seen.update(self)
        return _Read(self, self._number)


# -- compiling -----------------------------------------------------------------------------------------------------


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
    made.globals |= {"raise_exception": _raise, "strftime_now": _now}
    made.globals |= {"_begin": _begin, "_end": _end, "_is_turn": _is_turn}
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
    return f"{_BEGIN}{item._number}{_NUMBERED}" if isinstance(item, _Read) else ""


def _end(item: object) -> str:
    return _END if isinstance(item, _Read) else ""


def _is_turn(item: object, value: object) -> bool:
    return isinstance(value, _Read) and not isinstance(item, _Read)


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    """Return a template that marks what it writes for each message: in every loop, around its body."""
    environment = _environment()
    code = environment.compile(_Marker().visit(environment.parse(source)))
    return Template.from_code(environment, code, environment.make_globals(None))


class _Marker(NodeTransformer):
    """Puts marks around the body of every loop, and before what leaves it early."""

    def __init__(self) -> None:
        self._items: list[
            str | None
        ] = []  # of the loops around, outermost first: what the item was called first
        self._count = 0

    def visit_For(self, loop: nodes.For) -> nodes.For:
        if not isinstance(loop.target, nodes.Name):
            self._items.append(None)
            self.generic_visit(loop)
            self._items.pop()
            return loop
        self._count += 1
        kept = f"_item_{self._count}"  # the loop may give its item's name to something else
        self._items.append(kept)
        self.generic_visit(loop)
        self._items.pop()
        keep = nodes.Assign(nodes.Name(kept, "store"), _load(loop.target.name))
        loop.body = [keep, _mark("_begin", kept), *loop.body, _mark("_end", kept)]
        return loop

    def visit_Assign(self, assign: nodes.Assign) -> list[nodes.Node]:
        """Take what a loop over numbers looks up first as its message."""
        kept = self._items[-1] if self._items else None
        if kept is None or not isinstance(assign.target, nodes.Name):
            return [assign]
        name = assign.target.name
        found = nodes.Call(_load("_is_turn"), [_load(kept), _load(name)], [], None, None)
        keep = nodes.Assign(nodes.Name(kept, "store"), _load(name))
        return [assign, nodes.If(found, [keep, _mark("_begin", kept)], [], [])]

    def _leaving(self, node: nodes.Node) -> list[nodes.Node]:
        kept = self._items[-1] if self._items else None
        return [_mark("_end", kept), node] if kept else [node]

    visit_Break = visit_Continue = _leaving


def _mark(function: str, name: str) -> nodes.Node:
    return nodes.Output([nodes.Call(_load(function), [_load(name)], [], None, None)])


def _load(name: str) -> nodes.Name:
    return nodes.Name(name, "load")
