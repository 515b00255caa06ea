"""Bytes that a plan needs on each device, part by part; the verdict before anything is tried on hardware."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

from colledge.arrays import Array
from colledge.errors import OutOfMemoryError
from colledge.plan import Plan, Stage
from colledge.planner.cost import find_ties, shared_bytes
from colledge.profiles import DeviceProfile, ModelProfile, PoolProfile
from colledge.settings import LibraryName, ZeroStage
from colledge.units import format_bytes

_Number = TypeVar("_Number", float, Array)

_LEAST_BYTES = 1e-9  # of a sample: a layer may keep nothing
# What DeepSpeed 0.19 was seen to hold on CPUs beside its parts, for each byte that trains: gradients as they arrive,
# as they add up and as they are reduced, flattened copies (benchmarks/memory.py, 12 and 51 million parameters).
_DEEPSPEED_COPIES: Mapping[ZeroStage, float] = {1: 3.0, 2: 3.0, 3: 5.0}
# As parallel/executor.py holds: receives posted ahead, and sends not yet taken. A forward send is held until its
# gradient is back; where none comes back, the second send before it is waited for.
_BUFFERS_EACH_WAY = 2


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What one device holds, in bytes.

    `workspace_bytes` is what the hungriest layer needs for a moment, and the largest gradient while it is added: they
    seldom meet, so this is an upper bound. A sharded layer's is taken to shrink with its share. `allocator_bytes` is
    what is free between tensors.
    """

    parameters_bytes: float
    gradients_bytes: float
    optimizer_state_bytes: float
    activations_bytes: float
    workspace_bytes: float
    allocator_bytes: float
    wire_buffers_bytes: float
    runtime_bytes: float

    @property
    def total_bytes(self) -> int:
        """The sum of the parts, rounded up."""
        return -int(-sum(getattr(self, field.name) for field in fields(self)) // 1)


@dataclass(frozen=True, slots=True)
class _SpanBytes:
    """Bytes of a span of layers: (of layers that split over shards, of layers that every shard holds whole).

    Sums over the layers; of `workspace` and `gradient` the largest. `returned_bytes` is the input's gradient, sent back
    to where something trains; without a backward nothing is in flight but what waits to be sent.
    """

    parameters: tuple[int, int]
    trainable: tuple[int, int]
    saved: tuple[int, int]
    workspace: tuple[int, int]
    gradient: tuple[int, int]
    input_bytes: int
    returned_bytes: int
    output_bytes: int
    has_backward: bool

    def in_flight(self, depth: int) -> int:
        """Return the micro-batches that wait for a backward at a warm-up depth."""
        return depth if self.has_backward else 0

    def wire_bytes(self, depth: int) -> float:
        """Return the bytes a sample of wire buffers at a warm-up depth."""
        return _wire(self.input_bytes, self.returned_bytes, self.output_bytes, self.in_flight(depth))


@dataclass(frozen=True, slots=True)
class Shares:
    """The parts of a shard's parameters, gradients and optimizer state that one of its replicas holds."""

    parameters: float = 1.0
    gradients: float = 1.0
    optimizer_state: float = 1.0


WHOLE = Shares()


@dataclass(frozen=True, slots=True)
class Load:
    """What a stage asks of one of its devices."""

    layers: tuple[int, int]
    fraction: float
    samples: int
    in_flight: int
    recompute: bool
    shares: Shares = WHOLE


class MemoryModel:
    """Answers how many bytes a load needs, for one model and optimizer.

    Args:
        model: The layers.
        optimizer_state_factor: Bytes of optimizer state for each byte that trains.
        zero: The stage of ZeRO by which the replicas of a stage divide what they hold, or None.
        backend: The library that does it; None is the native engine.
    """

    def __init__(
        self,
        model: ModelProfile,
        optimizer_state_factor: float,
        zero: ZeroStage | None = None,
        backend: LibraryName | None = None,
    ) -> None:
        self._layers, self._first_trained = model.layers, model.first_trained
        self._saved_bytes, self._workspace_bytes = _activations(model)
        self._ties = find_ties(model.layers)
        self._zero, self._backend = zero, backend
        self._factor = state_factor(optimizer_state_factor, backend)
        self._spans: dict[tuple[int, int], _SpanBytes] = {}

    def parts(self, load: Load, device: DeviceProfile) -> MemoryParts:
        """Return the parts of a load."""
        span, fraction, samples, shares = self._span(load.layers), load.fraction, load.samples, load.shares
        trainable = _share(span.trainable, fraction)
        in_flight = span.in_flight(load.in_flight)
        kept = samples * _kept(_share(span.saved, fraction), span.input_bytes, in_flight, load.recompute)
        workspace = _largest(span.gradient, fraction) + samples * _largest(span.workspace, fraction)
        state = self._factor * (shares.optimizer_state * trainable)
        if shares is not WHOLE:
            workspace += self._gathered_bytes(load)
            state += self._uneven_bytes(span, shares)
        return MemoryParts(
            parameters_bytes=shares.parameters * _share(span.parameters, fraction),
            gradients_bytes=shares.gradients * trainable,
            optimizer_state_bytes=state,
            activations_bytes=kept,
            workspace_bytes=workspace,
            allocator_bytes=device.allocator_overhead * (kept + workspace),
            wire_buffers_bytes=samples * span.wire_bytes(load.in_flight),
            runtime_bytes=device.runtime_bytes,
        )

    def most_samples(
        self,
        device: DeviceProfile,
        layers: tuple[int, int],
        fraction: float,
        in_flight: int,
        recompute: bool,
        shares: Shares = WHOLE,
    ) -> float:
        """Return the most samples that fit on a device, rounded down; negative where not even the weights fit."""
        span = self._span(layers)
        grow = 1 + device.allocator_overhead
        kept = _kept(_share(span.saved, fraction), span.input_bytes, span.in_flight(in_flight), recompute)
        each = grow * (kept + _largest(span.workspace, fraction))
        each += span.wire_bytes(in_flight)
        static = self.static_bytes(layers, fraction, shares) + grow * _largest(span.gradient, fraction)
        return float((device.room_bytes - static) // max(each, _LEAST_BYTES))

    def static_bytes(self, layers: tuple[int, int], fraction: _Number, shares: Shares = WHOLE) -> _Number:
        """Return the bytes of parameters, gradients and optimizer state; of fractions in an array, an array."""
        span = self._span(layers)
        weights = shares.parameters * _share(span.parameters, fraction)
        return weights + (shares.gradients + shares.optimizer_state * self._factor) * _share(
            span.trainable, fraction
        )

    def state_bytes(self, layers: tuple[int, int], fraction: _Number) -> _Number:
        """Return the bytes of optimizer state of a shard; of fractions in an array, an array."""
        return self._factor * _share(self._span(layers).trainable, fraction)

    def _gathered_bytes(self, load: Load) -> float:
        """Return the bytes of the largest layer, which ZeRO stage 3 makes whole to compute it."""
        if load.shares.parameters == 1:
            return 0.0
        return max(float(self._layers[i].parameter_bytes) for i in range(*load.layers))

    def _uneven_bytes(self, span: _SpanBytes, shares: Shares) -> float:
        """Return what FairScale's replica of most state may hold beyond an equal part: its parts are whole weights."""
        if self._backend != "fairscale":
            return 0.0
        return self._factor * (1 - shares.optimizer_state) * max(span.gradient)

    def equal_shares(self, num_replicas: int) -> Shares:
        """Return what each of some replicas holds where they divide it equally."""
        zero, part = self._zero, 1 / num_replicas
        copies = _DEEPSPEED_COPIES[zero] if zero is not None and self._backend == "deepspeed" else 0.0
        if zero is None or (num_replicas == 1 and not copies):
            return WHOLE
        return Shares(part if zero == 3 else 1.0, (part if zero > 1 else 1.0) + copies, part)

    def rough_shares(self, rooms: Sequence[int]) -> list[Shares]:
        """Return about what each replica will hold, by the bytes of room that it has."""
        equal, total = self.equal_shares(len(rooms)), max(1, sum(rooms))
        if equal is WHOLE or self._backend is not None:
            return [equal] * len(rooms)
        return [Shares(optimizer_state=max(0, room) / total) for room in rooms]

    def divided(self, plan: Plan, devices: Mapping[str, DeviceProfile]) -> Plan:
        """Return a plan with `state_share`, where the native engine divides optimizer state.

        The shares are in proportion to the memory that each replica has left for it, so they fit if any do.
        """
        depths = plan.warmup_depths()
        stages = (
            self.divided_stage(stage, depths[s], plan.recomputes(s), devices)
            for s, stage in enumerate(plan.stages)
        )
        return plan.model_copy(update={"stages": tuple(stages)})

    def divided_stage(
        self, stage: Stage, in_flight: int, recompute: bool, devices: Mapping[str, DeviceProfile]
    ) -> Stage:
        """Return one stage so."""
        if self._zero is None or self._backend is not None or len(stage.replicas) == 1:
            return stage
        shares = []
        for k, fraction in enumerate(stage.replicas[0].fractions):
            free = []
            for replica in stage.replicas:
                load = Load(
                    stage.layers, fraction, replica.samples, in_flight, recompute, Shares(optimizer_state=0.0)
                )
                device = devices[replica.shards[k].device]
                free.append(max(0, device.memory_bytes - self.parts(load, device).total_bytes))
            total = sum(free)
            shares.append([room / total if total else 1 / len(free) for room in free])
        return stage.model_copy(
            update={
                "replicas": tuple(
                    replica.model_copy(
                        update={
                            "shards": tuple(
                                shard.model_copy(update={"state_share": shares[k][r]})
                                for k, shard in enumerate(replica.shards)
                            )
                        }
                    )
                    for r, replica in enumerate(stage.replicas)
                )
            }
        )

    def loads(self, stage: Stage, in_flight: int, recompute: bool) -> Iterator[tuple[str, Load]]:
        """Yield the devices of a stage and what it asks of each."""
        equal = self.equal_shares(len(stage.replicas))
        for replica in stage.replicas:
            for shard in replica.shards:
                shares = equal
                if equal is not WHOLE and shard.state_share is not None:
                    shares = replace(equal, optimizer_state=shard.state_share)
                yield (
                    shard.device,
                    Load(stage.layers, shard.fraction, replica.samples, in_flight, recompute, shares),
                )

    def least_bytes(
        self,
        layers: tuple[int, int],
        fractions: Array,
        samples: Array,
        overheads: Array,
        shares: Shares = WHOLE,
    ) -> Array:
        """Return the bytes that any schedule needs, without the runtime, for arrays of loads and allocators."""
        span = self._span(layers)
        gradient, workspace = (np.maximum(fractions * a, b) for a, b in (span.gradient, span.workspace))
        kept = samples * (_share(span.saved, fractions) + workspace) + gradient
        total: Array = self.static_bytes(layers, fractions, shares) + (1 + overheads) * kept
        return total

    def _span(self, layers: tuple[int, int]) -> _SpanBytes:
        span = self._spans.get(layers)
        if span is None:
            span = self._spans[layers] = self._sum(*layers)
        return span

    def _sum(self, start: int, stop: int) -> _SpanBytes:
        layers = range(start, stop)
        parameters = {i: self._layers[i].parameter_bytes for i in layers}
        trainable = {i: self._layers[i].trainable_parameter_bytes for i in layers}
        for tie in self._ties:
            if tie[0] in parameters and tie[1] in parameters:  # held once, by the earlier layer
                shared, trained = shared_bytes(self._layers, tie)
                parameters[tie[1]] -= shared
                trainable[tie[1]] -= trained
        input_bytes = self._layers[start - 1].output_bytes_per_sample if start else 0
        return _SpanBytes(
            parameters=self._split(parameters),
            trainable=self._split(trainable),
            saved=self._saved(layers),
            workspace=self._most({i: self._workspace_bytes[i] for i in layers}),
            gradient=self._most({i: self._layers[i].largest_gradient_bytes for i in layers}),
            input_bytes=input_bytes,
            returned_bytes=input_bytes if start > self._first_trained else 0,
            output_bytes=self._layers[stop - 1].output_bytes_per_sample if stop < len(self._layers) else 0,
            has_backward=stop > self._first_trained,
        )

    def _split(self, sizes: Mapping[int, int]) -> tuple[int, int]:
        sharded = sum(size for i, size in sizes.items() if self._layers[i].tensor)
        return sharded, sum(sizes.values()) - sharded

    def _saved(self, layers: range) -> tuple[int, int]:
        sharded, whole = self._split({i: self._saved_bytes[i] for i in layers})
        every = sum(
            t.whole_saved_bytes_per_sample
            for i in layers
            if (t := self._layers[i].tensor) is not None and i >= self._first_trained
        )
        return sharded - every, whole + every

    def _most(self, sizes: Mapping[int, int]) -> tuple[int, int]:
        """Return the largest of layers that split over shards, and of those that every shard holds whole."""
        sharded = [size for i, size in sizes.items() if self._layers[i].tensor]
        whole = [size for i, size in sizes.items() if not self._layers[i].tensor]
        return max(sharded, default=0), max(whole, default=0)


class SpanMemory:
    """The same for every span of layers at once, on devices that hold whole layers: arrays [start, stop].

    Args:
        model: The layers.
        optimizer_state_factor: Bytes of optimizer state for each byte that trains.
        backend: The library that trains; None is the native engine.
    """

    def __init__(
        self, model: ModelProfile, optimizer_state_factor: float, backend: LibraryName | None = None
    ) -> None:
        layers = model.layers
        self._factor = state_factor(optimizer_state_factor, backend)
        self._parameters = _sums([layer.parameter_bytes for layer in layers])
        self._trainable = _sums([layer.trainable_parameter_bytes for layer in layers])
        for a, b in find_ties(layers):
            shared, trained = shared_bytes(layers, (a, b))
            self._parameters[: a + 1, b + 1 :] -= shared  # held once where a span has both ends
            self._trainable[: a + 1, b + 1 :] -= trained
        saved, workspace = _activations(model)
        self._saved, self._workspace = _sums(saved), _maxima(workspace)
        self._gradient = _maxima([layer.largest_gradient_bytes for layer in layers])
        border = np.array([0.0, *(float(layer.output_bytes_per_sample) for layer in layers[:-1]), 0.0])
        self._input, self._output = border[:, None], border[None, :]
        trains = (np.arange(len(border)) > model.first_trained).astype(float)
        self._returned, self._has_backward = self._input * trains[:, None], trains[None, :]

    def _static(self, shares: Shares) -> Array:
        trained = (shares.gradients + shares.optimizer_state * self._factor) * self._trainable
        static: Array = shares.parameters * self._parameters + trained
        return static

    def total_bytes(
        self, overhead: float, samples: int, in_flight: int, recompute: bool, shares: Shares = WHOLE
    ) -> Array:
        """Return the bytes of so many samples, without the runtime, with an allocator's overhead."""
        kept = samples * self._kept(in_flight, recompute)
        workspace = self._gradient + samples * self._workspace
        wire = samples * self._wire(in_flight)
        total: Array = self._static(shares) + (1 + overhead) * (kept + workspace) + wire
        return total

    def most_samples(
        self, room_bytes: float, overhead: float, in_flight: int, recompute: bool, shares: Shares = WHOLE
    ) -> Array:
        """Return the most samples that fit into the room, rounded down; negative where not even the weights fit."""
        grow = 1 + overhead
        each = grow * (self._kept(in_flight, recompute) + self._workspace) + self._wire(in_flight)
        left = float(room_bytes) - self._static(shares) - grow * self._gradient
        fitting: Array = left // np.maximum(each, _LEAST_BYTES)
        return fitting

    def _kept(self, in_flight: int, recompute: bool) -> Array:
        return _kept(self._saved, self._input, in_flight * self._has_backward, recompute)

    def _wire(self, in_flight: int) -> Array:
        return _wire(self._input, self._returned, self._output, in_flight * self._has_backward)


def _activations(model: ModelProfile) -> tuple[list[int], list[int]]:
    """Return the bytes a sample that each layer keeps for its backward, and those it holds for a moment beside.

    A layer below the first that trains keeps nothing: all that its kind would keep is held for a moment at most.
    """
    first_trained = model.first_trained
    kept: list[int] = []
    workspace: list[int] = []
    for index, layer in enumerate(model.layers):
        saved = layer.saved_bytes_per_sample
        kept.append(saved if index >= first_trained else 0)
        workspace.append(layer.workspace_bytes_per_sample + saved - kept[-1])
    return kept, workspace


def state_factor(optimizer_state_factor: float, backend: LibraryName | None) -> float:
    """Return the bytes held for each byte that trains where it is updated: DeepSpeed keeps a copy of the values too."""
    return optimizer_state_factor + (1 if backend == "deepspeed" else 0)


def _share(sizes: tuple[int, int], fraction: _Number) -> _Number:
    return fraction * sizes[0] + sizes[1]


def _largest(sizes: tuple[int, int], fraction: float) -> float:
    return max(fraction * sizes[0], sizes[1])


def _kept(saved: _Number, into: _Number, in_flight: _Number, recompute: bool) -> _Number:
    """Return the bytes a sample that wait for a backward: all that is saved, or inputs and one micro-batch's rest."""
    return in_flight * into + saved if recompute else in_flight * saved


def _wire(into: _Number, returned: _Number, out: _Number, in_flight: _Number) -> _Number:
    """Return the bytes a sample of buffers: receives and gradients sent; gradients received (or sends) and sends."""
    # Of full size, an upper bound where messages are rounded to a narrower wire precision.
    return _BUFFERS_EACH_WAY * (into + returned) + (_BUFFERS_EACH_WAY + in_flight) * out


def _sums(sizes: Sequence[float]) -> Array:
    """Return sums of layers [start, stop); negative where stop < start."""
    prefix = np.concatenate(([0.0], np.cumsum(np.asarray(sizes, dtype=float))))
    return prefix[None, :] - prefix[:, None]


def _maxima(sizes: Sequence[float]) -> Array:
    """Return the largest of layers [start, stop), 0 where there are none."""
    spans = np.triu(np.tile(np.asarray(sizes, dtype=float), (len(sizes), 1)))
    found = np.zeros((len(sizes) + 1,) * 2)
    found[:-1, 1:] = np.maximum.accumulate(spans, axis=1)
    return found


def plan_memory(
    plan: Plan, pool: PoolProfile, model: ModelProfile, optimizer_state_factor: float
) -> dict[str, MemoryParts]:
    """Return what each device of a plan holds, part by part."""
    memory = MemoryModel(model.part(plan.layer_range), optimizer_state_factor, plan.zero, plan.backend)
    plan = plan.alone()
    return {
        device: memory.parts(load, pool.device(device))
        for s, (stage, depth) in enumerate(zip(plan.stages, plan.warmup_depths(), strict=True))
        for device, load in memory.loads(stage, depth, plan.recomputes(s))
    }


def check_memory(
    plan: Plan, pool: PoolProfile, model: ModelProfile, optimizer_state_factor: float = 2.0
) -> dict[str, MemoryParts]:
    """Check that every device can hold its part of a plan, and return the parts.

    Raises:
        OutOfMemoryError: Names the device that lacks most, the bytes needed, the bytes there and what would help.
    """
    parts = plan_memory(plan, pool, model, optimizer_state_factor)
    lacking = {d: p.total_bytes - pool.device(d).memory_bytes for d, p in parts.items()}
    device = max(lacking, key=lambda d: lacking[d])
    if lacking[device] > 0:
        raise out_of_memory(device, parts[device], pool.device(device).memory_bytes)
    return parts


def out_of_memory(device: str, parts: MemoryParts, there_bytes: int, prefix: str = "") -> OutOfMemoryError:
    """Return the error for a device whose load is larger than its memory."""
    needed = parts.total_bytes
    names = {
        field.name.removesuffix("_bytes").replace("_", " "): getattr(parts, field.name)
        for field in fields(parts)
    }
    largest = max(names, key=lambda name: names[name])
    help_for = {
        "activations": "a smaller micro-batch, recompute on that stage, or more devices",
        "workspace": "a smaller micro-batch, shorter rows, or tensor shards of the layer with the largest outputs",
        "allocator": "a smaller micro-batch, recompute on that stage, or more devices",
        "wire buffers": "a smaller micro-batch",
        "optimizer state": "an optimizer with less state (SGD), LoRA, fewer layers on this device, or more devices",
        "runtime": "a device with more memory",
    }
    return OutOfMemoryError(
        f"{prefix}device {device!r} needs {format_bytes(needed)} ({needed} bytes) and has {format_bytes(there_bytes)} "
        f"({there_bytes} bytes): it lacks {format_bytes(needed - there_bytes)}, "
        f"and its largest part is {largest} ({format_bytes(names[largest])}).",
        fix=f"try {help_for.get(largest, 'fewer layers on this device, LoRA, or more devices')}.",
    )
