"""The commands as a user runs them, on a small pool, model and corpus, and the training loop in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from colledge.launch.cli import main
from colledge.launch.inputs import open_model
from colledge.launch.job import Job, OutputFolder
from colledge.launch.run_config import load_pool, load_run
from colledge.launch.stop import StopRequest
from colledge.launch.training import Training
from colledge.parallel import World
from colledge.parallel.checkpoint import find_whole_checkpoint
from colledge.report import read_metrics
from tests import forked
from tests.multiproc.workers import Workers

COLLEDGE = str(Path(sys.executable).with_name("colledge"))
POOL = """\
devices:
  - {id: desk, threads: 1, memory: 2 GB, power: {idle_w: 10, compute_w: 40, communicate_w: 15}}
  - {id: lap, threads: 1, memory: 2 GB, power: {idle_w: 4, compute_w: 14, communicate_w: 6},
     emulate: {slowdown: 2, bandwidth: 500 Mbit/s, latency: 1 ms}}
  - {id: pi, threads: 1, memory: 2 GB, power: {idle_w: 2, compute_w: 6, communicate_w: 3}}
"""
RUN = """\
model: model
data: {train: corpus.jsonl, sequence_length: 32}
batch: {global_size: 4}
optimizer: {name: adamw, learning_rate: 1.0e-2, gradient_clipping: 1.0}
steps: 6
precision: float64
pool: pool.yaml
output: out
"""


def shard(device: str, fraction: float = 1.0) -> dict[str, object]:
    return {"device": device, "fraction": fraction}


def plan(*stages: tuple[tuple[int, int], list[tuple[int, list[dict[str, object]]]]]) -> dict[str, object]:
    return {
        "schema": "colledge/plan/1",
        "num_layers": 5,
        "global_batch_size": 4,
        "microbatch_size": 2,
        "stages": [
            {"layers": layers, "replicas": [{"samples": n, "shards": shards} for n, shards in replicas]}
            for layers, replicas in stages
        ],
    }


ONE = plan(((0, 5), [(2, [shard("desk")])]))
HYBRID = plan(((0, 2), [(2, [shard("desk")])]), ((2, 5), [(2, [shard("lap", 0.75), shard("pi", 0.25)])]))
PIPELINE = plan(((0, 3), [(2, [shard("desk")])]), ((3, 5), [(2, [shard("pi")])]))


def environment() -> dict[str, str]:
    return {**os.environ, "COLLEDGE_TIMEOUT_S": "40", "OMP_NUM_THREADS": "1"}


def colledge(folder: Path, *arguments: str, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COLLEDGE, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def forked_colledge(
    folder: Path, *arguments: str, timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run a command whose processes are all forks, which begin at once; it is the same code otherwise."""
    return forked.run(forked.colledge, *arguments, timeout_s=timeout_s, environment=environment(), cwd=folder)


def run_here(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that starts no process inside this one, which has imported everything already."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as output,
        redirect_stderr(StringIO()) as errors,
    ):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["colledge", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(arguments, ended.value.code, output.getvalue(), errors.getvalue())


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes of a run in a folder: those that name it, and every worker below its agents."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if process.info["cwd"] == str(folder) and process.pid != os.getpid():
            found.append(process)
    return found


def assert_one_line(result: subprocess.CompletedProcess[str], *wanted: str) -> None:
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("colledge: ")
    assert "Fix: " in lines[0]
    for text in wanted:
        assert text in lines[0], lines[0]


def start_by_hand(folder: Path, printed: str, count: int) -> list[str]:
    """Start the torchrun lines that --print-commands printed, each in a shell; return what they print."""
    lines = [line for line in printed.splitlines() if line and not line.startswith("#")]
    assert len(lines) == count
    assert all("torchrun" in line and "--nproc-per-node=1" in line for line in lines)
    started = [
        subprocess.Popen(
            line, shell=True, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for line in lines
    ]
    outputs = [process.communicate(timeout=90)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0] * count, outputs
    return outputs


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str] | forked.Forked) -> None:
    path = folder / "out" / "metrics.jsonl"
    deadline_s = time.monotonic() + 60
    while not path.is_file() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None, process.communicate(timeout=10)
        assert time.monotonic() < deadline_s, "the run did not begin"
        time.sleep(0.05)


def start_forked(folder: Path, *arguments: str) -> forked.Forked:
    return forked.Forked(forked.colledge, *arguments, environment=environment(), cwd=folder)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COLLEDGE, "train", *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class StopAfter:
    """Asks to stop once a step is in metrics.jsonl."""

    def __init__(self, metrics: Path, step: int) -> None:
        self._metrics, self._step = metrics, step

    @property
    def asked(self) -> bool:
        done = read_metrics(self._metrics)[-1].step if self._metrics.is_file() else 0
        return done >= self._step


class Runs:
    """Trains in this process, on the session's workers."""

    def __init__(self, folder: Path, workers: Workers) -> None:
        self._folder, self._wire = folder, workers.wire

    def __call__(
        self,
        output: Path,
        plan: dict[str, Any],
        *overrides: str,
        resume: bool = False,
        stop_after: int | None = None,
        file: str = "run.yaml",
    ) -> OutputFolder:
        run = load_run(self._folder / file, [*overrides, f"output={output}"])
        pool = load_pool(run.pool)
        devices = [device.id for device in pool.devices]
        out = OutputFolder(output)
        out.create()
        out.plan.write_text(json.dumps(plan))
        job = Job(
            kind="train",
            run=run,
            pool=pool,
            model=self._folder / "model",
            devices=tuple(devices),
            output=output,
            resume=find_whole_checkpoint(output)[0] if resume else None,
        )
        ranks = {id: rank for rank, id in enumerate(devices, start=1)}
        world = World(0, len(devices) + 1, cast(Any, None), self._wire)
        training = Training(job, world, ranks, open_model(run, job.model, probe=False))
        stop = StopAfter(out.metrics, 10**9 if stop_after is None else stop_after)
        training.run(cast(StopRequest, stop))
        return out
