"""A node as a process: hands messages between its round loop and its transport, and keeps its files.

<output>/<node>/state.clg      all that the next round needs, whole or not at all
status.json    where it stands
rounds.jsonl   what it did, a line a round
<output>/federation.jsonl      at the root: what all nodes did
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from pydantic import Field

from colledge.errors import ConfigError
from colledge.federation.clock import RealClock
from colledge.federation.message import Kind, Message, MessageError, decode, encode
from colledge.federation.node import Node, Outgoing
from colledge.federation.record import NodeRound
from colledge.federation.report import LINES
from colledge.federation.transport import NodeId, Transport, TransportError
from colledge.records import Record, read_json, write_atomically

_log = logging.getLogger("colledge.federation")
_TICK_S = 0.5
_SEND_S, _SLOWEST_BYTES_PER_S = 30.0, 1e5  # a send may take as long as this link would
_MOST_AT_ONCE = 16


class Stop(Protocol):
    """Says whether a node is to end."""

    @property
    def asked(self) -> bool:
        """Whether it is."""


class NodeStatus(Record):
    """status.json: where a node stands; `updated_s` is Unix time."""

    node: str
    parent: str | None = None
    children: tuple[str, ...]
    phase: str
    round: int = Field(ge=0)
    pid: int
    updated_s: float


class NodeFolder:
    """A node's files (a `Store`).

    Args:
        path: The folder; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def save(self, state: Message) -> None:
        """Keep a state, instead of the one before, whole or not at all."""
        write_atomically(self.path / "state.clg", encode(state))

    def load(self) -> Message | None:
        """Return the state that was kept, if one was; a damaged one is none, and said."""
        path = self.path / "state.clg"
        if not path.is_file():
            return None
        data = path.read_bytes()
        try:
            return decode(data, len(data))
        except MessageError as fault:
            _log.warning("%s is damaged (%s) and left out", path, fault.message)
            return None

    @property
    def parent(self) -> NodeId | None:
        """Whose child the node was when it last ran; None where that is not known, or it has none."""
        path = self.path / "status.json"
        if not path.is_file():
            return None
        try:
            return read_json(NodeStatus, path).parent
        except ConfigError as fault:
            _log.warning("%s It is left out", fault.message)
            return None

    def note(self, lines: Iterable[NodeRound], name: str = "rounds.jsonl") -> None:
        """Add lines to a file of records."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.writelines(line.model_dump_json(exclude_none=True) + "\n" for line in lines)

    def show(self, node: Node, now_s: float) -> None:
        """Write where a node stands."""
        status = NodeStatus(
            node=node.id,
            parent=node.parent,
            children=tuple(sorted(node.children)),
            phase=node.phase,
            round=node.round,
            pid=os.getpid(),
            updated_s=now_s,
        )
        write_atomically(self.path / "status.json", status.to_json())


def serve(node: Node, transport: Transport, folder: NodeFolder, clock: RealClock, stop: Stop) -> None:
    """Run a node until its federation ends, or until it is asked to stop; its state stays on disk.

    Raises:
        ColledgeError: The federation cannot go on, or the node is refused.
    """
    shown: tuple[object, ...] = ()
    outgoing = node.start()
    while not stop.asked:
        if node.parent is None and node.records:
            folder.note(node.records, f"../{LINES}")
            node.records = []
        state = (node.phase, node.round, frozenset(node.children))
        if state != shown:
            folder.show(node, clock.now_s())
            shown = state
        if outgoing:
            outgoing = _send(node, transport, outgoing, clock.now_s())
            continue
        if node.is_finished:
            return
        due_s = _TICK_S if node.wake_at_s is None else node.wake_at_s - clock.now_s()
        arrived = transport.receive(min(max(due_s, 0.0), _TICK_S))
        while arrived is not None:
            sender, message, num_bytes = arrived
            arrived = transport.receive(0.0)
            if arrived is not None and _supersedes(arrived[0], arrived[1], sender, message):
                continue
            outgoing += node.take(sender, message, num_bytes)
        if due_s <= 0:  # after what has arrived: a parent that hangs makes every send late, and children wait
            outgoing += node.wake()


def _supersedes(sender: NodeId, message: Message, before: NodeId, old: Message) -> bool:
    """Return whether a task makes an older one of the same parent, not yet begun, useless."""
    return sender == before and message.kind is Kind.TASK and old.kind is Kind.TASK


def _send(node: Node, transport: Transport, outgoing: list[Outgoing], now_s: float) -> list[Outgoing]:
    """Send messages, side by side where they go to several neighbours; return what the node says to faults.

    A child that hangs is given up in half of the time that it has to answer: the others' answers wait meanwhile.
    """
    until_s = node.answers_until_s

    def send(one: Outgoing) -> int | None:
        size = sum(tensor.nbytes for tensor in one.message.payload.tensors.values())
        limit_s = _SEND_S + size / _SLOWEST_BYTES_PER_S
        if one.message.kind is Kind.TASK and until_s is not None:
            limit_s = min(limit_s, max(until_s - now_s, 0.0) / 2)
        try:
            return transport.send(one.target, one.message, limit_s)
        except TransportError as fault:
            _log.warning("%s: a %s to %s: %s", node.id, one.message.kind.value, one.target, fault.message)
            return None

    with ThreadPoolExecutor(min(_MOST_AT_ONCE, len(outgoing))) as pool:
        sizes = list(pool.map(send, outgoing))
    answers: list[Outgoing] = []
    for one, size in zip(outgoing, sizes, strict=True):
        if size is None:
            answers += node.undelivered(one)
        else:
            node.delivered(one, size)
    return answers
