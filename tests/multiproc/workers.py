"""Real worker processes beside this one, which is rank 0, the coordinator."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from unittest import mock

from colledge.launch import worker
from colledge.parallel import Message
from colledge.parallel.world import join_world
from tests import forked


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Workers:
    """`count` device workers, ranks 1 to count, on loopback."""

    main: Callable[[], None] = staticmethod(worker.main)

    def __init__(self, count: int, timeout_s: float = 60.0) -> None:
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
            self.start(rank, {**os.environ, **shared, "RANK": str(rank)}) for rank in range(1, count + 1)
        ]
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

    def start(self, rank: int, environment: Mapping[str, str]) -> BaseProcess:
        return forked.start(self.main, environment=environment)

    def close(self) -> None:
        for rank, process in enumerate(self.processes, start=1):
            if process.is_alive():
                with suppress(Exception):
                    self.wire.send_message(rank, Message({"command": "shutdown"}))
                    self.wire.receive_message(rank, "shutdown", 10)
                    process.join(10)
            process.kill()
            process.join()


class FreshWorkers(Workers):
    """Workers that load everything themselves: all of their memory and time is their own."""

    def start(self, rank: int, environment: Mapping[str, str]) -> BaseProcess:
        with mock.patch.dict(os.environ, environment):
            process = multiprocessing.get_context("spawn").Process(target=self.main)
            process.start()
        return process
