"""A real deployment on one machine: processes over mutual TLS, killed, restarted, moved, and bothered by strangers.

cloud ─┬─ edge-0, a pool of two devices ─┬─ a
       │                                 └─ b
       └─ edge-1 ─┬─ c
                  └─ d
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from colledge.errors import DeviceError
from colledge.federation import certificates
from colledge.federation.build import Federation
from colledge.federation.config import FederationConfig
from colledge.plan import read_plan
from tests.federation import nodes
from tests.federation.deployment import Deployment, simulated_weights, write_federation


@pytest.fixture
def deployments() -> Iterator[list[Deployment]]:
    found: list[Deployment] = []
    yield found
    for deployment in found:
        deployment.end()


POOL = """\
devices:
  - {id: desk, threads: 1, memory: 2 GB}
  - {id: lap, threads: 1, memory: 2 GB}
"""


def test_what_is_killed_and_bothered_by_strangers_learns_what_a_simulation_on_devices_learns(
    tmp_path: Path, deployments: list[Deployment]
) -> None:
    path = write_federation(tmp_path)
    values = yaml.safe_load(path.read_text())
    values |= {"message_limit": "1 MB", "local": {**values["local"], "precision": "float64"}}
    on_devices = Federation(FederationConfig.model_validate(values))
    (tmp_path / "pool.yaml").write_text(POOL)
    values["nodes"][1]["trainer"] = "pool.yaml"  # edge-0's
    path.write_text(yaml.safe_dump(values))
    deployment = Deployment(path)
    deployments.append(deployment)
    own = deployment.output / "edge-0"
    deployment.start()
    deployment.wait_for_round("a", 1)
    deployment.kill("a")
    refused = bother(deployment, "edge-0", "a", tmp_path)
    deployment.start("a")

    deployment.wait_for_round("edge-0", 2)
    profile = (own / "pool-profile.json").read_bytes()
    started = processes_of(deployment, "edge-0")
    coordinator = json.loads((own / "status.json").read_text())["pid"]
    assert coordinator in [process.pid for process in started]
    psutil.Process(coordinator).kill()
    deployment.processes["edge-0"].join(60)
    assert deployment.processes["edge-0"].exitcode == DeviceError.exit_code
    assert "the coordinator ended without a word" in deployment.log("edge-0")
    assert not [process for process in started if process.is_running()]
    deployment.start("edge-0")

    deployment.wait_for_round("cloud", 3)
    deployment.kill("cloud")
    deployment.start("cloud")
    deployment.wait_for_round("edge-0", 4)
    started = processes_of(deployment, "edge-0")
    deployment.kill("edge-0")  # the launcher alone: the others notice
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left
    deployment.start("edge-0")
    deployment.wait()

    log = deployment.log("edge-0") + (own / "logs" / "coordinator.log").read_text()
    for line in refused:
        assert line in log
    assert (own / "pool-profile.json").read_bytes() == profile  # seconds differ where it is measured again
    lines = [json.loads(line) for line in (own / "rounds.jsonl").read_text().splitlines()]
    assert {line["plan"] for line in lines if line["compute_s"]} == {read_plan(own / "plan.json").describe()}
    for id, wanted in simulated_weights(on_devices).items():
        found = deployment.weights(id)
        assert found
        for name, tensor in found.items():
            difference = (tensor - wanted[f"weights/{name}"]).abs().max()
            assert difference <= 1e-9 * tensor.abs().max(), f"{id}: {name}"


def bother(deployment: Deployment, id: str, child: str, folder: Path) -> tuple[str, ...]:
    """Come to a node as strangers, and as a child of it that talks nonsense; return what its log must say of them."""
    address = deployment.federation.nodes[id].address
    assert address is not None
    credentials = deployment.path.parent / "credentials"
    certificates.make_authority(folder / "other")
    certificates.issue(folder / "other", child, [], folder / "forged", 1.0)
    certificates.issue(credentials / "authority", "z", [], folder / "z", 1.0)
    parent = (id, address)
    liar = nodes.Node(folder / "liar", node=child, folder=folder / "forged", parent=parent)
    guest = nodes.Node(folder / "guest", node="z", folder=folder / "z", parent=parent)
    known = nodes.Node(folder / "known", node=child, folder=credentials / child, parent=parent)
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as garbage:
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
    for bad in (liar, guest):
        with pytest.raises(nodes.TransportError, match="not connected"):
            bad(nodes.send, id, 100, 1, 2.0)
    with pytest.raises(nodes.TransportError, match="no message of colledge"):
        known(nodes.send_bytes, id, b"x" * 1000)
    with pytest.raises(nodes.TransportError, match="the limit is 1 MB"):
        known(nodes.send, id, 2_000_000)
    for one in (liar, guest, known):
        one.close()
    return (
        "no TLS with a certificate of this federation",
        "it is node 'z'",
        "no message of colledge",
        "the limit is 1 MB",
    )


def processes_of(deployment: Deployment, id: str) -> list[psutil.Process]:
    """Return the processes that a node's launcher started: agents, the coordinator, devices."""
    return psutil.Process(deployment.processes[id].pid).children(recursive=True)


def test_nodes_without_data_or_that_hang_are_missed_and_another_moves(
    tmp_path: Path, deployments: list[Deployment]
) -> None:
    path = write_federation(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["rounds"] |= {"quorum": 0.5, "first_deadline": 10, "deadline": 6, "count": 6}
    values["nodes"][-3]["parent"] = "edge-1"  # b's
    values["nodes"][-1]["data"] = "gone"  # d's
    path.write_text(yaml.safe_dump(values))
    deployment = Deployment(path)
    deployments.append(deployment)
    deployment.start()
    deployment.wait_for_round("edge-0", 1)
    deployment.signal("a", signal.SIGSTOP)  # rounds go on without it, but slowly
    deployment.kill("c")
    deployment.start("c", parent="edge-0")
    deployment.wait_for_child("edge-0", "c")
    deployment.signal("a", signal.SIGCONT)
    deployment.processes.pop("d").join(60)
    deployment.wait()
    assert "gone: no such folder" in deployment.log("d")
    assert "cannot be reached" not in deployment.log("edge-1")  # c has told it
    lines = [json.loads(line) for line in (deployment.output / "federation.jsonl").read_text().splitlines()]
    last = {line["node"]: line for line in lines if line["round"] == max(one["round"] for one in lines)}
    assert last["cloud"]["round"] == 6
    assert len({(line["node"], line["round"]) for line in lines}) == len(lines)
    assert {"a", "c"} <= last["edge-0"]["links"].keys()
    assert last["cloud"]["accuracy"] > 0.2  # who took part when depends on the machine; 0.1 is chance
