"""A whole federation on loopback: every node a real process over mutual TLS, which can be killed and started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from nvflare.fuel.f3.communicator import load_comm_drivers

from colledge.errors import ColledgeError
from colledge.federation.build import Federation
from colledge.federation.message import decode
from colledge.launch import federate
from tests.federation.nodes import free_port

load_comm_drivers()  # in the process that all nodes are forked from: it takes a while
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([__name__])
PATIENCE_S = 120.0


def write_federation(folder: Path, **changes: Any) -> Path:
    """Write a federation of a cloud, two edges and four ends on scikit-learn's digits."""
    inner = {"model": "large"}
    values: dict[str, Any] = {
        "strategy": {"name": "fedeec", "autoencoder": {"steps": 300}},
        "rounds": {"count": 6, "first_deadline": 60, "deadline": 60, "retry": 0.3, "heartbeat": 1},
        "data": {
            "source": "digits",
            "split": {"dirichlet": 0.5},
            "public": 0.1,
            "limit": 400,
            "test_limit": 100,
        },
        "models": {
            "small": {"architecture": "cnn", "channels": [4, 8]},
            "large": {"architecture": "cnn", "channels": [8, 16]},
        },
        "local": {"batch_size": 8, "optimizer": {"name": "sgd", "learning_rate": 0.005, "momentum": 0.9}},
        "nodes": [
            {"id": "cloud", **inner},
            *({"id": id, "parent": "cloud", **inner} for id in ("edge-0", "edge-1")),
            *({"id": id, "parent": "edge-0", "model": "small"} for id in ("a", "b")),
            *(
                {"id": id, "parent": "edge-1", "model": "small", "may_move_to": ["edge-0"]}
                for id in ("c", "d")
            ),
        ],
        **changes,
    }
    for node in values["nodes"]:
        if node["model"] == "large":
            node["address"] = f"127.0.0.1:{free_port()}"
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Deployment:
    """The processes of a federation.

    Args:
        path: Of its federation.yaml; certificates are made beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.federation = path, federate.read_federation(path)
        federate.provision(self.federation, path.parent / "credentials", valid_days=1.0)
        self.processes: dict[str, Any] = {}

    @property
    def output(self) -> Path:
        return self.federation.config.output

    def start(self, *ids: str, parent: str | None = None) -> None:
        for id in ids or self.federation.nodes:
            log = self.path.parent / f"{id}.log"
            self.processes[id] = _processes.Process(
                target=_run, args=(self.path, id, parent, log), daemon=True
            )
            self.processes[id].start()

    def signal(self, id: str, number: signal.Signals) -> None:
        os.kill(self.processes[id].pid, number)

    def kill(self, id: str) -> None:
        self.signal(id, signal.SIGKILL)
        self.processes[id].join(PATIENCE_S)

    def wait_for_round(self, id: str, round_index: int) -> None:
        """Wait until a node is in a round."""
        path, deadline = self.output / id / "status.json", time.monotonic() + PATIENCE_S
        while not path.is_file() or json.loads(path.read_text())["round"] < round_index:
            assert time.monotonic() < deadline, f"{id} is not in round {round_index}; {self.log(id)}"
            time.sleep(0.02)

    def wait_for_child(self, id: str, child: str) -> None:
        """Wait until a node has a child."""
        path, deadline = self.output / id / "status.json", time.monotonic() + PATIENCE_S
        while child not in json.loads(path.read_text())["children"]:
            assert time.monotonic() < deadline, f"{id} has no child {child}; {self.log(id)}"
            time.sleep(0.02)

    def wait(self) -> None:
        """Wait until all have ended, each with 0."""
        deadline = time.monotonic() + PATIENCE_S
        for id, process in self.processes.items():
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode == 0, f"{id}: {process.exitcode}; {self.log(id)}"

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join(PATIENCE_S)

    def log(self, id: str) -> str:
        return (self.path.parent / f"{id}.log").read_text()

    def weights(self, id: str) -> dict[str, torch.Tensor]:
        """Return the model that a node ended with."""
        data = (self.output / id / "state.clg").read_bytes()
        tensors = decode(data, len(data)).payload.tensors
        prefix = "strategy/weights/"
        return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def simulated_weights(federation: Federation) -> dict[str, dict[str, torch.Tensor]]:
    """Return the models with which all nodes of a simulation end."""
    simulation = federate.make_simulation(federation)
    simulation.run()
    return {id: place.node.strategy.state().tensors for id, place in simulation.nodes.items()}


def _run(path: Path, id: str, parent: str | None, log: Path) -> None:
    torch.set_num_threads(1)
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            federate.run_node(federate.read_federation(path), id, path.parent / "credentials" / id, parent)
        except ColledgeError as fault:
            print(f"colledge: {fault}", file=sys.stderr, flush=True)
            os._exit(fault.exit_code)
