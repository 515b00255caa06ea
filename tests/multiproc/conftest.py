"""One world for the whole session: this process is the coordinator, rank 0, four devices d0 to d3 beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.multiproc.workers import Workers

TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four device workers, ranks 1 to 4. A test that breaks one must use a world in a subprocess of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    world = Workers(4, TIMEOUT_S)
    yield world
    world.close()
    torch.set_num_threads(threads)
    left = [process.pid for process in world.processes if process.poll() is None]
    assert not left, f"workers {left} did not end"
