"""What federations come to: accuracy, bytes, joules, time and memory, each strategy against its baselines.

    OMP_NUM_THREADS=1 python benchmarks/federation.py fedeec|eclm|eclm-search|gkt|pool|many [--seeds 3] [--json]

All runs are simulations (virtual time, counted operations; a pool's seconds are measured); accuracies are means over
seeds, with their spread. Settings are in benchmarks/federations/*.yaml. Fashion-MNIST: apt-get install
dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

import psutil
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.federations import eclm
from colledge.errors import ColledgeError
from colledge.federation.build import Federation
from colledge.federation.config import FederationConfig
from colledge.federation.report import make_report, read_report
from colledge.federation.simulation import Migration
from colledge.federation.trainer import forward_flops
from colledge.launch import federate
from colledge.models import SequentialModel
from colledge.records import parse_record, read_yaml_mapping
from colledge.report.federation import FederationReport
from colledge.units import format_bytes, format_joules, format_seconds

SETTINGS = Path(__file__).parent / "federations"
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Args:
        name: Of what was run.
        seed: Of the federation.
        accuracy: By tier, after the last round: of the cloud, of the mean edge and end.
        num_bytes: On all links.
        joules: Of all nodes whose power is known.
        seconds: Virtual ones.
        wall_s: Seconds that it took here.
        figures: The root's other ones, after its last round.
    """

    name: str
    seed: int
    accuracy: dict[str, float]
    num_bytes: int
    joules: float
    seconds: float
    wall_s: float
    figures: Mapping[str, float] = field(default_factory=dict)


def run(
    name: str, file: str, seed: int, changes: Mapping[str, Any] = NOTHING, migrate: float = 0.0
) -> Outcome:
    """Simulate a file's federation, some of its keys replaced, and return what came of it."""
    began_s = time.perf_counter()
    federation = federation_of(file, seed, changes)
    simulation = federate.make_simulation(federation)
    if migrate:
        simulation.on_round.append(Migration(federation.tree, migrate, federation.config.seed))
    records = simulation.run()
    report = make_report(federation.facts(simulated=True), records)
    figures = next(one.figures for one in reversed(records) if one.node == federation.tree.root)
    return outcome_of(name, seed, report, time.perf_counter() - began_s, figures)


def federation_of(file: str, seed: int, changes: Mapping[str, Any] = NOTHING) -> Federation:
    """Return a file's federation, some of its keys replaced."""
    values = {**read_values(file), "seed": seed, **changes}
    return Federation(parse_record(FederationConfig, values, file))


def outcome_of(
    name: str, seed: int, report: FederationReport, wall_s: float, figures: Mapping[str, float] = NOTHING
) -> Outcome:
    """Return what a report says of a run."""
    tiers = {
        tier: mean(node.accuracy for node in nodes if node.accuracy is not None)
        for tier, nodes in report.tiers()
        if any(node.accuracy is not None for node in nodes)
    }
    joules = sum(node.joules or 0.0 for node in report.nodes)
    return Outcome(name, seed, tiers, report.num_bytes, joules, report.seconds, wall_s, figures)


# -- benchmarks --------------------------------------------------------------------------------------------------


def fedeec(seed: int) -> list[Outcome]:
    """FedEEC against HierFAVG with the ends' model everywhere, on two splits; rectification off; ends that migrate."""
    found = []
    for split in ({"dirichlet": 0.3}, {"classes": 2}):
        name = " ".join(f"{key} {value}" for key, value in split.items())
        values = read_values("fedeec")
        data = {"data": {**values["data"], "split": split}}
        without = {"strategy": {**values["strategy"], "name": "fedagg"}}
        found += [
            run(f"{name}: HierFAVG, the ends' model", "fedeec", seed, {**data, **hierfavg()}),
            run(f"{name}: FedAgg (no rectification)", "fedeec", seed, {**data, **without}),
            run(f"{name}: FedEEC", "fedeec", seed, data),
        ]
    return [
        *found,
        run("dirichlet 0.3: FedEEC, 30 % of the ends move every round", "fedeec", seed, migrate=0.3),
    ]


def hierfavg() -> dict[str, Any]:
    """Return the changes that make fedeec.yaml HierFAVG, at the learning rate that suits it best."""
    local = with_rate("fedeec", 0.03)  # of 0.003, 0.01 and 0.03; FedEEC: 0.002 of 0.001, 0.002, 0.004
    return {"nodes": with_model("fedeec", "end"), "strategy": {"name": "hierfavg"}, "local": local}


def gkt(seed: int) -> list[Outcome]:
    """FedGKT against FedAvg on the full net and on the edges' net; edges alone; features in fewer bytes."""
    if seed == 0:
        print_sizes()
    slow = {"local": with_rate("gkt", 0.02)}  # the best for FedAvg on the full net, of 0.02, 0.05 and 0.1
    full = {**slow, "strategy": {"name": "fedavg"}, "nodes": with_model("gkt", "full")}
    edge = {"strategy": {"name": "fedavg"}, "nodes": with_model("gkt", "edge")}
    alone = {"strategy": {"name": "gkt", "alpha": 0.0}}
    found = [
        run("FedAvg, full net, 10 rounds", "gkt", seed, full),
        run("FedAvg, full net, 30 rounds", "gkt", seed, {**full, "rounds": {"count": 30}}),
        run("FedAvg, edge net, 10 rounds", "gkt", seed, edge),
        run("edges alone (FedGKT, alpha 0), 10 rounds", "gkt", seed, alone),
        run("FedGKT, 10 rounds", "gkt", seed),
        run("FedGKT, 30 rounds", "gkt", seed, {"rounds": {"count": 30}}),
    ]
    for kind in ("float16", "int8"):
        narrow = {"strategy": {"name": "gkt", "features": kind}}
        found.append(run(f"FedGKT, {kind} features, 10 rounds", "gkt", seed, narrow))
    return found


def print_sizes() -> None:
    """Print parameters and FLOPs of the paper's nets for 32x32x3 images, the edge's against the full ones."""
    nets = {}
    for depth in (8, 56, 110):
        config = {
            "architecture": "resnet",
            "depth": depth,
            "bottleneck": True,
            "classes": 10,
            "image": [3, 32, 32],
        }
        model = SequentialModel(config)
        layers = range(len(model.layer_names))
        parameters = sum(prod(s) for index in layers for s in model.layer_parameters(index).values())
        rows = (("pixels", (3, 32, 32)),)
        nets[depth] = parameters, forward_flops(model.spec.to_json(), (0, len(layers)), rows)
    edge = nets[8]
    for depth, (parameters, flops) in nets.items():
        print(
            f"ResNet-{depth}: {parameters:,} parameters ({parameters / edge[0]:.1f} times the edge's), "
            f"{flops / 1e6:.1f} MFLOP a forward ({flops / edge[1]:.1f} times)"
        )


def pool(seed: int) -> list[Outcome]:
    """An edge on one emulated device and on a pool of three, with a middle and with a large model."""
    return [
        outcome
        for model in ("middle", "large")
        for devices in ("one", "three")
        if (outcome := run_on_pool(f"{model} edge on {devices}", seed, model, devices)) is not None
    ]


def run_on_pool(name: str, seed: int, model: str, devices: str) -> Outcome | None:
    """Simulate pool.yaml with another model and pool for its edge; None, and said, where the model does not fit."""
    nodes = [dict(node) for node in read_values("pool")["nodes"]]
    nodes[1] |= {"model": model, "trainer": str(SETTINGS / "pools" / f"{devices}.yaml")}
    with tempfile.TemporaryDirectory() as folder:
        federation = federation_of("pool", seed, {"nodes": nodes, "output": folder})
        began_s = time.perf_counter()
        try:
            federate.simulate(federation, Console(stderr=True))
        except ColledgeError as fault:
            print(f"{name}: {fault.message}", flush=True)
            return None
        report = read_report(Path(folder))
    edge = next(node for node in report.nodes if node.node == "edge")
    rounds = [one.seconds for one in report.rounds]
    print(
        f"{name}, seed {seed}: {format_seconds(mean(rounds[1:]))} a round after the first, "
        f"{format_joules(edge.joules or 0.0)} at the edge ({format_joules(edge.idle_joules or 0.0)} of it idling)",
        flush=True,
    )
    return outcome_of(name, seed, report, time.perf_counter() - began_s)


def many(seed: int) -> list[Outcome]:
    """More and more ends in one process, the same number of rows each; each size in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        return [processes.apply(run_many, (seed, ends)) for ends in (39, 89, 189)]


def run_many(seed: int, ends: int) -> Outcome:
    """Simulate many.yaml with some number of ends; print seconds and memory."""
    values = read_values("many")
    nodes = [*values["nodes"][:-1], {**values["nodes"][-1], "count": ends}]
    rows = round(20 * ends / (1.0 - values["data"]["public"]))
    federation = federation_of("many", seed, {"nodes": nodes, "data": {**values["data"], "limit": rows}})
    assert federation.test is not None
    assert federation.public is not None  # all rows are read, and the files' memory is free again
    before = resident_bytes()
    simulation = federate.make_simulation(federation)
    began_s = time.perf_counter()
    records = simulation.run()
    wall_s, held = time.perf_counter() - began_s, resident_bytes() - before
    seconds = wall_s / values["rounds"]["count"]
    print(
        f"{ends + 11} nodes: {seconds:.2f} s a round, {1e3 * seconds / (ends + 11):.1f} ms a node; they hold "
        f"{format_bytes(held)}, {format_bytes(held / (ends + 11))} a node, beside {format_bytes(before)} before",
        flush=True,
    )
    report = make_report(federation.facts(simulated=True), records)
    return outcome_of(f"{ends + 11} nodes", seed, report, wall_s, {})


def resident_bytes() -> int:
    """Return what this process has in memory, after what is not in use was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


# -- settings and tables -----------------------------------------------------------------------------------------


def read_values(file: str) -> dict[str, Any]:
    """Return what a file of settings holds."""
    return read_yaml_mapping(SETTINGS / f"{file}.yaml")


def with_model(file: str, model: str) -> list[dict[str, Any]]:
    """Return a file's nodes, all with one model."""
    return [{**node, "model": model} for node in read_values(file)["nodes"]]


def with_rate(file: str, learning_rate: float) -> dict[str, Any]:
    """Return how a file's nodes train, at another learning rate."""
    local: dict[str, Any] = read_values(file)["local"]
    return {**local, "optimizer": {**local["optimizer"], "learning_rate": learning_rate}}


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as Markdown: means over seeds, and the spread of the cloud's accuracy."""
    lines = ["| | cloud | edge | end | bytes | joules | virtual time |", "|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(one.name for one in outcomes):
        same = [one for one in outcomes if one.name == name]
        cells = []
        for tier in ("cloud", "edge", "end"):
            known = [100 * one.accuracy[tier] for one in same if tier in one.accuracy]
            spread = f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else ""
            cells.append(f"{mean(known):.1f} %{spread}" if known else "-")
        cells += [
            format_bytes(mean(one.num_bytes for one in same)),
            format_joules(mean(one.joules for one in same)),
            f"{mean(one.seconds for one in same):.1f} s",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


BENCHMARKS = {
    "fedeec": fedeec,
    "eclm": eclm.eclm,
    "eclm-search": eclm.search,
    "gkt": gkt,
    "pool": pool,
    "many": many,
}


def main() -> None:
    """Run one benchmark for some seeds; print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    outcomes = [one for seed in range(arguments.seeds) for one in BENCHMARKS[arguments.benchmark](seed)]
    make_table = eclm.table if arguments.benchmark.startswith("eclm") else table
    print(json.dumps([asdict(one) for one in outcomes]) if arguments.json else make_table(outcomes))


if __name__ == "__main__":
    main()
