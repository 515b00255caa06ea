"""What of a chat a template leaves out: texts are given marks, and one whose mark the template does not write is lost.

Of calls of tools every name and every value must be written, of other keys a part. The thinking of earlier turns may be
left out, as templates mean it; keys that only name things, numbers and flags too, which is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from colledge.data.text.chats.templates import REASONING, Marked, Message, mark_text

# Columns that hold something to learn from.
MEANT = frozenset(
    {"tools", "functions", "documents", "image", "images", "audio", "audios", "video", "videos"}
    | {"system", "system_prompt", "system_message", "chat_template_kwargs"}
)
# Keys of a message that name it and say nothing: templates may leave them out.
_NAMES = frozenset(
    {"id", "tool_call_id", "name", "type", "index", "timestamp", "time", "date", "created", "created_at"}
    | {"model", "source", "lang", "language", "url", "uuid", "hash", "finish_reason", "metadata", "meta"}
)
_CALLS = frozenset(("tool_calls", "function_call"))
_WHOLE = _CALLS | {"content"}  # keys of which every text must be written


@dataclass(frozen=True)
class _Place:
    """A text of a chat.

    Args:
        number: Of the message; None for what stands beside the messages.
        key: In which it stands.
        text: As it is; of a number, as JSON.
        marked: Whether it has a mark.
    """

    number: int | None
    key: str
    text: str
    marked: bool


@dataclass
class Texts:
    """The texts of a chat, in the order of their marks."""

    places: list[_Place] = field(default_factory=list)

    def marked_chat(self, chat: Sequence[Message]) -> list[Message]:
        """Return a chat whose texts have marks."""
        return [
            {key: self._marked(value, number, key) for key, value in message.items()}
            for number, message in enumerate(chat)
        ]

    def marked_columns(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return what stands beside the messages, with marks in what holds something to learn from."""
        return {
            key: self._marked(value, None, key) if key in MEANT else value for key, value in columns.items()
        }

    def unmark(self) -> None:
        """Go by the texts themselves, where a template does not run with their marks."""
        self.places = [replace(place, marked=False) for place in self.places]

    def lost(self, chat: Sequence[Message], written: Marked, text: str) -> str | None:
        """Return in words what of a chat a template left out, None where that is nothing.

        Args:
            chat: The messages.
            written: What the template wrote for the marked chat.
            text: What it wrote for the chat.
        """
        found: dict[tuple[int | None, str], list[bool]] = {}
        for mark, place in enumerate(self.places):
            seen = mark in written.written if place.marked else place.text in text
            key = "thinking" if place.key in REASONING else place.key
            found.setdefault((place.number, key), []).append(seen)
        for (number, key), seen_of in found.items():
            if all(seen_of) if key in _WHOLE else any(seen_of):
                continue
            if number is None:
                return f"key {key!r}"
            if key == "thinking":
                if number < len(chat) - 1:
                    continue
                key = next(name for name in REASONING if name in chat[number])
            role = chat[number]["role"]
            return f"{'the' if key == 'content' else 'key'} {key!r} of messages[{number}], whose role is {role!r}"
        return _written_as_python(chat, text)

    def owned(self, written: Marked) -> list[bool]:
        """Return for each turn whether it holds what its message says, not what another one does."""
        marks: dict[int | None, list[int]] = {}
        for mark, at in written.written.items():
            marks.setdefault(self.places[mark].number, []).append(at)
        return [
            number not in marks or any(start < at <= stop for at in marks[number])
            for number, start, stop in written.turns
        ]

    def _marked(self, value: Any, number: int | None, key: str) -> Any:
        if key in _NAMES or key == "role":
            return value
        if key == "content" and isinstance(value, list):
            return [{**part, "text": self._text(part["text"], number, key)} for part in value]
        if key in _CALLS:
            calls = value if isinstance(value, list) else [value]
            marked = [self._call(call, number, key) for call in calls]
            return marked if isinstance(value, list) else marked[0]
        if key in ("tools", "functions") and isinstance(value, list):
            return [self._named(tool, number, key) for tool in value]
        return self._leaves(value, number, key)

    def _call(self, call: Any, number: int | None, key: str) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"], number, key)}
        arguments = call.get("arguments")
        said = {"arguments": self._leaves(arguments, number, key, whole=True)} if arguments else {}
        return {**self._named(call, number, key), **said}

    def _named(self, tool: Any, number: int | None, key: str) -> Any:
        """Return a tool whose name has a mark; of what else it is templates take their choice."""
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
            return {**tool, "function": self._named(tool["function"], number, key)}
        if isinstance(tool, dict) and isinstance(tool.get("name"), str):
            return {**tool, "name": self._text(tool["name"], number, key)}
        return tool

    def _leaves(self, value: Any, number: int | None, key: str, *, whole: bool = False) -> Any:
        """Return a value in which every text has a mark; with `whole` numbers are looked for too."""
        if isinstance(value, str):
            return self._text(value, number, key)
        if isinstance(value, list):
            return [self._leaves(one, number, key, whole=whole) for one in value]
        if isinstance(value, dict):
            return {name: self._leaves(one, number, key, whole=whole) for name, one in value.items()}
        if whole and isinstance(value, int | float) and not isinstance(value, bool):
            self.places.append(_Place(number, key, json.dumps(value), False))
        return value

    def _text(self, text: str, number: int | None, key: str) -> str:
        if not text.strip():
            return text
        self.places.append(_Place(number, key, text, True))
        return mark_text(text, len(self.places) - 1)


def unread_names(chat: Sequence[Message], read: Sequence[Iterable[str]]) -> tuple[str, ...]:
    """Return the keys of messages that a template does not look at and that hold no text to learn from."""
    return tuple(
        key
        for message, seen in zip(chat, read, strict=True)
        for key, value in message.items()
        if key not in seen and key != "role" and (key in _NAMES or not _says(value))
    )


def _says(value: Any) -> bool:
    """Return whether there is text in a value."""
    if isinstance(value, dict | list):
        return any(map(_says, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


def _written_as_python(chat: Sequence[Message], text: str) -> str | None:
    """Return in words what a template wrote as Python prints it, or as JSON within JSON."""
    for number, arguments in _arguments(chat):
        if isinstance(arguments, str):
            wrong = arguments.lstrip().startswith(("{", "[")) and json.dumps(arguments, ensure_ascii=False)
        else:
            plain = json.dumps(arguments, ensure_ascii=False)
            wrong = str(arguments) != plain and plain not in text and str(arguments)
        if wrong and wrong in text:
            return f"the arguments of a call in messages[{number}] as JSON"
    return None


def _arguments(chat: Sequence[Message]) -> Iterator[tuple[int, Any]]:
    for number, message in enumerate(chat):
        for call in message.get("tool_calls") or ():
            inner = call.get("function", call)
            if isinstance(inner, dict) and inner.get("arguments") is not None:
                yield number, inner["arguments"]
