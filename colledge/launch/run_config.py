"""run.yaml and pool.yaml: what the user chooses. Read, overridden from the command line, checked.

Keys are those of the files; attributes carry their units (`memory: 4 GB` is `memory_bytes`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from colledge.errors import ConfigError
from colledge.launch.config_file import PathKeys, read_config
from colledge.profiles import (
    DeviceProfile,
    LinkProfile,
    PoolProfile,
    PowerMode,
    SegmentProfile,
)
from colledge.profiles.catalog import catalog_device
from colledge.records import Record
from colledge.report.trackers import Tracker
from colledge.settings import (
    BackendName,
    DeepSpeedSettings,
    EarlyStopping,
    Emulation,
    LoraSettings,
    LossOn,
    NarrowPrecision,
    Objective,
    OptimizerSettings,
    Precision,
    WirePrecision,
    ZeroStage,
)
from colledge.units import Bytes, BytesPerSecond, Seconds

Accounting = Literal["whole-pool", "marginal"]

_PATH_KEYS = PathKeys(
    paths=("data.train", "data.validation", "pool", "output", "deepspeed.config"),
    names=("model",),  # a hub id
)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | Path) else value


Sources = Annotated[tuple[Path, ...], BeforeValidator(_listed), Field(min_length=1)]


class DataConfig(Record):
    """What to train on, and to validate with, in rows of `sequence_length`.

    `train` and `validation` are a .jsonl, .json, .parquet or .txt, a folder or pattern of such, or a list of these.
    `validation_split` holds a share of the training examples back. Without `packing` each example has a row of its own.
    `loss_on: answers` learns completions and what the assistant says, and only reads the rest.
    """

    train: Sources
    validation: Sources | None = None
    validation_split: float | None = Field(default=None, gt=0, lt=1)
    sequence_length: int = Field(default=512, ge=2, strict=True)
    packing: bool = True
    loss_on: LossOn = "all"

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.validation is not None and self.validation_split is not None:
            raise ValueError("give validation or validation_split, not both")
        return self


class ActivationCacheConfig(Record):
    """Compute what the layers below the first adapter give once, and keep it on the devices' disks.

    `limit` is the most bytes on any device's disk.
    """

    limit_bytes: Bytes = Field(alias="limit", gt=0)


class BatchConfig(Record):
    """Rows in one step, over all devices."""

    global_size: int = Field(default=16, ge=1, le=1_000_000, strict=True)


class RunConfig(Record):
    """run.yaml: one training run.

    `model` is a local Hugging Face directory or a hub id. `method: lora` trains adapters alone, `lora` are their
    settings. `deadline` is for the whole run, `deadline_step` for one step. `accounting` says whose idle energy counts;
    `must_use` and `must_not_use` name devices. `wire_precision` is that of what travels between stages, instead of
    `precision`. `checkpoint_every` counts steps; without it only a run that is stopped saves one; `keep_checkpoints` of
    them stay. `evaluate_every` counts steps too: the loss on the validation data, also after the last step. The end
    saves what was trained: with `keep_best` that of the lowest validation loss, whose checkpoint stays. `report_to`
    writes the figures of metrics.jsonl for a tracker too. `zero: 1` divides the optimizer state over the replicas of a
    stage. `backend` is what trains, `deepspeed` are settings of it. With `activation_cache` what lies below the first
    adapter is computed once, not in every epoch.
    """

    schema_tag: Literal["colledge/run/1"] = Field(default="colledge/run/1", alias="schema")
    model: str = Field(min_length=1)
    data: DataConfig
    method: Literal["full", "lora"] = "full"
    lora: LoraSettings | None = None
    activation_cache: ActivationCacheConfig | None = None
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerSettings = OptimizerSettings()
    steps: int = Field(default=100, ge=1, strict=True)
    precision: Precision = "float32"
    mixed_precision: NarrowPrecision | None = None
    frozen_precision: NarrowPrecision | None = None
    wire_precision: WirePrecision | None = None
    seed: int = Field(default=0, ge=0, lt=2**63, strict=True)
    pool: Path
    objective: Objective = "energy"
    accounting: Accounting = "whole-pool"
    must_use: tuple[str, ...] = ()
    must_not_use: tuple[str, ...] = ()
    deadline_s: Seconds | None = Field(default=None, alias="deadline", gt=0)
    deadline_step_s: Seconds | None = Field(default=None, alias="deadline_step", gt=0)
    output: Path = Path("out")
    checkpoint_every: int | None = Field(default=None, ge=1, strict=True)
    keep_checkpoints: int = Field(default=2, ge=1, strict=True)
    evaluate_every: int | None = Field(default=None, ge=1, strict=True)
    keep_best: bool = False
    early_stopping: EarlyStopping | None = None
    report_to: Tracker = "none"
    zero: Literal[1] | None = None
    backend: BackendName = "native"
    deepspeed: DeepSpeedSettings | None = None

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        validates = self.data.validation is not None or self.data.validation_split is not None
        if validates != (self.evaluate_every is not None):
            missing = "evaluate_every" if validates else "data.validation (or data.validation_split)"
            raise ValueError(f"evaluate_every and validation data go together; {missing} is missing")
        for name, asked in (
            ("keep_best", self.keep_best),
            ("early_stopping", self.early_stopping is not None),
        ):
            if asked and not validates:
                raise ValueError(f"{name} needs validation data and evaluate_every")
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, the run has {self.steps} steps"
            )
        if self.lora is not None and self.method != "lora":
            raise ValueError(f"lora has settings and method is {self.method!r}; set method: lora")
        if self.activation_cache is not None and self.method != "lora":
            raise ValueError("activation_cache is for method: lora; else every layer trains")
        if self.frozen_precision is not None and self.method != "lora":
            raise ValueError("frozen_precision is for method: lora; else no weight is frozen")
        if self.precision != "float32" and self.mixed_precision is not None:
            raise ValueError(f"mixed_precision needs precision: float32, saw {self.precision}")
        self._check_backend()
        return self

    def _check_backend(self) -> None:
        if self.zero is not None and self.backend != "native":
            raise ValueError(
                f"zero is for backend: native; saw {self.backend}, which divides optimizer state in any case"
            )
        if self.zero is not None and self.optimizer.state_factor == 0:
            raise ValueError(
                "zero: 1 divides optimizer state, and sgd without momentum has none; take zero out"
            )
        if (self.deepspeed is not None) != (self.backend == "deepspeed"):
            raise ValueError("backend: deepspeed and deepspeed (such as {zero_stage: 2}) go together")
        if self.backend == "native":
            return
        for name, asked in (
            ("method: lora", self.method == "lora"),
            (f"precision: {self.precision}", self.precision != "float32"),
            ("mixed_precision", self.mixed_precision is not None),
        ):
            if asked:
                raise ValueError(
                    f"backend {self.backend} trains whole models in float32, saw {name}; set backend: native"
                )
        for name, asked in (
            ("checkpoint_every", self.checkpoint_every is not None),
            ("keep_best", self.keep_best),
        ):
            if self.backend == "deepspeed" and asked:
                raise ValueError(f"backend deepspeed keeps no checkpoints; take {name} out")

    @property
    def adapters(self) -> LoraSettings | None:
        """The adapters to train; None where the whole model is trained."""
        return (self.lora or LoraSettings()) if self.method == "lora" else None

    @property
    def step_limit_s(self) -> float | None:
        """The longest step that keeps both deadlines, in seconds; None without a deadline."""
        limits = [self.deadline_s / self.steps] if self.deadline_s is not None else []
        if self.deadline_step_s is not None:
            limits.append(self.deadline_step_s)
        return min(limits, default=None)


_HOST = re.compile(r"(?![-.0-9]+$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")


def _checked_host(text: str) -> str:
    try:
        ip_address(text)
    except ValueError:
        if not _HOST.fullmatch(text):
            raise ValueError("wanted an address or a name alone, such as 192.168.1.10 or desk.lan") from None
    return text


def _checked_device_host(text: str) -> str:
    user, at, host = text.rpartition("@")
    if at:
        _checked_host(user)
    _checked_host(host)
    return text


class CoordinatorConfig(Record):
    """Where the coordinator listens; without a port it takes a free one."""

    address: Annotated[str, AfterValidator(_checked_host)] = "127.0.0.1"
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

    `host` is local or the device's address, as user@address where ssh needs a user. `threads` is for the CPU (all of
    them by default); without `memory` the device measures what is free. A device with `catalog` is an entry of the
    catalog, to plan with and not to train on; `mode` is its power mode.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)
    host: Annotated[str, AfterValidator(_checked_device_host)] = "local"
    accelerator: str = Field(default="cpu", pattern=r"^(cpu|cuda:[0-9]+)$")
    threads: int | None = Field(default=None, ge=1, strict=True)
    memory_bytes: Bytes | None = Field(default=None, alias="memory", gt=0)
    power: PowerConfig | None = None
    emulate: Emulation = Emulation()
    catalog: str | None = None
    mode: str | None = None

    @model_validator(mode="after")
    def _check(self) -> DeviceConfig:
        if self.catalog is None:
            if self.mode is not None:
                raise ValueError("mode is for a device with catalog")
            return self
        for name in ("host", "accelerator", "threads", "power", "emulate"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"a device with catalog takes id, catalog, mode and memory; {name} is for a real one"
                )
        return self

    def catalog_profile(self) -> DeviceProfile:
        """Return the catalog's figures for this device.

        Raises:
            ConfigError: The catalog has no such kind of device or no such mode of it.
        """
        assert self.catalog is not None
        profile = catalog_device(self.catalog).profile(self.id, self.mode)
        if self.memory_bytes is None:
            return profile
        return profile.model_copy(update={"memory_bytes": self.memory_bytes})

    def power_mode(self) -> PowerMode:
        """Return the declared watts, or a placeholder whose source is `modelled`."""
        if self.power is None:
            return _PLACEHOLDER_CPU if self.accelerator == "cpu" else _PLACEHOLDER_GPU
        return PowerMode(name="default", source="declared", **self.power.model_dump())


class LinkConfig(Record):
    """A connection that two devices have to themselves, as fast in both directions."""

    between: tuple[str, str]
    bandwidth_bytes_per_s: BytesPerSecond = Field(alias="bandwidth", gt=0)
    latency_s: Seconds = Field(alias="latency", ge=0)


class SegmentConfig(Record):
    """A medium whose members share its bandwidth, such as a Wi-Fi channel."""

    name: str = Field(min_length=1)
    devices: tuple[str, ...] = Field(min_length=2)
    bandwidth_bytes_per_s: BytesPerSecond = Field(alias="bandwidth", gt=0)
    latency_s: Seconds = Field(alias="latency", ge=0)


class PoolConfig(Record):
    """pool.yaml: the devices, and where their coordinator listens.

    Links of real devices are measured; `links` and `segments` declare those of devices from the catalog.
    """

    schema_tag: Literal["colledge/pool/1"] = Field(default="colledge/pool/1", alias="schema")
    coordinator: CoordinatorConfig = CoordinatorConfig()
    devices: tuple[DeviceConfig, ...] = Field(min_length=1)
    links: tuple[LinkConfig, ...] = ()
    segments: tuple[SegmentConfig, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> PoolConfig:
        ids = [device.id for device in self.devices]
        for id in ids:
            if ids.count(id) > 1:
                raise ValueError(f"device {id!r} appears {ids.count(id)} times; ids must differ")
        if "coordinator" in ids:
            raise ValueError("no device can have the id 'coordinator'; that is the process that feeds them")
        self._check_catalog(ids)
        return self

    def _check_catalog(self, ids: list[str]) -> None:
        entries = [device.id for device in self.devices if device.catalog is not None]
        real = [id for id in ids if id not in entries]
        if entries and real:
            raise ValueError(
                f"device {entries[0]!r} is from the catalog and {real[0]!r} is not; a pool is all catalog or all real"
            )
        if real and (self.links or self.segments):
            raise ValueError(
                "links and segments are for devices from the catalog; those of real ones are measured"
            )
        named: dict[str, tuple[str, ...]] = {f"links[{i}]": link.between for i, link in enumerate(self.links)}
        named |= {f"segments[{i}]": segment.devices for i, segment in enumerate(self.segments)}
        for where, members in named.items():
            for id in members:
                if id not in ids:
                    raise ValueError(f"{where} names unknown device {id!r}; the devices are {', '.join(ids)}")
            if len(set(members)) != len(members):
                raise ValueError(f"{where} names a device twice")
        pairs = [frozenset(link.between) for link in self.links]
        for link in self.links:
            if pairs.count(frozenset(link.between)) > 1:
                raise ValueError(f"links: {' and '.join(link.between)} are joined twice")

    @property
    def is_catalog(self) -> bool:
        """Whether the devices are entries of the catalog: nothing to measure or to train on."""
        return self.devices[0].catalog is not None

    def catalog_profile(self) -> PoolProfile:
        """Return the profile of a pool from the catalog, with its links as declared.

        Raises:
            ConfigError: The catalog has no such kind of device or no such mode of it.
        """
        return PoolProfile(
            schema_tag="colledge/pool-profile/1",
            devices=tuple(device.catalog_profile() for device in self.devices),
            links=tuple(
                LinkProfile(
                    source=link.between[0],
                    target=link.between[1],
                    latency_s=link.latency_s,
                    bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
                    provenance="declared",
                )
                for link in self.links
            ),
            segments=tuple(
                SegmentProfile(
                    name=segment.name,
                    devices=segment.devices,
                    latency_s=segment.latency_s,
                    bandwidth_bytes_per_s=segment.bandwidth_bytes_per_s,
                    provenance="declared",
                )
                for segment in self.segments
            ),
        )


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run in a file, with `key=value` overrides such as `batch.global_size=8`.

    Raises:
        ConfigError: The file or an override is malformed; the message names the key and what is known.
    """
    return read_config(RunConfig, path, overrides, _PATH_KEYS, {"output": "out"})


def load_pool(path: Path) -> PoolConfig:
    """Return the pool in a file.

    Raises:
        ConfigError: The file is missing or malformed, or names what the catalog does not have; the message names
            the key and what is known.
    """
    pool = read_config(PoolConfig, path)
    if pool.is_catalog:
        try:
            pool.catalog_profile()
        except ConfigError as fault:
            raise ConfigError(f"{path}: {fault.message}", fix=fault.fix) from None
    return pool


def read_deepspeed(settings: DeepSpeedSettings) -> dict[str, JsonValue]:
    """Return the configuration of DeepSpeed that is given, or the one of a ZeRO stage.

    Raises:
        ConfigError: The file is no JSON object.
    """
    path = settings.config
    if path is None:
        return {"zero_optimization": {"stage": settings.zero_stage}}
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise ConfigError(
            f"{path}: cannot be read as JSON ({fault}).", fix="mend deepspeed.config."
        ) from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: is no JSON object.", fix="mend deepspeed.config.")
    return given


def zero_stage(run: RunConfig) -> ZeroStage | None:
    """Return the stage of ZeRO by which a run divides what replicas hold, None for nothing.

    FairScale's is 1: while micro-batches add up, its replicas hold whole gradients.

    Raises:
        ConfigError: The configuration of DeepSpeed is malformed.
    """
    match run.backend:
        case "native":
            return run.zero
        case "fairscale":
            return 1
        case "deepspeed":
            assert run.deepspeed is not None
            section = read_deepspeed(run.deepspeed).get("zero_optimization")
            stage = section.get("stage") if isinstance(section, dict) else None
            for known in get_args(ZeroStage):
                if stage == known:
                    found: ZeroStage = known
                    return found
            raise ConfigError(
                f"deepspeed: zero_optimization.stage is {stage!r}, wanted 1, 2 or 3.", fix="set one of them."
            )
