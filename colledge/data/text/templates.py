"""Chat templates run with marks, which say what of the text a template writes for whom.

The marks stand at both ends of what it writes for a message, and where it marks answers itself with {% generation %};
messages note which of their keys are read. Without the marks the text is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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

# Characters that are in no text: Unicode keeps them for programs' own use.
_BEGIN, _NUMBERED, _END, _ANSWER, _ANSWERED = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
_MARKS = re.compile(f"{_BEGIN}(\\d+){_NUMBERED}|{_END}|{_ANSWER}|{_ANSWERED}")
_STANDARD = frozenset(
    ("messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")
)
# Names of one thing, the model's thinking: transformers gives a template all of them.
REASONING = ("reasoning_content", "thinking", "reasoning")


def names_read(source: str) -> set[str]:
    """Return the names that a template reads beside the messages, such as `tools`; none of one that is malformed."""
    try:
        found = meta.find_undeclared_variables(_environment().parse(source))
    except TemplateError:
        return set()
    return found - _STANDARD - _environment().globals.keys()


class Read(dict[str, Any]):
    """A message, or a part of one, that notes which of its keys are read."""

    def __init__(self, values: Mapping[str, Any], number: int) -> None:
        super().__init__(values)
        self._number = number
        self._read: set[str] = set()
        self._parts: list[Read] = []
        if isinstance(values.get("content"), list):
            self._parts = [Read(part, -1) for part in values["content"]]
            super().__setitem__("content", self._parts)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, and note it."""
        self._read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        """Return all, and note it."""
        self._read.update(self)
        return super().items()

    def values(self) -> Any:
        """Return all, and note it."""
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
    return f"{_BEGIN}{item._number}{_NUMBERED}" if isinstance(item, Read) and item._number >= 0 else ""


def _end(item: object) -> str:
    return _END if isinstance(item, Read) and item._number >= 0 else ""


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
class Marked:
    """What the marked template wrote: the text, where each message stands in it, and what it marks as answers."""

    text: str
    turns: tuple[tuple[int, int, int], ...]  # number, begin and end of what was written for a message
    generated: tuple[Span, ...]
    messages: tuple[Read, ...]

    @property
    def end(self) -> int:
        """Where what is written for messages ends."""
        return max((stop for _, _, stop in self.turns), default=0)


def _with_reasoning(message: Message) -> Message:
    """Return a message with its thinking under each name that templates read, as transformers gives it."""
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def run_with_marks(
    chat: Sequence[Message], template: str, arguments: Mapping[str, Any], prompt: bool = False
) -> Marked:
    """Return what a template writes for a chat, and for whom.

    Args:
        chat: The messages.
        template: Its source.
        arguments: What it reads beside them; special tokens, too.
        prompt: Whether it writes what has the assistant speak.

    Raises:
        Exception: Whatever the template's expressions raise.
    """
    aliased = [_with_reasoning(message) for message in chat]
    messages = tuple(Read(message, number) for number, message in enumerate(aliased))
    names = {"tools": None, "documents": None, **arguments}
    written = _compiled(template).render(messages=list(messages), add_generation_prompt=prompt, **names)
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
    return Marked("".join(text), tuple(written_for), tuple(generated), messages)
