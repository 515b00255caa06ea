"""Processes forked from one that has loaded torch and colledge already: they begin within milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "tests.multiproc.faulty_worker",
        "colledge.launch.coordinator",
        "transformers.models.llama.modeling_llama",
        "tests.federation.deployment",  # the federation's tests fork from the same process
    ]
)


def start(target: Callable[..., None], *arguments: Any, environment: Mapping[str, str]) -> BaseProcess:
    """Start a function of a module with nothing but this environment.

    A process that was started so itself forks on its own: it must not have joined a world yet.
    """
    nested = multiprocessing.parent_process() is not None
    context = multiprocessing.get_context("fork") if nested else _server
    process: BaseProcess = context.Process(target=_begin, args=(target, arguments, dict(environment)))
    process.start()
    return process


def _begin(target: Callable[..., None], arguments: Sequence[Any], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    target(*arguments)


def run(
    target: Callable[..., None],
    *arguments: Any,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a function of a module in a process of its own, to its end; return what it printed."""
    with TemporaryDirectory() as folder:
        paths = Path(folder, "stdout"), Path(folder, "stderr")
        own = environment if environment is not None else os.environ
        process = start(_printing_to, paths, cwd or Path.cwd(), target, arguments, environment=own)
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(
                target.__name__, timeout_s, *(path.read_bytes() for path in paths)
            )
        assert process.exitcode is not None
        output, errors = (path.read_text() for path in paths)
        return subprocess.CompletedProcess(arguments, process.exitcode, output, errors)


def _printing_to(
    paths: tuple[Path, Path], cwd: Path, target: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.chdir(cwd)
    for path, stream in zip(paths, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    target(*arguments)
