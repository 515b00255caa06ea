"""The base of every record that crosses a border (file, process, package), and how records meet the disk.

Records are frozen, refuse unknown keys by name and, when they are files, carry a `schema` tag. Files appear
whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from colledge.errors import ConfigError, one_line

_NUMBERS = frozenset({int, float})


class Record(BaseModel):
    """A frozen record that refuses unknown keys, and NaN and infinity in numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        serialize_by_alias=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth_values(cls, values: Any) -> Any:
        """Refuse true and false where a number is wanted: they would count as 1 and 0."""
        if isinstance(values, Mapping):
            for key in _numeric_keys(cls):
                if isinstance(values.get(key), bool):
                    raise ValueError(f"{key} is {str(values[key]).lower()}, wanted a number")
        return values

    def to_json(self) -> str:
        """Return the record as indented JSON; what was not set stays out."""
        return self.model_dump_json(indent=2, exclude_none=True)


RecordT = TypeVar("RecordT", bound=Record)


@cache
def _numeric_keys(record: type[Record]) -> tuple[str, ...]:
    """Return the keys of a record that hold one number, or none."""
    return tuple(
        key
        for name, info in record.model_fields.items()
        for parts in [(info.annotation, *get_args(info.annotation))]
        if not _NUMBERS.isdisjoint(parts)
        or any(type(value) is int for part in parts for value in get_args(part))  # of a Literal
        for key in {name, info.alias or name}
    )


# Beyond these no file holds a quantity, and products of a few numbers stay finite between them.
_SMALLEST, _LARGEST = 1e-30, 1e20
_MOST_SHOWN = 60


def describe_validation_error(error: ValidationError) -> str:
    """Return the first fault of a validation as one line: where, what was seen, what was wanted."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    match fault["type"]:
        case "extra_forbidden":
            text = f"unknown key {where!r}"
        case "missing":
            text = f"key {where!r} is missing"
        case "union_tag_not_found":
            text = f"key '{where}.{fault['ctx']['discriminator'][1:-1]}' is missing"
        case "union_tag_invalid":
            key, known = fault["ctx"]["discriminator"][1:-1], fault["ctx"]["expected_tags"].replace("'", "")
            text = f"{where}.{key} is {_shortened(fault['ctx']['tag'])}, wanted one of {known}"
        case _:
            message = (
                fault["msg"].removeprefix("Value error, ").replace("path for <class 'pathlib.Path'>", "path")
            )
            seen = fault.get("input")
            shown = (
                f" (saw {_shortened(seen)})"
                if isinstance(seen, str | int | float | bool | list | None)
                else ""
            )
            text = f"{where}: {message}{shown}" if where else message
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{text}{more}."


def _shortened(seen: object) -> str:
    try:
        text = repr(seen)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def _find_absurd(value: object) -> tuple[str, object] | None:
    """Return where a record, or what it holds, has a number that no quantity has, and the number."""
    children: Iterable[tuple[object, object]]
    if isinstance(value, Record):
        children = value.__dict__.items()
    elif isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, tuple | list):
        children = enumerate(value)
    else:
        return None
    for key, child in children:
        kind = type(child)
        found: tuple[str, object] | None = None
        if kind is float or kind is int:
            if child and not _SMALLEST <= abs(child) <= _LARGEST:  # type: ignore[arg-type]
                found = "", child
        elif kind is not str and kind is not bool and child is not None:
            found = _find_absurd(child)
        if found is not None:
            field = type(value).model_fields.get(str(key)) if isinstance(value, Record) else None
            name = field.alias if field is not None and field.alias else key
            return (f"[{name}]" if isinstance(name, int) else f".{name}") + found[0], found[1]
    return None


def parse_record(
    record: type[RecordT], value: object, source: str, error: type[ConfigError] = ConfigError
) -> RecordT:
    """Return `value` (parsed JSON or YAML) as a record.

    Args:
        record: The class wanted.
        value: A mapping of plain values.
        source: Where the value came from; begins the error's line.
        error: The class of error to raise.

    Raises:
        ConfigError: Unknown, missing or malformed keys, or numbers that no quantity has; the message names the first.
    """
    if not isinstance(value, Mapping):
        raise error(
            f"{source}: saw {kind_of(value)}, wanted a mapping of keys to values.",
            fix=f"give {', '.join(_keys_of(record))} as keys.",
        )
    try:
        parsed = record.model_validate(value)
    except ValidationError as fault:
        raise error(f"{source}: {describe_validation_error(fault)}", fix=_fix_for(record, fault)) from None
    absurd = _find_absurd(parsed)
    if absurd is not None:
        where, seen = absurd
        raise error(
            f"{source}: {where.lstrip('.')} is {_shortened(seen)}, wanted 0 or a size between {_SMALLEST:g} and "
            f"{_LARGEST:g}.",
            fix="check the unit of that value.",
        )
    return parsed


def kind_of(value: object) -> str:
    """Return what a value of JSON or YAML is, in a word."""
    return "nothing" if value is None else type(value).__name__


def _keys_of(record: type[Record]) -> list[str]:
    return [info.alias or name for name, info in record.model_fields.items()]


def _fix_for(record: type[Record], error: ValidationError) -> str:
    fault = error.errors()[0]
    if fault["type"] in ("extra_forbidden", "missing") and len(fault["loc"]) == 1:
        return f"the top-level keys are {', '.join(_keys_of(record))}."
    match fault["type"]:
        case "missing" | "union_tag_not_found":
            verb = "add that value"
        case "extra_forbidden":
            verb = "take that key out"
        case _:
            verb = "change that value"
    return f"{verb}; `colledge config schema` prints what each file may hold."


def _read_text(path: Path, error: type[ConfigError]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path}: no such file.", fix="give the path of an existing file.") from None
    except IsADirectoryError:
        raise error(f"{path}: is a directory.", fix="give the path of a file.") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{path}: cannot be read ({fault}).", fix="give a readable UTF-8 text file.") from None


def parse_json(text: str | bytes) -> Any:
    """Return what JSON text says.

    Raises:
        ValueError: It is no JSON, or a key stands twice in a mapping, of which readers would take one or the other.
    """
    return _writable(json.loads(text, object_pairs_hook=_once))


def _writable(value: Any) -> Any:
    """Return a value of whose texts none holds half a character, which no file could hold again."""
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError:
        raise ValueError("a text there holds half a character") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {_shortened(key)} stands there twice")
        values[key] = value
    return values


class _YamlLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML's own `<<` may bring what a mapping says anew."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {_shortened(key.value)} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_json(record: type[RecordT], path: Path, error: type[ConfigError] = ConfigError) -> RecordT:
    """Return the record in a JSON file.

    Raises:
        ConfigError: The file is missing, is not JSON or does not hold such a record.
    """
    try:
        value = parse_json(_read_text(path, error))
    except (ValueError, RecursionError) as fault:
        raise error(
            f"{path}: not JSON ({_shortened(str(fault))}).", fix="mend or regenerate the file."
        ) from None
    return parse_record(record, value, str(path), error)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return the top-level mapping of a YAML file.

    Raises:
        ConfigError: The file is missing, is not YAML or is not a mapping.
    """
    try:
        value = _writable(yaml.load(_read_text(path, ConfigError), Loader=_YamlLoader))  # a safe one
    except (yaml.YAMLError, RecursionError, ValueError) as fault:  # ValueError: such as the date 2001-99-99
        raise ConfigError(
            f"{path}: not YAML ({one_line(fault, most=600)}).", fix="mend the line it names."
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}: saw {kind_of(value)}, wanted a mapping of keys to values.",
            fix="write lines such as `key: value`.",
        )
    return value


def write_atomically(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file so that it appears whole or not at all, also through a crash or a full disk.

    Args:
        path: The file; folders above it are made.
        content: All that it will hold.
        mode: Its permissions. While it is written, only its owner may read it.

    Raises:
        OSError: The content could not be written; the file that was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
