"""Being asked to end: by a signal, or by the death of the launcher."""

from __future__ import annotations

import os
import signal
from types import FrameType

import psutil

from colledge.launch.rendezvous import LAUNCHER_VARIABLE


class StopRequest:
    """Whether a signal has asked this process to end after the step under way, or its launcher is gone."""

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = int(os.environ.get(LAUNCHER_VARIABLE, "0"))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def asked(self) -> bool:
        """Whether to end. A run started by hand has no launcher to lose."""
        return self._signalled or (self._launcher != 0 and not psutil.pid_exists(self._launcher))
