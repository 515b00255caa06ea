"""A driver for NVIDIA FLARE's CellNet: frames over mutual TLS 1.3, between nodes that know each other.

FLARE's own TCP driver shakes hands in the thread that accepts, so that one silent stranger keeps all others out;
trusts every authority that the system trusts; reads up to 2 GiB on the word of the peer; and waits for a lost peer as
long as the kernel does. Here each connection has a thread and a deadline, one authority counts, the peer's certificate
must name a neighbour before a byte of it is read, and frames are limited.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.connection import Connection
from nvflare.fuel.f3.drivers.base_driver import BaseDriver
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverCap, DriverParams
from nvflare.fuel.f3.sfm.prefix import PREFIX_LEN, Prefix

from colledge.errors import one_line
from colledge.federation.certificates import AUTHORITY_CERTIFICATE, NODE_CERTIFICATE, NODE_KEY
from colledge.federation.transport import NodeId
from colledge.units import format_bytes

SCHEME = "colledge"
ENDS = "ends"  # where a cell's credentials hold `Ends`
CHUNK_BYTES = 4 * 1024**2
RETRY_S = 1.0
_MOST_FRAME_BYTES = PREFIX_LEN + CHUNK_BYTES + 64 * 1024  # headers are at most that by their format
TICK_S = 0.2  # how soon a thread that waits sees that it should end
_HANDSHAKE_S = 10.0
_FRAME_S = 30.0  # for frames that nobody waits for: answers, and CellNet's own
_SAME_LINE_S = 60.0
_PIECE_BYTES = 64 * 1024

_log = logging.getLogger("colledge.federation")
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@contextmanager
def sending_until(deadline: float) -> Iterator[None]:
    """Bound the frames that this thread sends inside, by a time of `time.monotonic`."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


class RefusalLog:
    """Logs what is refused in one line each; the same again only after a minute, since peers try again."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, who: str, why: str) -> None:
        """Log that `who` was refused, and why."""
        now, line = time.monotonic(), f"refused {who}: {why}"
        with self._lock:
            self._last = {known: when for known, when in self._last.items() if now - when < _SAME_LINE_S}
            is_new = self._last.setdefault(line, now) == now
        if is_new:
            _log.warning("%s", line)


@dataclass
class Ends:
    """What one end of a star of connections needs: its own proof, whom it takes, and where it listens or connects."""

    folder: Path
    neighbours: frozenset[NodeId]
    refuse: RefusalLog
    address: tuple[str, int] = ("", 0)
    listener: socket.socket | None = None
    context: ssl.SSLContext = field(init=False)

    def __post_init__(self) -> None:
        """Read the certificates."""
        server = self.listener is not None
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.check_hostname = False  # names are checked, hosts may move
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_verify_locations(self.folder / AUTHORITY_CERTIFICATE)
        self.context.load_cert_chain(self.folder / NODE_CERTIFICATE, self.folder / NODE_KEY)


class InTurn(Executor):
    """Runs tasks in the thread that submits them, in place of CellNet's pool of a hundred threads.

    So the frames of a connection are handled in their order, a peer that sends faster than they are handled has to
    wait, and an answer that arrived before its connection ended is seen.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._ended = False

    def submit(self, task: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        """Run a task; return nothing that is of use.

        Raises:
            RuntimeError: Shut down.
        """
        with self._changed:
            if self._ended:
                raise RuntimeError("shut down")
            self._running += 1
        try:
            task(*arguments, **keywords)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()
        return Future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, and wait for those that run."""
        with self._changed:
            self._ended = True
            if wait:
                self._changed.wait_for(lambda: self._running == 0)


class TlsDriver(BaseDriver):  # type: ignore[misc]
    """Opens connections for one cell: accepts its children, or connects to its parent again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[threading.Thread, TlsConnection] = {}
        self._meeting = threading.Lock()

    @staticmethod
    def supported_transports() -> list[str]:
        """Return the scheme of addresses that this driver is for."""
        return [SCHEME]

    @staticmethod
    def capabilities() -> dict[str, Any]:
        """Return what CellNet may ask of it."""
        return {DriverCap.SEND_HEARTBEAT.value: True, DriverCap.SUPPORT_SSL.value: True}

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """Refuse to choose an address: nodes are told theirs."""
        raise CommError(CommError.NOT_SUPPORTED, f"{scheme} needs an address")

    def listen(self, connector: ConnectorInfo) -> None:
        """Accept connections until the connector stops; each has a thread of its own."""
        ends: Ends = connector.params[ENDS]
        assert ends.listener is not None
        while not connector.stopped.is_set():
            try:
                plain, address = ends.listener.accept()
            except TimeoutError:
                continue
            except OSError:
                connector.stopped.wait(TICK_S)  # as many files are open as may be
                continue
            try:
                connection = TlsConnection(connector, ends, plain, address[0])
            except OSError:  # the peer has left already
                plain.close()
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="federation", daemon=True)
            self._open = {one: held for one, held in self._open.items() if one.is_alive()}
            self._open[thread] = connection
            thread.start()
        for thread in self._open:
            thread.join()

    def connect(self, connector: ConnectorInfo) -> None:
        """Connect to the parent, and again when the connection ends, until the connector stops."""
        ends: Ends = connector.params[ENDS]
        while not connector.stopped.is_set():
            with suppress(OSError):  # a parent that is not there yet, or no more
                plain = socket.create_connection(ends.address, timeout=_HANDSHAKE_S)
                connection = TlsConnection(connector, ends, plain, "{}:{}".format(*ends.address))
                self._open = {threading.current_thread(): connection}
                self._serve(connection)
            connector.stopped.wait(RETRY_S)

    def shutdown(self) -> None:
        """End all connections; CellNet has told `listen` or `connect` to end."""
        for connection in self._open.values():
            connection.close()

    def _serve(self, connection: TlsConnection) -> None:
        """Serve one connection until it ends."""
        try:
            if connection.shake_hands():
                self.add_connection(connection)
                try:
                    connection.read_frames(self._meeting)
                finally:
                    connection.close()
                    with self._meeting:  # CellNet would forget a peer whose next connection greets meanwhile
                        self.close_connection(connection)
        finally:
            connection.encrypted.close()


class TlsConnection(Connection):  # type: ignore[misc]
    """One connection to a neighbour: frames in, frames out. What has to wait ends when the connection is closed."""

    def __init__(self, connector: ConnectorInfo, ends: Ends, plain: socket.socket, where: str) -> None:
        super().__init__(connector)
        _notice_lost_peers(plain)
        plain.setblocking(False)
        self.encrypted = ends.context.wrap_socket(
            plain, server_side=ends.listener is not None, do_handshake_on_connect=False
        )
        self._ends = ends
        self._who = where
        self._closing = connector.stopped
        self._closed = threading.Event()
        self._lock = threading.Lock()  # OpenSSL's connections are not for two threads at once

    def shake_hands(self) -> bool:
        """Return whether the peer proved to be a neighbour."""
        try:
            self._when_ready(self.encrypted.do_handshake, time.monotonic() + _HANDSHAKE_S)
        except (OSError, ValueError) as fault:  # of which ssl.SSLError is one
            if not self._has_ended():
                self._refuse(f"no TLS with a certificate of this federation ({_reason(fault)})")
            return False
        name = _common_name(self.encrypted)
        if name not in self._ends.neighbours:
            self._refuse(f"it is node {name!r}, wanted one of {', '.join(sorted(self._ends.neighbours))}")
            return False
        self._who = name
        return True

    def get_conn_properties(self) -> dict[str, str]:
        """Return who the peer is, by its certificate."""
        return {DriverParams.PEER_CN.value: self._who}

    def close(self) -> None:
        """End the connection; the thread that serves it frees it."""
        self._closed.set()
        with suppress(OSError):  # not SSLSocket.shutdown: what is sent after that is not encrypted
            socket.socket.shutdown(self.encrypted, socket.SHUT_RDWR)

    def send_frame(self, frame: bytes | bytearray | memoryview) -> None:
        """Send a frame; one that is not sent by its deadline ends the connection, for half of it may be gone.

        Raises:
            CommError: The connection ended, or the deadline passed.
        """
        rest = memoryview(frame)
        deadline = _deadline.get() or time.monotonic() + _FRAME_S
        try:
            while rest:
                piece = rest[:_PIECE_BYTES]
                rest = rest[self._when_ready(partial(self.encrypted.send, piece), deadline) :]
        except (OSError, ValueError) as fault:
            self.close()
            raise CommError(CommError.CLOSED, _reason(fault)) from None

    def read_frames(self, meeting: threading.Lock) -> None:
        """Read frames until the connection ends, or a frame is none; CellNet handles each before the next is read.

        Two ends that both send do not block each other: an end that answers a part has read all that the other sends
        until that answer.

        Args:
            meeting: Held while CellNet handles the peer's greeting.
        """
        try:
            greeting = self._read_frame()
            with meeting:
                self.process_frame(greeting)
            if not self._has_greeted():
                self._refuse("it does not greet as the cell of its node")
                return
            while True:
                self.process_frame(self._read_frame())
        except (OSError, ValueError) as fault:
            if self._has_ended():
                return
            if not isinstance(fault, ConnectionError):
                self._refuse(_reason(fault))
            elif not self._has_greeted():
                self._refuse("it ended the connection before it greeted; it may not know this node")

    def _has_greeted(self) -> bool:
        """Return whether CellNet has found the peer's greeting to be of the node that its certificate names."""
        return self.frame_receiver.conn.sfm_endpoint is not None

    def _read_frame(self) -> bytearray:
        head = bytearray(PREFIX_LEN)
        self._read_into(memoryview(head))
        length = Prefix.from_bytes(head).length
        if not PREFIX_LEN <= length <= _MOST_FRAME_BYTES:
            raise ValueError(
                f"a frame of {format_bytes(length)}, the limit is {format_bytes(_MOST_FRAME_BYTES)}"
            )
        frame = bytearray(length)
        frame[:PREFIX_LEN] = head
        self._read_into(memoryview(frame)[PREFIX_LEN:])
        return frame

    def _read_into(self, rest: memoryview) -> None:
        """Fill a buffer."""
        while rest:
            count = self._when_ready(partial(self.encrypted.recv_into, rest), float("inf"))
            if count == 0:
                raise ConnectionResetError
            rest = rest[count:]

    def _when_ready(self, action: Callable[[], Any], deadline: float) -> Any:
        """Do what may have to wait for the peer.

        Raises:
            OSError: The connection broke or was closed here, or the deadline passed.
        """
        while not self._has_ended():
            try:
                with self._lock:
                    return action()
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            if time.monotonic() >= deadline:
                raise TimeoutError("the peer did not read or answer in time")
            poll = select.poll()
            poll.register(self.encrypted, event)
            poll.poll(TICK_S * 1000.0)
        raise ConnectionAbortedError("closed")

    def _has_ended(self) -> bool:
        return self._closed.is_set() or self._closing.is_set()

    def _refuse(self, why: str) -> None:
        self._ends.refuse(self._who, why)


def _common_name(encrypted: ssl.SSLSocket) -> str:
    """Return whose certificate the peer showed; the handshake has verified it."""
    subject: Any = (encrypted.getpeercert() or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else ""


def _notice_lost_peers(sock: socket.socket) -> None:
    """Send at once, and end a connection whose peer has gone without a word (no power, no network) in 25 s."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 25_000),
    ):
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _reason(fault: Exception) -> str:
    """Return a fault in some words, on one line."""
    verify = getattr(fault, "verify_message", "")
    return verify or getattr(fault, "reason", None) or one_line(fault, most=120)
