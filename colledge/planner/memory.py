"""Bytes that a plan needs on each device, part by part; the verdict before anything is tried on hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from colledge.errors import OutOfMemoryError
from colledge.plan import Plan
from colledge.planner.cost import find_ties, shared_bytes
from colledge.profiles import ModelProfile, PoolProfile
from colledge.units import format_bytes

_BUFFERS_EACH_WAY = 2  # as parallel/executor.py holds; a forward send is held until its gradient is back


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What one device holds, in bytes."""

    parameters_bytes: float
    gradients_bytes: float
    optimizer_state_bytes: float
    activations_bytes: float
    wire_buffers_bytes: float
    runtime_bytes: float

    @property
    def total_bytes(self) -> int:
        """The sum of the parts, rounded up."""
        return -int(-sum(getattr(self, field.name) for field in fields(self)) // 1)


@dataclass(frozen=True, slots=True)
class _SpanBytes:
    """Bytes of a span of layers: (of layers that split over shards, of layers that every shard holds whole)."""

    parameters: tuple[int, int]
    trainable: tuple[int, int]
    saved: tuple[int, int]
    input_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a stage asks of one of its devices."""

    layers: tuple[int, int]
    fraction: float
    samples: int
    in_flight: int
    recompute: bool


class MemoryModel:
    """Answers how many bytes a load needs, for one model and optimizer."""

    def __init__(self, model: ModelProfile, optimizer_state_factor: float) -> None:
        self._layers = model.layers
        self._ties = find_ties(model.layers)
        self._factor = optimizer_state_factor
        self._spans: dict[tuple[int, int], _SpanBytes] = {}

    def parts(self, load: Load, runtime_bytes: int) -> MemoryParts:
        """Return the parts of a load."""
        span = self._spans.get(load.layers)
        if span is None:
            span = self._spans[load.layers] = self._span(*load.layers)
        fraction = load.fraction
        trainable = fraction * span.trainable[0] + span.trainable[1]
        saved = (fraction * span.saved[0] + span.saved[1]) * load.samples
        if load.recompute:
            activations = load.in_flight * span.input_bytes * load.samples + saved
        else:
            activations = load.in_flight * saved
        receives_and_gradients_sent = 2 * _BUFFERS_EACH_WAY * span.input_bytes
        gradients_received_and_sends = (_BUFFERS_EACH_WAY + load.in_flight) * span.output_bytes
        wire = (receives_and_gradients_sent + gradients_received_and_sends) * load.samples
        return MemoryParts(
            parameters_bytes=fraction * span.parameters[0] + span.parameters[1],
            gradients_bytes=trainable,
            optimizer_state_bytes=self._factor * trainable,
            activations_bytes=activations,
            wire_buffers_bytes=wire,
            runtime_bytes=runtime_bytes,
        )

    def _span(self, start: int, stop: int) -> _SpanBytes:
        layers = range(start, stop)
        parameters = {i: self._layers[i].parameter_bytes for i in layers}
        trainable = {i: self._layers[i].trainable_parameter_bytes for i in layers}
        for tie in self._ties:
            if tie[0] in parameters and tie[1] in parameters:  # held once, by the earlier layer
                shared, trained = shared_bytes(self._layers, tie)
                parameters[tie[1]] -= shared
                trainable[tie[1]] -= trained
        return _SpanBytes(
            parameters=self._split(parameters),
            trainable=self._split(trainable),
            saved=self._split({i: self._layers[i].saved_bytes_per_sample for i in layers}),
            input_bytes=self._layers[start - 1].output_bytes_per_sample if start else 0,
            output_bytes=self._layers[stop - 1].output_bytes_per_sample if stop < len(self._layers) else 0,
        )

    def _split(self, sizes: Mapping[int, int]) -> tuple[int, int]:
        sharded = sum(size for i, size in sizes.items() if self._layers[i].tensor)
        return sharded, sum(sizes.values()) - sharded


def plan_memory(
    plan: Plan, pool: PoolProfile, model: ModelProfile, optimizer_state_factor: float
) -> dict[str, MemoryParts]:
    """Return what each device of a plan holds, part by part."""
    memory, depths = MemoryModel(model, optimizer_state_factor), plan.warmup_depths()
    parts = {}
    for place in plan.places():
        stage = plan.stages[place.stage_index]
        load = Load(
            layers=stage.layers,
            fraction=place.shard.fraction,
            samples=stage.replicas[place.replica_index].samples,
            in_flight=depths[place.stage_index],
            recompute=plan.recomputes(place.stage_index),
        )
        parts[place.shard.device] = memory.parts(load, pool.device(place.shard.device).runtime_bytes)
    return parts


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
