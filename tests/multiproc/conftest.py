"""One world for the whole session: this process is the coordinator, rank 0, four devices d0 to d3 beside it.

And a folder with all that a run needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from colledge.launch.demo import make_model, standard_library_source
from tests.multiproc.commands import HYBRID, ONE, PIPELINE, POOL, RUN, Runs
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
    codes = [process.exitcode for process in world.processes]
    assert codes == [0] * 4, f"workers did not end as asked: {codes}"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    texts = standard_library_source(60_000)
    make_model(folder / "model", texts, vocabulary=300, hidden_size=32, num_blocks=3)
    short = [
        text[i : i + 1000] for text in texts for i in range(0, len(text), 1000)
    ]  # so that few can be held out
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in short))
    (folder / "pool.yaml").write_text(POOL)
    (folder / "run.yaml").write_text(RUN)
    for name, content in (("one", ONE), ("hybrid", HYBRID), ("pipeline", PIPELINE)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    for path in template.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def runs(folder: Path, workers: Workers) -> Runs:
    return Runs(folder, workers)
