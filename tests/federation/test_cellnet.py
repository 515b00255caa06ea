"""Messages between real processes over real TLS: what arrives, what is refused, and what happens when nodes die."""

from __future__ import annotations

import itertools
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessageType
from nvflare.fuel.f3.cellnet.utils import new_cell_message

from colledge.errors import ConfigError
from colledge.federation import tls
from colledge.federation.cellnet import CellNetTransport
from colledge.federation.certificates import issue, make_authority
from colledge.federation.transport import TransportError
from tests.federation.nodes import (
    Node,
    digest,
    free_port,
    lines,
    message_of,
    receive,
    send,
    send_bytes,
)

LIMIT_BYTES = 32 * 1024**2
seeds = itertools.count(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of nodes of one federation, and of some that are none."""
    root = tmp_path_factory.mktemp("federation")
    make_authority(root / "authority")
    for node in ("cloud", "a", "b", "edge.lan", "stranger"):
        issue(root / "authority", node, ["localhost"], root / node)
    make_authority(root / "other-authority")
    issue(root / "other-authority", "a", ["localhost"], root / "a-of-another-authority")
    (root / "a-of-another-authority" / "ca.crt").write_bytes((root / "authority" / "ca.crt").read_bytes())
    past = datetime.now(timezone.utc) - timedelta(days=400)
    issue(root / "authority", "a", ["localhost"], root / "a-of-last-year", valid_days=365, now=past)
    return root


class Star:
    """A cloud and its children a and b, each a process."""

    def __init__(self, folders: Path) -> None:
        self.folders = folders
        self.address = f"127.0.0.1:{free_port()}"
        self.cloud = Node(
            folders / "cwd",
            node="cloud",
            folder=folders / "cloud",
            listen=self.address,
            children=("a", "b"),
            limit_bytes=LIMIT_BYTES,
        )
        self.a, self.b = self.child("a"), self.child("b")

    def child(self, node: str, folder: str = "", unchecked: bool = False) -> Node:
        parent = ("cloud", self.address)
        cwd = self.folders / "cwd"
        return Node(cwd, unchecked, node=node, folder=self.folders / (folder or node), parent=parent)

    def good_messages_arrive(self) -> None:
        for node in (self.a, self.b):
            seed = next(seeds)
            node(send, "cloud", 1000, seed)
            assert self.cloud(receive) == (node.name, digest(message_of(1000, seed)))
            self.cloud(send, node.name, 1000, seed)
            assert node(receive) == ("cloud", digest(message_of(1000, seed)))
        assert self.cloud(receive, 0.0) is None


@pytest.fixture(scope="module")
def whole_star(folders: Path) -> Iterator[Star]:
    star = Star(folders)
    star.good_messages_arrive()
    yield star
    for node in (star.a, star.b, star.cloud):
        node.close()
    assert list((folders / "cwd").iterdir()) == []  # CellNet writes nothing


@pytest.fixture
def star(whole_star: Star) -> Iterator[Star]:
    """The star, which must be well again after every test."""
    yield whole_star
    for node in (whole_star.cloud, whole_star.a, whole_star.b):
        if not node.process.is_alive():
            node.start()
    whole_star.good_messages_arrive()


def await_refusal(node: Node, why: str) -> None:
    """Wait until a node has logged one thing that begins so, and nothing else."""
    deadline = time.monotonic() + 20.0
    logged: list[str] = []
    while not logged and time.monotonic() < deadline:
        logged = refusals(node)
        time.sleep(0.02)
    assert [line for line in logged if not line.startswith(why)] == []
    assert logged


def refusals(node: Node) -> list[str]:
    """Return what a node refused since the last call; it must have logged nothing else."""
    logged: list[str] = node(lines)
    start = "colledge.federation: refused "
    assert all(line.startswith(start) for line in logged), logged
    return [line.removeprefix(start) for line in logged]


@pytest.mark.parametrize("num_bytes", [1000, 20_000_000])
def test_tensors_arrive_as_they_were(star: Star, num_bytes: int) -> None:
    for node in (star.a, star.b):
        seed = next(seeds)
        star.cloud(send, node.name, num_bytes, seed)
        assert node(receive) == ("cloud", digest(message_of(num_bytes, seed)))
        node(send, "cloud", num_bytes, seed)
        assert star.cloud(receive) == (node.name, digest(message_of(num_bytes, seed)))
    assert refusals(star.cloud) == refusals(star.a) == refusals(star.b) == []


def test_both_children_send_at_once(star: Star) -> None:
    for node, seed in ((star.a, 101), (star.b, 102)):
        node.tell(send, "cloud", 20_000_000, seed)
    star.cloud(send, "a", 20_000_000, 103)
    star.a.answer()
    star.b.answer()
    assert star.a(receive) == ("cloud", digest(message_of(20_000_000, 103)))
    expected = {("a", digest(message_of(20_000_000, 101))), ("b", digest(message_of(20_000_000, 102)))}
    assert {star.cloud(receive), star.cloud(receive)} == expected


def test_a_child_that_died_comes_back(star: Star) -> None:
    star.a.kill()
    start = time.monotonic()
    with pytest.raises(TransportError, match="a: "):
        star.cloud(send, "a", 1000, 0, 30.0)
    assert time.monotonic() - start < 10.0  # a parent does not wait long: its child greets when it is back
    seed = next(seeds)
    star.b(send, "cloud", 1000, seed)
    assert star.cloud(receive) == ("b", digest(message_of(1000, seed)))


@pytest.mark.parametrize(
    "num_bytes", [1000, 20_000_000]
)  # while its answer is awaited, or while it is sent to
def test_a_child_that_dies_in_the_middle_is_noticed_at_once(star: Star, num_bytes: int) -> None:
    star.a.signal(signal.SIGSTOP)
    star.cloud.tell(send, "a", num_bytes, 0, 30.0)
    time.sleep(0.3)
    assert not star.cloud.pipe.poll()
    star.a.kill()
    start = time.monotonic()
    with pytest.raises(TransportError, match="a: the connection ended at byte"):
        star.cloud.answer()
    assert time.monotonic() - start < 10.0


def test_a_child_that_hangs_is_given_up_at_the_deadline(star: Star) -> None:
    """Also when its kernel takes no more: the first message is in buffers, the next ones do not fit."""
    star.a.signal(signal.SIGSTOP)
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(TransportError, match="a: "):
            star.cloud(send, "a", 20_000_000, 0, 1.0)
        assert time.monotonic() - start < 3.0
    star.a.signal(signal.SIGCONT)
    with suppress(TransportError):  # the first thing that it sees is that its connection has ended
        star.a(send, "cloud")
        star.cloud(receive)


def test_a_parent_that_died_comes_back(star: Star) -> None:
    star.cloud.kill()
    start = time.monotonic()
    with pytest.raises(TransportError, match="cloud: "):
        star.a(send, "cloud", 1000, 0, 1.0)
    assert time.monotonic() - start < 3.0
    star.b.tell(send, "cloud", 1000, 7, 20.0)  # waits for the parent
    star.cloud.start()
    star.b.answer()
    assert star.cloud(receive) == ("b", digest(message_of(1000, 7)))


@pytest.mark.parametrize(
    ("node", "folder", "why"),
    [
        ("a", "a-of-another-authority", "127.0.0.1: no TLS with a certificate of this federation"),
        (
            "a",
            "a-of-last-year",
            "127.0.0.1: no TLS with a certificate of this federation (certificate has expired)",
        ),
        ("a", "b", "b: it does not greet as the cell of its node"),
        ("stranger", "stranger", "127.0.0.1: it is node 'stranger', wanted one of a, b"),
        ("cloud", "cloud", "127.0.0.1: it is node 'cloud', wanted one of a, b"),
    ],
)
def test_who_is_not_who_it_says_is_refused(star: Star, node: str, folder: str, why: str) -> None:
    refusals(star.cloud)
    star.b.kill()  # its certificate is the impostor's
    impostor = star.child(node, folder, unchecked=True)
    with pytest.raises(TransportError, match="cloud: "):
        impostor(send, "cloud", 1000, 0, 0.3)
    await_refusal(star.cloud, why)
    with pytest.raises(TransportError, match="cloud: "):
        impostor(send, "cloud", 1000, 0, 0.3)
    impostor.close()


@pytest.mark.parametrize(
    ("folder", "why"),
    [
        ("b", "it is node 'b', wanted one of cloud"),
        ("a-of-last-year", "no TLS with a certificate of this federation (certificate has expired)"),
        ("a-of-another-authority", "no TLS with a certificate of this federation"),
    ],
)
def test_a_child_takes_no_other_parent(star: Star, folder: str, why: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    cwd = star.folders / "cwd"
    impostor = Node(
        cwd, True, node="cloud", folder=star.folders / folder, listen=address, children=("edge.lan",)
    )
    child = Node(cwd, node="edge.lan", folder=star.folders / "edge.lan", parent=("cloud", address))
    await_refusal(child, f"{address}: {why}")
    with pytest.raises(TransportError, match="cloud: not connected"):
        child(send, "cloud", 1000, 0, 0.1)
    child.close()
    impostor.close()


def first_part(transport: CellNetTransport, size: int) -> str:
    """Send 10 bytes that claim to begin a message of some size; return the answer's error."""
    answer = transport._cells[0].ask("server", {"size": size, "offset": 0}, memoryview(bytes(10)), 10.0)
    return str(answer.get_header(MessageHeaderKey.ERROR))


def test_too_large_a_message_is_refused_at_its_first_part(star: Star) -> None:
    refusals(star.cloud)
    too_large = "a message of 40 MB, the limit is "
    with pytest.raises(TransportError, match=f"cloud: refused the message: {too_large}"):
        star.a(send, "cloud", 40_000_000)
    await_refusal(star.cloud, f"a: {too_large}")
    assert star.a(first_part, 40_000_168).startswith(too_large)
    assert star.a(first_part, LIMIT_BYTES) == "None"


ENVELOPE = b'{"schema": "colledge/message/1", "kind": "task", "round": 0, "part": 0, "fields": {}}'
NO_DTYPE_OF_TORCH = b'{"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}'


def message_bytes(envelope: bytes, tensors: bytes = b"") -> bytes:
    return b"clg1" + struct.pack("<Q", len(envelope)) + envelope + tensors


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        message_bytes(b"{}"),
        message_bytes(ENVELOPE, b"garbage"),
        message_bytes(ENVELOPE, struct.pack("<Q", len(NO_DTYPE_OF_TORCH)) + NO_DTYPE_OF_TORCH + b"x"),
        bytes(9_000_000),
    ],
)
def test_bytes_that_are_no_message_are_refused(star: Star, data: bytes) -> None:
    with pytest.raises(
        TransportError, match="cloud: refused the message: bytes that are no message of colledge's"
    ):
        star.a(send_bytes, "cloud", data)
    (line,) = refusals(star.cloud)
    assert line.startswith("a: bytes that are no message of colledge's")


def fire(
    transport: CellNetTransport, target: str, channel: str, topic: str, payload: Any, **headers: Any
) -> None:
    """Send as a child that does not keep to the rules can, past the transport."""
    transport._cells[0].fire_and_forget(channel, topic, target, new_cell_message(headers, payload))


def fire_reply(transport: CellNetTransport) -> None:
    """Answer what nobody asked, with an object, as another cell."""
    cell = transport._cells[0]
    message = new_cell_message({MessageHeaderKey.MSG_TYPE: MessageType.RETURN}, {"a": 1})
    message.add_headers({MessageHeaderKey.ORIGIN: "~a", MessageHeaderKey.DESTINATION: "server"})
    cell._send_to_endpoint(cell.agents["server"].endpoint, message)


def send_frame(transport: CellNetTransport, length: int) -> None:
    """Announce a frame of some length."""
    (connection,) = transport._cells[0].communicator.conn_manager.sfm_conns.values()
    connection.conn.send_frame(struct.pack(">IHBBHHHH", length, 0, 1, 0, 0, 1, 17, 1))


@pytest.mark.parametrize(
    ("action", "arguments", "why"),
    [
        (fire, ("server", "colledge", "message", {"an": "object"}), "a: it sends objects, not bytes"),
        (
            fire,
            ("server", "cellnet.channel", "bulk", b""),
            "a: ('req', 'cellnet.channel', 'bulk') is no message",
        ),
        (
            fire,
            ("server", "credential_manager", "key_exchange", b""),
            "a: ('req', 'credential_manager', 'key_",
        ),
        (fire, ("~b", "colledge", "message", b""), "a: it relays between others"),
        (fire_reply, (), "a: ('return', None, None) is no message"),
        (fire, ("server", "colledge", "message", b"x"), "a: a part of a message that says neither"),
        (send_frame, (1_500_000_000,), "a: a frame of 1.5 GB, the limit is 4.26 MB"),
        (send_frame, (3,), "a: a frame of 3 B"),
    ],
)
def test_a_neighbour_that_breaks_the_rules_is_refused(
    star: Star, action: Callable[..., None], arguments: tuple[Any, ...], why: str
) -> None:
    refusals(star.cloud)
    star.a(action, *arguments)
    await_refusal(star.cloud, why)
    assert star.b(receive, 0.0) is None


@pytest.mark.parametrize(
    "greeting", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(100_000)]
)
def test_strangers_disturb_nobody(star: Star, greeting: bytes) -> None:
    host, port = star.address.split(":")
    star.a.kill()
    with socket.create_connection((host, int(port)), timeout=5.0) as stranger:
        stranger.sendall(greeting)
        star.a.start()  # while the stranger stays
        star.good_messages_arrive()
    refusals(star.cloud)


def test_a_tree_in_one_process(folders: Path) -> None:
    """An inner node has a parent and children; a leaf changes its parent; nothing is left behind."""
    before = set(threading.enumerate())
    top, middle = f"127.0.0.1:{free_port()}", f"localhost:{free_port()}"
    with (
        closing(
            CellNetTransport("cloud", folders / "cloud", listen=top, children=["edge.lan", "a"])
        ) as cloud,
        closing(
            CellNetTransport(
                "edge.lan", folders / "edge.lan", parent=("cloud", top), listen=middle, children=["a"]
            )
        ) as edge,
    ):
        with closing(CellNetTransport("a", folders / "a", parent=("edge.lan", middle))) as leaf:
            for source, name, target, other in (
                (leaf, "a", edge, "edge.lan"),
                (edge, "edge.lan", cloud, "cloud"),
                (cloud, "cloud", edge, "edge.lan"),
                (edge, "edge.lan", leaf, "a"),
            ):
                assert_arrives(source, name, target, other)
            with pytest.raises(TransportError, match="'cloud' is no neighbour of 'a'"):
                leaf.send("cloud", message_of(10, 0), 1.0)
            with pytest.raises(TransportError, match="a: not connected"):
                cloud.send("a", message_of(10, 0), 0.2)
        with closing(CellNetTransport("a", folders / "a", parent=("cloud", top))) as leaf:
            assert_arrives(leaf, "a", cloud, "cloud")
            assert_arrives(cloud, "cloud", leaf, "a")
    deadline = time.monotonic() + 2.0
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left
    with socket.create_server(("127.0.0.1", int(top.split(":")[1]))):  # the address is free again
        pass


def assert_arrives(source: CellNetTransport, name: str, target: CellNetTransport, other: str) -> None:
    message = message_of(1000, next(seeds))
    num_bytes = source.send(other, message, 5.0)
    received = target.receive(0.0)  # what was acknowledged is there
    assert received is not None
    assert received[0] == name
    assert received[2] == num_bytes
    assert digest(received[1]) == digest(message)


def test_what_was_taken_is_acknowledged_before_the_end(folders: Path) -> None:
    """A node that is told to stop does so at once; whoever told it must not take it for dead."""
    address = f"127.0.0.1:{free_port()}"
    with closing(CellNetTransport("cloud", folders / "cloud", listen=address, children=["a"])) as cloud:
        for _ in range(20):
            leaf = CellNetTransport("a", folders / "a", parent=("cloud", address))
            leaf.send("cloud", message_of(10, 0), 20.0)
            stopper = threading.Thread(target=lambda leaf=leaf: leaf.receive(20.0) and leaf.close())
            stopper.start()
            cloud.send("a", message_of(10, 0), 20.0)
            stopper.join(20.0)


def test_both_ends_send_at_once_through_a_narrow_way(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that no buffer holds do not wait for each other."""
    notice = tls._notice_lost_peers

    def narrow(sock: socket.socket) -> None:
        notice(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)

    monkeypatch.setattr(tls, "_notice_lost_peers", narrow)
    address = f"127.0.0.1:{free_port()}"
    with (
        closing(CellNetTransport("cloud", folders / "cloud", listen=address, children=["a"])) as cloud,
        closing(CellNetTransport("a", folders / "a", parent=("cloud", address))) as leaf,
    ):
        message = message_of(13_000_000, 1)
        leaf.send("cloud", message_of(10, 0), 20.0)
        sender = threading.Thread(target=cloud.send, args=("a", message, 20.0))
        sender.start()
        leaf.send("cloud", message, 20.0)
        sender.join()
        for receiver in (cloud, cloud, leaf):
            received = receiver.receive(0.0)
            assert received is not None
        assert digest(received[1]) == digest(message)


def test_closing_ends_what_waits(folders: Path) -> None:
    transport = CellNetTransport("a", folders / "a", parent=("cloud", f"127.0.0.1:{free_port()}"))
    faults: list[Exception] = []

    def wait() -> None:
        try:
            transport.send("cloud", message_of(10, 0), 30.0)
        except TransportError as fault:
            faults.append(fault)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    start = time.monotonic()
    transport.close()
    thread.join(2.0)
    assert time.monotonic() - start < 2.0
    assert len(faults) == 1
    transport.close()  # twice is once
    with pytest.raises(TransportError):
        transport.send("cloud", message_of(10, 0), 30.0)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"node": "b"}, "of node 'a', wanted 'b'"),
        ({"parent": ("cloud", "localhost")}, "address 'localhost', wanted host:port"),
        ({"parent": ("cloud", "stcp://localhost:1")}, "address 'stcp://localhost:1', wanted host:port"),
        ({"listen": "localhost:99999"}, "address 'localhost:99999', wanted host:port"),
    ],
)
def test_settings_that_cannot_be_are_one_line(folders: Path, settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CellNetTransport(**{"node": "a", "folder": folders / "a", **settings})
    assert fault in str(caught.value)


def test_an_address_in_use_is_said(folders: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(
            TransportError, match=rf"cannot listen at {address} \(Address already in use\). Fix: "
        ):
            CellNetTransport("cloud", folders / "cloud", listen=address)
