"""Training examples as people keep them: read from a file, each fault named by file, line and key.

    {"text": ...}                                        a document
    {"prompt": ..., "completion": ...}                   a question and its answer
    {"messages": [{"role": ..., "content": ...}, ...]}   a chat; what the assistant says are the answers

One a line in .jsonl, in a list in .json, a row each in .parquet; a .txt is one document. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch

from colledge.data.text.encodings import check_beginning, decode
from colledge.data.text.files import SUFFIXES
from colledge.data.text.formats import SHAPES, canonical
from colledge.errors import ColledgeError, DataError

Kind = Literal["text", "completion", "chat"]


@dataclass(frozen=True)
class Example:
    """One example.

    Args:
        where: File and line, for messages.
        kind: What it is.
        parts: Of a chat (role, content) of each message; else ("prompt" or "text" or "completion", text).
        read_as: The format that it was in, where that is not one of ours, such as ShareGPT.
    """

    where: str
    kind: Kind
    parts: tuple[tuple[str, str], ...]
    read_as: str | None = None


OnFault = Callable[[DataError], None]


def stop_at_fault(fault: DataError) -> NoReturn:
    """Raise a fault: training begins on data without any."""
    raise DataError(
        fault.message, fix=f"{fault.fix} `colledge data check FILE --model DIR` names all such lines."
    )


def read_examples(path: Path, on_fault: OnFault = stop_at_fault) -> list[Example]:
    """Return the examples of a file; those without any text are left out.

    Args:
        path: .jsonl, .json, .parquet or .txt.
        on_fault: Told of each malformed example, which is left out if it returns.

    Raises:
        DataError: The file is missing, cannot be read or holds no text.
    """
    if not path.exists():
        raise DataError(
            f"{path}: no such file; data sets of a hub (org/name) are not read yet.",
            fix="give the path of an existing file, or fetch the data set and name its files.",
        )
    if path.suffix.lower() not in SUFFIXES:
        seen = f"a {path.suffix} file" if path.suffix else "a name without a suffix"
        raise DataError(
            f"{path}: saw {seen}, wanted {', '.join(SUFFIXES)}.",
            fix=f"write one {SHAPES} a line into a .jsonl file, or plain text into a .txt file.",
        )
    found: list[Example] = []
    try:
        for where, value in _entries(path, on_fault):
            try:
                example = _example(value, where)
                found += [example] if example is not None else []
            except DataError as fault:
                on_fault(fault)
    except OSError as fault:
        raise DataError(
            f"{path}: cannot be read ({fault.strerror or fault}).", fix="give a readable file."
        ) from None
    found = [example for example in found if any(text for _, text in example.parts)]
    if not found:
        raise DataError(f"{path}: holds no text.", fix="give a file with at least one row of text.")
    return found


def split_examples(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and those to validate with, drawn by the seed alone; both in file order.

    Args:
        examples: All of them.
        share: Of the examples, to validate with; at least one.
        seed: Of the run.

    Raises:
        DataError: There are too few for both.
    """
    held = max(1, round(share * len(examples)))
    if held >= len(examples):
        raise DataError(
            f"{len(examples)} example(s) cannot be split: {held} to validate with leave none to train on.",
            fix="give more examples, a smaller data.validation_split or a file as data.validation.",
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:held])
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )


def count_kinds(examples: Sequence[Example]) -> Counter[Kind]:
    """Return how many examples there are of each kind."""
    return Counter(example.kind for example in examples)


# -- files -------------------------------------------------------------------------------------------------------


def _entries(path: Path, on_fault: OnFault) -> Iterator[tuple[str, object]]:
    """Yield where each entry of a file stands, and the entry."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    content = check_beginning(path, path.read_bytes())
    match path.suffix.lower():
        case ".txt":
            yield str(path), {"text": decode(path, content)}
        case ".json":
            value = _parse(
                decode(path, content), str(path), "write a list of objects, or one a line in .jsonl."
            )
            if not isinstance(value, list):
                raise DataError(
                    f"{path}: saw {type(value).__name__}, wanted a list of objects.",
                    fix=f"write [{{...}}, ...], each {SHAPES}.",
                )
            yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(value, start=1))
        case _:
            for line, raw in enumerate(content.split(b"\n"), start=1):
                if raw.strip():
                    where = f"{path}, line {line}"
                    try:
                        yield where, _parse(decode(path, raw, line), where, f"write one {SHAPES} a line.")
                    except DataError as fault:
                        on_fault(fault)


def _parse(text: str, where: str, fix: str) -> object:
    try:
        return json.loads(text)
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
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except ArrowException as fault:
        line = " ".join(str(fault).split())[:200]
        raise DataError(f"{path}: not parquet ({line}).", fix="mend or regenerate the file.") from None


# -- entries -----------------------------------------------------------------------------------------------------


def _example(value: object, where: str) -> Example | None:
    """Return an entry as an example; None where all that it has is null."""
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: saw {type(value).__name__}, wanted an object {SHAPES}.",
            fix=f"write one {SHAPES} a line.",
        )
    entry, read_as = canonical(value, where)
    if not entry:
        return None
    if "messages" in entry:
        return Example(where, "chat", _messages(entry["messages"], where), read_as)
    if "prompt" in entry or "completion" in entry:
        parts = tuple((key, _text(entry, key, where)) for key in ("prompt", "completion"))
        return Example(where, "completion", parts, read_as)
    return Example(where, "text", (("text", _text(entry, "text", where)),), read_as)


def _messages(value: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        seen = "an empty list" if value == [] else type(value).__name__
        raise DataError(
            f"{where}: key 'messages' holds {seen}, wanted a list of messages.",
            fix='write [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}].',
        )
    parts = []
    wanted = '{"role": ..., "content": ...}, both text (calls of tools and parts of content are not read)'
    for number, message in enumerate(value):
        at = f"{where}, messages[{number}]"
        if not isinstance(message, dict):
            raise DataError(
                f"{at}: saw {type(message).__name__}, wanted an object with role and content.",
                fix=f"write {wanted}.",
            )
        parts.append((_text(message, "role", at, wanted), _text(message, "content", at, wanted)))
    return tuple(parts)


def _text(value: dict[str, object], key: str, where: str, wanted: str = SHAPES) -> str:
    if key not in value:
        seen = ", ".join(repr(name) for name in list(value)[:8]) or "none"
        raise DataError(
            f"{where}: key {key!r} is missing; the keys are {seen}.",
            fix=f"name the key `{key}`; wanted {wanted}.",
        )
    text = value[key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: key {key!r} holds {type(text).__name__}, wanted a string.",
            fix=f"write text; wanted {wanted}.",
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: legal JSON, but no text
        raise DataError(
            f"{where}: key {key!r} holds a lone surrogate, wanted Unicode text.",
            fix="write the character itself.",
        ) from None
    return text
