"""Real worker processes beside this one, which is rank 0, the coordinator."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from colledge.parallel import Message
from colledge.parallel.world import join_world


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Workers:
    """`count` device workers, ranks 1 to count, on loopback; each in a cgroup of its own where they are given."""

    module = "colledge.launch.worker"

    def __init__(self, count: int, timeout_s: float = 60.0, cgroups: Sequence[Path] = ()) -> None:
        port = free_port()
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count + 1),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "COLLEDGE_TIMEOUT_S": str(timeout_s),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", self.module],
                env={**os.environ, **shared, "RANK": str(rank)},
            )
            for rank in range(1, count + 1)
        ]
        for process, cgroup in zip(self.processes, cgroups, strict=bool(cgroups)):
            (cgroup / "cgroup.procs").write_text(str(process.pid))  # before it has loaded anything
        try:
            with mock.patch.dict(
                os.environ, {**shared, "RANK": "0"}
            ):  # others, such as Trainer, look for them too
                self.wire = join_world(timeout_s).wire
        except BaseException:
            for process in self.processes:
                process.kill()
            raise
        self.ranks = {f"d{i}": i + 1 for i in range(count)}

    def close(self) -> None:
        for rank, process in enumerate(self.processes, start=1):
            if process.poll() is None:
                try:
                    self.wire.send_message(rank, Message({"command": "shutdown"}))
                    self.wire.receive_message(rank, "shutdown", 10)
                    process.wait(10)
                except Exception:
                    process.kill()
                    process.wait()
