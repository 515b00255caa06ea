"""Starting and ending a run's processes: one torchrun agent a device, and one for the coordinator.

    colledge train ── agent rank 0 ── coordinator       each agent in a session of its own, so that Ctrl-C
                   ├─ agent rank 1 ── device "desk"     reaches this process alone and it decides what ends
                   └─ agent rank 2 ── device "pi-1"     how

One agent a device: a worker that dies takes no other with it. After a fault torchrun's agents would wait for
each other at their exit; here they are ended.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from types import FrameType
from typing import Protocol

import psutil

from colledge.errors import ColledgeError, ConfigError, DeviceError, LaunchError
from colledge.launch.job import Failure, Launch, OutputFolder
from colledge.launch.run_config import DeviceConfig, PoolConfig
from colledge.parallel.checkpoint import find_checkpoint
from colledge.records import read_json, write_atomically

_ENDED_AT_ONCE = {  # kinds of job that save nothing on the way; what is left, and what to do
    "profile": ("profiling left nothing behind", "profile again."),
    "simulate": ("a simulation keeps no state", "simulate again."),
}
LAUNCHER_VARIABLE = "COLLEDGE_LAUNCHER_PID"  # a coordinator whose launcher is gone stops as if asked to
_BY_HAND = {"simulate": "colledge federate simulate", "node": "colledge federate join"}  # or serve
_OF_OTHER_LAUNCHERS = frozenset(
    {"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"}
    | {"ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "PYTHON_EXEC"}
)
_WITHOUT_PET = "env $(env | sed -n 's/^\\(PET_[A-Za-z_]*\\)=.*/-u \\1/p')"
_ANYWHERE = ("0.0.0.0", "::")  # where one may listen and nobody can call
_POLL_S = 0.2
_REPORT_GRACE_S = 15.0  # for the coordinator to say what happened after a device died
_EXIT_GRACE_S = 15.0  # for torchrun's agents to end after the coordinator did
_KILL_GRACE_S = 3.0


@dataclass(frozen=True)
class Agent:
    """One torchrun agent to start: where, and the command."""

    name: str
    host: str
    environment: Mapping[str, str]
    command: tuple[str, ...]

    def line(self) -> str:
        """Return the command as a line for a shell, which may have variables that torchrun would obey."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([_WITHOUT_PET, *variables, shlex.join(self.command)])


def choose_port(pool: PoolConfig) -> int:
    """Return the port that the run meets at: the pool's, or a free one.

    Raises:
        LaunchError: The pool's port is taken, or its address is none of this machine's.
    """
    address, port = pool.coordinator.address, pool.coordinator.port
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port or 0))
        except OSError as fault:
            raise LaunchError(
                f"cannot listen on {address}:{port or 'any port'} ({fault.strerror}).",
                fix="set coordinator.port in pool.yaml to a free one (or leave it out), and coordinator.address "
                "to an address of this machine.",
            ) from None
        return int(probe.getsockname()[1])


def plan_agents(job: Launch, port: int) -> list[Agent]:
    """Return the agents of a job: the coordinator, then the devices by rank."""
    address = job.pool.coordinator.address
    if address in _ANYWHERE:
        raise ConfigError(
            f"coordinator.address is {address}, which no device can call.",
            fix="set coordinator.address in pool.yaml to this machine's address in the devices' network.",
        )
    remote = [device.id for device in job.pool.devices if device.host != "local" and device.id in job.devices]
    if remote and _leads_here(_look_up(address)):
        raise ConfigError(
            f"device {remote[0]!r} is on another machine and cannot reach the coordinator at {address}.",
            fix="set coordinator.address in pool.yaml to this machine's address in their network.",
        )
    devices = {device.id: device for device in job.pool.devices}
    agents = [_agent("coordinator", "local", address, address, port, 0, job, 1)]
    for rank, id in enumerate(job.devices, start=1):
        device = devices[id]
        own = address if device.host == "local" else _address_of(device)
        agents.append(_agent(id, device.host, own, address, port, rank, job, device.threads))
    return agents


def _address_of(device: DeviceConfig) -> str:
    """Return the address at which another machine is: of its host without the user, whose name is for ssh.

    Raises:
        ConfigError: The host is this machine, or no name that is known here.
    """
    host = device.host.rpartition("@")[2]
    address = _look_up(host)
    if address is None:
        raise ConfigError(
            f"device {device.id!r}: host {device.host!r} is no address, and no name that is known here.",
            fix="give the machine's address in pool.yaml.",
        )
    if _leads_here(address):
        raise ConfigError(
            f"device {device.id!r}: host {device.host!r} is this machine.",
            fix="write host: local, or leave it out.",
        )
    return address


def _look_up(host: str) -> str | None:
    """Return the address of a host by its address or name; None where it has none that is known here."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]).partition("%")[0]
    except (OSError, UnicodeError):
        return None


def _leads_here(address: str | None) -> bool:
    """Return whether an address leads every machine to itself, as a name of one's own often does."""
    if address is None:
        return False
    found = ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback or (mapped or found).is_unspecified


def _agent(
    name: str, host: str, own: str, address: str, port: int, rank: int, job: Launch, threads: int | None
) -> Agent:
    beside = Path(sys.executable).with_name("torchrun")
    local = (str(beside),) if beside.is_file() else (sys.executable, "-m", "torch.distributed.run")
    torchrun = local if host == "local" else ("torchrun",)
    module = ("colledge.launch.coordinator", str(job.output)) if rank == 0 else ("colledge.launch.worker",)
    command = (
        *torchrun,
        f"--nnodes={len(job.devices) + 1}",
        f"--node-rank={rank}",
        "--nproc-per-node=1",
        f"--master-addr={address}",
        f"--master-port={port}",
        f"--local-addr={own}",
        "--max-restarts=0",
        "-m",
        *module,
    )
    environment = {"OMP_NUM_THREADS": str(threads)} if threads is not None else {}
    return Agent(name, host, environment, command)


class Progress(Protocol):
    """Called a few times a second while a run goes on."""

    def __call__(self) -> None:
        """Show how far the run is."""


class Stopped(ColledgeError):
    """The user asked the run to end; what was done is saved."""

    exit_code = 130


class _Interrupts:
    """Counts Ctrl-C, SIGTERM and SIGHUP while a run is supervised."""

    def __init__(self) -> None:
        self.count = 0

    def _add(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextmanager
    def listening(self) -> Iterator[_Interrupts]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._add) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Supervisor:
    """Runs a job's agents to their end; whatever happens, no process of theirs is left.

    Args:
        job: Written to its output folder, where the coordinator reads it.

    Raises:
        LaunchError: The port is taken, or a device's host is not this machine.
    """

    def __init__(self, job: Launch) -> None:
        self._job, self._folder = job, OutputFolder(job.output)
        remote = [
            device.id for device in job.pool.devices if device.host != "local" and device.id in job.devices
        ]
        if remote:
            command = _BY_HAND.get(job.kind, "colledge train")
            raise LaunchError(
                f"device {remote[0]!r} is on another machine, which colledge does not start yet.",
                fix=f"start the lines of `{command} --print-commands` by hand, one on each machine.",
            )
        self._agents = plan_agents(job, choose_port(job.pool))
        self._processes: list[Popen[bytes]] = []
        self._known: dict[int, psutil.Process] = {}
        self._began_at: dict[str, int] = {}  # where in its log an agent began

    def run(self, on_poll: Progress | None = None) -> None:
        """Start the agents, wait for their end.

        Raises:
            Stopped: The user asked for it; the coordinator has saved a checkpoint.
            ColledgeError: What the coordinator reported, or which process died without a word.
        """
        self._folder.failure.unlink(missing_ok=True)
        self._folder.outcome.unlink(missing_ok=True)
        write_atomically(self._folder.job, self._job.to_json())
        with _Interrupts().listening() as interrupts:
            try:
                self._start()
                self._wait(interrupts, on_poll)
            finally:
                self._end_all()
        if interrupts.count and self._job.kind in _ENDED_AT_ONCE:
            left, fix = _ENDED_AT_ONCE[self._job.kind]
            raise Stopped(f"stopped on request; {left}.", fix=fix)
        if self._folder.failure.is_file():
            failure = read_json(Failure, self._folder.failure)
            raise ColledgeError(failure.message, fix=failure.fix, exit_code=failure.exit_code)
        if interrupts.count and self._job.kind == "node":
            return  # it keeps its state, and goes on when it is started again
        if interrupts.count and not self._folder.outcome.is_file():
            raise Stopped(
                f"stopped on request; {self._saved()}.",
                fix="go on with `colledge train ... --resume auto`.",
            )
        if self._processes[0].returncode != 0:
            raise self._silent_death(0)

    def _start(self) -> None:
        for agent in self._agents:
            log = self._folder.log(agent.name)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab" if self._job.kind == "node" else "wb") as output:  # a node comes back
                self._began_at[agent.name] = output.tell()
                self._processes.append(
                    Popen(
                        agent.command,
                        env={**_inherited(), **agent.environment, LAUNCHER_VARIABLE: str(os.getpid())},
                        stdin=DEVNULL,
                        stdout=output,
                        stderr=STDOUT,
                        start_new_session=True,
                    )
                )

    def _wait(self, interrupts: _Interrupts, on_poll: Progress | None) -> None:
        coordinator, *devices = self._processes
        asked = 0
        died_at_s: float | None = None
        while coordinator.poll() is None:
            self._remember_workers()
            if on_poll is not None:
                on_poll()
            if interrupts.count > asked:
                asked = interrupts.count
                if asked > 1 or self._job.kind in _ENDED_AT_ONCE or not self._ask_to_stop():
                    return
            dead = [
                index for index, process in enumerate(devices, start=1) if process.poll() not in (None, 0)
            ]
            if dead and died_at_s is None:
                died_at_s = time.monotonic()
            if died_at_s is not None and time.monotonic() - died_at_s > _REPORT_GRACE_S:
                raise self._silent_death(dead[0])
            if self._folder.failure.is_file():
                return
            time.sleep(_POLL_S)
        if on_poll is not None:
            on_poll()
        deadline_s = time.monotonic() + (_EXIT_GRACE_S if coordinator.returncode == 0 else 0.0)
        while any(process.poll() is None for process in devices) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)

    def _ask_to_stop(self) -> bool:
        """Ask the coordinator itself, not its agent, which would kill it after a while; False if there is none."""
        asked = False
        for child in _children(self._processes[0].pid):
            try:
                child.send_signal(signal.SIGTERM)
                asked = True
            except psutil.NoSuchProcess:
                continue
        return asked

    def _silent_death(self, index: int) -> DeviceError:
        name = self._agents[index].name
        what = "the coordinator" if index == 0 else f"device {name!r}"
        return DeviceError(
            f"{what} ended without a word ({self._last_line(name) or 'its log is empty'}).",
            fix=f"read {self._folder.log(name)}.",
        )

    def _saved(self) -> str:
        saved = find_checkpoint(self._job.output)
        return f"saved {saved}" if saved is not None else "there was nothing to save yet"

    def _last_line(self, name: str) -> str:
        try:
            text = self._folder.log(name).read_bytes()[self._began_at[name] :].decode(errors="replace")
        except OSError:
            return ""
        words = [line for line in text.strip().splitlines() if any(character.isalpha() for character in line)]
        telling = [line for line in words if "Error" in line and "ChildFailed" not in line] or words
        return telling[-1].strip()[:300] if telling else ""

    def _end_all(self) -> None:
        """End every agent and every process below it, by id."""
        for method in ("terminate", "kill"):
            self._remember_workers()
            for process in self._known.values():
                try:
                    getattr(process, method)()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(list(self._known.values()), timeout=_KILL_GRACE_S)
        for agent in self._processes:
            agent.wait(_KILL_GRACE_S)

    def _remember_workers(self) -> None:
        """Note the agents and the processes below them, so that a worker is found when its agent is gone."""
        for agent in self._processes:
            try:
                process = psutil.Process(agent.pid)
                found = [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            self._known |= {process.pid: process for process in found}


def _inherited() -> dict[str, str]:
    """Return this process's environment without what other launchers left in it, which torchrun would obey."""
    return {
        key: value
        for key, value in os.environ.items()
        if key not in _OF_OTHER_LAUNCHERS and not key.startswith(("PET_", "TORCHELASTIC_"))
    }


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def write_commands(job: Launch) -> str:
    """Write the job for its coordinator; return the lines that start it by hand, each with where it belongs."""
    write_atomically(OutputFolder(job.output).job, job.to_json())
    agents = plan_agents(job, choose_port(job.pool))
    return "\n".join(
        f"# {agent.name} ({'this machine' if agent.host == 'local' else agent.host})\n{agent.line()}"
        for agent in agents
    )
