"""run.yaml and pool.yaml: what the user chooses. Read, overridden from the command line, checked.

Keys are those of the files; attributes carry their units (`memory: 4 GB` is `memory_bytes`). Relative paths
count from the folder of run.yaml, those given on the command line from the working directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, model_validator

from colledge.errors import ConfigError
from colledge.plan import Plan
from colledge.profiles import ModelProfile, PoolProfile, PowerMode
from colledge.records import Record, RecordT, parse_record, read_yaml_mapping
from colledge.report.metrics import StepMetrics
from colledge.report.record import Report
from colledge.settings import Emulation, OptimizerSettings, Precision
from colledge.units import Bytes, Seconds

Objective = Literal["energy", "time", "energy-delay"]

_PATH_KEYS = ("model", "data.train", "pool", "output")


class DataConfig(Record):
    """What to train on: a .jsonl of `{"text": ...}` lines or a .txt, cut into rows of `sequence_length`."""

    train: Path
    sequence_length: int = Field(default=512, ge=2, strict=True)


class BatchConfig(Record):
    """Rows in one step, over all devices."""

    global_size: int = Field(default=16, ge=1, le=1_000_000, strict=True)


class RunConfig(Record):
    """run.yaml: one training run.

    `model` is a local Hugging Face directory or a hub id. `deadline` is for the whole run, `deadline_step`
    for one step. `checkpoint_every` counts steps; without it only a run
    that is stopped saves one. The end saves the model.
    """

    schema_tag: Literal["colledge/run/1"] = Field(default="colledge/run/1", alias="schema")
    model: str = Field(min_length=1)
    data: DataConfig
    method: Literal["full"] = "full"
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerSettings = OptimizerSettings()
    steps: int = Field(default=100, ge=1, strict=True)
    precision: Precision = "float32"
    seed: int = Field(default=0, ge=0, strict=True)
    pool: Path
    objective: Objective = "energy"
    deadline_s: Seconds | None = Field(default=None, alias="deadline", gt=0)
    deadline_step_s: Seconds | None = Field(default=None, alias="deadline_step", gt=0)
    output: Path = Path("out")
    checkpoint_every: int | None = Field(default=None, ge=1, strict=True)

    @property
    def step_limit_s(self) -> float | None:
        """The longest step that keeps both deadlines, in seconds; None without a deadline."""
        limits = [self.deadline_s / self.steps] if self.deadline_s is not None else []
        if self.deadline_step_s is not None:
            limits.append(self.deadline_step_s)
        return min(limits, default=None)


class CoordinatorConfig(Record):
    """Where the coordinator listens; without a port it takes a free one."""

    address: str = Field(default="127.0.0.1", min_length=1)
    port: int | None = Field(default=None, ge=1, le=65535, strict=True)


class PowerConfig(Record):
    """Watts that a device draws while it idles, computes and communicates."""

    idle_w: float = Field(ge=0)
    compute_w: float = Field(ge=0)
    communicate_w: float = Field(ge=0)


# Placeholders for a device without `power`: a mini PC, and a desktop with a GPU. They only make plans
# comparable; every figure that rests on them says `modelled`.
_PLACEHOLDER_CPU = PowerMode(name="default", idle_w=5, compute_w=20, communicate_w=8, source="modelled")
_PLACEHOLDER_GPU = PowerMode(name="default", idle_w=40, compute_w=250, communicate_w=70, source="modelled")


class DeviceConfig(Record):
    """One device of the pool.

    `threads` is for the CPU (all of them by default); without `memory` the device measures what is free.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    host: str = Field(default="local", min_length=1)
    accelerator: str = Field(default="cpu", pattern=r"^(cpu|cuda:[0-9]+)$")
    threads: int | None = Field(default=None, ge=1, strict=True)
    memory_bytes: Bytes | None = Field(default=None, alias="memory", gt=0)
    power: PowerConfig | None = None
    emulate: Emulation = Emulation()

    def power_mode(self) -> PowerMode:
        """Return the declared watts, or a placeholder whose source is `modelled`."""
        if self.power is None:
            return _PLACEHOLDER_CPU if self.accelerator == "cpu" else _PLACEHOLDER_GPU
        return PowerMode(name="default", source="declared", **self.power.model_dump())


class PoolConfig(Record):
    """pool.yaml: the devices, and where their coordinator listens."""

    schema_tag: Literal["colledge/pool/1"] = Field(default="colledge/pool/1", alias="schema")
    coordinator: CoordinatorConfig = CoordinatorConfig()
    devices: tuple[DeviceConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> PoolConfig:
        ids = [device.id for device in self.devices]
        for id in ids:
            if ids.count(id) > 1:
                raise ValueError(f"device {id!r} appears {ids.count(id)} times; ids must differ")
        if "coordinator" in ids:
            raise ValueError("no device can have the id 'coordinator'; that is the process that feeds them")
        return self


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run in a file, with `key=value` overrides such as `batch.global_size=8`.

    Raises:
        ConfigError: The file or an override is malformed; the message names the key and what is known.
    """
    values = read_yaml_mapping(path)
    values.setdefault("output", "out")
    _resolve_paths(values, path.absolute().parent)
    for override in overrides:
        _merge(values, _parse_override(override))
    return _check_config(RunConfig, values, str(path))


def load_pool(path: Path) -> PoolConfig:
    """Return the pool in a file.

    Raises:
        ConfigError: The file is missing or malformed; the message names the key and what is known.
    """
    return _check_config(PoolConfig, read_yaml_mapping(path), str(path))


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"override {override!r} is not key=value.", fix="write such as batch.global_size=8."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML.", fix="quote the value.") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    _resolve_paths(value, Path.cwd())
    return dict(value)


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], change)
        else:
            values[key] = change


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    for dotted in _PATH_KEYS:
        *parents, key = dotted.split(".")
        holder: Any = values
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(key), str) and holder[key]:
            text = holder[key]
            resolved = (folder / Path(text).expanduser()).resolve()
            if key != "model" or text.startswith((".", "/", "~")) or resolved.exists():
                holder[key] = str(resolved)  # any other model is a hub id


def _check_config(record: type[RecordT], values: Mapping[str, Any], source: str) -> RecordT:
    for where, key, known in _unknown_keys(record, values):
        guess = get_close_matches(key, known, n=1)
        meant = f"did you mean {guess[0]!r}? " if guess else ""
        raise ConfigError(
            f"{source}: unknown key {where + key!r}.", fix=f"{meant}the known keys are {', '.join(known)}."
        )
    return parse_record(record, values, source)


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
    for candidate in (annotation, *get_args(annotation)):
        if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, Record):
            return candidate
    return None


SCHEMAS: Mapping[str, type[Record]] = {
    "run": RunConfig,
    "pool": PoolConfig,
    "pool-profile": PoolProfile,
    "model-profile": ModelProfile,
    "plan": Plan,
    "metrics": StepMetrics,
    "report": Report,
}


def schema_text(name: str) -> str:
    """Return the JSON schema of a file: run, pool, pool-profile, model-profile, plan, metrics or report.

    Raises:
        ConfigError: There is no such file.
    """
    if name not in SCHEMAS:
        raise ConfigError(f"there is no schema {name!r}.", fix=f"use one of {', '.join(SCHEMAS)}.")
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(dialect | SCHEMAS[name].model_json_schema(), indent=2)
