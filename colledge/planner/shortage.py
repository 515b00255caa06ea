"""When nothing fits: the plan that comes closest, who lacks how many bytes under it, and what would make it fit.

Closest is the smallest worst lack over pipelines (every order of a few devices, by memory of many; cuts where the
worst lack is least) and one replica sharded over all devices, with one row a micro-batch and recomputation on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from colledge.errors import OutOfMemoryError
from colledge.planner.layouts import proportional
from colledge.planner.memory import Load, MemoryModel, MemoryParts, SpanMemory, out_of_memory
from colledge.planner.request import PlanningRequest
from colledge.profiles import DeviceProfile, LayerProfile, ModelProfile

_MOST_PERMUTED = 5
_LORA_SHARE = 100  # adapters train about a hundredth of the weights


@dataclass(frozen=True)
class Lack:
    """The device that lacks most under the plan that comes closest; negative bytes are to spare."""

    device: DeviceProfile
    parts: MemoryParts

    @property
    def lacking_bytes(self) -> int:
        """The bytes that are missing."""
        return self.parts.total_bytes - self.device.memory_bytes


def closest(
    devices: Sequence[DeviceProfile], model: ModelProfile, state_factor: float, must_use: frozenset[str]
) -> Lack:
    """Return the worst lack under the plan that comes closest to fitting."""
    memory = MemoryModel(model, state_factor)
    found = [
        _pipeline(order, model, memory, state_factor)
        for order in _orders(devices, must_use, len(model.layers))
    ]
    if 1 < len(devices) <= model.shard_units:
        found.append(_sharded(devices, model, memory))
    return min(found, key=lambda lack: lack.lacking_bytes)


def nothing_fits(
    devices: Sequence[DeviceProfile], model: ModelProfile, request: PlanningRequest
) -> OutOfMemoryError | None:
    """Return the error that says who lacks what and which change would make the model fit; None if memory suffices."""
    must_use, factor = frozenset(request.must_use), request.optimizer_state_factor
    lack = closest(devices, model, factor, must_use)
    if lack.lacking_bytes <= 0:
        return None
    prefix = (
        "no plan fits in memory. In the one that comes closest (micro-batches of one row, recomputation on), "
    )
    error = out_of_memory(lack.device.id, lack.parts, lack.device.memory_bytes, prefix)

    def helps(some: Sequence[DeviceProfile], changed: ModelProfile, state_factor: float) -> bool:
        return closest(some, changed, state_factor, must_use).lacking_bytes <= 0

    helpful = list(_remedies(devices, model, factor, helps))
    if helpful:
        fix = f"this would make it fit: {'; or '.join(helpful)}."
    else:
        fix = "neither adapters, nor SGD, nor one more device of a kind that is there is enough alone: take a smaller "
        fix += "model or shorter rows, or several more devices."
    return OutOfMemoryError(error.message, fix=fix)


def _remedies(
    devices: Sequence[DeviceProfile],
    model: ModelProfile,
    factor: float,
    helps: Callable[[Sequence[DeviceProfile], ModelProfile, float], bool],
) -> Iterator[str]:
    """Yield the single changes that were checked to be enough."""
    if factor > 0 and helps(devices, model, 0.0):
        yield "an optimizer without state (SGD without momentum)"
    frozen_bytes = sum(layer.parameter_bytes - layer.trainable_parameter_bytes for layer in model.layers)
    if frozen_bytes == 0 and helps(devices, _with_layers(model, _adapted), factor):
        yield f"LoRA (method: lora; reckoned with 1/{_LORA_SHARE} of the weights trained)"
    wide = model.precision in ("float32", "float64") and model.frozen_precision is None
    if frozen_bytes and wide and helps(devices, _with_layers(model, _held), factor):
        yield "frozen weights in half as many bytes (frozen_precision: bfloat16)"
    kinds: dict[str, DeviceProfile] = {}
    for device in devices:
        if device.kind not in kinds or device.memory_bytes > kinds[device.kind].memory_bytes:
            kinds[device.kind] = device
    for kind, device in kinds.items():
        if helps([*devices, device.model_copy(update={"id": f"{device.id}-more"})], model, factor):
            yield f"one more device like {device.id!r} ({kind})"
            break


def _with_layers(model: ModelProfile, change: Callable[[LayerProfile], LayerProfile]) -> ModelProfile:
    return model.model_copy(update={"layers": tuple(change(layer) for layer in model.layers)})


def _adapted(layer: LayerProfile) -> LayerProfile:
    return layer.model_copy(
        update={
            "trainable_parameter_bytes": layer.trainable_parameter_bytes // _LORA_SHARE,
            "largest_gradient_bytes": layer.largest_gradient_bytes // _LORA_SHARE,
        }
    )


def _held(layer: LayerProfile) -> LayerProfile:
    frozen_bytes = layer.parameter_bytes - layer.trainable_parameter_bytes
    return layer.model_copy(update={"parameter_bytes": layer.parameter_bytes - frozen_bytes // 2})


def _orders(
    devices: Sequence[DeviceProfile], must_use: frozenset[str], most_stages: int
) -> Iterator[tuple[DeviceProfile, ...]]:
    by_memory = sorted(devices, key=lambda d: (d.id not in must_use, -d.room_bytes))
    sizes = range(max(1, len(must_use)), min(len(devices), most_stages) + 1)
    if len(devices) <= _MOST_PERMUTED:
        for size in sizes:
            for order in permutations(devices, size):
                if must_use <= {d.id for d in order}:
                    yield order
        return
    for size in sorted({*sizes[:8], *sizes[::8], *sizes[-1:]}):
        yield tuple(by_memory[:size])
        yield tuple(reversed(by_memory[:size]))


def _pipeline(
    order: Sequence[DeviceProfile], model: ModelProfile, memory: MemoryModel, factor: float
) -> Lack:
    """Return the worst lack of the pipeline over these devices whose worst lack is least."""
    num_layers, spans = len(model.layers), SpanMemory(model, factor)
    best, came = np.where(np.arange(num_layers + 1) == 0, -np.inf, np.inf), []
    for s, device in enumerate(order):
        depth = len(order) - s
        overhead = device.allocator_overhead
        needed = np.minimum(*(spans.total_bytes(overhead, 1, depth, flag) for flag in (False, True)))
        lack = np.where(np.tri(num_layers + 1, dtype=bool), np.inf, needed)
        worst = np.maximum(best[:, None], lack - device.room_bytes)
        came.append(worst.argmin(axis=0))
        best = worst.min(axis=0)
    stop, lacks = num_layers, []
    for s in range(len(order) - 1, -1, -1):
        start, device = int(came[s][stop]), order[s]
        parts = (
            memory.parts(Load((start, stop), 1.0, 1, len(order) - s, flag), device) for flag in (False, True)
        )
        lacks.append(Lack(device, min(parts, key=lambda p: p.total_bytes)))
        stop = start
    return max(lacks, key=lambda lack: lack.lacking_bytes)


def _sharded(devices: Sequence[DeviceProfile], model: ModelProfile, memory: MemoryModel) -> Lack:
    """Return the worst lack of one replica sharded over all devices in proportion to their memory."""
    units = proportional(model.shard_units, [float(d.memory_bytes) for d in devices])
    whole = (0, len(model.layers))
    lacks = [
        Lack(
            device,
            memory.parts(Load(whole, u / model.shard_units, 1, 1, True), device),
        )
        for device, u in zip(devices, units, strict=True)
    ]
    return max(lacks, key=lambda lack: lack.lacking_bytes)
