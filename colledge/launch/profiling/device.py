"""The device's side of profiling: measures itself, a layer or its end of a link when asked (`HANDLERS`)."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch

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
from colledge.measure import Effort, allocator_overhead, count_model, runtime_bytes, time_layer, usable_bytes
from colledge.models import build_model
from colledge.parallel import Message, Wire
from colledge.parallel.clock import Clock
from colledge.parallel.device import Handler
from colledge.parallel.wire import Pace

_DATA_TAG, _ACKNOWLEDGE_TAG = 10, 11


def _measure_device(message: Message, wire: Wire) -> Message:
    request = DeviceRequest.model_validate(message.fields["request"])
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = torch.device(request.accelerator)
    build_model(request.model)
    taken = runtime_bytes(device)
    facts = DeviceFacts(
        kind=_device_kind(device),
        runtime_bytes=taken,
        allocator_overhead=allocator_overhead(device),
        usable_bytes=usable_bytes(device),
    )
    return Message({"answer": facts.model_dump(mode="json")})


def _measure_layers(message: Message, wire: Wire) -> Message:
    request = LayersRequest.model_validate(message.fields["request"])
    workload = request.workload.workload()
    clock, effort = Clock(request.workload.slowdown), Effort()
    units = None if request.num_units is None else (0, request.num_units)
    times = time_layer(workload, request.layer_index, request.sample_counts, clock, effort, units)
    layer_kind = workload.model.layer_kinds[request.layer_index]
    answer = LayersAnswer(
        rows=tuple(t.row(request.device_kind, request.mode, layer_kind) for t in times),
    )
    return Message({"answer": answer.model_dump(mode="json")})


def _count_layers(message: Message, wire: Wire) -> Message:
    work = WorkloadRequest.model_validate(message.fields["request"]).workload()
    layers = count_model(work.model, work.row_shape, work.dtype, work.loss, work.update)
    return Message({"answer": CountAnswer(layers=layers).model_dump(mode="json")})


def _measure_link(message: Message, wire: Wire) -> Message:
    request = LinkRequest.model_validate(message.fields["request"])
    if request.latency_s or request.bandwidth_bytes_per_s:
        wire.pace({request.peer: Pace(request.latency_s, request.bandwidth_bytes_per_s)})
    try:
        answer = LinkAnswer(samples=_send_all(request, wire)) if request.sends else LinkAnswer()
        if not request.sends:
            _acknowledge_all(request, wire)
    finally:
        wire.pace({})
    return Message({"answer": answer.model_dump(mode="json")})


def _send_all(request: LinkRequest, wire: Wire) -> tuple[tuple[int, float], ...]:
    """Send every message and wait for its acknowledgement; return (bytes, one-way seconds)."""
    samples: list[tuple[int, float]] = []
    back_s: float | None = None
    for size_bytes, num_messages in zip(request.sizes_bytes, request.messages, strict=True):
        data = torch.zeros(size_bytes, dtype=torch.uint8)
        acknowledgement = torch.zeros(1, dtype=torch.uint8)
        round_trips_s = []
        for _ in range(num_messages):
            answer = wire.receive(acknowledgement, request.peer, _ACKNOWLEDGE_TAG)
            began_s = time.perf_counter()
            sent = wire.send(data, request.peer, _DATA_TAG)
            answer.wait("measuring the link")
            round_trips_s.append(time.perf_counter() - began_s)
            sent.wait("measuring the link")
        if back_s is None:
            back_s = median(round_trips_s) / 2
        samples += [(size_bytes, max(s - back_s, 0.0)) for s in round_trips_s]
    return tuple(samples)


def _acknowledge_all(request: LinkRequest, wire: Wire) -> None:
    """Answer every message by one byte; the next receive is posted before, as the executor does."""
    sizes = [size for size, n in zip(request.sizes_bytes, request.messages, strict=True) for _ in range(n)]
    acknowledgement = torch.zeros(1, dtype=torch.uint8)
    following = wire.receive(torch.empty(sizes[0], dtype=torch.uint8), request.peer, _DATA_TAG)
    for index in range(len(sizes)):
        following.wait("measuring the link")
        if index + 1 < len(sizes):
            buffer = torch.empty(sizes[index + 1], dtype=torch.uint8)
            following = wire.receive(buffer, request.peer, _DATA_TAG)
        wire.send(acknowledgement, request.peer, _ACKNOWLEDGE_TAG).wait("measuring the link")


def _device_kind(device: torch.device) -> str:
    """Return what devices of equal speed have in common: the accelerator, or processor and threads."""
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return "-".join([_slug(platform.machine()), _slug(_processor_name()), f"{torch.get_num_threads()}t"])


def _processor_name() -> str:
    """Return the board's name (Jetson, Raspberry Pi) or else the processor's."""
    board = Path("/proc/device-tree/model")
    if board.is_file():
        return board.read_text(errors="replace").strip("\0 \n")
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.system()


def _slug(text: str) -> str:
    plain = re.sub(r"\((R|TM|C)\)|\bCPU\b|\bProcessor\b|@.*", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9_.]+", "-", plain.lower()).strip("-")[:48] or "unknown"


HANDLERS: Mapping[str, Handler] = {
    "measure_device": _measure_device,
    "measure_layers": _measure_layers,
    "count_layers": _count_layers,
    "measure_link": _measure_link,
}
