"""Processes forked from one that has loaded torch and colledge already: they begin within milliseconds."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from colledge.launch import cli, rendezvous

_server = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "tests.multiproc.faulty_worker",
    "colledge.launch.coordinator",
    "transformers.models.llama.modeling_llama",
    "tests.federation.deployment",  # the federation's tests fork from the same process
]
_server.set_forkserver_preload(_PRELOADED)


def start(
    target: Callable[..., None], *arguments: Any, environment: Mapping[str, str], daemon: bool = True
) -> BaseProcess:
    """Start a function of a module with nothing but this environment; a daemon ends with this process.

    A process that was started so, and is no daemon, forks on its own: it must not have joined a world yet.
    """
    _server.set_forkserver_preload(_PRELOADED)  # other modules may have set theirs since
    nested = multiprocessing.parent_process() is not None
    context = multiprocessing.get_context("fork") if nested else _server
    process: BaseProcess = context.Process(
        target=_begin, args=(target, arguments, dict(environment)), daemon=daemon
    )
    process.start()
    return process


def _begin(target: Callable[..., None], arguments: Sequence[Any], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    target(*arguments)


class Forked:
    """A function of a module in a process of its own, with the methods of subprocess.Popen."""

    def __init__(
        self,
        target: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str] = os.environ,
        cwd: Path | None = None,
        daemon: bool = True,
    ) -> None:
        self._folder = TemporaryDirectory()
        self._paths = Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")
        printing = (self._paths, cwd or Path.cwd(), target, arguments)
        self._process = start(_printing_to, *printing, environment=environment, daemon=daemon)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; return what it printed.

        Raises:
            TimeoutExpired: It was killed as it had not ended.
        """
        self._process.join(timeout)
        if self._process.is_alive():
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(
                "a forked process", timeout, *(p.read_bytes() for p in self._paths)
            )
        output, errors = (path.read_text() for path in self._paths)
        return output, errors


def run(
    target: Callable[..., None], *arguments: Any, timeout_s: float, **given: Any
) -> CompletedProcess[str]:
    """Run a function of a module in a process of its own, to its end; return what it printed."""
    process = Forked(target, *arguments, **given, daemon=False)
    try:
        output, errors = process.communicate(timeout_s)
    except BaseException:
        process.kill()
        raise
    assert process.returncode is not None
    return CompletedProcess(arguments, process.returncode, output, errors)


def _printing_to(
    paths: tuple[Path, Path], cwd: Path, target: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.chdir(cwd)
    for path, stream in zip(paths, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    target(*arguments)


# -- the command line ----------------------------------------------------------------------------------------------


def colledge(*arguments: str) -> None:
    """Run a command of colledge; it forks its torchrun agents, and these fork what they start."""
    sys.argv = ["colledge", *arguments]
    with mock.patch.object(rendezvous, "Popen", _fork), mock.patch.object(subprocess_handler, "Popen", _fork):
        cli.main()


def _fork(args: Sequence[str], env: Mapping[str, str], **given: Any) -> subprocess.Popen[bytes]:
    """Start torchrun or `python -m` as subprocess.Popen would, but as a fork of this process."""
    sys.stdout.flush()
    return subprocess.Popen(args, preexec_fn=partial(_become, list(args), dict(env)), **given)


def _become(command: list[str], environment: dict[str, str]) -> None:
    """Be a command and end: nothing is executed after it."""
    gc.freeze()
    gc.enable()  # subprocess had disabled it
    os.closerange(
        3, os.sysconf("SC_OPEN_MAX")
    )  # as exec would: so subprocess learns that the command has begun
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    code: Any = 1
    try:
        if Path(command[0]).name == "torchrun":
            _begin(torchrun.main, [command[1:]], environment)
        else:
            module, *sys.argv[1:] = command[command.index("-m") + 1 :]
            _begin(importlib.import_module(module).main, [], environment)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
