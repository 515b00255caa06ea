"""The coordinator's side of profiling: what is asked of whom, in which order, and the profiles that come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from statistics import median
from typing import Protocol

from colledge.launch.profiling.requests import (
    CountAnswer,
    DeviceFacts,
    DeviceRequest,
    LayersAnswer,
    LayersRequest,
    LinkAnswer,
    LinkRequest,
    WorkloadRequest,
)
from colledge.launch.run_config import DeviceConfig
from colledge.measure import NOISY_SPREAD, LinkFit, fit_link
from colledge.models import LayeredModel
from colledge.models.layered import DTYPES
from colledge.parallel import Message, Wire
from colledge.parallel.engine import command
from colledge.profiles import DeviceProfile, LinkProfile, ModelProfile, PoolProfile, Timing
from colledge.records import Record
from colledge.settings import OptimizerSettings, Precision
from colledge.units import format_bytes

_LARGEST_SAMPLES = 8
_SHARD_SAMPLES = (1, 4)
_SMALL_BYTES, _SMALL_MESSAGES = 1024, 10
_SIZES_BYTES = (64 * 1024, 256 * 1024, 1024**2, 4 * 1024**2)
_MESSAGES = 5
_LONG_TRANSFER_S = 0.03  # a message as slow as this is the largest that a link is measured with


class Progress(Protocol):
    """Hears of every measurement before it begins, and of what is too noisy to rely on."""

    def __call__(self, line: str, /) -> None:
        """Show a line."""


@dataclass(frozen=True)
class _LayerTask:
    device: str
    layer_index: int
    sample_counts: tuple[int, ...]
    num_units: int | None


@dataclass(frozen=True)
class _Training:
    """How the model will be trained, so that it is measured like that."""

    name: str
    row_shape: tuple[int, ...]
    global_batch_size: int
    precision: Precision
    optimizer: OptimizerSettings
    loss: str


def profile_pool(
    wire: Wire,
    ranks: Mapping[str, int],
    devices: Sequence[DeviceConfig],
    model: LayeredModel,
    *,
    name: str,
    row_shape: tuple[int, ...],
    global_batch_size: int,
    precision: Precision,
    optimizer: OptimizerSettings,
    loss: str = "causal_lm",
    progress: Progress | None = None,
) -> tuple[PoolProfile, ModelProfile]:
    """Measure devices, their links, and a model on them.

    Args:
        wire: The coordinator's messages.
        ranks: The rank of every device.
        devices: The pool; an emulated device is measured as slow as it pretends to be.
        model: The structure; weights are random.
        name: What to call the model in its profile.
        row_shape: Of one row of the model's input: (tokens,), or that of an image.
        global_batch_size: Rows a step; no more are measured at once.
        precision: Of parameters and activations.
        optimizer: Its update is timed.
        loss: By name, one that needs labels alone; part of the last layer.
        progress: Hears of every measurement, and of the noisy ones.

    Raises:
        ColledgeError: A device failed or does not answer; the message names it.
    """
    training = _Training(name, row_shape, global_batch_size, precision, optimizer, loss)
    return _Profiler(wire, ranks, devices, model, training, progress).run()


def noise_warnings(pool: PoolProfile, model: ModelProfile) -> list[str]:
    """Return a line for every layer kind on every device kind of which a timing is too noisy to rely on."""
    devices = {device.kind: device.id for device in reversed(pool.devices)}
    worst: dict[tuple[str, str], float] = {}
    for row in model.timings:
        key = (row.layer_kind, devices.get(row.device_kind, row.device_kind))
        worst[key] = max(worst.get(key, 0.0), row.spread)
    return [
        _noise(f"{layer_kind} on {device}", spread)
        for (layer_kind, device), spread in worst.items()
        if spread > NOISY_SPREAD
    ]


def _noise(what: str, spread: float) -> str:
    return f"{what}: spread {100 * spread:.0f} %, measure again on an idle device"


class _Profiler:
    def __init__(
        self,
        wire: Wire,
        ranks: Mapping[str, int],
        devices: Sequence[DeviceConfig],
        model: LayeredModel,
        training: _Training,
        progress: Progress | None,
    ) -> None:
        self._wire, self._model, self._training = wire, model, training
        self._devices = {device.id: device for device in devices}
        self._ranks = {id: ranks[id] for id in self._devices}
        for id, rank in self._ranks.items():
            wire.names[rank] = f"device {id!r}"
        self._progress = progress
        self._done = self._total = 0

    def run(self) -> tuple[PoolProfile, ModelProfile]:
        pairs = list(combinations(self._devices, 2))
        facts = self._facts()
        kinds = {id: _emulated_kind(facts[id].kind, device) for id, device in self._devices.items()}
        tasks = list(self._tasks(kinds))
        self._total = 1 + len(tasks) + 2 * len(pairs)
        first = next(iter(self._devices.values()))
        self._next("bytes and FLOPs of the layers")
        answer = self._ask(first.id, "count_layers", self._workload(first, measured=False))
        layers = CountAnswer.model_validate(answer).layers
        timings = list(self._timings(tasks, kinds))
        links = [
            self._link(source, target)
            for pair in pairs
            for source, target in (pair, pair[::-1])
        ]  # fmt: skip
        pool = PoolProfile(
            schema_tag="colledge/pool-profile/1",
            devices=tuple(self._device_profiles(facts, kinds)),
            links=tuple(links),
        )
        row_shape, is_text = self._training.row_shape, not self._model.input_dtype.is_floating_point
        input_bytes = prod(row_shape) * DTYPES[self._training.precision].itemsize
        profile = ModelProfile(
            schema_tag="colledge/model-profile/1",
            name=self._training.name,
            sequence_length=row_shape[0] if is_text else 1,
            layers=layers,
            timings=tuple(timings),
            precision=self._training.precision,
            mixed_precision=self._model.spec.mixed_precision,
            frozen_precision=self._model.spec.frozen_precision,
            lora=self._model.spec.lora,
            input_bytes_per_sample=0 if is_text else input_bytes,
        )
        for line in noise_warnings(pool, profile):
            self._say(line)
        return pool, profile

    # -- devices ---------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, DeviceFacts]:
        """Ask all devices at once what they are: nothing is timed yet."""
        self._say("memory and processors of all devices")
        messages = {}
        for id, device in self._devices.items():
            request = DeviceRequest(
                model=self._model.spec, accelerator=device.accelerator, threads=device.threads
            )
            fields = {"command": "measure_device", "request": request.model_dump(mode="json")}
            messages[self._ranks[id]] = Message(fields)
        answers = command(self._wire, messages, "profiling (measure_device)", self._ranks)
        return {id: DeviceFacts.model_validate(answers[id].fields["answer"]) for id in self._devices}

    def _device_profiles(
        self, facts: Mapping[str, DeviceFacts], kinds: Mapping[str, str]
    ) -> Iterator[DeviceProfile]:
        """Yield the devices; those of one machine without `memory` share what is free there evenly."""
        undeclared = Counter(
            (device.host, device.accelerator)
            for device in self._devices.values()
            if device.memory_bytes is None
        )
        for id, device in self._devices.items():
            sharers = undeclared[device.host, device.accelerator]
            yield DeviceProfile(
                id=id,
                kind=kinds[id],
                memory_bytes=device.memory_bytes or facts[id].usable_bytes // sharers,
                runtime_bytes=facts[id].runtime_bytes,
                allocator_overhead=facts[id].allocator_overhead,
                modes=(device.power_mode(),),
            )

    # -- layers ----------------------------------------------------------------------------------------------------

    def _tasks(self, kinds: Mapping[str, str]) -> Iterator[_LayerTask]:
        """Yield what to time: each kind of layer on the first device of each kind, what can be cut also in parts."""
        counts = sample_counts(self._training.global_batch_size)
        shard_counts = tuple(c for c in _SHARD_SAMPLES if c <= counts[-1])
        layer_kinds = self._model.layer_kinds
        measured: set[str] = set()
        for id, kind in kinds.items():
            if kind in measured:
                continue
            measured.add(kind)
            for layer_kind in dict.fromkeys(layer_kinds):
                index = layer_kinds.index(layer_kind)
                yield _LayerTask(id, index, counts, None)
                if len(kinds) > 1 and self._model.is_sharded(index):
                    for num_units in shard_parts(self._model.shard_units):
                        yield _LayerTask(id, index, shard_counts, num_units)

    def _timings(self, tasks: Sequence[_LayerTask], kinds: Mapping[str, str]) -> Iterator[Timing]:
        for task in tasks:
            device = self._devices[task.device]
            layer_kind = self._model.layer_kinds[task.layer_index]
            part = "" if task.num_units is None else f", {task.num_units}/{self._model.shard_units} of it"
            self._next(f"{layer_kind} on {device.id}{part}")
            request = LayersRequest(
                workload=self._workload(device, measured=True),
                layer_index=task.layer_index,
                sample_counts=task.sample_counts,
                device_kind=kinds[device.id],
                mode=device.power_mode().name,
                num_units=task.num_units,
            )
            answer = LayersAnswer.model_validate(self._ask(device.id, "measure_layers", request))
            yield from answer.rows

    def _workload(self, device: DeviceConfig, measured: bool) -> WorkloadRequest:
        training = self._training
        return WorkloadRequest(
            model=self._model.spec,
            row_shape=training.row_shape,
            precision=training.precision,
            loss=training.loss,
            optimizer=training.optimizer,
            accelerator=device.accelerator if measured else "cpu",
            threads=device.threads,
            slowdown=device.emulate.slowdown if measured else 1.0,
        )

    # -- links -----------------------------------------------------------------------------------------------------

    def _link(self, source: str, target: str) -> LinkProfile:
        """Measure one direction, with messages that grow until one takes long enough to tell the bandwidth."""
        self._next(f"link {source} -> {target}")
        samples: list[tuple[int, float]] = []
        for size in _SIZES_BYTES:
            found = self._exchange(source, target, size)
            samples += found
            if median(seconds for num_bytes, seconds in found if num_bytes == size) > _LONG_TRANSFER_S:
                break
        fit: LinkFit = fit_link(samples)
        if fit.spread > NOISY_SPREAD:
            largest = format_bytes(max(num_bytes for num_bytes, _ in samples))
            self._say(_noise(f"link {source} -> {target} ({largest} messages)", fit.spread))
        return LinkProfile(
            source=source,
            target=target,
            latency_s=fit.latency_s,
            bandwidth_bytes_per_s=fit.bandwidth_bytes_per_s,
        )

    def _exchange(self, source: str, target: str, size: int) -> tuple[tuple[int, float], ...]:
        latency_s, bandwidth = self._devices[source].emulate.link_to(self._devices[target].emulate)
        messages = {}
        for id, peer in ((source, target), (target, source)):
            request = LinkRequest(
                sends=id == source,
                peer=self._ranks[peer],
                sizes_bytes=(_SMALL_BYTES, size),
                messages=(_SMALL_MESSAGES, _MESSAGES),
                latency_s=latency_s,
                bandwidth_bytes_per_s=bandwidth,
            )
            fields = {"command": "measure_link", "request": request.model_dump(mode="json")}
            messages[self._ranks[id]] = Message(fields)
        answers = command(self._wire, messages, f"measuring the link {source} -> {target}", self._ranks)
        return LinkAnswer.model_validate(answers[source].fields["answer"]).samples

    # -- asking and telling ----------------------------------------------------------------------------------------

    def _ask(self, device: str, name: str, request: Record) -> object:
        message = Message({"command": name, "request": request.model_dump(mode="json")})
        answers = command(self._wire, {self._ranks[device]: message}, f"profiling ({name})", self._ranks)
        return answers[device].fields["answer"]

    def _next(self, what: str) -> None:
        self._done += 1
        self._say(f"[{self._done}/{self._total}] {what}")

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress(line)


def sample_counts(global_batch_size: int) -> tuple[int, ...]:
    """Return the sample counts to measure: 1, 2, 4, ... and the largest that is worth it."""
    largest = min(global_batch_size, _LARGEST_SAMPLES)
    counts = [1]
    while counts[-1] * 2 <= largest:
        counts.append(counts[-1] * 2)
    return tuple(counts) if counts[-1] == largest else (*counts, largest)


def shard_parts(num_units: int) -> tuple[int, ...]:
    """Return how many of a block's shard units to time: the least, half, and all but one."""
    return tuple(sorted({1, num_units // 2, num_units - 1} - {0, num_units}))


def _emulated_kind(kind: str, device: DeviceConfig) -> str:
    return kind if device.emulate.slowdown == 1 else f"{kind}-x{device.emulate.slowdown:g}"
