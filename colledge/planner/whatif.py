"""Pools that are not there: without a device, with more of them, with another network. Pure; nothing is planned here.

Each function takes a pool and returns another one, with notes that say what had to be assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median

from colledge.errors import ConfigError
from colledge.planner.request import PlanningRequest
from colledge.profiles import DeviceProfile, LinkProfile, PoolProfile, SegmentProfile
from colledge.units import format_bytes, format_seconds

CABLE_BYTES_PER_S = 125e6
CABLE_LATENCY_S = 3e-4
_MOST_MEMBERS_CABLED = 48  # beyond this, a link a pair would be thousands


@dataclass(frozen=True)
class Changed:
    """A pool after a change, and what the change assumed."""

    pool: PoolProfile
    notes: tuple[str, ...] = ()


def remove_devices(pool: PoolProfile, ids: Sequence[str]) -> Changed:
    """Return the pool without some devices; segments left with one member go too.

    Raises:
        ConfigError: A device is unknown, or none would be left.
    """
    gone = {pool.device(id).id for id in ids}
    devices = tuple(device for device in pool.devices if device.id not in gone)
    if not devices:
        raise ConfigError("that leaves no device in the pool.", fix="take away fewer devices.")
    shrunk = (
        segment.model_copy(update={"devices": tuple(id for id in segment.devices if id not in gone)})
        for segment in pool.segments
    )
    links = tuple(k for k in pool.links if not gone & {k.source, k.target})
    return Changed(_pool(devices, links, tuple(segment for segment in shrunk if len(segment.devices) > 1)))


def add_devices(pool: PoolProfile, template: DeviceProfile, count: int = 1) -> Changed:
    """Return the pool with `count` devices like `template`, named KIND-1, KIND-2, ... where those are free.

    They join the pool's first segment. Without one they get links to every device, as slow and as late as the
    pool's median link, and without any link a cable of 1 Gbit/s is assumed.
    """
    taken = {device.id for device in pool.devices}
    free = (f"{template.kind}-{number}" for number in range(1, len(taken) + count + 1))
    ids = [id for id in free if id not in taken][:count]
    added = tuple(template.model_copy(update={"id": id}) for id in ids)
    names = ", ".join(ids)
    devices = (*pool.devices, *added)
    if pool.segments:
        first = pool.segments[0]
        joined = first.model_copy(update={"devices": (*first.devices, *ids)})
        changed = _pool(devices, pool.links, (joined, *pool.segments[1:]))
        return Changed(changed, (f"{names}: assumed to join segment {first.name!r}.",))
    latency_s, bandwidth = CABLE_LATENCY_S, CABLE_BYTES_PER_S
    like = "a cable"
    if pool.links:
        latency_s = median(link.latency_s for link in pool.links)
        bandwidth = median(link.bandwidth_bytes_per_s for link in pool.links)
        like = "the pool's median link"
    others = [device.id for device in pool.devices]
    pairs = [(a, b) for n, a in enumerate(ids) for b in (*others, *ids[:n])]
    links = tuple(_link(a, b, latency_s, bandwidth) for a, b in pairs)
    links += tuple(_link(b, a, latency_s, bandwidth) for a, b in pairs)
    note = (
        f"{names}: assumed to be linked to every device like {like} "
        f"({format_bytes(bandwidth)}/s, {format_seconds(latency_s)})."
    )
    return Changed(_pool(devices, (*pool.links, *links), ()), (note,))


def set_bandwidth(pool: PoolProfile, name: str, bytes_per_s: float) -> Changed:
    """Return the pool with another bandwidth of a segment, or of the link `a->b`; latencies stay.

    A link that was given one way only serves both, and does so after the change. A pair that only shares a segment
    gets a link of its own.

    Raises:
        ConfigError: There is no such segment or pair, or the bandwidth is not above 0.
    """
    if bytes_per_s <= 0:
        raise ConfigError(
            f"bandwidth of {name!r} is {bytes_per_s:g}, wanted more than 0.",
            fix="leave a device out with --without to do without its link.",
        )
    source, arrow, target = name.partition("->")
    if not arrow:
        return _set_segment(pool, name, bytes_per_s)
    source, target = pool.device(source.strip()).id, pool.device(target.strip()).id
    if source == target:
        raise ConfigError(f"{name!r} joins a device to itself.", fix="name two devices.")
    ways = [(k.source, k.target) for k in pool.links]
    route = pool.route(source, target)
    update = {"bandwidth_bytes_per_s": bytes_per_s, "provenance": "declared"}
    if (source, target) in ways:
        chosen = (source, target)
    elif (target, source) in ways:
        # The link serves both ways: give this way its own, so that the other keeps its bandwidth.
        made = _link(source, target, route.latency_s, bytes_per_s)
        return Changed(_pool(pool.devices, (*pool.links, made), pool.segments))
    else:
        made = _link(source, target, route.latency_s, bytes_per_s)
        note = f"{source} and {target} share segment {route.medium!r}: assumed to get a link of their own, both ways."
        return Changed(_pool(pool.devices, (*pool.links, made), pool.segments), (note,))
    links = tuple(k.model_copy(update=update) if (k.source, k.target) == chosen else k for k in pool.links)
    return Changed(_pool(pool.devices, links, pool.segments))


def cable_segment(pool: PoolProfile, name: str) -> Changed:
    """Return the pool with a cable of 1 Gbit/s between every two members of a segment instead of the segment.

    Raises:
        ConfigError: There is no such segment.
    """
    segment = _segment(pool, name)
    if len(segment.devices) > _MOST_MEMBERS_CABLED:
        wired = segment.model_copy(
            update={"bandwidth_bytes_per_s": CABLE_BYTES_PER_S, "latency_s": CABLE_LATENCY_S}
        )
        note = f"segment {name!r} has many members: assumed to share one medium of 1 Gbit/s."
        return Changed(_replace_segment(pool, segment, wired), (note,))
    known = {(k.source, k.target) for k in pool.links} | {(k.target, k.source) for k in pool.links}
    made = tuple(
        _link(a, b, CABLE_LATENCY_S, CABLE_BYTES_PER_S)
        for a, b in product(segment.devices, repeat=2)
        if a != b and (a, b) not in known
    )
    rest = tuple(other for other in pool.segments if other.name != name)
    return Changed(_pool(pool.devices, (*pool.links, *made), rest))


def cable_slow_links(pool: PoolProfile) -> Changed:
    """Return the pool with every link slower than 1 Gbit/s replaced by a cable of 1 Gbit/s."""
    links = tuple(
        _link(k.source, k.target, min(k.latency_s, CABLE_LATENCY_S), CABLE_BYTES_PER_S)
        if k.bandwidth_bytes_per_s < CABLE_BYTES_PER_S
        else k
        for k in pool.links
    )
    return Changed(_pool(pool.devices, links, pool.segments))


def fix_mode(pool: PoolProfile, id: str, mode: str) -> Changed:
    """Return the pool with a device that knows one power mode only.

    Raises:
        ConfigError: The device or the mode is unknown.
    """
    device = pool.device(id)
    if not device.has_mode(mode):
        there = ", ".join(known.name for known in device.modes)
        raise ConfigError(f"device {id!r} has no power mode {mode!r}.", fix=f"use one of {there}.")
    fixed = device.model_copy(update={"modes": (device.mode(mode),)})
    devices = tuple(fixed if other.id == id else other for other in pool.devices)
    return Changed(_pool(devices, pool.links, pool.segments))


def apply_changes(pool: PoolProfile, changes: Sequence[Callable[[PoolProfile], Changed]]) -> Changed:
    """Return the pool after changes, one after the other, with all their notes."""
    notes: tuple[str, ...] = ()
    for change in changes:
        changed = change(pool)
        pool, notes = changed.pool, (*notes, *changed.notes)
    return Changed(pool, notes)


def _pool(
    devices: tuple[DeviceProfile, ...],
    links: tuple[LinkProfile, ...],
    segments: tuple[SegmentProfile, ...],
) -> PoolProfile:
    """Return a new pool; a copy of another one would keep the routes that it has looked up."""
    return PoolProfile(schema_tag="colledge/pool-profile/1", devices=devices, links=links, segments=segments)


def _link(source: str, target: str, latency_s: float, bandwidth_bytes_per_s: float) -> LinkProfile:
    return LinkProfile(
        source=source,
        target=target,
        latency_s=latency_s,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        provenance="declared",
    )


def _segment(pool: PoolProfile, name: str) -> SegmentProfile:
    for segment in pool.segments:
        if segment.name == name:
            return segment
    there = ", ".join(repr(segment.name) for segment in pool.segments) or "none"
    raise ConfigError(
        f"the pool has no segment {name!r}.", fix=f"the segments are {there}; write a link as 'a->b'."
    )


def _set_segment(pool: PoolProfile, name: str, bytes_per_s: float) -> Changed:
    segment = _segment(pool, name)
    faster = segment.model_copy(update={"bandwidth_bytes_per_s": bytes_per_s, "provenance": "declared"})
    return Changed(_replace_segment(pool, segment, faster))


def _replace_segment(pool: PoolProfile, old: SegmentProfile, new: SegmentProfile) -> PoolProfile:
    segments = tuple(new if segment.name == old.name else segment for segment in pool.segments)
    return _pool(pool.devices, pool.links, segments)


def without_missing(request: PlanningRequest, pool: PoolProfile) -> PlanningRequest:
    """Return a request whose `must_not_use` names only devices that are in the pool still."""
    there = {device.id for device in pool.devices}
    kept = tuple(id for id in request.must_not_use if id in there)
    return request if kept == request.must_not_use else request.model_copy(update={"must_not_use": kept})
