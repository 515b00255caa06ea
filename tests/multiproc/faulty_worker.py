"""A device worker that obeys a few more commands, which break it on purpose; for worlds in a subprocess.

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
from typing import Any
from unittest import mock

import torch

from colledge.errors import ColledgeError
from colledge.parallel import DeviceWorker, Message, Wire
from colledge.parallel import gradients as gradients_module
from colledge.parallel.groups import Group
from colledge.parallel.stage import StageRunner
from colledge.parallel.wire import COORDINATOR_RANK, RECORD_TAG
from colledge.parallel.world import join_world
from tests.multiproc.workers import Workers

SINK_TAG = 77

_active: list[Any] = []


class FaultyWorkers(Workers):
    """`count` workers that take the commands of this module, on loopback; this process is rank 0."""

    module = "tests.multiproc.faulty_worker"


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
    torch.set_num_threads(1)
    handlers = {"inject": _inject, "echo": _echo, "babble": _babble, "sink": _sink, "sleep": _sleep}
    try:
        world = join_world(float(os.environ["COLLEDGE_TIMEOUT_S"]))
        DeviceWorker(world, handlers).serve()
    except ColledgeError as fault:
        print(f"faulty worker: {fault}", file=sys.stderr, flush=True)
        os._exit(fault.exit_code)


if __name__ == "__main__":
    main()
