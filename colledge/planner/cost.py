"""Seconds of computing and sending, from what was measured: the simulator's `Costs` for a pool and a model.

Timings are interpolated piecewise-linearly in samples and in shard fraction. Beyond the largest sample count the
last line goes on; below the smallest the first line goes on, but never below zero (one measurement alone is
scaled in proportion). A layer kind without timings in some power mode is timed from its FLOPs and bytes and the
rates of that mode, from the pool or else from the catalog. Nothing here decides anything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from colledge.errors import ConfigError
from colledge.plan import Shard
from colledge.profiles import LayerProfile, ModelProfile, PoolProfile, Route
from colledge.profiles.catalog import read_catalog
from colledge.profiles.device import Source
from colledge.settings import ITEM_BYTES, WirePrecision

_Points = list[tuple[float, float]]

# AdamW reads weight, gradient and two moments and writes all but the gradient, which is then set to zero; it takes
# about 12 operations a float32 weight.
_UPDATE_TRAFFIC, _UPDATE_FLOPS_PER_BYTE = 8, 3


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the piecewise-linear value at `x` of points (x, y) sorted by x, continued at both ends, at least 0."""
    if len(points) == 1:
        return points[0][1] * x / points[0][0]
    right = min(max(bisect_left(points, (x,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))


class _LayerTimes:
    """The timings of one layer kind on one device kind and mode."""

    def __init__(self) -> None:
        self.forward: dict[float, _Points] = {}
        self.backward: dict[float, _Points] = {}
        self.update: dict[float, float] = {}

    def seconds(self, samples: int, fraction: float) -> tuple[float, float]:
        """Return forward and backward seconds."""
        forward, backward = (
            interpolate([(f, interpolate(points, samples)) for f, points in table.items()], fraction)
            for table in (self.forward, self.backward)
        )
        return forward, backward

    def update_s(self, fraction: float) -> float:
        """Return the optimizer update's seconds; the largest measured, since it does not depend on samples."""
        return interpolate(list(self.update.items()), fraction)


@dataclass(frozen=True)
class _Rates:
    """What a device kind reaches in a power mode; `source` says where the figures come from."""

    flops_per_s: float
    bytes_per_s: float | None
    source: Source

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Return the seconds of an operation: the slower of its arithmetic and its memory (the roofline model)."""
        memory_s = num_bytes / self.bytes_per_s if self.bytes_per_s is not None else 0.0
        return max(flops / self.flops_per_s, memory_s)


@dataclass(frozen=True)
class _RatedTimes:
    """The times of one layer from rates.

    A forward moves at least its weights once and what it keeps for backward once; a backward moves both again, and
    reads and writes the gradients. A layer without arithmetic looks its weights up and moves its output alone.
    """

    layer: LayerProfile
    rates: _Rates

    def seconds(self, samples: int, fraction: float) -> tuple[float, float]:
        """Return forward and backward seconds."""
        layer, size = self.layer, samples * fraction
        arithmetic = layer.forward_flops_per_sample > 0
        weights = fraction * layer.parameter_bytes if arithmetic else 0.0
        kept = size * (layer.saved_bytes_per_sample if arithmetic else layer.output_bytes_per_sample)
        gradients = 2 * fraction * layer.trainable_parameter_bytes
        return (
            self.rates.seconds(size * layer.forward_flops_per_sample, weights + kept),
            self.rates.seconds(size * layer.backward_flops_per_sample, weights + kept + gradients),
        )

    def update_s(self, fraction: float) -> float:
        """Return the seconds of AdamW's update."""
        num_bytes = fraction * self.layer.trainable_parameter_bytes
        return self.rates.seconds(_UPDATE_FLOPS_PER_BYTE * num_bytes, _UPDATE_TRAFFIC * num_bytes)


def _read_rates(pool: PoolProfile) -> dict[tuple[str, str], _Rates]:
    """Return the rates that the pool gives for a device kind and mode."""
    rates: dict[tuple[str, str], _Rates] = {}
    for device in pool.devices:
        for mode in device.modes:
            if mode.achieved_flops_per_s is None:
                continue
            source: Source = "modelled" if mode.source == "measured" else mode.source
            found = _Rates(mode.achieved_flops_per_s, mode.memory_bytes_per_s, source)
            if rates.setdefault((device.kind, mode.name), found) != found:
                raise ConfigError(
                    f"pool profile: two rates of device kind {device.kind!r} in power mode {mode.name!r}; the second "
                    f"is that of {device.id!r}.",
                    fix="give devices of unequal speed different kinds.",
                )
    return rates


_TimesKey = tuple[str, str, str]
LayerClass = tuple[str, bool, int]


def _read_timings(model: ModelProfile) -> dict[_TimesKey, _LayerTimes]:
    tables: dict[_TimesKey, _LayerTimes] = {}
    for row in sorted(model.timings, key=lambda row: (row.shard_fraction, row.samples)):
        times = tables.setdefault((row.device_kind, row.mode, row.layer_kind), _LayerTimes())
        fraction = row.shard_fraction
        forward = times.forward.setdefault(fraction, [])
        if forward and forward[-1][0] == row.samples:
            raise ConfigError(
                f"model profile: two timings of layer kind {row.layer_kind!r} on device kind {row.device_kind!r}, "
                f"mode {row.mode!r}, samples {row.samples}, shard_fraction {fraction:g}.",
                fix="keep one of them.",
            )
        forward.append((row.samples, row.forward_s))
        times.backward.setdefault(fraction, []).append((row.samples, row.backward_s))
        times.update[fraction] = max(times.update.get(fraction, 0.0), row.update_s)
    return tables


def find_ties(layers: Sequence[LayerProfile]) -> tuple[tuple[int, int], ...]:
    """Return the pairs (earlier, later) of layers that share a weight, as indices."""
    index = {layer.name: number for number, layer in enumerate(layers)}
    pairs = (
        sorted((index[layer.tied_to], number))
        for number, layer in enumerate(layers)
        if layer.tied_to is not None and layer.tied_to != layer.name
    )
    return tuple((a, b) for a, b in pairs)


def shared_bytes(layers: Sequence[LayerProfile], tie: tuple[int, int]) -> tuple[int, int]:
    """Return the bytes of a tied weight, and how many of them train."""
    a, b = layers[tie[0]], layers[tie[1]]
    parameters = min(a.parameter_bytes, b.parameter_bytes)
    return parameters, min(parameters, a.trainable_parameter_bytes, b.trainable_parameter_bytes)


def _boundary_share(model: ModelProfile, wire_precision: WirePrecision | None) -> tuple[int, int]:
    """Return the bytes of an activation's entry on the wire and as computed, or (1, 1) where they are the same."""
    if wire_precision is None:
        return 1, 1
    if model.precision is None:
        raise ConfigError(
            f"wire_precision {wire_precision} is asked for, and the profile of model {model.name!r} does not say in "
            "which precision it computes.",
            fix="profile the model again, give its profile `precision` (float64, float32 or bfloat16), or leave "
            "wire_precision out.",
        )
    return ITEM_BYTES[wire_precision], ITEM_BYTES[model.precision]


class PoolCosts:
    """What computing and sending take for one model on one pool; implements `colledge.schedule.Costs`.

    Layers below the first that trains anything have no backward and no update, whatever their kind's timings say.

    Args:
        pool: The devices and links.
        model: The layers and timings.
        wire_precision: Of what travels between stages; None: as computed. All-reduces are as computed in any case.

    Raises:
        ConfigError: A timing stands twice, or there is a wire precision and nobody knows the model's own.
    """

    def __init__(
        self, pool: PoolProfile, model: ModelProfile, wire_precision: WirePrecision | None = None
    ) -> None:
        self.pool, self.model, self.wire_precision = pool, model, wire_precision
        self.first_trained = model.first_trained
        self._boundary_share = _boundary_share(model, wire_precision)
        self._times = _read_timings(model)
        self._rates = _read_rates(pool)
        self._ties = find_ties(model.layers)
        self._modes = {device.id: device.modes[0].name for device in pool.devices}
        self.prefix_s = lru_cache(maxsize=None)(self._prefix_s)
        self.update_prefix_s = lru_cache(maxsize=None)(self._update_prefix_s)
        self.allreduce_prefix_s = lru_cache(maxsize=None)(self._allreduce_prefix_s)

    @property
    def ties(self) -> tuple[tuple[int, int], ...]:
        """Pairs of layers (earlier, later) that train one shared weight."""
        return tuple(tie for tie in self._ties if shared_bytes(self.model.layers, tie)[1] > 0)

    def has_mode(self, device: str, mode: str) -> bool:
        """Return whether every layer kind can be timed on the device's kind in that mode."""
        kind = self.pool.device(device).kind
        return self._is_measured(kind, mode) or self._rates_of(kind, mode) is not None

    def _is_measured(self, kind: str, mode: str) -> bool:
        return all((kind, mode, layer.kind) in self._times for layer in self.model.layers)

    def time_source(self, kind: str, mode: str) -> Source:
        """Return where the times of a device kind in a mode come from: `measured`, or that of the rates.

        Raises:
            ConfigError: There are neither timings nor rates.
        """
        if self._is_measured(kind, mode):
            return "measured"
        rates = self._rates_of(kind, mode)
        if rates is None:
            missing = next(y for y in self.model.layers if (kind, mode, y.kind) not in self._times)
            raise self._no_times(kind, mode, missing.kind)
        return rates.source

    def layer_class(self, layer: int) -> LayerClass:
        """Return what layers that always take the same time have in common: (kind, splits, the first such layer)."""
        return self._layer_classes[layer]

    @cached_property
    def _layer_classes(self) -> tuple[LayerClass, ...]:
        first: dict[tuple[LayerProfile, bool], int] = {}
        classes = []
        for index, layer in enumerate(self.model.layers):
            alike = layer.model_copy(update={"name": "", "tied_to": None})
            number = first.setdefault((alike, index >= self.first_trained), index)
            classes.append((layer.kind, layer.tensor is not None, number))
        return tuple(classes)

    def layer_s(self, device: str, mode: str | None, layer: int, samples: int, fraction: float) -> float:
        """Return forward plus backward seconds of one layer; a layer without tensor split ignores `fraction`."""
        return sum(
            self._seconds(
                self.pool.device(device).kind, mode or self._modes[device], layer, samples, fraction
            )
        )

    def _seconds(
        self, kind: str, mode: str, layer: int, samples: int, fraction: float
    ) -> tuple[float, float]:
        """Return the forward and backward seconds of one layer."""
        profile = self.model.layers[layer]
        part = fraction if profile.tensor else 1.0
        forward, backward = self._table(kind, mode, profile).seconds(samples, part)
        return forward, backward if layer >= self.first_trained else 0.0

    def _rates_of(self, kind: str, mode: str) -> _Rates | None:
        """Return the pool's rates, else those of the catalog."""
        key = (kind, mode)
        if key not in self._rates:
            entry = read_catalog().get(kind)
            for known in entry.modes if entry is not None else ():
                rates = _Rates(known.achieved_flops_per_s, known.memory_bytes_per_s, "catalog")
                self._rates.setdefault((kind, known.name), rates)
        return self._rates.get(key)

    def _table(self, kind: str, mode: str, layer: LayerProfile) -> _LayerTimes | _RatedTimes:
        found = self._times.get((kind, mode, layer.kind))
        if found is not None:
            return found
        rates = self._rates_of(kind, mode)
        if rates is None:
            raise self._no_times(kind, mode, layer.kind)
        return _RatedTimes(layer, rates)

    def _no_times(self, kind: str, mode: str, layer_kind: str) -> ConfigError:
        modes = sorted({m for k, m, layer in self._times if k == kind and layer == layer_kind})
        there = f"there are rows for mode {', '.join(modes)}" if modes else "there are none for this kind"
        return ConfigError(
            f"no timings of layer kind {layer_kind!r} on device kind {kind!r} in power mode {mode!r} "
            f"({there}), and no rates of that mode.",
            fix="measure it with `colledge profile`, give the mode achieved_flops_per_s in the pool profile, or take "
            "the device out of the pool.",
        )

    def _prefix_s(
        self, kind: str, mode: str, samples: int, fraction: float
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return forward and backward seconds of layers [0, i), for i = 0 .. num_layers."""
        known: dict[LayerClass, tuple[float, float]] = {}
        rows = []
        for layer, alike in enumerate(self._layer_classes):
            if alike not in known:
                known[alike] = self._seconds(kind, mode, layer, samples, fraction)
            rows.append(known[alike])
        return (
            tuple(accumulate((f for f, _ in rows), initial=0.0)),
            tuple(accumulate((b for _, b in rows), initial=0.0)),
        )

    def _update_prefix_s(self, kind: str, mode: str, fraction: float) -> tuple[float, ...]:
        """Return update seconds of layers [0, i), for i = 0 .. num_layers."""
        updates = (
            self._table(kind, mode, layer).update_s(fraction if layer.tensor else 1.0)
            if index >= self.first_trained
            else 0.0
            for index, layer in enumerate(self.model.layers)
        )
        return tuple(accumulate(updates, initial=0.0))

    def key(self, shard: Shard) -> tuple[str, str]:
        """Return the device kind and power mode that time a shard."""
        return self.pool.device(shard.device).kind, shard.mode or self._modes[shard.device]

    def compute_s(self, layers: tuple[int, int], shard: Shard, samples: int) -> tuple[float, float]:
        """Return the forward and backward seconds of one shard for `samples` rows, without all-reduces."""
        if samples == 0:
            return 0.0, 0.0
        forward, backward = self.prefix_s(*self.key(shard), samples, shard.fraction)
        start, stop = layers
        return max(0.0, forward[stop] - forward[start]), max(0.0, backward[stop] - backward[start])

    def update_s(self, layers: tuple[int, int], shard: Shard) -> float:
        """Return the seconds of one shard's optimizer update."""
        updates = self.update_prefix_s(*self.key(shard), shard.fraction)
        return max(0.0, updates[layers[1]] - updates[layers[0]])

    def allreduce_s(self, devices: tuple[str, ...], num_bytes: float) -> float:
        """Return the seconds of a ring all-reduce: 2(n-1) rounds in which each member passes 1/n of the bytes on.

        Hops of the ring that go through one medium share its bandwidth.
        """
        n = len(devices)
        if n == 1:
            return 0.0
        latency_s, bandwidth = self.ring(devices)
        return 2 * (n - 1) * latency_s + 2 * (n - 1) / n * num_bytes / bandwidth

    def ring(self, devices: tuple[str, ...]) -> tuple[float, float]:
        """Return the largest latency, and the smallest bandwidth that a hop of the ring over `devices` gets."""
        routes = [self.route(a, b) for a, b in zip(devices, (*devices[1:], devices[0]), strict=True)]
        media = [route.medium for route in routes]
        return (
            max(route.latency_s for route in routes),
            min(route.bandwidth_bytes_per_s / media.count(route.medium) for route in routes),
        )

    def _allreduce_prefix_s(
        self, devices: tuple[str, ...], samples: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return forward and backward all-reduce seconds of layers [0, i), for i = 0 .. num_layers."""
        forward, backward = [], []
        for index, layer in enumerate(self.model.layers):
            tensor = layer.tensor
            once = self.allreduce_s(devices, tensor.allreduce_bytes_per_sample * samples) if tensor else 0.0
            forward.append(tensor.forward_allreduces * once if tensor else 0.0)
            backward.append(
                tensor.backward_allreduces * once if tensor and index >= self.first_trained else 0.0
            )
        return tuple(accumulate(forward, initial=0.0)), tuple(accumulate(backward, initial=0.0))

    def inner_allreduce_s(
        self, layers: tuple[int, int], devices: tuple[str, ...], samples: int
    ) -> tuple[float, float]:
        """Return the seconds of a replica's tensor-parallel all-reduces in one forward and one backward."""
        if len(devices) == 1 or samples == 0:
            return 0.0, 0.0
        forward, backward = self.allreduce_prefix_s(devices, samples)
        start, stop = layers
        return max(0.0, forward[stop] - forward[start]), max(0.0, backward[stop] - backward[start])

    def sync_bytes(self, layers: tuple[int, int], fraction: float) -> float:
        """Return the gradient bytes of a shard's SYNC: a weight tied within the stage once, one tied beyond it not."""
        start, stop = layers
        trains = {i: self.model.layers[i].trainable_parameter_bytes for i in range(start, stop)}
        for tie in self.ties:
            owner = next((layer for layer in reversed(tie) if layer in trains), None)
            if owner is not None:
                trains[owner] = max(0, trains[owner] - shared_bytes(self.model.layers, tie)[1])
        return sum(size * (fraction if self.model.layers[i].tensor else 1.0) for i, size in trains.items())

    def sync_s(self, layers: tuple[int, int], devices: tuple[str, ...], fraction: float) -> float:
        """Return the seconds of the gradient all-reduce of shards of that fraction, tied weights left out."""
        num_bytes = self.sync_bytes(layers, fraction)
        return self.allreduce_s(devices, num_bytes) if num_bytes > 0 else 0.0

    def gather_s(self, layers: tuple[int, int], devices: tuple[str, ...], fraction: float) -> float:
        """Return the seconds in which shards of that fraction give each other what each has updated, once.

        The native engine does it by an all-reduce; that a library's broadcasts take as long is an estimate.
        """
        tied = (
            shared_bytes(self.model.layers, tie)[1]
            for tie in self.ties
            if sum(layers[0] <= layer < layers[1] for layer in tie) == 1  # reduced apart, but updated here
        )
        num_bytes = self.sync_bytes(layers, fraction) + sum(tied)
        return self.allreduce_s(devices, num_bytes) if num_bytes > 0 else 0.0

    def tie_s(self, tie: tuple[int, int], devices: tuple[str, ...]) -> float:
        """Return the seconds of the all-reduce of a tied weight's gradient."""
        return self.allreduce_s(devices, shared_bytes(self.model.layers, tie)[1])

    def boundary_bytes(self, layer: int) -> int:
        """Return the bytes a sample that a pipeline boundary after `layer` carries."""
        travels, computed = self._boundary_share
        return -(-self.model.layers[layer].output_bytes_per_sample * travels // computed)

    def route(self, source: str, target: str) -> Route:
        """Return how bytes travel from one device to another."""
        return self.pool.route(source, target)
