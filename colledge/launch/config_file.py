"""YAML files that a user writes: read, changed from the command line, checked, with a guess for a misspelt key.

Relative paths count from the file's folder, those given on the command line from the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin

import yaml

from colledge.errors import ConfigError
from colledge.records import Record, RecordT, parse_record, read_yaml_mapping


@dataclass(frozen=True)
class PathKeys:
    """The dotted keys of a file whose values are paths; `nodes.*.data` is a key of every item of a list.

    What `names` hold may also be a name that is no path: it is one only if it looks like one, or is there.
    """

    paths: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def resolve(self, values: dict[str, Any], folder: Path) -> None:
        """Make the paths in some values absolute."""
        for dotted in (*self.paths, *self.names):
            *parents, key = dotted.split(".")
            for holder in _holders(values, parents):
                value = holder.get(key)
                if isinstance(value, list):
                    holder[key] = [self._absolute(item, folder, dotted) for item in value]
                elif value is not None:
                    holder[key] = self._absolute(value, folder, dotted)

    def _absolute(self, value: Any, folder: Path, key: str) -> Any:
        return _resolved(value, folder, key, key in self.names) if isinstance(value, str) and value else value


def read_config(
    record: type[RecordT],
    path: Path,
    overrides: Sequence[str] = (),
    keys: PathKeys = PathKeys(),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> RecordT:
    """Return the record in a file, with `key=value` overrides such as `batch.global_size=8`.

    Args:
        record: The class wanted.
        path: Of the file.
        overrides: Changes to it.
        keys: Those whose values are paths.
        defaults: Values of top-level keys that the file leaves out.

    Raises:
        ConfigError: The file or an override is malformed; the message names the key and what is known.
    """
    values = {**defaults, **read_yaml_mapping(path)}
    keys.resolve(values, path.absolute().parent)
    for override in overrides:
        _merge(values, _parse_override(override, keys))
    for where, key, known in _unknown_keys(record, values):
        guess = get_close_matches(key, known, n=1)
        meant = f"did you mean {guess[0]!r}? " if guess else ""
        raise ConfigError(
            f"{path}: unknown key {where + key!r}.", fix=f"{meant}the known keys are {', '.join(known)}."
        )
    return parse_record(record, values, str(path))


def _holders(values: Any, parents: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the mappings that a path of keys leads to."""
    if parents and parents[0] == "*":
        for item in values if isinstance(values, list) else ():
            yield from _holders(item, parents[1:])
    elif parents and isinstance(values, dict):
        yield from _holders(values.get(parents[0]), parents[1:])
    elif not parents and isinstance(values, dict):
        yield values


def _resolved(text: str, folder: Path, key: str, may_be_name: bool) -> str:
    try:
        path = (folder / Path(text).expanduser()).resolve()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as fault:  # too long, no such user, a null byte
        why = fault.strerror if isinstance(fault, OSError) else str(fault)
        raise ConfigError(f"{key} {text[:60]!r} is no path ({why}).", fix="mend it.") from None
    return str(path) if not may_be_name or text.startswith((".", "/", "~")) or exists else text


def _parse_override(override: str, keys: PathKeys) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"override {override!r} is not key=value.", fix="write such as batch.global_size=8."
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError(f"override {override!r}: the value is not YAML.", fix="quote the value.") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    keys.resolve(value, Path.cwd())
    return dict(value)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], change)
        else:
            values[key] = change


def _unknown_keys(
    record: type[Record], values: Mapping[Any, Any], where: str = ""
) -> Iterator[tuple[str, str, list[str]]]:
    """Yield every key that a record does not have: where it stands, its name and those it could be."""
    fields = {info.alias or name: info for name, info in record.model_fields.items()}
    for key, value in values.items():
        if key not in fields:
            yield where, str(key), list(fields)
            continue
        nested = _nested_record(fields[key].annotation)
        if nested is not None and isinstance(value, Mapping):
            yield from _unknown_keys(nested, value, f"{where}{key}.")
        elif nested is not None and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Mapping):
                    yield from _unknown_keys(nested, item, f"{where}{key}[{index}].")


def _nested_record(annotation: object) -> type[Record] | None:
    """Return the record in `Power`, `Power | None` or `tuple[Device, ...]`."""
    found = [
        candidate
        for candidate in (annotation, *get_args(annotation))
        if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, Record)
    ]
    return found[0] if len(found) == 1 else None  # of several, which one is meant stands in the value
