"""When nothing fits: the plan that comes closest, who lacks how many bytes under it, and what would make it fit.

Closest is the smallest worst lack over pipelines (every order of a few devices, by memory of many; cuts where the
worst lack is least) and one replica sharded over all devices, with one row a micro-batch and recomputation on. Under
ZeRO the stages can be groups of replicas too, and a library has one such stage alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import accumulate, pairwise, permutations

import numpy as np

from colledge.errors import OutOfMemoryError
from colledge.plan import Plan, Replica, Shard, Stage
from colledge.planner.layouts import compositions, divisors, proportional
from colledge.planner.memory import Load, MemoryModel, MemoryParts, SpanMemory, out_of_memory
from colledge.planner.request import PlanningRequest
from colledge.profiles import DeviceProfile, LayerProfile, ModelProfile
from colledge.settings import LibraryName, ZeroStage

_MOST_PERMUTED = 5
_LORA_SHARE = 100  # adapters train about a hundredth of the weights


@dataclass(frozen=True)
class Lack:
    """The device that lacks most under the plan that comes closest; negative bytes are to spare.

    `plan` is that plan, where it is one of stages of whole layers.
    """

    device: DeviceProfile
    parts: MemoryParts
    plan: Plan | None = None

    @property
    def lacking_bytes(self) -> int:
        """The bytes that are missing."""
        return self.parts.total_bytes - self.device.memory_bytes


@dataclass(frozen=True)
class Question:
    """What is to fit, and on what."""

    devices: Sequence[DeviceProfile]
    model: ModelProfile
    state_factor: float
    must_use: frozenset[str] = frozenset()
    batch: int = 1
    zero: ZeroStage | None = None
    backend: LibraryName | None = None

    def closest(self) -> Lack:
        """Return the worst lack under the plan that comes closest to fitting."""
        memory = MemoryModel(self.model, self.state_factor, self.zero, self.backend)
        spans = SpanMemory(self.model, self.state_factor, self.backend)
        stages: list[Sequence[Sequence[DeviceProfile]]] = []
        if self.backend is None:
            orders = _orders(self.devices, self.must_use, len(self.model.layers))
            stages += [[[device] for device in order] for order in orders]
        if self.zero is not None:
            stages += _groupings(self)
        found = [_pipeline(groups, self, memory, spans) for groups in stages]
        if self.backend is None and 1 < len(self.devices) <= self.model.shard_units:
            found.append(_sharded(self.devices, self.model, memory))
        return min(found, key=lambda lack: lack.lacking_bytes)

    def fits(self) -> bool:
        """Return whether that plan fits."""
        return self.closest().lacking_bytes <= 0


def question_of(devices: Sequence[DeviceProfile], model: ModelProfile, request: PlanningRequest) -> Question:
    """Return what a request asks of memory."""
    return Question(
        devices,
        model,
        request.optimizer_state_factor,
        frozenset(request.must_use),
        request.global_batch_size,
        request.zero,
        request.backend,
    )


def nothing_fits(
    devices: Sequence[DeviceProfile], model: ModelProfile, request: PlanningRequest
) -> OutOfMemoryError | None:
    """Return the error that says who lacks what and which change would make the model fit; None if memory suffices."""
    question = question_of(devices, model, request)
    lack = question.closest()
    if lack.lacking_bytes <= 0:
        return None
    prefix = (
        "no plan fits in memory. In the one that comes closest (micro-batches of one row, recomputation on), "
    )
    if request.backend is not None:
        prefix = f"backend {request.backend} runs replicas of the whole model alone; {prefix}"
    error = out_of_memory(lack.device.id, lack.parts, lack.device.memory_bytes, prefix)
    helpful = list(_remedies(question))
    if helpful:
        fix = f"this would make it fit: {'; or '.join(helpful)}."
    else:
        fix = "neither adapters, nor SGD, nor one more device of a kind that is there is enough alone: take a smaller "
        fix += "model or shorter rows, or several more devices."
    return OutOfMemoryError(error.message, fix=fix)


def _remedies(question: Question) -> Iterator[str]:
    """Yield the single changes that were checked to be enough."""
    devices, model = question.devices, question.model
    if question.backend is not None and replace(question, zero=1, backend=None).fits():
        yield "backend: native, which splits the model's layers too"
    yield from _divisions(question)
    if question.state_factor > 0 and replace(question, state_factor=0.0).fits():
        yield "an optimizer without state (SGD without momentum)"
    frozen_bytes = sum(layer.parameter_bytes - layer.trainable_parameter_bytes for layer in model.layers)
    trains_adapters = replace(question, model=_with_layers(model, _adapted))
    if frozen_bytes == 0 and question.backend is None and trains_adapters.fits():
        yield f"LoRA (method: lora; reckoned with 1/{_LORA_SHARE} of the weights trained)"
    wide = model.precision in ("float32", "float64") and model.frozen_precision is None
    if frozen_bytes and wide and replace(question, model=_with_layers(model, _held)).fits():
        yield "frozen weights in half as many bytes (frozen_precision: bfloat16)"
    kinds: dict[str, DeviceProfile] = {}
    for device in devices:
        if device.kind not in kinds or device.memory_bytes > kinds[device.kind].memory_bytes:
            kinds[device.kind] = device
    for kind, device in kinds.items():
        more = [*devices, device.model_copy(update={"id": f"{device.id}-more"})]
        if replace(question, devices=more).fits():
            yield f"one more device like {device.id!r} ({kind})"
            break


def _divisions(question: Question) -> Iterator[str]:
    """Yield the stages of ZeRO that are enough: of the native engine, and the first of each library."""
    model, state = question.model, question.state_factor
    if question.zero is None and state > 0 and replace(question, zero=1).fits():
        yield "optimizer state divided over replicas (zero: 1)"
    whole = all(layer.parameter_bytes == layer.trainable_parameter_bytes for layer in model.layers)
    if not whole or model.precision not in (None, "float32") or model.mixed_precision is not None:
        return  # libraries train whole models in float32
    asked: tuple[tuple[LibraryName, tuple[ZeroStage, ...]], ...] = (
        ("deepspeed", (1, 2, 3)),
        ("fairscale", (1,)),
    )
    for library, stages in asked:
        helps = (stage for stage in stages if replace(question, zero=stage, backend=library).fits())
        stage = next(helps, None)
        if stage is not None and (question.zero, question.backend) != (stage, library):
            chosen = f", deepspeed: {{zero_stage: {stage}}}" if library == "deepspeed" else ""
            missing = "" if find_spec(library) else f", after pip install 'colledge[{library}]'"
            yield f"replicas of the whole model on CPUs that divide it (backend: {library}{chosen}{missing})"


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


def _groupings(question: Question) -> Iterator[Sequence[Sequence[DeviceProfile]]]:
    """Yield stages of several replicas each: devices by memory, cut in every way if they are few, else evenly."""
    devices, must_use = question.devices, question.must_use
    by_memory = sorted(devices, key=lambda d: (d.id not in must_use, -d.room_bytes))
    if question.backend is not None:
        most = max(1, len(must_use), min(len(devices), question.batch))
        yield from ([by_memory[:count]] for count in range(max(1, len(must_use)), most + 1))
        return
    if must_use:
        return  # most replicas of such stages compute nothing
    few = range(2, min(len(devices), _MOST_PERMUTED) + 1)
    for count in sorted({*few, len(devices) // 2, len(devices)} - {0, 1}):
        if count in few:
            sizes = [s for parts in range(1, count) for s in compositions(count, parts)]
        else:
            even = {2, 3, 4, 8, count // 2, count}
            sizes = [tuple(b - a for a, b in pairwise((*range(0, count, s), count))) for s in sorted(even)]
        for size in sizes:
            if len(size) <= len(question.model.layers):
                groups = [by_memory[a:b] for a, b in pairwise((0, *accumulate(size)))]
                yield groups
                yield groups[::-1]


def _pipeline(
    groups: Sequence[Sequence[DeviceProfile]], question: Question, memory: MemoryModel, spans: SpanMemory
) -> Lack:
    """Return the worst lack of the pipeline over these groups of replicas whose worst lack is least."""
    num_layers = len(question.model.layers)
    best, came = np.where(np.arange(num_layers + 1) == 0, -np.inf, np.inf), []
    for s, group in enumerate(groups):
        depth, rows = len(groups) - s, _rows(group, question)
        shares = memory.rough_shares([device.room_bytes for device in group])
        needed = np.minimum(
            *(
                np.maximum.reduce(
                    [
                        spans.total_bytes(device.allocator_overhead, n, depth, flag, share)
                        - device.room_bytes
                        for device, n, share in zip(group, rows, shares, strict=True)
                    ]
                )
                for flag in (False, True)
            )
        )
        lack = np.where(np.tri(num_layers + 1, dtype=bool), np.inf, needed)
        worst = np.maximum(best[:, None], lack)
        came.append(worst.argmin(axis=0))
        best = worst.min(axis=0)
    stop, found = num_layers, list[tuple[Stage, bool, Lack]]()
    for s in range(len(groups) - 1, -1, -1):
        start = int(came[s][stop])
        found.insert(0, _stage((start, stop), groups[s], len(groups) - s, question, memory))
        stop = start
    size = sum(replica.samples for replica in found[0][0].replicas)
    plan = Plan(
        schema_tag="colledge/plan/1",
        num_layers=num_layers,
        global_batch_size=size * (question.batch // size),
        microbatch_size=size,
        stages=tuple(stage for stage, _, _ in found),
        recompute=tuple(flag for _, flag, _ in found),
    )
    return replace(
        max((lack for *_, lack in reversed(found)), key=lambda lack: lack.lacking_bytes), plan=plan
    )


def _rows(group: Sequence[DeviceProfile], question: Question) -> list[int]:
    """Return the rows of a micro-batch of each replica: as few as can be, none of them 0 where a library trains."""
    if question.backend is None:
        return [1, *[0] * (len(group) - 1)]
    size = next((d for d in divisors(question.batch) if d >= len(group)), len(group))
    return [size // len(group) + (i < size % len(group)) for i in range(len(group))]


def _stage(
    layers: tuple[int, int],
    group: Sequence[DeviceProfile],
    depth: int,
    question: Question,
    memory: MemoryModel,
) -> tuple[Stage, bool, Lack]:
    """Return a stage of replicas, whether it recomputes (where that is better), and its worst lack."""
    stage = Stage(
        layers=layers,
        replicas=tuple(
            Replica(samples=rows, shards=(Shard(device=device.id),))
            for device, rows in zip(group, _rows(group, question), strict=True)
        ),
    )
    devices, found = {device.id: device for device in group}, []
    for flag in (False, True):
        divided = memory.divided_stage(stage, depth, flag, devices)
        lacks = [
            Lack(devices[id], memory.parts(load, devices[id]))
            for id, load in memory.loads(divided, depth, flag)
        ]
        found.append((stage, flag, max(lacks, key=lambda lack: lack.lacking_bytes)))
    return min(found, key=lambda entry: entry[2].lacking_bytes)


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
