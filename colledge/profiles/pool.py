"""A pool: its devices, and the route between any two of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from colledge.errors import ConfigError
from colledge.profiles.device import DeviceProfile
from colledge.profiles.link import LinkProfile, SegmentProfile
from colledge.records import Record


@dataclass(frozen=True)
class Route:
    """How one device reaches another. Transfers with the same `medium` share its bandwidth."""

    medium: str
    latency_s: float
    bandwidth_bytes_per_s: float

    def transfer_s(self, num_bytes: float) -> float:
        """Return the seconds that one message of `num_bytes` takes on an otherwise empty medium."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s


class PoolProfile(Record):
    """pool-profile.json: devices, links and segments (measured).

    Two devices without a link of their own use the fastest segment that holds both.
    """

    schema_tag: Literal["colledge/pool-profile/1"] = Field(alias="schema")
    devices: tuple[DeviceProfile, ...] = Field(min_length=1)
    links: tuple[LinkProfile, ...] = ()
    segments: tuple[SegmentProfile, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> PoolProfile:
        ids = [device.id for device in self.devices]
        for id in ids:
            if ids.count(id) > 1:
                raise ValueError(f"device {id!r} appears {ids.count(id)} times; ids must differ")
        known = set(ids)
        seen: set[tuple[str, str]] = set()
        for link in self.links:
            if link.source == link.target:
                raise ValueError(f"link {link.source}->{link.target} joins a device to itself")
            if (link.source, link.target) in seen:
                raise ValueError(f"link {link.source}->{link.target} appears twice; keep one")
            seen.add((link.source, link.target))
            for end in (link.source, link.target):
                if end not in known:
                    raise ValueError(f"link {link.source}->{link.target} names unknown device {end!r}")
        names = [segment.name for segment in self.segments]
        for segment in self.segments:
            if names.count(segment.name) > 1:
                raise ValueError(
                    f"segment {segment.name!r} appears {names.count(segment.name)} times; names must differ"
                )
            if len(set(segment.devices)) != len(segment.devices):
                raise ValueError(
                    f"segment {segment.name!r} names a device twice: {', '.join(segment.devices)}"
                )
            for id in segment.devices:
                if id not in known:
                    raise ValueError(f"segment {segment.name!r} names unknown device {id!r}")
        return self

    def device(self, id: str) -> DeviceProfile:
        """Return the device of that id.

        Raises:
            ConfigError: The pool has no such device.
        """
        found = self._devices_by_id.get(id)
        if found is None:
            there = ", ".join(self._devices_by_id)
            raise ConfigError(f"device {id!r} is not in the pool.", fix=f"use one of {there}.")
        return found

    def route(self, source: str, target: str) -> Route:
        """Return how bytes travel from one device to another.

        Raises:
            ConfigError: No link and no segment joins the two; the message names the pair.
        """
        key = (source, target)
        found = self._routes.get(key)
        if found is None:
            found = self._find_route(source, target)
            self._routes[key] = found
        return found

    @cached_property
    def _devices_by_id(self) -> dict[str, DeviceProfile]:
        return {device.id: device for device in self.devices}

    @cached_property
    def _routes(self) -> dict[tuple[str, str], Route]:
        routes: dict[tuple[str, str], Route] = {}
        for link in self.links:
            back = (link.target, link.source)
            routes.setdefault(
                back, Route(f"{back[0]}->{back[1]}", link.latency_s, link.bandwidth_bytes_per_s)
            )
        for link in self.links:
            medium = f"{link.source}->{link.target}"
            routes[(link.source, link.target)] = Route(medium, link.latency_s, link.bandwidth_bytes_per_s)
        return routes

    def _find_route(self, source: str, target: str) -> Route:
        shared = [s for s in self.segments if source in s.devices and target in s.devices]
        if not shared:
            raise ConfigError(
                f"no link and no segment joins {source!r} and {target!r}.",
                fix=f'add {{"source": "{source}", "target": "{target}", ...}} to the pool profile\'s links.',
            )
        best = max(shared, key=lambda segment: segment.bandwidth_bytes_per_s)
        return Route(best.name, best.latency_s, best.bandwidth_bytes_per_s)
