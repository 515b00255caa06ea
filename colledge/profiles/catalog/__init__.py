"""Figures of known devices, so that a pool can be planned before it is bought; one YAML file a device.

Every figure names its source, and the source begins with how far it can be trusted:

    [S]    a primary source: a vendor's page, an official repository, somebody's own measurement
    [S2]   a secondary source: a hobbyist's document, an aggregator
    [D]    derived from others by the arithmetic that the text gives
    [M]    general knowledge, not looked up

All but [S] are estimates and are shown as such. A rate is what matrix products reach in float32 where somebody
measured it; else half the peak (measured boards reach 7 to 94 % of theirs), and for processors twice the float64
rate of Linpack. A layer reaches less than its products alone, on a processor about half to two thirds, so times from
these rates are on the short side. Watts of a graphics card include the computer around it; those of a Jetson leave
out the carrier board.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

import yaml
from pydantic import Field, model_validator

from colledge.errors import ConfigError, one_line
from colledge.profiles.device import DeviceProfile, PowerMode
from colledge.records import Record, parse_record
from colledge.units import Bytes, BytesPerSecond

_TAGGED = re.compile(r"^\[(S|S2|D|M)\] \S")
_DEVICE_FIGURES = ("memory_bytes", "usable_memory_bytes", "runtime_bytes", "allocator_overhead")
_MODE_FIGURES = ("idle_w", "compute_w", "communicate_w", "achieved_flops_per_s", "memory_bytes_per_s")


class CatalogMode(Record):
    """Watts and rates of a device in one power mode."""

    name: str = Field(min_length=1)
    idle_w: float = Field(ge=0)
    compute_w: float = Field(gt=0)
    communicate_w: float = Field(ge=0)
    achieved_flops_per_s: float = Field(gt=0)
    memory_bytes_per_s: BytesPerSecond = Field(gt=0)


@dataclass(frozen=True)
class Figure:
    """One figure of an entry: `path` names it, such as `modes.15W.idle_w`."""

    path: str
    value: float
    source: str

    @property
    def estimated(self) -> bool:
        """Whether the figure has no primary source."""
        return not self.source.startswith("[S] ")


class CatalogDevice(Record):
    """A device that can be bought.

    `memory_bytes` is what is on the board, `usable_memory_bytes` what training may use of it, `runtime_bytes` what
    the worker itself takes of that, `allocator_overhead` as in `DeviceProfile`. `sources` has a text for the path of
    every figure; `modes.*.idle_w` stands for that figure of all modes that do not have their own.
    """

    kind: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str = Field(min_length=1)
    memory_bytes: Bytes = Field(gt=0)
    usable_memory_bytes: Bytes = Field(gt=0)
    runtime_bytes: Bytes = Field(ge=0)
    allocator_overhead: float = Field(ge=0)
    default_mode: str
    modes: tuple[CatalogMode, ...] = Field(min_length=1)
    sources: Mapping[str, str]

    @model_validator(mode="after")
    def _check(self) -> CatalogDevice:
        names = [mode.name for mode in self.modes]
        if len(set(names)) != len(names):
            raise ValueError(f"power mode names must differ, saw {names}")
        if self.default_mode not in names:
            raise ValueError(f"default_mode is {self.default_mode!r}, wanted one of {', '.join(names)}")
        if not self.runtime_bytes < self.usable_memory_bytes <= self.memory_bytes:
            raise ValueError("wanted runtime_bytes < usable_memory_bytes <= memory_bytes")
        used = set()
        for path, starred, _ in self._paths():
            key = path if path in self.sources else starred
            if key not in self.sources:
                raise ValueError(f"sources: {path!r} has none")
            used.add(key)
        for key, text in self.sources.items():
            if key not in used:
                raise ValueError(f"sources: {key!r} is the source of no figure")
            if not _TAGGED.match(text):
                raise ValueError(f"sources: {key!r} must begin with [S], [S2], [D] or [M], saw {text!r}")
        return self

    def _paths(self) -> Iterator[tuple[str, str, float]]:
        """Yield the path of every figure, the path that stands for all modes, and the value."""
        for name in _DEVICE_FIGURES:
            yield name, name, getattr(self, name)
        for mode in self.modes:
            for name in _MODE_FIGURES:
                yield f"modes.{mode.name}.{name}", f"modes.*.{name}", getattr(mode, name)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Every figure with its source."""
        return tuple(
            Figure(path, value, self.sources[path if path in self.sources else starred])
            for path, starred, value in self._paths()
        )

    @property
    def estimated(self) -> tuple[str, ...]:
        """The paths of the figures that have no primary source."""
        return tuple(figure.path for figure in self.figures if figure.estimated)

    def mode(self, name: str | None = None) -> CatalogMode:
        """Return the mode of that name, or the default one for None.

        Raises:
            ConfigError: There is no such mode; the message lists those there are.
        """
        wanted = self.default_mode if name is None else name
        for mode in self.modes:
            if mode.name == wanted:
                return mode
        raise ConfigError(
            f"{self.kind} has no power mode {wanted!r} in the catalog.",
            fix=f"use one of {', '.join(mode.name for mode in self.modes)}.",
        )

    def profile(self, id: str, mode: str | None = None) -> DeviceProfile:
        """Return a device of this kind.

        Args:
            id: What the pool calls it.
            mode: The power mode to put first, which is what a plan means when it names none; None is the default.

        Raises:
            ConfigError: There is no such mode.
        """
        first = self.mode(mode)
        modes = (first, *(other for other in self.modes if other.name != first.name))
        return DeviceProfile(
            id=id,
            kind=self.kind,
            memory_bytes=self.usable_memory_bytes,
            runtime_bytes=self.runtime_bytes,
            allocator_overhead=self.allocator_overhead,
            modes=tuple(PowerMode(source="catalog", **each.model_dump()) for each in modes),
        )


def parse_catalog_device(kind: str, text: str) -> CatalogDevice:
    """Return the entry in a YAML text.

    Raises:
        ConfigError: A key is unknown, missing or malformed, or a figure has no source.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as fault:
        raise ConfigError(f"catalog entry {kind}: not YAML ({one_line(fault)}).") from None
    entry = {"kind": kind, **values} if isinstance(values, dict) else values
    return parse_record(CatalogDevice, entry, f"catalog entry {kind}")


@lru_cache(maxsize=1)
def read_catalog() -> Mapping[str, CatalogDevice]:
    """Return every device of the catalog by its kind, in alphabetical order."""
    files = sorted(
        (file for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml")),
        key=lambda file: file.name,
    )
    entries = (
        parse_catalog_device(file.name.removesuffix(".yaml"), file.read_text(encoding="utf-8"))
        for file in files
    )
    return MappingProxyType({entry.kind: entry for entry in entries})


def catalog_device(kind: str) -> CatalogDevice:
    """Return the catalog's entry for a kind of device.

    Raises:
        ConfigError: There is none; the message lists those there are and the closest.
    """
    catalog = read_catalog()
    if kind not in catalog:
        guess = get_close_matches(kind, catalog, n=1)
        meant = f"did you mean {guess[0]!r}? " if guess else ""
        raise ConfigError(
            f"the catalog has no device {kind!r}.", fix=f"{meant}the kinds are {', '.join(catalog)}."
        )
    return catalog[kind]
