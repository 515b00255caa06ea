"""Joining the processes of a run: the gloo world that torchrun (or a test) describes in the environment."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from colledge.errors import ConfigError, LaunchError
from colledge.parallel.wire import COORDINATOR_RANK, Wire

DEFAULT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class World:
    """This process among all processes of a run; `store` is where groups meet."""

    rank: int
    size: int
    store: Store
    wire: Wire


def timeout_from_environment() -> float:
    """Return the deadline of waits in seconds: COLLEDGE_TIMEOUT_S, or five minutes."""
    text = os.environ.get("COLLEDGE_TIMEOUT_S", str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(
            f"COLLEDGE_TIMEOUT_S is {text!r}, wanted a number of seconds above 0.", fix="unset it."
        )
    return seconds


def _choose_interface(address: str) -> None:
    """Make gloo listen only on the interface that leads to an address, unless the user named one.

    Gloo would otherwise bind to whatever this host's name resolves to.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing: it only asks the kernel for the route
            own = probe.getsockname()[0]
        except OSError:
            return
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def join_world(timeout_s: float = DEFAULT_TIMEOUT_S) -> World:
    """Join the world of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    It is no default process group of torch.distributed: that is left to the libraries of a backend, which take it
    for the devices that train.

    Args:
        timeout_s: The deadline of every wait that names no other, joining included.

    Raises:
        LaunchError: The others cannot be reached.
    """
    limit = timedelta(seconds=timeout_s)
    _choose_interface(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
        store.set_timeout(limit)
        own_store = dist.PrefixStore("colledge/world", store)  # type: ignore[attr-defined]
        process_group = dist.ProcessGroupGloo(own_store, rank, size, limit)
    except (RuntimeError, ValueError) as fault:
        line = str(fault).splitlines()[0]
        raise LaunchError(
            f"the devices could not find each other within {timeout_s:g} s ({line}).",
            fix="check that every device was started and that --master-addr and --master-port can be reached.",
        ) from None
    names = [f"rank {r}" for r in range(size)]
    names[COORDINATOR_RANK] = "the coordinator"
    return World(rank, size, store, Wire(process_group, names, timeout_s))
