"""Where a worker's time goes in a step, and how an emulated slower device takes longer to compute."""

from __future__ import annotations

import time

import torch


class Clock:
    """Adds up seconds of computing and communicating.

    Args:
        slowdown: 1 for a real device. An emulated one computes `slowdown` times as long: the rest of the time
            is slept, measured by the thread's own CPU time so that the other processes of this machine do not
            count.
        device: Where it computes; a CUDA device is waited for before the clock is read.
    """

    def __init__(self, slowdown: float = 1.0, device: torch.device | None = None) -> None:
        self._slowdown = slowdown
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._wall_s = self._cpu_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin a new step."""
        self.compute_s = 0.0
        self.communicate_s = 0.0

    def begin_compute(self) -> None:
        """Mark the begin of computing."""
        self._wall_s = time.perf_counter()
        self._cpu_s = time.thread_time()

    def end_compute(self) -> None:
        """Mark the end of computing, after what an emulated device would still take."""
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        if self._slowdown > 1:
            due_s = self._wall_s + self._slowdown * (time.thread_time() - self._cpu_s)
            remaining_s = due_s - time.perf_counter()
            if remaining_s > 0:
                time.sleep(remaining_s)
        self.compute_s += time.perf_counter() - self._wall_s

    def waited(self, blocked_s: float, expected_s: float | None) -> None:
        """Add a wait for bytes: communication up to the time that they take on their route, the rest is idle.

        Args:
            blocked_s: How long the worker waited.
            expected_s: What the transfer takes alone on a measured route; None where no route was measured,
                and then all of the wait counts as communication.
        """
        self.communicate_s += blocked_s if expected_s is None else min(blocked_s, expected_s)
