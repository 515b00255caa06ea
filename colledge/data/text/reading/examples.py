"""Training examples as people keep them: read from a file, each fault named by file, line and key.

    {"text": ...}                                        a document
    {"prompt": ..., "completion": ...}                   a question and its answer
    {"messages": [{"role": ..., "content": ...}, ...]}   a chat; what the assistant says are the answers

One a line in .jsonl, in a list in .json, a row each in .parquet; a .txt is one document. Other shapes that are read are
in `formats`. A key that holds null is one that is not there. Of other keys, those that a chat template reads go to it
(`tools`), those that hold something to learn from are refused, and the rest is said to be not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from colledge.data.text.chats.losses import MEANT
from colledge.data.text.reading.encodings import UTF8_MARK, check_beginning, decode
from colledge.data.text.reading.files import SUFFIXES
from colledge.data.text.reading.formats import PROMPTED, SHAPES, canonical, null_arguments
from colledge.data.text.reading.parts import DECODER, entries_of, parts_of
from colledge.errors import ColledgeError, DataError
from colledge.records import kind_of

Kind = Literal["text", "completion", "chat"]

_BEGINNING_BYTES = 1 << 12
_CURES = {
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "unpack it first."),
    **dict.fromkeys(
        (".csv", ".tsv"), "tables of text are not read: write each row as an object into a .jsonl file."
    ),
    **dict.fromkeys((".ndjson", ".jsonlines"), "call it .jsonl."),
    **dict.fromkeys((".md", ".text"), "call it .txt."),
}
_EMPTY = frozenset(("role", "content"))  # the keys of a message that has nothing but its content


@dataclass(frozen=True)
class Example:
    """One example.

    Args:
        where: File and line, for messages.
        kind: What it is.
        parts: Of a chat (role, text) of each message; else ("prompt" or "text" or "completion", text).
        messages: Of a chat, with all that they have.
        columns: Of a chat, what stands beside the messages.
        goes_on: Whether the next example is a part of the same text, which is long.
        prompting: Of a chat, how many messages, from the first on, only ask: of them nothing is learnt.
    """

    where: str
    kind: Kind
    parts: tuple[tuple[str, str], ...]
    messages: tuple[dict[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    prompting: int = 0
    goes_on: bool = False


@dataclass
class Noticed:
    """What a reader of files should hear once: formats, keys that nobody reads, rows of nothing, and what is learnt."""

    read_as: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    unprompted: int = 0
    null_arguments: int = 0

    def sentences(self) -> list[str]:
        """Return it in words."""
        said = [f"{count:,} example(s) were read as {name}." for name, count in self.read_as.items()]
        if self.unread:
            keys = ", ".join(f"{key} ({count:,})" for key, count in sorted(self.unread.items()))
            said.append(f"Keys that are not read: {keys}.")
        if self.empty:
            said.append(f"{self.empty:,} example(s) hold no text and were left out.")
        if self.null_arguments:
            said.append(
                f"{self.null_arguments:,} call(s) of tools have arguments of null, which are left out."
            )
        if self.unprompted:
            said.append(
                f"{self.unprompted:,} chat(s): the chat template writes nothing to prompt an answer, so what it writes "
                "before one is learnt with it."
            )
        return said


OnFault = Callable[[DataError], None]


def stop_at_fault(fault: DataError) -> NoReturn:
    """Raise a fault: training begins on data without any."""
    raise DataError(
        fault.message, fix=f"{fault.fix} `colledge data check FILE --model DIR` names all such lines."
    )


def read_examples(
    path: Path, on_fault: OnFault = stop_at_fault, noticed: Noticed | None = None
) -> list[Example]:
    """Return the examples of a file; those without any text are left out.

    Args:
        path: .jsonl, .json, .parquet or .txt.
        on_fault: Told of each malformed example, which is left out if it returns.
        noticed: What else is noticed is added to it.

    Raises:
        DataError: The file is missing, cannot be read or holds no text.
    """
    found: list[Example] = []
    parts: list[str] = []
    for example in iterate_examples([path], on_fault, noticed):
        if example.goes_on:
            parts.append(example.parts[0][1])
        elif parts:
            found.append(replace(example, parts=(("text", "".join([*parts, example.parts[0][1]])),)))
            parts = []
        else:
            found.append(example)
    if not found:
        raise DataError(f"{path}: holds no text.", fix="give a file with at least one row of text.")
    return found


def iterate_examples(
    paths: Iterable[Path], on_fault: OnFault = stop_at_fault, noticed: Noticed | None = None
) -> Iterator[Example]:
    """Yield the examples of files, one after another; of a .jsonl or .parquet only a part is in memory.

    Args:
        paths: .jsonl, .json, .parquet or .txt.
        on_fault: Told of each malformed example, which is left out if it returns.
        noticed: What else is noticed is added to it.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    noticed = noticed if noticed is not None else Noticed()
    for path in paths:
        check_name(path)
        try:
            if path.suffix.lower() == ".txt":
                yield from _document(path, noticed)
                continue
            for where, value in _entries(path, on_fault):
                try:
                    example = _example(value, where, noticed)
                except DataError as fault:
                    on_fault(fault)
                    continue
                if example is None:
                    noticed.empty += 1
                else:
                    yield example
        except OSError as fault:
            raise unreadable(path, fault) from None


def unreadable(path: Path, fault: OSError) -> DataError:
    """Return the fault of a file that the system does not let read."""
    return DataError(f"{path}: cannot be read ({fault.strerror or fault}).", fix="give a readable file.")


def check_name(path: Path) -> None:
    """Check that a file is there and that its name says what is in it.

    Raises:
        DataError: It is not, or does not.
    """
    if not path.exists():
        raise DataError(
            f"{path}: no such file; data sets of a hub (org/name) are not read yet.",
            fix="give the path of an existing file, or fetch the data set and name its files.",
        )
    if not (path.is_file() or path.is_dir()):
        raise DataError(
            f"{path}: is a pipe or a device, wanted a file.", fix="write what it gives into a file."
        )
    if path.suffix.lower() not in SUFFIXES:
        seen = f"a {path.suffix} file" if path.suffix else "a name without a suffix"
        fix = f"write one {SHAPES} a line into a .jsonl file, or plain text into a .txt file."
        raise DataError(
            f"{path}: saw {seen}, wanted {', '.join(SUFFIXES)}.", fix=_CURES.get(path.suffix.lower(), fix)
        )


def split_examples(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and those to validate with, as `split_numbers` draws them; in file order.

    Raises:
        DataError: There are too few for both.
    """
    train, held = split_numbers(len(examples), share, seed)
    return [examples[i] for i in train], [examples[i] for i in held]


def split_numbers(count: int, share: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the numbers of the examples to train on and of those to validate with, drawn by the seed alone; rising.

    Args:
        count: Of all examples.
        share: Of them, to validate with; at least one.
        seed: Of the run.

    Raises:
        DataError: There are too few for both.
    """
    held = max(1, round(share * count))
    if held >= count:
        raise DataError(
            f"{count} example(s) cannot be split: {held} to validate with leave none to train on.",
            fix="give more examples, a smaller data.validation_split or a file as data.validation.",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(order[held:]), np.sort(order[:held])


# -- files -------------------------------------------------------------------------------------------------------


def _entries(path: Path, on_fault: OnFault) -> Iterator[tuple[str, object]]:
    """Yield where each entry of a file stands, and the entry."""
    match path.suffix.lower():
        case ".parquet":
            yield from _parquet_rows(path)
        case ".json":
            fix = f"write [{{...}}, ...], each {SHAPES}; a file of one object a line is called .jsonl."
            for number, entry in enumerate(entries_of(path, fix), start=1):
                yield f"{path}, entry {number}", entry
        case _:
            yield from _json_lines(path, on_fault)


def _document(path: Path, noticed: Noticed) -> Iterator[Example]:
    """Yield the text of a file as one example, or as several that go on."""
    empty = True
    for part in parts_of(path):
        empty = False
        yield Example(str(path), "text", (("text", part.text),), goes_on=part.goes_on)
    noticed.empty += empty


def _json_lines(path: Path, on_fault: OnFault) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        marked = len(beginning := file.read(_BEGINNING_BYTES)) - len(check_beginning(path, beginning))
        file.seek(marked)
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                where = f"{path}, line {line}"
                try:
                    text = decode(path, raw.removeprefix(UTF8_MARK), line)
                    value = _parse(text, where, f"write one {SHAPES} a line.")
                except DataError as fault:
                    on_fault(fault)
                    continue
                yield where, value


def _parse(text: str, where: str, fix: str) -> object:
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"{where}: not JSON ({fault}).", fix=fix) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ColledgeError(
            f"{path}: reading parquet needs pyarrow.", fix="pip install 'colledge[parquet]'."
        ) from None
    try:
        with path.open("rb") as file:
            number = 0
            table = parquet.ParquetFile(file)
            twice = [name for name, count in Counter(table.schema_arrow.names).items() if count > 1]
            if twice:
                raise DataError(
                    f"{path}: has two columns {twice[0]!r}, of which one would be lost.",
                    fix="rename one of them.",
                )
            for batch in table.iter_batches(batch_size=1024):
                try:
                    rows = batch.to_pylist()
                except (
                    ValueError,
                    OverflowError,
                ) as fault:  # bytes that are no text, times beyond the calendar
                    raise DataError(
                        f"{path}, behind row {number}: a value cannot be read ({fault}).", fix="mend it."
                    ) from None
                for row in rows:
                    number += 1
                    yield f"{path}, row {number}", row
    except ArrowException as fault:
        line = " ".join(str(fault).split())[:200]
        raise DataError(f"{path}: not parquet ({line}).", fix="mend or regenerate the file.") from None


# -- entries -----------------------------------------------------------------------------------------------------


def _example(value: object, where: str, noticed: Noticed) -> Example | None:
    """Return an entry as an example; None where it holds no text."""
    if not isinstance(value, dict):
        named = "; a file that is one list is called .json" if isinstance(value, list) else ""
        raise DataError(
            f"{where}: saw {kind_of(value)}, wanted an object {SHAPES}.",
            fix=f"write one {SHAPES} a line{named}.",
        )
    entry, read_as = canonical(value, where)
    if not entry:
        return None
    if "messages" in entry:
        noticed.null_arguments += null_arguments(value)
        messages = _messages(entry.pop("messages"), where)
        parts = tuple((message["role"], _text_of(message)) for message in messages)
        prompting = len(value["prompt"]) if read_as == PROMPTED else 0
        example = Example(where, "chat", parts, messages, _columns(entry, where), prompting)
        if not any(text for _, text in parts) and all(message.keys() <= _EMPTY for message in messages):
            return None
    else:
        chosen = ("prompt", "completion") if "prompt" in entry or "completion" in entry else ("text",)
        parts = tuple((key, _text(entry, key, where)) for key in chosen)
        example = Example(where, "completion" if len(parts) > 1 else "text", parts)
        check_columns({key: left for key, left in entry.items() if key not in chosen}, where, noticed)
        if not any(text for _, text in parts):
            return None
    if read_as is not None:
        noticed.read_as[read_as] += 1
    return example


def check_columns(columns: Mapping[str, Any], where: str, noticed: Noticed) -> None:
    """Note columns that nothing reads.

    Raises:
        DataError: One holds something to learn from.
    """
    for key in columns:
        if key in MEANT:
            raise DataError(
                f"{where}: key {key!r} is not read, so it would be lost.",
                fix=f"take {key!r} out of the data, or write a chat for a model whose chat template reads it.",
            )
        noticed.unread[key] += 1


def _columns(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what stands beside a chat's messages, `tools` as a list of objects, however they are kept."""
    columns = dict(entry)
    tools = columns.get("tools")
    if isinstance(tools, str):
        tools = _parse(tools, f"{where}, key 'tools'", "write a list of tools.") if tools.strip() else []
    if isinstance(tools, list):
        tools = [
            _parse(tool, f"{where}, key 'tools'", "write each tool as an object.")
            if isinstance(tool, str)
            else tool
            for tool in tools
        ]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(
            f"{where}: key 'tools' is no list of objects.",
            fix='write [{"type": "function", "function": {"name": ..., "parameters": {...}}}].',
        )
    if "tools" in columns:
        columns["tools"] = tools
    columns = {key: inner for key, inner in columns.items() if key not in MEANT or inner not in ("", [], {})}
    more = columns.get("chat_template_kwargs")
    if isinstance(more, str):
        more = _parse(more, f"{where}, key 'chat_template_kwargs'", "write an object.")
    if isinstance(more, dict):
        del columns["chat_template_kwargs"]
        columns |= more
    return columns


def _messages(value: object, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        seen = "an empty list" if value == [] else kind_of(value)
        raise DataError(
            f"{where}: key 'messages' holds {seen}, wanted a list of messages.",
            fix='write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].',
        )
    return tuple(_message(message, f"{where}, messages[{number}]") for number, message in enumerate(value))


def _message(value: object, where: str) -> dict[str, Any]:
    wanted = '{"role": ..., "content": ...}'
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: saw {kind_of(value)}, wanted an object with role and content.",
            fix=f"write {wanted}.",
        )
    message = {key: inner for key, inner in value.items() if inner is not None}
    _text(message, "role", where, wanted)
    if isinstance(message.get("content"), list):
        for part in message["content"]:
            _check_part(part, where)
    elif "content" in message or message.keys() <= _EMPTY:
        _text(message, "content", where, wanted)
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(
            f"{where}: key 'tool_calls' is no list of objects.",
            fix='write [{"type": "function", "function": {"name": ..., "arguments": {...}}}].',
        )
    return message


def _check_part(part: object, where: str) -> None:
    if not isinstance(part, dict):
        raise DataError(
            f"{where}: key 'content' holds a list with {kind_of(part)}, wanted a string or parts of content.",
            fix='write text, or [{"type": "text", "text": ...}].',
        )
    if part.get("type", "text") != "text":
        raise DataError(
            f"{where}: key 'content' has a part of type {part['type']!r}; colledge trains on text.",
            fix="take such parts out.",
        )
    _text(part, "text", f"{where}, a part of content", '{"type": "text", "text": ...}')


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _text(value: dict[str, object], key: str, where: str, wanted: str = SHAPES) -> str:
    if key not in value:
        seen = ", ".join(repr(name) for name in list(value)[:8]) or "none"
        raise DataError(
            f"{where}: key {key!r} is missing; the keys are {seen}.",
            fix=f"write {wanted}.",
        )
    text = value[key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: key {key!r} holds {kind_of(text)}, wanted a string.",
            fix=f"write text, as in {wanted}.",
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: legal JSON, but no text
        raise DataError(
            f"{where}: key {key!r} holds a lone surrogate, wanted Unicode text.",
            fix="write the character itself.",
        ) from None
    return text
