"""Nodes of a federation on pools: the numbers are those of devices, for every strategy; the commands start all."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from colledge.federation.build import Federation
from colledge.federation.clock import Clock
from colledge.federation.config import FederationConfig
from colledge.federation.pool_trainer import PlanFor, PoolTrainer
from colledge.federation.record import NodeRound
from colledge.federation.trainer import Trainer
from colledge.launch.engine_settings import settings_on
from colledge.launch.federate import make_simulation
from colledge.launch.federated_pools import PoolPlanner
from colledge.launch.run_config import DeviceConfig, PowerConfig
from colledge.models import LayeredModel, SequentialModel
from colledge.plan import Plan, read_plan
from tests.multiproc.commands import (
    assert_one_line,
    forked_colledge,
    processes_of,
    run_here,
    start_by_hand,
    start_forked,
)
from tests.multiproc.workers import Workers

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "hierfavg": {},
    "heterofl": {},
    "fedagg": {"autoencoder": {"steps": 5}},
    "fedeec": {"autoencoder": {"steps": 5}},
    "gkt": {"cuts": [2, 1]},
    "eclm": {
        "modules": 4,
        "offline": {"epochs": 1, "enhance_epochs": 1},
        "budget": {"share": 1.0},
        "budgets": {"a": {"share": 0.8}, "b": {"share": 0.9}},
    },
}
SGD = {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9}
POOL = """\
devices:
  - {id: desk, threads: 1, memory: 2 GB, power: {idle_w: 2, compute_w: 6, communicate_w: 3}}
  - {id: lap, threads: 1, memory: 2 GB, power: {idle_w: 1, compute_w: 21, communicate_w: 3},
     emulate: {slowdown: 3, bandwidth: 500 Mbit/s, latency: 1 ms}}
"""


def values_of(strategy: str, **changes: Any) -> dict[str, Any]:
    """Return a federation of a cloud, an edge and two ends on scikit-learn's digits."""
    return {
        "strategy": {"name": strategy, **STRATEGIES[strategy]},
        "rounds": {"count": 3},
        "data": {
            "source": "digits",
            "split": {"dirichlet": 1.0},
            "public": 0.1,
            "limit": 63,  # so that the last batches are not full
            "test_limit": 20,
        },
        "models": {
            "small": {"architecture": "cnn", "channels": [4]},
            "middle": {"architecture": "cnn", "channels": [4, 6]},
            "large": {"architecture": "cnn", "channels": [4, 6, 8]},
        },
        "local": {"batch_size": 8, "optimizer": SGD, "precision": "float64"},
        "nodes": [
            {"id": "cloud", "model": "large"},
            {"id": "edge", "parent": "cloud", "model": "middle"},
            {"id": "a", "parent": "edge", "model": "small"},
            {"id": "b", "parent": "edge", "model": "small"},
        ],
        **changes,
    }


def federation_of(strategy: str, output: Path, **changes: Any) -> Federation:
    values = values_of(strategy, output=str(output), **changes)
    if strategy in ("fedavg", "hierfavg", "heterofl", "eclm"):  # one model for all
        values["nodes"] = [{**node, "model": "middle"} for node in values["nodes"]]
    return Federation(FederationConfig.model_validate(values))


def of_text(output: Path) -> Federation:
    """Return a federation of small Llamas that continue bytes of this file, by FedEEC."""
    source = output / "source"
    source.mkdir()
    for index, text in enumerate(Path(__file__).read_text(encoding="utf-8")[:2400].split("\n\n")):
        (source / f"{index}.txt").write_text(text)
    llama = {"architecture": "llama", "hidden": 8, "intermediate": 16, "heads": 2, "kv_heads": 1}
    return federation_of(
        "fedeec",
        output,
        data={
            "source": str(source),
            "text": {"sequence_length": 16},
            "public": 0.1,
            "limit": 63,
            "test_limit": 9,
        },
        models={name: {**llama, "blocks": n} for name, n in (("small", 1), ("middle", 1), ("large", 2))},
    )


def halves(devices: tuple[str, str], num_rows: int) -> PlanFor:
    """Return plans of two stages, one on each device; of a single layer, and of a leaf's, two unequal replicas."""

    def plan(model: LayeredModel, layers: tuple[int, int]) -> Plan:
        one, other = ({"samples": 4, "shards": [{"device": device, "fraction": 1.0}]} for device in devices)
        cut = layers[1] - 1
        stages = [
            {"layers": [layers[0], cut], "replicas": [one]},
            {"layers": [cut, layers[1]], "replicas": [other]},
        ]
        if cut == layers[0] or devices == ("d2", "d3"):
            stages = [{"layers": layers, "replicas": [{**one, "samples": 3}, {**other, "samples": 1}]}]
        tag = {"schema": "colledge/plan/1", "global_batch_size": num_rows, "microbatch_size": 4}
        num_layers = len(model.layer_names)
        return Plan.model_validate({**tag, "num_layers": num_layers, "layers": layers, "stages": stages})

    return plan


def final_weights(federation: Federation, workers: Workers | None) -> dict[str, Mapping[str, Tensor]]:
    """Return every node's weights after a simulation, with an edge and a leaf on pools where there are workers."""
    pools = {"edge": ("d0", "d1"), "a": ("d2", "d3")} if workers is not None else {}
    trainers: dict[str, Trainer] = {}

    def trainer_for(id: str, clock: Clock) -> Trainer:
        trainers[id] = federation.device_trainer(id, clock)
        if id in pools:
            assert workers is not None
            local = federation.config.local
            devices = [DeviceConfig(id=device, threads=1) for device in pools[id]]
            settings = settings_on(devices, local.optimizer, local.precision, seed=0)
            plan_for = halves(pools[id], federation.largest_batch(id))
            trainers[id] = PoolTrainer(plan_for, settings, workers.ranks, workers.wire, clock)
        return trainers[id]

    records = make_simulation(federation, trainer_for=trainer_for).run()
    assert not [record for record in records if record.failed or record.missing]
    planned = {record.node for record in records if record.plan is not None}
    assert planned <= set(pools)
    assert workers is None or "a" in planned
    weights = {id: trainer.weights() for id, trainer in trainers.items()}
    for id in pools:
        trainers[id].close()
    return weights


@pytest.mark.parametrize("strategy", [*STRATEGIES, "text"])
def test_the_same_seed_gives_the_same_model_on_a_device_and_on_a_pool(
    strategy: str, workers: Workers, tmp_path: Path
) -> None:
    federation = of_text(tmp_path) if strategy == "text" else federation_of(strategy, tmp_path)
    wanted = final_weights(federation, None)
    seen = final_weights(federation, workers)
    assert seen.keys() == wanted.keys() == federation.nodes.keys()
    for id, weights in wanted.items():
        assert seen[id].keys() == weights.keys()
        for name, values in weights.items():
            scale = float(values.abs().max())
            assert float((seen[id][name] - values).abs().max()) <= 1e-9 * scale, (id, name)


def write(folder: Path, pools: Mapping[str, str], **changes: Any) -> None:
    """Write federation.yaml, with some nodes on a pool.yaml each, and those files."""
    values = values_of("fedagg", **{"rounds": {"count": 2}, **changes})
    values["local"]["precision"] = "float32"
    for id, text in pools.items():
        (folder / f"{id}.yaml").write_text(text)
    nodes = [
        {
            **node,
            **({"trainer": f"{node['id']}.yaml"} if node["id"] in pools else {"device": "raspberry-pi-5"}),
        }
        for node in values["nodes"]
    ]
    (folder / "federation.yaml").write_text(yaml.safe_dump({**values, "nodes": nodes}))


def records_of(folder: Path, node: str) -> list[NodeRound]:
    lines = (folder / "federation" / "federation.jsonl").read_text().splitlines()
    return [record for line in lines if (record := NodeRound.model_validate_json(line)).node == node]


def test_a_federation_with_a_pool_is_simulated_and_finds_its_plan_again_when_started_by_hand(
    tmp_path: Path,
) -> None:
    write(tmp_path, {"edge": POOL})
    first = forked_colledge(tmp_path, "federate", "simulate", "federation.yaml")
    assert first.returncode == 0, first.stderr
    own = tmp_path / "federation" / "edge"
    plan, profile = read_plan(own / "plan.json"), (own / "pool-profile.json").read_bytes()
    assert plan.global_batch_size == 8
    assert f"edge trains under {plan.describe()}" in first.stdout
    edge, cloud = (records_of(tmp_path, id) for id in ("edge", "cloud"))
    assert [record.plan for record in edge] == [plan.describe()] * 2
    assert all(record.plan is None for record in cloud)
    for record in edge:
        assert record.compute_joules is not None
        watts = record.compute_joules / record.compute_s
        assert 6 - 2 - 1e-9 <= watts <= 21 - 1 + 1e-9
        assert record.ended_s - record.began_s > record.compute_s / len(plan.devices)
    report = json.loads((tmp_path / "federation" / "federation-report.json").read_text())
    figures = {node["node"]: node for node in report["nodes"]}
    assert figures["edge"]["idle_joules"] == pytest.approx(3 * report["seconds"])
    assert "at least" not in first.stdout  # every joule is known

    printed = run_here(tmp_path, "federate", "simulate", "federation.yaml", "--print-commands")
    assert printed.returncode == 0, printed.stderr
    coordinator, *_ = start_by_hand(tmp_path, printed.stdout, 3)
    assert "round 2" in coordinator
    assert "bytes and FLOPs" not in coordinator
    assert (own / "pool-profile.json").read_bytes() == profile
    assert [record.loss for record in records_of(tmp_path, "edge")] == [record.loss for record in edge]


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        (
            {"edge": POOL, "cloud": POOL},
            "nodes: device 'desk' is in the pools of 'cloud' and 'edge'. Fix: give every node a pool.yaml",
        ),
        (
            {"edge": "devices: [{id: d, catalog: jetson-orin-nano}]"},
            "nodes: 'edge' has a pool from the catalog",
        ),
        (
            {"edge": "devices: [{id: far, host: 192.168.1.7}]"},
            "device 'far' is on another machine, which colledge does not start yet. Fix: start the lines of "
            "`colledge federate simulate --print-commands`",
        ),
        (
            {"edge": POOL, "cloud": "coordinator: {port: 4711}\ndevices: [{id: other}]"},
            "nodes: the pools of 'cloud' and 'edge' have different coordinators",
        ),
    ],
    ids=["one device twice", "catalog", "elsewhere", "coordinators"],
)
def test_pools_that_do_not_go_together_are_refused(pools: dict[str, str], said: str, tmp_path: Path) -> None:
    write(tmp_path, pools)
    assert_one_line(run_here(tmp_path, "federate", "simulate", "federation.yaml"), said)


def test_lines_to_start_by_hand_are_of_nodes_on_pools(tmp_path: Path) -> None:
    write(tmp_path, {"cloud": POOL})
    printed = run_here(tmp_path, "federate", "serve", "federation.yaml", "--print-commands")
    assert printed.returncode == 0, printed.stderr
    named, lines = printed.stdout.splitlines()[::2], printed.stdout.splitlines()[1::2]
    assert named == [f"# {name} (this machine)" for name in ("coordinator", "desk", "lap")]
    assert lines[0].endswith(f"-m colledge.launch.coordinator {tmp_path / 'federation' / 'cloud'}")
    assert [f"--nnodes=3 --node-rank={rank} " in line for rank, line in enumerate(lines)] == [True] * 3
    assert_one_line(
        run_here(tmp_path, "federate", "join", "federation.yaml", "--node", "a", "--print-commands"),
        "--print-commands, and nothing here trains on a pool",
    )
    far = "coordinator: {address: 127.0.0.1}\ndevices: [{id: far, host: 192.168.1.7}]"
    write(tmp_path, {"cloud": far})
    assert_one_line(
        run_here(tmp_path, "federate", "serve", "federation.yaml", "--print-commands"),
        "device 'far' is on another machine and cannot reach the coordinator at 127.0.0.1",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_simulation_that_is_ended_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    write(tmp_path, {"edge": POOL}, rounds={"count": 5000})
    log, deadline_s = tmp_path / "federation/logs/coordinator.log", time.monotonic() + 90
    process = start_forked(tmp_path, "federate", "simulate", "federation.yaml")
    while not log.is_file() or "round 2" not in log.read_text():
        assert process.poll() is None, process.communicate(timeout=10)
        assert time.monotonic() < deadline_s, "the simulation did not begin"
        time.sleep(0.1)
    assert len(processes_of(tmp_path)) == 7  # the launcher, three agents, the coordinator and two devices
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert stderr == "colledge: stopped on request; a simulation keeps no state. Fix: simulate again.\n"
    deadline_s = time.monotonic() + 60
    while number == signal.SIGKILL and processes_of(tmp_path) and time.monotonic() < deadline_s:
        time.sleep(0.2)  # they notice
    assert not processes_of(tmp_path)


def test_models_of_as_many_layers_are_measured_once(workers: Workers, tmp_path: Path) -> None:
    federation = federation_of("eclm", tmp_path)
    devices = [DeviceConfig(id="d0", threads=1, memory="2 GB")]
    base = federation.model_of("a").spec.config
    modular = {"architecture": "modular", "base": base, "modules": 4, "top_k": 2, "width": 0.25}
    models = [SequentialModel({**modular, "held": held}) for held in ([[0, 1], [2]], [[3], [0, 1, 2]])]
    layers = (0, len(models[0].layer_names))

    def files() -> list[bytes]:  # what is measured again has other seconds in it
        return [(tmp_path / "a" / name).read_bytes() for name in ("model-profile.json", "plan.json")]

    def planner_on(devices: list[DeviceConfig]) -> PoolPlanner:
        return PoolPlanner(federation, "a", devices, workers.ranks, workers.wire)

    made = []
    for _ in range(2):  # the second time as after a restart
        planner = planner_on(devices)
        made += [(planner(model, layers), files()) for model in models]
    assert made == [made[0]] * 4
    assert made[0][0].layer_range == layers
    assert planner(models[0], (1, layers[1])).layer_range == (1, layers[1])
    assert files()[0] == made[0][1][0]
    federation.nodes["a"] = federation.nodes["a"].model_copy(update={"objective": "time"})
    planner_on(devices)(models[0], (1, layers[1]))
    assert files()[0] == made[0][1][0]
    assert '"time"' in (tmp_path / "a" / "request.json").read_text()
    federation.nodes["a"] = federation.nodes["a"].model_copy(update={"model": "small"})
    planner_on(devices)(models[0], layers)
    renamed = files()[0]
    assert renamed != made[0][1][0]
    power = PowerConfig(idle_w=1, compute_w=2, communicate_w=1)
    planner_on([DeviceConfig(id="d0", threads=1, memory="2 GB", power=power)])(models[0], layers)
    assert files()[0] != renamed


def test_a_leaf_of_fedeec_plans_for_both_halves_of_its_batches(tmp_path: Path) -> None:
    for strategy in STRATEGIES:
        federation = federation_of(strategy, tmp_path)
        both = 16 if strategy in ("fedeec", "fedagg") else 8
        assert [federation.largest_batch(id) for id in ("cloud", "edge", "a")] == [8, 8, both]
