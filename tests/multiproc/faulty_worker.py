"""A device worker that obeys a few more commands, which break it on purpose; for worlds in a subprocess.

watch     from now on note what is done and sent (breaks nothing)
seen      tell what was noted
inject    from now on drop one all-reduce, weigh rows wrongly, cut gradients into small buckets, or fail
echo      answer with the same message
babble    send a header that is none of ours
sink      take raw bytes
sleep     answer late
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from colledge.errors import ColledgeError
from colledge.parallel import DeviceWorker, Message, Wire
from colledge.parallel import gradients as gradients_module
from colledge.parallel.groups import Group
from colledge.parallel.stage import StageRunner
from colledge.parallel.wire import COORDINATOR_RANK, RECORD_TAG, Transfer
from colledge.parallel.world import join_world
from tests.multiproc.workers import Workers

SINK_TAG = 77

_active: list[Any] = []


class _NoReduce:
    """Stands in for an all-reduce that never happened."""

    def wait(self, action: object) -> float:
        return 0.0


def _drop_all_reduce(number: int) -> Any:
    """Skip this process's all-reduce of that number, counted from now; its members must all do so."""
    original, count = Group.begin_all_reduce, 0

    def begin_all_reduce(self: Group, *args: Any) -> Any:
        nonlocal count
        count += 1
        return _NoReduce() if count == number else original(self, *args)

    return mock.patch.object(Group, "begin_all_reduce", begin_all_reduce)


def _misweigh(factor: float) -> Any:
    """Divide this rank's loss by a wrong number of targets."""
    original = StageRunner.begin_step

    def begin_step(self: StageRunner, denominator: float, step: int) -> None:
        original(self, denominator * factor, step)  # type: ignore[arg-type]

    return mock.patch.object(StageRunner, "begin_step", begin_step)


def _inject(message: Message, wire: Wire) -> Message:
    """Break this process as told, until the next `inject`."""
    while _active:
        _active.pop().stop()
    fields = message.fields
    match fields["fault"]:
        case "drop_all_reduce":
            _active.append(_drop_all_reduce(fields["number"]))
        case "misweigh":
            _active.append(_misweigh(fields["factor"]))
        case "fail":
            _active.append(mock.patch.object(StageRunner, "backward", side_effect=RuntimeError("injected")))
    if "bucket_bytes" in fields:
        _active.append(mock.patch.object(gradients_module, "_BUCKET_BYTES", fields["bucket_bytes"]))
    for patch in _active:
        patch.start()
    return Message({})


class _Notes:
    """What this process does: actions, messages (the peer's rank, bytes), and the most that it holds.

    Sends not yet waited for; micro-batches that wait for a backward; of those the ones whose input is kept.
    """

    def __init__(self) -> None:
        self.actions: list[str] = []
        self.sent: list[tuple[int, int]] = []
        self.received: list[tuple[int, int]] = []
        self.most_unsettled = self.most_in_flight = self.most_inputs = 0
        self._sending: list[weakref.ref[Transfer]] = []

    def watch(self) -> None:
        """Note from now on."""
        send, receive, record = Wire.send, Wire.receive, torch.profiler.record_function
        forward = StageRunner.forward

        def noted_send(wire: Wire, tensor: Tensor, peer: int, tag: int) -> Transfer:
            transfer = send(wire, tensor, peer, tag)
            self.sent.append((peer, tensor.nbytes))
            self._sending = [ref for ref in self._sending if ref() is not None] + [weakref.ref(transfer)]
            self.most_unsettled = max(self.most_unsettled, len(self._sending))
            return transfer

        def noted_receive(wire: Wire, tensor: Tensor, peer: int, tag: int) -> Transfer:
            if tag != RECORD_TAG:
                self.received.append((peer, tensor.nbytes))
            return receive(wire, tensor, peer, tag)

        def noted_record(name: str) -> Any:
            self.actions.append(name)
            return record(name)

        def noted_forward(runner: StageRunner, *args: Any) -> Tensor:
            output = forward(runner, *args)
            kept = runner._saved.values()
            self.most_in_flight = max(self.most_in_flight, len(kept))
            self.most_inputs = max(self.most_inputs, sum(saved.x is not None for saved in kept))
            return output

        mock.patch.object(StageRunner, "forward", noted_forward).start()
        mock.patch.object(Wire, "send", noted_send).start()
        mock.patch.object(Wire, "receive", noted_receive).start()
        mock.patch.object(torch.profiler, "record_function", noted_record).start()


_notes = _Notes()


def _watch(message: Message, wire: Wire) -> Message:
    _notes.watch()
    return Message({})


def _seen(message: Message, wire: Wire) -> Message:
    seen = {name: value for name, value in vars(_notes).items() if not name.startswith("_")}
    vars(_notes).update(vars(_Notes()))
    return Message(seen)


def _echo(message: Message, wire: Wire) -> Message:
    return Message({"echo": message.fields["content"]}, message.tensors)


def _babble(message: Message, wire: Wire) -> Message:
    header = torch.tensor(message.fields["header"], dtype=torch.int64)
    wire.send(header, COORDINATOR_RANK, RECORD_TAG).wait("babble")
    return Message({})


def _sink(message: Message, wire: Wire) -> Message:
    tensor = torch.empty(message.fields["num_bytes"], dtype=torch.uint8)
    wire.receive(tensor, COORDINATOR_RANK, SINK_TAG).wait("sink")
    return Message({"total": int(tensor.sum())})


def _sleep(message: Message, wire: Wire) -> Message:
    time.sleep(message.fields["seconds"])
    return Message({})


def main() -> None:
    handlers = {"inject": _inject, "echo": _echo, "babble": _babble, "sink": _sink, "sleep": _sleep}
    handlers |= {"watch": _watch, "seen": _seen}
    try:
        world = join_world(float(os.environ["COLLEDGE_TIMEOUT_S"]))
        DeviceWorker(world, handlers).serve()
    except ColledgeError as fault:
        print(f"faulty worker: {fault}", file=sys.stderr, flush=True)
        os._exit(fault.exit_code)


class FaultyWorkers(Workers):
    """`count` workers that take the commands of this module, on loopback; this process is rank 0."""

    main = staticmethod(main)
