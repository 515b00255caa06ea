"""Messages over NVIDIA FLARE's CellNet: each node and its children are a star of cells, over mutual TLS.

    cloud: cell "server" ◀── "~edge-1"            one star; a cell is named after its node, a star's root "server"
                         ◀── "~edge-2" of edge-2, which is also
                             cell "server" ◀── "~phone-7"

CellNet connects, greets and carries requests and answers. Of what else its cells can do, nothing is left reachable: a
cell here knows no other cell of its process, forwards nothing, never decodes FOBS (objects of classes that the sender
names), and takes one kind of request, from neighbours, whose certificates name them.

A message travels in parts, each acknowledged, so that it is refused at its first part if it is too large, and no more
of it than one part is in flight; a round trip for each 4 MiB is the price.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from nvflare.fuel.f3.cellnet.core_cell import CellAgent, CoreCell
from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey, MessagePropKey, MessageType, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply, new_cell_message
from nvflare.fuel.f3.communicator import driver_mgr
from nvflare.fuel.f3.message import Message as CellMessage
from nvflare.fuel.f3.stats_pool import StatsPoolManager

from colledge.errors import ConfigError
from colledge.federation import certificates
from colledge.federation.message import DEFAULT_LIMIT_BYTES, Message, MessageError, decode, encode
from colledge.federation.tls import (
    CHUNK_BYTES,
    ENDS,
    RETRY_S,
    SCHEME,
    TICK_S,
    Ends,
    InTurn,
    RefusalLog,
    TlsDriver,
    sending_until,
)
from colledge.federation.transport import NodeId, TransportError
from colledge.units import format_bytes

_CHANNEL, _TOPIC = "colledge", "message"
_SIZE, _OFFSET = "size", "offset"
_MOST_ERROR_CHARACTERS = 300
_MOST_SHOWN = 80


class CellNetTransport:
    """Carries messages between a node and its parent and children.

    A child connects to its parent again whenever the connection ends. Another parent means another transport. A
    transport that is not closed keeps its process from ending.

    Args:
        node: This node's id.
        folder: Its `ca.crt`, `node.crt` and `node.key`.
        parent: The parent's id and "host:port"; None for the root.
        listen: "host:port" for children to connect to; None for a leaf.
        children: Ids of the nodes that may connect.
        limit_bytes: Larger messages are refused.

    Raises:
        ConfigError: The folder does not prove that this is the node, or an address is none.
        TransportError: The address to listen at is not free.
    """

    def __init__(
        self,
        node: NodeId,
        folder: Path,
        parent: tuple[NodeId, str] | None = None,
        listen: str | None = None,
        children: Collection[NodeId] = (),
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        certificates.check(folder, node)
        _prepare_nvflare()
        self._node = node
        self._limit_bytes = limit_bytes
        self._refuse = RefusalLog()
        self._inbox: queue.Queue[tuple[NodeId, Message, int]] = queue.Queue()
        self._neighbours: dict[NodeId, _Neighbour] = {}
        self._cells: list[_Cell] = []
        self._listener: socket.socket | None = None
        if parent is not None:
            ends = Ends(folder, frozenset({parent[0]}), self._refuse, address=_parse_address(parent[1]))
            self._add_cell(_name(node), {FQCN.ROOT_SERVER: parent[0]}, ends)
        if listen is not None:
            self._listener = _listen_at(_parse_address(listen))
            ends = Ends(folder, frozenset(children), self._refuse, listener=self._listener)
            self._add_cell(FQCN.ROOT_SERVER, {_name(child): child for child in children}, ends)

    def _add_cell(self, name: str, nodes: Mapping[str, NodeId], ends: Ends) -> None:
        cell = _Cell(name, self._node, nodes, ends)
        cell.register_request_cb(_CHANNEL, _TOPIC, self._take, cell)
        cell.start()
        self._cells.append(cell)
        self._neighbours |= {node: _Neighbour(cell, other) for other, node in nodes.items()}

    def send(self, target: NodeId, message: Message, timeout_s: float) -> int:
        """Hand a message to a neighbour; return its bytes once the neighbour has it.

        A parent that is away is waited for until `timeout_s`, a child only as long as it takes to connect again. After
        an error, the neighbour may have the message nevertheless.

        Raises:
            TransportError: The neighbour cannot be reached, refused it, or has not taken it within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        neighbour = self._neighbours.get(target)
        if neighbour is None:
            raise TransportError(f"{target!r} is no neighbour of {self._node!r}.")
        if not neighbour.turn.acquire(timeout=max(0.0, timeout_s)):
            raise TransportError(f"{target}: still taking another message after {timeout_s:g} s.")
        try:
            if not neighbour.wait_until_connected(deadline):
                raise TransportError(f"{target}: not connected.")
            data = encode(message)
            with sending_until(deadline):
                for offset in range(0, len(data), CHUNK_BYTES):
                    self._send_part(target, neighbour, data, offset, deadline)
        finally:
            neighbour.turn.release()
        return len(data)

    def _send_part(
        self, target: NodeId, neighbour: _Neighbour, data: bytes, offset: int, deadline: float
    ) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0.0:
            raise TransportError(f"{target}: has {offset} of {len(data)} bytes at the deadline.")
        part = memoryview(data)[offset : offset + CHUNK_BYTES]
        reply = neighbour.cell.ask(neighbour.name, {_SIZE: len(data), _OFFSET: offset}, part, left_s)
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if code == ReturnCode.OK:
            return
        if code == ReturnCode.INVALID_REQUEST:
            why = "".join(
                one if one.isprintable() else " " for one in str(reply.get_header(MessageHeaderKey.ERROR))
            )
            raise TransportError(f"{target}: refused the message: {why[:_MOST_ERROR_CHARACTERS]}")
        if code == ReturnCode.TIMEOUT and time.monotonic() >= deadline:
            raise TransportError(f"{target}: did not confirm byte {offset} of {len(data)} by the deadline.")
        raise TransportError(f"{target}: the connection ended at byte {offset} of {len(data)}.")

    def receive(self, timeout_s: float) -> tuple[NodeId, Message, int] | None:
        """Return the next message, its sender and its bytes; None after `timeout_s` without one."""
        try:
            return self._inbox.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def close(self) -> None:
        """End all connections, and with them what waits in `send`."""
        for cell in self._cells:
            cell.leave()
        if self._listener is not None:
            self._listener.close()

    def _take(self, request: CellMessage, cell: _Cell) -> CellMessage:
        """Take a part of a message; with the last one, decode it and put it into the inbox."""
        sender = cell.nodes[request.get_prop(MessagePropKey.ENDPOINT).name]
        try:
            data = self._neighbours[sender].add(request, self._limit_bytes)
            if data is not None:
                self._inbox.put((sender, decode(data, self._limit_bytes), len(data)))
        except MessageError as fault:
            self._refuse(sender, str(fault))
            return make_reply(ReturnCode.INVALID_REQUEST, str(fault))
        return make_reply(ReturnCode.OK)


@dataclass
class _Neighbour:
    """A neighbour's cell, as one of ours sees it, and what has arrived of its next message."""

    cell: _Cell
    name: str
    turn: threading.Lock = field(default_factory=threading.Lock)
    _adding: threading.Lock = field(default_factory=threading.Lock)
    _arrived: bytearray = field(default_factory=bytearray)

    def wait_until_connected(self, deadline: float) -> bool:
        if self.name != FQCN.ROOT_SERVER:
            deadline = min(deadline, time.monotonic() + 2.0 * RETRY_S)
        return self.cell.wait_until_connected(self.name, deadline)

    def add(self, request: CellMessage, limit_bytes: int) -> bytes | None:
        """Add a part; return the message once it is whole."""
        size, offset = request.get_header(_SIZE), request.get_header(_OFFSET)
        part = request.payload or b""
        if type(size) is not int or type(offset) is not int:
            raise MessageError("a part of a message that says neither its size nor its place.")
        if size > limit_bytes:
            raise MessageError(
                f"a message of {format_bytes(size)}, the limit is {format_bytes(limit_bytes)}.",
                fix="raise message_limit in federation.yaml, if the sender is right.",
            )
        with self._adding:
            if offset == 0:
                self._arrived = bytearray()
            if offset != len(self._arrived) or offset + len(part) > size:
                raise MessageError(f"{len(part)} bytes at {offset} of {size}, after {len(self._arrived)}.")
            self._arrived += part
            if len(self._arrived) < size:
                return None
            data, self._arrived = bytes(self._arrived), bytearray()
            return data


class _Cell(CoreCell):  # type: ignore[misc]
    """One cell of a star, which knows no cell but its neighbours and speaks of nothing but messages."""

    __module__ = CoreCell.__module__  # by which CellNet names its logger; else its lines would be ours

    def __init__(self, name: str, node: NodeId, nodes: Mapping[str, NodeId], ends: Ends) -> None:
        self.ALL_CELLS: dict[str, CoreCell] = {}  # else cells of a process meet past their connections
        with StatsPoolManager.lock:
            kept = set(StatsPoolManager.pools)
            super().__init__(
                fqcn=name,
                root_url=f"{SCHEME}://{node}",
                secure=True,
                credentials={ENDS: ends},
                auth_identity=node,
                auth_identity_map=dict(nodes),
            )
            for pool in (
                set(StatsPoolManager.pools) - kept
            ):  # else this process gets no second cell of that name
                del StatsPoolManager.pools[pool]
        self.communicator.conn_manager.frame_mgr_executor.shutdown()
        self.communicator.conn_manager.frame_mgr_executor = self._handling = InTurn()
        self.running: bool = False
        self.nodes = nodes
        self._refuse = ends.refuse
        self._changed = threading.Condition()
        self.add_incoming_filter("*", "*", self._screen)
        self.set_cell_connected_cb(self._connected)
        self.set_cell_disconnected_cb(self._disconnected)

    def ask(self, name: str, headers: Mapping[str, int], part: memoryview, timeout_s: float) -> CellMessage:
        """Send a part to a neighbour's cell; return its answer, whose header has CellNet's return code."""
        try:
            return self.send_request(
                channel=_CHANNEL,
                topic=_TOPIC,
                target=name,
                request=new_cell_message(dict(headers), part),
                timeout=timeout_s,
                optional=True,
            )
        except RuntimeError:  # closed meanwhile
            return make_reply(ReturnCode.COMM_ERROR)

    def wait_until_connected(self, name: str, deadline: float) -> bool:
        """Return whether a neighbour's cell is connected before the deadline."""
        with self._changed:
            self._changed.wait_for(
                lambda: name in self.agents or not self.running, timeout=max(0.0, deadline - time.monotonic())
            )
        return self.running and name in self.agents

    def leave(self) -> None:
        """Acknowledge what was taken, and close all connections. Not CoreCell.stop, which asks the neighbours first."""
        if not self.running:
            return
        self.running = False
        self._connected(None)
        self._release(list(self.waiters.values()))
        self._handling.shutdown()
        self.communicator.stop()

    def _screen(self, message: CellMessage) -> CellMessage | None:
        """Return something for what is not to be looked at; called before CellNet decodes, forwards or answers."""
        endpoint = message.get_prop(MessagePropKey.ENDPOINT).name
        header = message.get_header
        what = tuple(
            map(header, (MessageHeaderKey.MSG_TYPE, MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC))
        )
        encoding = header(MessageHeaderKey.PAYLOAD_ENCODING)
        named = message.get_prop(MessagePropKey.COMMON_NAME)
        if self.nodes.get(endpoint) != named:
            why = f"it speaks as cell {endpoint!r}"
        elif (
            header(MessageHeaderKey.ORIGIN) != endpoint
            or header(MessageHeaderKey.DESTINATION) != self.get_fqcn()
        ):
            why = "it relays between others"
        elif what not in ((MessageType.REQ, _CHANNEL, _TOPIC), (MessageType.REPLY, _CHANNEL, _TOPIC)):
            why = f"{str(what)[:_MOST_SHOWN]} is no message"
        elif encoding not in (Encoding.BYTES, Encoding.NONE):
            why = "it sends objects, not bytes"
        else:
            return None
        self._refuse(named, why)
        return make_reply(ReturnCode.INVALID_REQUEST)

    def _connected(self, _agent: CellAgent | None) -> None:
        with self._changed:
            self._changed.notify_all()

    def _disconnected(self, agent: CellAgent) -> None:
        """End what waits for an answer of a cell that has gone."""
        self._release([one for one in list(self.waiters.values()) if agent.get_fqcn() in one.targets])

    @staticmethod
    def _release(waiters: list[threading.Event]) -> None:
        for waiter in waiters:
            waiter.set()


def _name(node: NodeId) -> str:
    """Return the name of a node's cell below its parent's: a dot would mean a cell below a cell."""
    return "~" + node.replace(".", "~")


def _parse_address(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        if parts.hostname and parts.port is not None and parts.netloc == address:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"address {address!r}, wanted host:port.", fix='write such as "edge1.lan:9100".')


def _listen_at(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    try:
        listener = socket.create_server(address, family=family)
    except OSError as fault:
        why = str(fault.strerror).partition(" (")[0]  # Python adds the address to it
        raise TransportError(
            f"cannot listen at {address[0]}:{address[1]} ({why}).",
            fix="end what listens there, or give the node another address.",
        ) from None
    listener.settimeout(TICK_S)
    return listener


def _prepare_nvflare() -> None:
    """Make our driver known to CellNet, and CellNet quiet unless a level was set for its loggers."""
    logger = logging.getLogger("nvflare")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)
    if driver_mgr.find_driver_class(SCHEME) is None:
        driver_mgr.register(TlsDriver)
