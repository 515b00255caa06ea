"""Messages between ranks over gloo: tensors of agreed shape, and records with tensors attached.

What gloo does not do is done here: every wait has a deadline, every error names the peer and the action, a
message can be held back to rehearse a slower link. Gloo checks neither size nor type of a tensor, so both ends
must have agreed on them before (the coordinator announces shapes with every command); a record's size travels
ahead of it in a header. Records are JSON and raw bytes, never pickle.

    header   magic, bytes of JSON, bytes of tensors | a small record's body      always of one size
    body     JSON, tensors                                                       only of a larger record

A send ends when the peer takes it. A small record needs only the receive of the header, which the coordinator
posts with every command: so a device that reports a fault can end at once, whomever the coordinator waits for.
"""

from __future__ import annotations

import heapq
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colledge.errors import DeadlineError, DeviceError

COORDINATOR_RANK = 0
RECORD_TAG = 1
_MAGIC = 0x636F6C6C65646765  # "colledge" in ASCII
_MAX_JSON_BYTES = 64 * 1024**2
_MAX_BYTES = 64 * 1024**3
_FIXED_BYTES = 3 * 8
_INLINE_BYTES = 2048
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


@dataclass(frozen=True)
class Message:
    """A record: plain JSON fields, and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pace:
    """A link, measured or to rehearse: what one message waits (`latency_s`) and how fast bytes leave."""

    latency_s: float
    bandwidth_bytes_per_s: float | None

    def transfer_s(self, num_bytes: int) -> float:
        """Return the seconds that bytes occupy the link."""
        return num_bytes / self.bandwidth_bytes_per_s if self.bandwidth_bytes_per_s else 0.0

    def all_reduce_s(self, num_bytes: int, num_ranks: int) -> float:
        """Return the seconds of a ring all-reduce of `num_bytes` over links like this one."""
        rounds = 2 * (num_ranks - 1)
        return rounds * self.latency_s + rounds / num_ranks * self.transfer_s(num_bytes)


def slowest(paces: Sequence[Pace]) -> Pace | None:
    """Return a link as slow as the slowest of some, in latency and in bandwidth; None for none."""
    if not paces:
        return None
    bandwidths = [p.bandwidth_bytes_per_s for p in paces if p.bandwidth_bytes_per_s]
    return Pace(max(p.latency_s for p in paces), min(bandwidths, default=None))


class Transfer:
    """A send or a receive under way; keeps its tensor alive until it has been waited for."""

    def __init__(self, tensor: Tensor, peer: str, timeout_s: float) -> None:
        self.tensor = tensor
        self._peer = peer
        self._timeout_s = timeout_s
        self._work: dist.Work | None = None
        self._posted = threading.Event()
        self._fault: Exception | None = None

    def post(self, start: Callable[[], dist.Work | None]) -> None:
        """Hand the transfer to gloo."""
        try:
            self._work = start()
        except (RuntimeError, ValueError) as fault:
            self._fault = fault
        self._posted.set()

    def wait(self, action: object, timeout_s: float | None = None) -> float:
        """Wait until the bytes are there, and return the seconds that it took.

        Raises:
            DeadlineError: The peer did not answer in time.
            DeviceError: The connection to the peer is gone.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        began_s = time.perf_counter()
        posted = self._posted.wait(limit_s)
        if self._work is not None and posted:
            left_s = max(limit_s - (time.perf_counter() - began_s), 0.001)
            try:
                self._work.wait(timedelta(seconds=left_s))
            except (RuntimeError, ValueError) as fault:
                self._fault = fault
        waited_s = time.perf_counter() - began_s
        if self._fault is None and posted:
            return waited_s
        if waited_s >= 0.99 * limit_s:
            raise DeadlineError(
                f"{self._peer} did not answer within {limit_s:g} s during {action}.",
                fix="look at that device: it may be frozen, overloaded or unplugged.",
            )
        raise DeviceError(
            f"lost the connection to {self._peer} during {action}.",
            fix="look at that device's own log: its worker may have died or run out of memory.",
        )


class _Pacer(threading.Thread):
    """Holds sends back until the moment an emulated link would deliver them."""

    def __init__(self) -> None:
        super().__init__(name="pacer", daemon=True)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._condition = threading.Condition()
        self._free_at_s: dict[int, float] = {}
        self._count = 0

    def submit(self, peer: int, pace: Pace, num_bytes: int, start: Callable[[], None]) -> None:
        """Call `start` when `num_bytes` more have gone over the link to a peer."""
        with self._condition:
            begin_s = max(time.perf_counter(), self._free_at_s.get(peer, 0.0))
            self._free_at_s[peer] = begin_s + pace.transfer_s(num_bytes)
            self._count += 1
            due_s = self._free_at_s[peer] + pace.latency_s
            heapq.heappush(self._heap, (due_s, self._count, start))
            self._condition.notify()

    def run(self) -> None:
        while True:
            with self._condition:
                while not self._heap or self._heap[0][0] > time.perf_counter():
                    wait_s = self._heap[0][0] - time.perf_counter() if self._heap else None
                    self._condition.wait(wait_s)
                start = heapq.heappop(self._heap)[2]
            start()


class Wire:
    """The messages of this rank.

    Args:
        process_group: Of all ranks.
        names: What to call each rank in an error, by rank.
        timeout_s: The deadline of a wait that names no other.
    """

    def __init__(self, process_group: dist.ProcessGroupGloo, names: Sequence[str], timeout_s: float) -> None:
        self._process_group = process_group
        self.names = list(names)
        self.timeout_s = timeout_s
        self._paces: dict[int, Pace] = {}
        self._pacer: _Pacer | None = None

    def pace(self, paces: Mapping[int, Pace]) -> None:
        """Rehearse slower links to some ranks from now on; an empty mapping ends it."""
        self._paces = dict(paces)
        if self._paces and self._pacer is None:
            self._pacer = _Pacer()
            self._pacer.start()

    def slowest_pace(self, peers: Sequence[int]) -> Pace | None:
        """Return a link as slow as the slowest rehearsed one to these ranks, or None."""
        return slowest([self._paces[peer] for peer in peers if peer in self._paces])

    def send(self, tensor: Tensor, peer: int, tag: int) -> Transfer:
        """Begin to send a contiguous CPU tensor, which must stay as it is until the transfer was waited for."""
        transfer = Transfer(tensor, self.names[peer], self.timeout_s)
        pace = self._paces.get(peer)
        if pace is None or self._pacer is None:
            transfer.post(lambda: self._send(tensor, peer, tag))
        else:
            self._pacer.submit(
                peer, pace, tensor.nbytes, lambda: transfer.post(lambda: self._send(tensor, peer, tag))
            )
        return transfer

    def _send(self, tensor: Tensor, peer: int, tag: int) -> dist.Work:
        return self._process_group.send([tensor], peer, tag)  # type: ignore[attr-defined,no-any-return]

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Transfer:
        """Begin to receive into a contiguous CPU tensor of exactly the shape and type that the peer sends."""
        transfer = Transfer(tensor, self.names[peer], self.timeout_s)
        transfer.post(
            lambda: self._process_group.recv(  # type: ignore[attr-defined]
                [tensor], peer, tag
            )
        )
        return transfer

    def send_message(self, peer: int, message: Message) -> None:
        """Send a record and wait until it is taken.

        Raises:
            DeviceError: The peer is gone or does not answer.
        """
        for transfer in self.begin_message(peer, message):
            transfer.wait(f"sending {message.fields.get('command', 'a record')!r}")

    def begin_message(self, peer: int, message: Message) -> list[Transfer]:
        """Begin to send a record; wait for the transfers later."""
        name, timeout_s = self.names[peer], self.timeout_s
        transfers = []
        for tensor in _encode(message):
            transfer = Transfer(tensor, name, timeout_s)
            transfer.post(lambda tensor=tensor: self._send(tensor, peer, RECORD_TAG))  # type: ignore[misc]
            transfers.append(transfer)
        return transfers

    def begin_receive_message(self, peer: int) -> Transfer:
        """Begin to receive a record's header; hand it to `finish_message`."""
        header = torch.zeros(_FIXED_BYTES + _INLINE_BYTES, dtype=torch.uint8)
        return self.receive(header, peer, RECORD_TAG)

    def finish_message(
        self, peer: int, header: Transfer, action: object, timeout_s: float | None = None
    ) -> Message:
        """Wait for a record whose header is being received.

        Raises:
            DeviceError: The peer is gone, does not answer, or sent something that is no record.
        """
        header.wait(action, timeout_s)
        magic, json_bytes, payload_bytes = header.tensor[:_FIXED_BYTES].view(torch.int64).tolist()
        if magic != _MAGIC or not 0 < json_bytes <= _MAX_JSON_BYTES or not 0 <= payload_bytes <= _MAX_BYTES:
            raise DeviceError(
                f"{self.names[peer]} sent something that is no colledge message.",
                fix="run the same version of colledge on every device.",
            )
        size = json_bytes + payload_bytes
        if size <= _INLINE_BYTES:
            return _decode(header.tensor[_FIXED_BYTES : _FIXED_BYTES + size].clone(), json_bytes)
        body = torch.empty(size, dtype=torch.uint8)
        self.receive(body, peer, RECORD_TAG).wait(action)
        return _decode(body, json_bytes)

    def receive_message(self, peer: int, action: object, timeout_s: float | None = None) -> Message:
        """Receive a record.

        Raises:
            DeviceError: The peer is gone, does not answer, or sent something that is no record.
        """
        return self.finish_message(peer, self.begin_receive_message(peer), action, timeout_s)


def _encode(message: Message) -> list[Tensor]:
    """Return the header, and the body where it does not fit into the header."""
    tensors, payload, offset = {}, [], 0
    for name, tensor in message.tensors.items():
        data = tensor.detach().cpu().contiguous()
        tensors[name] = [str(data.dtype).removeprefix("torch."), list(data.shape), offset]
        payload.append(data.reshape(-1).view(torch.uint8))
        offset += data.nbytes
    text = json.dumps({"fields": message.fields, "tensors": tensors}).encode()
    text += b" " * (-len(text) % 16)  # tensors begin aligned
    body = torch.cat([torch.frombuffer(bytearray(text), dtype=torch.uint8), *payload])
    header = torch.zeros(_FIXED_BYTES + _INLINE_BYTES, dtype=torch.uint8)
    header[:_FIXED_BYTES] = torch.tensor([_MAGIC, len(text), offset], dtype=torch.int64).view(torch.uint8)
    if len(body) > _INLINE_BYTES:
        return [header, body]
    header[_FIXED_BYTES : _FIXED_BYTES + len(body)] = body
    return [header]


def _decode(body: Tensor, json_bytes: int) -> Message:
    content = json.loads(bytes(body[:json_bytes].numpy()))
    tensors = {}
    for name, (dtype_name, shape, offset) in content["tensors"].items():
        dtype = _DTYPES[dtype_name]
        num_bytes = dtype.itemsize
        for length in shape:
            num_bytes *= length
        begin = json_bytes + offset
        part = body[begin : begin + num_bytes]
        aligned = part if (part.storage_offset() % dtype.itemsize) == 0 else part.clone()
        tensors[name] = aligned.view(dtype).reshape(shape)
    return Message(content["fields"], tensors)
