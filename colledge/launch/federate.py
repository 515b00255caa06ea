"""`colledge federate`: reads federation.yaml, simulates, serves, reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from rich.console import Console
from torch import Tensor

from colledge.errors import ConfigError, DataError, LaunchError
from colledge.federation.build import Federation
from colledge.federation.clock import Clock, RealClock, VirtualClock
from colledge.federation.config import FederationConfig
from colledge.federation.message import Kind, Message
from colledge.federation.report import FACTS, LINES, read_report
from colledge.federation.serve import NodeFolder, NodeStatus, serve
from colledge.federation.simulation import Link, Migration, RoundHook, Simulated, Simulation
from colledge.federation.trainer import Trainer
from colledge.federation.transport import NodeId, TransportError
from colledge.launch.config_file import PathKeys, read_config
from colledge.launch.federated_pools import (
    FederationJob,
    Trainers,
    idle_watts,
    node_job,
    simulation_job,
)
from colledge.launch.job import OutputFolder
from colledge.launch.progress import ProfilingProgress
from colledge.launch.rendezvous import Supervisor, write_commands
from colledge.launch.stop import StopRequest
from colledge.parallel import World
from colledge.records import read_json, write_atomically
from colledge.report.federation import FederationReport, render, tier_table
from colledge.report.tables import make_console
from colledge.units import format_bytes, format_count, format_joules, format_seconds

_PATH_KEYS = PathKeys(
    paths=("output", "nodes.*.data"), names=("data.source", "data.text.tokenizer", "nodes.*.trainer")
)

_LEAVE_S = 5.0  # for the parent of before to be told that a node moved


def read_federation(path: Path, overrides: Sequence[str] = ()) -> Federation:
    """Return the federation in a file.

    Raises:
        ConfigError: The file is malformed, the nodes are no tree, or the output is no folder.
    """
    config = read_config(FederationConfig, path, overrides, _PATH_KEYS, {"output": "federation"})
    for folder in (config.output, *config.output.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output: {folder} is a file, wanted a folder.", fix="give another output.")
    return Federation(config)


class TrainerFor(Protocol):
    """Decides where nodes train."""

    def __call__(self, id: NodeId, clock: Clock) -> Trainer:
        """Return a node's trainer."""


def run_job(job: FederationJob, world: World, ranks: Mapping[str, int], stop: StopRequest) -> None:
    """Do what the coordinator of a federation's pools is to do.

    Raises:
        ColledgeError: What ended it.
    """
    federation = Federation(job.federation, idle_watts(job))
    trainer_for = Trainers(job, federation, ranks, world.wire)
    if job.kind == "simulate":
        _simulate(
            federation, make_console(), trainer_for, [_Stopping(stop), *_moves(federation, job.migrate)]
        )
        return
    assert job.node is not None
    assert job.credentials is not None
    _serve(federation, job.node, job.credentials, job.parent, trainer_for, stop)


# -- simulations -------------------------------------------------------------------------------------------------


def simulate(federation: Federation, console: Console, migrate: float = 0.0) -> None:
    """Run all nodes in virtual time; write what they did to federation.jsonl.

    They run in this process; where some train on pools, in one that is the coordinator of all their devices.

    Args:
        federation: Its file.
        console: Hears of every round.
        migrate: The share of the leaves that moves in every round.

    Raises:
        ColledgeError: The federation cannot go on.
    """
    moves = _moves(federation, migrate)
    job = simulation_job(federation, migrate)
    if job is None:
        _simulate(federation, console, federation.device_trainer, moves)
        return
    log = OutputFolder(job.output).log("coordinator")
    with ProfilingProgress(log, console, ("round ", "is not there", "trains under")) as progress:
        Supervisor(job).run(progress)


def simulation_commands(federation: Federation, migrate: float = 0.0) -> str:
    """Return the lines that start a simulation with pools by hand, one for each process.

    Raises:
        ConfigError: No node trains on a pool, or nobody would move.
    """
    _moves(federation, migrate)
    return _commands(simulation_job(federation, migrate))


def _moves(federation: Federation, share: float) -> list[RoundHook]:
    return [Migration(federation.tree, share, federation.config.seed)] if share else []


def _commands(job: FederationJob | None) -> str:
    if job is None:
        raise ConfigError(
            "--print-commands, and nothing here trains on a pool: there is one process to start.",
            fix="leave it out.",
        )
    return write_commands(job)


def _simulate(
    federation: Federation,
    console: Console,
    trainer_for: TrainerFor,
    on_round: Sequence[RoundHook],
) -> None:
    simulation = make_simulation(federation, console, trainer_for)
    lines = _RoundLines(console, federation.tree.root)
    simulation.on_round += [lines, *on_round]
    folder, facts = federation.config.output, federation.facts(simulated=True)
    records = simulation.run()
    lines(simulation, 0)  # the last round, which no other follows
    write_atomically(folder / FACTS, facts.to_json())
    text = "".join(record.model_dump_json(exclude_none=True) + "\n" for record in records)
    write_atomically(folder / LINES, text)


class _Stopping:
    """Ends a simulation that is asked to stop, or whose launcher is gone (a `RoundHook`)."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, simulation: Simulation, round_index: int) -> None:
        if self._stop.asked:
            raise LaunchError(f"stopped in round {round_index}.", fix="simulate again.")


class _RoundLines:
    """Prints a line about every round of the root that ended (a `RoundHook`)."""

    def __init__(self, console: Console, root: NodeId) -> None:
        self._console, self._root = console, root

    def __call__(self, simulation: Simulation, round_index: int) -> None:
        last = next((one for one in reversed(simulation.records) if one.node == self._root), None)
        if last is None:
            return
        accuracy = "" if last.accuracy is None else f", accuracy {last.accuracy:.4f}"
        after = f", after {format_seconds(last.ended_s)}" if last.ended_s else ""
        self._console.print(f"round {last.round}{accuracy}{after}", highlight=False)


def report(folder: Path, console: Console, target: float | None = None) -> FederationReport:
    """Print what a federation did, and write federation-report.json and federation.html.

    Raises:
        ConfigError: The root has ended no round there, or the target is no accuracy.
    """
    if target is not None and not 0.0 <= target <= 1.0:
        raise ConfigError(f"--target {target:g}, wanted an accuracy from 0 to 1.", fix="write such as 0.9.")
    made = read_report(folder, target)
    write_atomically(folder / "federation-report.json", made.to_json())
    write_atomically(folder / "federation.html", render(made))
    accuracy = "unknown" if made.accuracy is None else f"{made.accuracy:.4f}"
    console.print(
        f"{made.strategy}: {format_count(len(made.rounds), 'round')} in {made.seconds_text} ({made.source}), "
        f"accuracy of the root {accuracy}, {made.joules_text}, {format_bytes(made.num_bytes)} on all links",
        highlight=False,
    )
    console.print(made.discloses, highlight=False)
    console.print(made.accuracy_text, highlight=False)
    console.print(made.busy_text, highlight=False)
    if target is not None:
        reached = (
            f"in {format_count(made.rounds_to_target, 'round')}, {format_joules(made.joules_to_target)}"
            if made.rounds_to_target is not None and made.joules_to_target is not None
            else "not reached"
        )
        console.print(f"accuracy {target:g}: {reached}", highlight=False)
    console.print(tier_table(made))
    console.print(f"the whole report is {folder / 'federation.html'}", highlight=False)
    return made


def make_simulation(
    federation: Federation, console: Console | None = None, trainer_for: TrainerFor | None = None
) -> Simulation:
    """Return a simulation of a federation, ready to run; leaves whose data are missing are not there, and said.

    Args:
        federation: Its file.
        console: Hears who is not there; None raises it.
        trainer_for: Where nodes train; by default in this process.

    Raises:
        DataError: The common data are missing, or an inner node's.
    """
    make_trainer = trainer_for or federation.device_trainer
    absent: dict[NodeId, DataError] = {}

    def entering(id: NodeId, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return simulation.entering(id, inputs)

    nodes = {}
    for id, config in federation.nodes.items():
        clock = VirtualClock()
        try:
            node = federation.node(id, make_trainer(id, clock), clock, entering=partial(entering, id))
        except DataError as fault:
            if config.data is None or console is None or federation.tree.children(id):
                raise
            absent[id] = fault
            continue
        nodes[id] = Simulated(node, clock, Link(config.latency_s, config.bandwidth_bytes_per_s))
    _check_quorums(federation, absent)
    for id, why in absent.items():
        assert console is not None
        console.print(f"{id} is not there: {why}", highlight=False, markup=False)
    simulation = Simulation(federation.tree.root, nodes, limit_bytes=federation.config.message_limit_bytes)
    return simulation


def _check_quorums(federation: Federation, absent: Mapping[NodeId, DataError]) -> None:
    """Check that nodes can begin without those that are not there.

    Raises:
        DataError: One cannot; the message begins with why one of its children is not there.
    """
    for parent in federation.tree.parents:
        children = federation.tree.children(parent)
        lost = [child for child in children if child in absent]
        wanted = federation.config.rounds.quorum_of(len(children))
        if lost and len(children) - len(lost) < wanted:
            fault = absent[lost[0]]
            raise DataError(
                f"{lost[0]} is not there: {fault.message} So {parent!r} has {len(children) - len(lost)} of "
                f"{len(children)} children, wanted {wanted}; missing: {', '.join(lost)}.",
                fix=f"{fault.fix.rstrip('.')}, or lower rounds.quorum.",
            )


# -- real federations --------------------------------------------------------------------------------------------


def provision(federation: Federation, folder: Path, valid_days: float) -> list[tuple[NodeId, Path]]:
    """Make the federation's authority and a certificate for every node; return each node's folder.

    What is there stays: a node that is new in the file gets a certificate of the same authority.

    Raises:
        ConfigError: An inner node has no address.
    """
    from colledge.federation import certificates

    for id in federation.nodes:
        _address_of(federation, id)
    authority = folder / "authority"
    if not (authority / certificates.AUTHORITY_CERTIFICATE).is_file():
        certificates.make_authority(authority)
    made = []
    for id, config in federation.nodes.items():
        own = folder / id
        if not (own / certificates.NODE_CERTIFICATE).is_file():
            hosts = [config.address.rpartition(":")[0].strip("[]")] if config.address is not None else []
            certificates.issue(authority, id, hosts, own, valid_days)
        made.append((id, own))
    return made


def _address_of(federation: Federation, id: NodeId) -> str | None:
    """Return where a node listens; None for a leaf.

    Raises:
        ConfigError: Nodes connect to it, and it has no address.
    """
    address = federation.nodes[id].address
    expected = federation.tree.children(id)
    if expected and address is None:
        raise ConfigError(
            f"nodes: {id!r} has children and no address.", fix="give it one, such as 192.168.1.2:8700."
        )
    return address if expected else None


def run_node(federation: Federation, id: NodeId, credentials: Path, parent: NodeId | None = None) -> None:
    """Run a node of a real federation until that ends, or until SIGTERM or Ctrl-C; it goes on where it stopped.

    It runs in this process; one that trains on a pool, in one that is the coordinator of the pool's devices.

    Args:
        federation: Its file.
        id: The node.
        credentials: The node's own folder, as `provision` made it.
        parent: Another parent than the file says: one of `may_move_to`.

    Raises:
        ConfigError: There is no such node, it may not move there, or its certificate is not valid.
        LaunchError: It runs already.
        ColledgeError: The federation cannot go on.
    """
    _check_place(federation, id, parent)
    job = node_job(federation, id, credentials, parent)
    if job is None:
        with OutputFolder(federation.config.output / id).locked():  # a pool's coordinator holds its own
            _serve(federation, id, credentials, parent, federation.device_trainer, StopRequest())
    else:
        Supervisor(job).run()


def node_commands(federation: Federation, id: NodeId, credentials: Path, parent: NodeId | None = None) -> str:
    """Return the lines that start a node on a pool by hand, one for each process; as `run_node`.

    Raises:
        ConfigError: As `run_node`; or the node trains on one device.
    """
    _check_place(federation, id, parent)
    return _commands(node_job(federation, id, credentials, parent))


def _check_place(federation: Federation, id: NodeId, parent: NodeId | None) -> None:
    config = federation.nodes.get(id)
    if config is None:
        raise ConfigError(f"there is no node {id!r}.", fix=f"use one of {', '.join(federation.nodes)}.")
    if parent is not None and parent != config.parent and parent not in config.may_move_to:
        raise ConfigError(f"{id!r} may not move to {parent!r}.", fix="add it to the node's may_move_to.")


def _serve(
    federation: Federation,
    id: NodeId,
    credentials: Path,
    parent: NodeId | None,
    trainer_for: TrainerFor,
    stop: StopRequest,
) -> None:
    from colledge.federation.cellnet import CellNetTransport

    above = parent or federation.nodes[id].parent
    children = [
        other for other, node in federation.nodes.items() if id == node.parent or id in node.may_move_to
    ]
    folder, clock = NodeFolder(federation.config.output / id), RealClock()
    if id == federation.tree.root:
        write_atomically(federation.config.output / FACTS, federation.facts(simulated=False).to_json())
    node = federation.node(id, trainer_for(id, clock), clock, folder, parent)
    _leave_old_parent(federation, id, credentials, folder, above)
    above_address = None if above is None else _address_of(federation, above)
    transport = CellNetTransport(
        id,
        credentials,
        parent=None if above is None or above_address is None else (above, above_address),
        listen=_address_of(federation, id),
        children=children,
        limit_bytes=federation.config.message_limit_bytes,
    )
    try:
        serve(node, transport, folder, clock, stop)
    finally:
        transport.close()


def _leave_old_parent(
    federation: Federation, id: NodeId, credentials: Path, folder: NodeFolder, above: NodeId | None
) -> None:
    """Tell the parent of before, if a node moved, not to wait for it; one that is away finds out by itself."""
    from colledge.federation.cellnet import CellNetTransport

    before = folder.parent or federation.nodes[id].parent
    if before == above or before not in federation.nodes:
        return
    address = _address_of(federation, before)
    if address is None:
        return
    transport = CellNetTransport(id, credentials, parent=(before, address))
    try:
        with suppress(TransportError):
            transport.send(before, Message(Kind.LEAVE), _LEAVE_S)
    finally:
        transport.close()


def read_status(folder: Path) -> list[NodeStatus]:
    """Return where the nodes stand whose files are in an output folder.

    Raises:
        ConfigError: There are none.
    """
    found = [read_json(NodeStatus, path) for path in sorted(folder.glob("*/status.json"))]
    if not found:
        raise ConfigError(f"{folder}: no node has run here.", fix="give the output folder of a federation.")
    return found
