"""Long files of text, a part at a time: none of them is ever whole in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colledge.data.text.reading.encodings import check_beginning, check_zeros, decode
from colledge.errors import DataError
from colledge.records import kind_of

_PART_BYTES = 1 << 20
_SPACES = " \t\n\r"  # of JSON
_LONGEST_WORD = 16  # characters that JSON takes together, such as -Infinity or an escape
_EXPONENT = 3  # characters of a number that are none yet: 1e+


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, of which no key stands twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object, so that one of its values would be lost")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_once)


@dataclass(frozen=True)
class Part:
    """A part of a file's text, and whether there is more."""

    text: str
    goes_on: bool


def parts_of(path: Path) -> Iterator[Part]:
    """Yield the text of a file in parts, none of which ends within a character; nothing of an empty file.

    Raises:
        DataError: It is no UTF-8; the message names the line.
    """
    line, rest = 1, b""
    with path.open("rb") as file:
        part = check_beginning(path, file.read(_PART_BYTES))
        while part:
            following = file.read(_PART_BYTES)
            content = rest + check_zeros(path, part, line)
            whole = len(content) - (_unfinished(content) if following else 0)
            text = decode(path, content[:whole], line)
            yield Part(text, goes_on=bool(following))
            line, rest, part = line + text.count("\n"), content[whole:], following


def entries_of(path: Path, fix: str) -> Iterator[Any]:
    """Yield the entries of a file that is a list in JSON.

    Args:
        path: Of the file.
        fix: What to do where it is none.

    Raises:
        DataError: It is not a list in JSON, or no UTF-8; the message names the line.
    """
    text = _Text(path, fix)
    if text.following() != "[":
        value = text.value()
        text.end()
        raise DataError(f"{path}: saw {kind_of(value)}, wanted a list of objects.", fix=fix)
    text.skip()
    if text.following() == "]":
        text.skip()
    else:
        while True:
            yield text.value()
            separator = text.following()
            if separator not in (",", "]"):
                raise text.fault("Expecting ',' delimiter")
            text.skip()
            if separator == "]":
                break
    text.end()


class _Text:
    """JSON of which a part is held: read on as a value needs more."""

    def __init__(self, path: Path, fix: str) -> None:
        self._path, self._fix = path, fix
        self._parts = parts_of(path)
        self._held, self._at = "", 0
        self._line, self._column = 1, 1  # where what is held begins

    def following(self) -> str:
        """Return the character that is next, spaces left out; nothing at the end."""
        while True:
            while self._at < len(self._held):
                if self._held[self._at] not in _SPACES:
                    return self._held[self._at]
                self._at += 1
            if not self._read():
                return ""

    def skip(self) -> None:
        """Go on behind the character that is next."""
        self._at += 1

    def value(self) -> Any:
        """Return the value that is next."""
        self.following()
        while True:
            try:
                value, end = DECODER.raw_decode(self._held, self._at)
            except RecursionError as fault:
                raise self.fault(str(fault)) from None
            except json.JSONDecodeError as fault:
                cut = fault.pos > len(self._held) - _LONGEST_WORD or fault.msg.startswith("Unterminated")
                # Twice as much: a long value is not parsed anew for every part.
                if not (cut and self._read(len(self._held) - self._at)):
                    raise self.fault(fault.msg, fault.pos) from None
                continue
            except ValueError as fault:  # a key that stands twice, a number of too many digits
                raise self.fault(str(fault)) from None
            if end > len(self._held) - _EXPONENT and self._read():
                continue  # a number may go on
            self._at = end
            return value

    def end(self) -> None:
        """See that there is nothing more."""
        if self.following():
            raise self.fault("Extra data")

    def fault(self, said: str, at: int | None = None) -> DataError:
        """Return what is wrong, and where."""
        line, column = self._place(self._at if at is None else at)
        return DataError(f"{self._path}: not JSON ({said}: line {line} column {column}).", fix=self._fix)

    def _place(self, at: int) -> tuple[int, int]:
        lines = self._held.count("\n", 0, at)
        if not lines:
            return self._line, self._column + at
        return self._line + lines, at - self._held.rfind("\n", 0, at)

    def _read(self, least: int = 1) -> bool:
        """Hold more of the file, at least so many characters; forget what is before the place that is next."""
        more: list[str] = []
        while sum(map(len, more)) < max(least, 1) and (part := next(self._parts, None)) is not None:
            more.append(part.text)
        if more:
            self._line, self._column = self._place(self._at)
            self._held, self._at = self._held[self._at :] + "".join(more), 0
        return bool(more)


def _unfinished(content: bytes) -> int:
    """Return how many bytes at the end of UTF-8 are a character's first ones, of which more are to come."""
    for count in range(1, min(4, len(content) + 1)):
        if content[-count] >= 0xC0:
            return count if content[-count] >= (0xC0, 0xE0, 0xF0)[count - 1] else 0
        if content[-count] < 0x80:
            break
    return 0
