"""Numbers that the search asks for again and again, as arrays: seconds, bytes and watts of each class of devices.

A class is a set of devices that can be exchanged without changing any plan's figures. Everything here comes from
`PoolCosts` and `MemoryModel`; nothing decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from colledge.arrays import Array
from colledge.errors import ConfigError
from colledge.planner.cost import PoolCosts, shared_bytes
from colledge.planner.draft import StageDraft
from colledge.planner.layouts import Group
from colledge.planner.memory import WHOLE, MemoryModel, Shares, SpanMemory
from colledge.planner.request import PlanningRequest
from colledge.profiles import PowerMode, Route

MOST_ROWS = 4096  # of one replica in one micro-batch


def device_classes(costs: PoolCosts, devices: Sequence[str], marked: Sequence[str] = ()) -> dict[str, int]:
    """Return a class for each device; devices of one class can be exchanged without changing any plan's figures.

    Args:
        costs: Answers routes.
        devices: Those that may be used.
        marked: Devices that the request names; they are alike only among themselves.
    """
    pool = costs.pool

    def look(a: str, b: str) -> tuple[float, float, str] | None:
        route = find_route(costs, a, b)
        if route is None:
            return None
        private = route.medium == f"{a}->{b}"
        return (route.latency_s, route.bandwidth_bytes_per_s, "" if private else route.medium)

    # Devices without links of their own are told apart by the segments that hold them.
    linked = {end for link in pool.links for end in (link.source, link.target)}
    segments = {d: tuple(s.name for s in pool.segments if d in s.devices) for d in devices}

    def same(a: str, b: str) -> bool:
        one, two = pool.device(a), pool.device(b)
        return one.model_copy(update={"id": b}) == two and (a in marked) == (b in marked)

    def alike(a: str, b: str) -> bool:
        if not same(a, b):
            return False
        if a not in linked and b not in linked:
            return segments[a] == segments[b]
        others = [d for d in devices if d not in (a, b)]
        return look(a, b) == look(b, a) and all(
            look(a, c) == look(b, c) and look(c, a) == look(c, b) for c in others
        )

    classes: dict[str, int] = {}
    representatives: list[str] = []
    for device in devices:
        for number, other in enumerate(representatives):
            if alike(device, other):
                classes[device] = number
                break
        else:
            classes[device] = len(representatives)
            representatives.append(device)
    return classes


def find_route(costs: PoolCosts, a: str, b: str) -> Route | None:
    """Return the route between two devices, or None where nothing joins them."""
    try:
        return costs.route(a, b)
    except ConfigError:
        return None


class Tables:
    """Arrays over layers [0, i), i = 0 .. num_layers, for one pool, model and request."""

    def __init__(self, costs: PoolCosts, request: PlanningRequest) -> None:
        self.costs, self.request = costs, request
        self.pool, self.model = costs.pool, costs.model
        self.num_layers = len(self.model.layers)
        self.units = self.model.shard_units
        self._bytes()
        self._devices = {device.id: device for device in self.pool.devices}
        self.modes = lru_cache(maxsize=None)(self._modes)
        factor = request.optimizer_state_factor
        self.memory = MemoryModel(self.model, factor, request.zero, request.backend)
        self._spans = SpanMemory(self.model, factor, request.backend)
        self.rows_of_spans = lru_cache(maxsize=256)(self._span_rows)

    def _bytes(self) -> None:
        """Sum bytes that replicas sum, of layers [0, i): those that split over shards, those held whole."""
        layers = self.model.layers
        never_synced = [0] * len(layers)
        for a, b in self.costs.ties:
            trained = shared_bytes(layers, (a, b))[1]
            never_synced[a] += trained
            never_synced[b] += trained
        synced = np.zeros((2, len(layers) + 1))
        for i, layer in enumerate(layers):
            row = 0 if layer.tensor is not None else 1
            synced[row, i + 1] = max(0, layer.trainable_parameter_bytes - never_synced[i])
        self.synced_bytes = synced.cumsum(axis=1)
        self.out_bytes = np.array([self.costs.boundary_bytes(i) for i in range(len(layers))], dtype=float)

    def _modes(self, device: str) -> tuple[tuple[str | None, PowerMode], ...]:
        """Return the power modes in which a device's times are known, the first mode as None."""
        profile = self._devices[device]
        first, *others = profile.modes
        known = [(mode.name, mode) for mode in others if self.costs.has_mode(device, mode.name)]
        return ((None, first), *known)

    def kind_and_mode(self, device: str, mode: str | None) -> tuple[str, str]:
        """Return what times a device."""
        profile = self._devices[device]
        return profile.kind, mode or profile.modes[0].name

    def busy_s(
        self, device: str, mode: str | None, layers: tuple[int, int], rows: int, fraction: float
    ) -> float:
        """Return forward plus backward seconds of one micro-batch's rows."""
        if rows == 0:
            return 0.0
        profile = self._devices[device]
        forward, backward = self.costs.prefix_s(profile.kind, mode or profile.modes[0].name, rows, fraction)
        start, stop = layers
        return forward[stop] - forward[start] + backward[stop] - backward[start]

    def replica_s(self, stage: StageDraft, index: int, rows: int | None = None) -> float:
        """Return the forward plus backward seconds of a replica for a micro-batch, all-reduces included."""
        rows = stage.samples[index] if rows is None else rows
        if rows == 0:
            return 0.0
        replica, total = stage.group[index], sum(stage.units)
        slowest = max(
            self.busy_s(device, mode, stage.layers, rows, units / total)
            for device, mode, units in zip(replica, stage.modes[index], stage.units, strict=True)
        )
        return slowest + sum(self.costs.inner_allreduce_s(stage.layers, replica, rows))

    def rough_shares(self, devices: Sequence[str]) -> list[Shares]:
        """Return about what each replica of a stage on these devices will hold of it."""
        return self.memory.rough_shares([self._devices[device].room_bytes for device in devices])

    def memory_rows(
        self,
        device: str,
        layers: tuple[int, int],
        depth: int,
        fraction: float,
        recompute: bool,
        shares: Shares = WHOLE,
    ) -> int:
        """Return the most rows of a micro-batch that a device can hold, at least 0; -1 if not even the weights fit."""
        profile = self._devices[device]
        fitting = self.memory.most_samples(profile, layers, fraction, depth, recompute, shares)
        return int(max(-1, min(MOST_ROWS, fitting)))

    def _span_rows(
        self, room_bytes: int, overhead: float, depth: int, recompute: bool, shares: Shares = WHOLE
    ) -> Array:
        """Return `memory_rows` of unsharded devices with so much room, for every span, [start, stop]; empty: -1."""
        empty = np.tri(self.num_layers + 1, dtype=bool)
        most = self._spans.most_samples(room_bytes, overhead, depth, recompute, shares)
        rows: Array = np.clip(most, -1, MOST_ROWS)
        return np.where(empty, -1.0, rows)

    def span_rows(self, device: str, depth: int, recompute: bool) -> Array:
        """Return `memory_rows` of an unsharded device for every span, [start, stop]; -1 for empty spans."""
        profile = self._devices[device]
        return self.rows_of_spans(profile.room_bytes, profile.allocator_overhead, depth, recompute)

    def joined(self, group: Group) -> bool:
        """Return whether the devices of a stage that have to talk to each other can."""
        rings = [*group, *zip(*group, strict=True)]
        return all(
            find_route(self.costs, a, b) is not None
            for ring in rings
            if len(ring) > 1
            for a, b in zip(ring, (*ring[1:], ring[0]), strict=True)
        )
