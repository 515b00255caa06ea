"""A device's process: joins the world that torchrun describes in its environment and serves the coordinator.

torchrun ... -m colledge.launch.worker
"""

from __future__ import annotations

import os
import signal
import sys

from colledge.errors import ColledgeError
from colledge.launch.profiling import HANDLERS
from colledge.launch.terminal import replace_unprintable
from colledge.parallel import DeviceWorker
from colledge.parallel.world import join_world, timeout_from_environment


def main() -> None:
    """Serve until the coordinator says shutdown; on a fault report it, print one line and end at once."""
    replace_unprintable()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole terminal; the coordinator ends the run
    try:
        world = join_world(timeout_from_environment())
        DeviceWorker(world, HANDLERS).serve()
    except ColledgeError as fault:
        print(f"colledge worker: {fault}", file=sys.stderr, flush=True)
        os._exit(fault.exit_code)  # sockets close now: that is what frees the peers that wait for this device


if __name__ == "__main__":
    main()
