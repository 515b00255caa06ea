"""The base of every record that crosses a border (file, process, package), and how records meet the disk.

Records are frozen, refuse unknown keys by name and, when they are files, carry a `schema` tag. Files appear
whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from colledge.errors import ConfigError


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

    def to_json(self) -> str:
        """Return the record as indented JSON; what was not set stays out."""
        return self.model_dump_json(indent=2, exclude_none=True)


RecordT = TypeVar("RecordT", bound=Record)


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
        case _:
            message = fault["msg"].removeprefix("Value error, ")
            seen = fault.get("input")
            shown = f" (saw {seen!r})" if isinstance(seen, str | int | float | bool | None) else ""
            text = f"{where}: {message}{shown}" if where else message
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{text}{more}."


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
        ConfigError: Unknown, missing or malformed keys; the message names the first of them.
    """
    if not isinstance(value, Mapping):
        raise error(f"{source}: saw {type(value).__name__}, wanted a mapping of keys to values.")
    try:
        return record.model_validate(value)
    except ValidationError as fault:
        raise error(f"{source}: {describe_validation_error(fault)}", fix=_fix_for(record, fault)) from None


def _fix_for(record: type[Record], error: ValidationError) -> str:
    keys = ", ".join(info.alias or name for name, info in record.model_fields.items())
    if error.errors()[0]["type"] in ("extra_forbidden", "missing"):
        return f"the top-level keys are {keys}."
    return "change that value; `colledge config schema` prints what each file may hold."


def _read_text(path: Path, error: type[ConfigError]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path}: no such file.", fix="give the path of an existing file.") from None
    except IsADirectoryError:
        raise error(f"{path}: is a directory.", fix="give the path of a file.") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"{path}: cannot be read ({fault}).", fix="give a readable UTF-8 text file.") from None


def read_json(record: type[RecordT], path: Path, error: type[ConfigError] = ConfigError) -> RecordT:
    """Return the record in a JSON file.

    Raises:
        ConfigError: The file is missing, is not JSON or does not hold such a record.
    """
    try:
        value = json.loads(_read_text(path, error))
    except (ValueError, RecursionError) as fault:
        raise error(f"{path}: not JSON ({fault}).", fix="mend or regenerate the file.") from None
    return parse_record(record, value, str(path), error)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return the top-level mapping of a YAML file.

    Raises:
        ConfigError: The file is missing, is not YAML or is not a mapping.
    """
    try:
        value = yaml.safe_load(_read_text(path, ConfigError))
    except (yaml.YAMLError, RecursionError) as fault:
        line = " ".join(str(fault).split())
        raise ConfigError(f"{path}: not YAML ({line}).", fix="mend the line it names.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: saw {type(value).__name__}, wanted a mapping of keys to values.")
    return value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it appears whole or not at all, also through a crash or a full disk.

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
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
