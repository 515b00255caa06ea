"""Nodes of a federation that train on pools: the process that runs them is the coordinator of their devices.

colledge federate simulate ── coordinator: all nodes ─┬─ the devices of edge-0's pool
                                                      └─ the devices of edge-1's pool
colledge federate join     ── coordinator: one node  ─── the devices of its pool

<output>/<node>/pool-profile.json  model-profile.json  request.json  plan.json   how a node's pool trains
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Literal

from pydantic import Field

from colledge.errors import ConfigError
from colledge.federation.build import Federation
from colledge.federation.clock import Clock
from colledge.federation.config import FederationConfig
from colledge.federation.pool_trainer import PoolTrainer
from colledge.federation.trainer import Trainer
from colledge.federation.transport import NodeId
from colledge.launch import planning
from colledge.launch.engine_settings import settings_on
from colledge.launch.job import Launch, OutputFolder
from colledge.launch.profiling import profile_pool
from colledge.launch.run_config import DeviceConfig, PoolConfig, load_pool
from colledge.models import LayeredModel
from colledge.models.layered import DTYPES
from colledge.parallel import Wire
from colledge.plan import Plan, read_plan
from colledge.planner import PlanningRequest, plan_training
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import read_json, write_atomically


class FederationJob(Launch):
    """What the coordinator of a federation's pools is to do: simulate all nodes, or be one of them.

    `pools` has the ids of each node's devices. `credentials` is the node's folder of certificates, `parent` another
    one than the file says. `migrate` is of a simulation: the share of the leaves that moves in every round.
    """

    schema_tag: Literal["colledge/federation-job/1"] = Field(
        default="colledge/federation-job/1", alias="schema"
    )
    kind: Literal["simulate", "node"]
    federation: FederationConfig
    pools: dict[NodeId, tuple[str, ...]]
    migrate: float = 0.0
    node: NodeId | None = None
    credentials: Path | None = None
    parent: NodeId | None = None

    def devices_of(self, id: NodeId) -> list[DeviceConfig]:
        """Return the devices of a node's pool."""
        return [device for device in self.pool.devices if device.id in self.pools[id]]


def simulation_job(federation: Federation, migrate: float) -> FederationJob | None:
    """Return the job that simulates a federation with all its pools; None where no node has one.

    Raises:
        ConfigError: A pool.yaml cannot be read, or two nodes' pools do not go together.
    """
    config = federation.config
    pools = {id: _pool_of(federation, id) for id, n in federation.nodes.items() if n.trainer != "device"}
    if not pools:
        return None
    pool = _together(pools)
    return FederationJob(
        kind="simulate",
        federation=config,
        pool=pool,
        pools=_ids(pools),
        devices=tuple(device.id for device in pool.devices),
        output=config.output.resolve(),
        migrate=migrate,
    )


def node_job(
    federation: Federation, id: NodeId, credentials: Path, parent: NodeId | None
) -> FederationJob | None:
    """Return the job that is a node of a real federation with its pool; None where it trains on one device.

    Raises:
        ConfigError: The pool.yaml cannot be read.
    """
    config = federation.config
    if federation.nodes[id].trainer == "device":
        return None
    pools = {id: _pool_of(federation, id)}
    pool = _together(pools)
    return FederationJob(
        kind="node",
        federation=config,
        pool=pool,
        pools=_ids(pools),
        devices=tuple(device.id for device in pool.devices),
        output=(config.output / id).resolve(),
        node=id,
        credentials=credentials.resolve(),
        parent=parent,
    )


def _pool_of(federation: Federation, id: NodeId) -> PoolConfig:
    try:
        return load_pool(Path(federation.nodes[id].trainer))
    except ConfigError as fault:
        raise ConfigError(f"trainer of {id!r}: {fault.message}", fix=fault.fix) from None


def _ids(pools: Mapping[NodeId, PoolConfig]) -> dict[NodeId, tuple[str, ...]]:
    return {id: tuple(device.id for device in pool.devices) for id, pool in pools.items()}


def _together(pools: Mapping[NodeId, PoolConfig]) -> PoolConfig:
    """Return the devices of some nodes' pools as one pool.

    Raises:
        ConfigError: A device is in two of them or from the catalog, or they meet at different coordinators.
    """
    first, owners = next(iter(pools)), dict[str, NodeId]()
    for id, pool in pools.items():
        if pool.is_catalog:
            raise ConfigError(
                f"nodes: {id!r} has a pool from the catalog, which is to plan with: there is nothing to train on.",
                fix="list real devices in its pool.yaml; emulate makes one as slow as another.",
            )
        if pool.coordinator != pools[first].coordinator:
            raise ConfigError(
                f"nodes: the pools of {first!r} and {id!r} have different coordinators, and one process runs both.",
                fix="give their pool.yaml the same coordinator.",
            )
        for device in pool.devices:
            if device.id in owners:
                raise ConfigError(
                    f"nodes: device {device.id!r} is in the pools of {owners[device.id]!r} and {id!r}.",
                    fix="give every node a pool.yaml of its own, and every device in them another id.",
                )
            owners[device.id] = id
    devices = tuple(device for pool in pools.values() for device in pool.devices)
    return PoolConfig(coordinator=pools[first].coordinator, devices=devices)


# -- on the coordinator ------------------------------------------------------------------------------------------


def idle_watts(job: FederationJob) -> dict[NodeId, float]:
    """Return what the devices of each node's pool draw together while they idle, where pool.yaml says it."""
    return {
        id: sum(device.power_mode().idle_w for device in job.devices_of(id))
        for id in job.pools
        if _has_power(job.devices_of(id))
    }


def _has_power(devices: Sequence[DeviceConfig]) -> bool:
    return all(device.power is not None for device in devices)


class Trainers:
    """Makes the trainers of a job's nodes (a `TrainerFor`): on the node's pool if it has one, else in this process.

    Args:
        job: Of this coordinator.
        federation: Of the job.
        ranks: The rank of every device.
        wire: This rank's messages.
    """

    def __init__(
        self, job: FederationJob, federation: Federation, ranks: Mapping[str, int], wire: Wire
    ) -> None:
        self._job, self._federation, self._ranks, self._wire = job, federation, ranks, wire

    def __call__(self, id: NodeId, clock: Clock) -> Trainer:
        """Return a node's trainer."""
        if id not in self._job.pools:
            return self._federation.device_trainer(id, clock)
        config, devices = self._federation.config, self._job.devices_of(id)
        settings = settings_on(devices, config.local.optimizer, config.local.precision, config.seed)
        modes = {device.id: device.power_mode() for device in devices}
        watts = {device: mode.compute_w - mode.idle_w for device, mode in modes.items()}
        planner = PoolPlanner(self._federation, id, devices, self._ranks, self._wire)
        known = watts if _has_power(devices) else None
        return PoolTrainer(planner, settings, self._ranks, self._wire, clock, known)


class PoolPlanner:
    """Decides how a node's pool trains its models (a `PlanFor`): for the least of its `objective`.

    Profiles and the plan are kept in the node's folder. What is measured holds for all sub-models of as many layers: a
    plan for one of them is exact for the others, and rarely far from their best.

    Args:
        federation: It says how nodes train, and what rows are like.
        id: The node.
        devices: Of its pool.
        ranks: The rank of every device.
        wire: This rank's messages.
    """

    def __init__(
        self,
        federation: Federation,
        id: NodeId,
        devices: Sequence[DeviceConfig],
        ranks: Mapping[str, int],
        wire: Wire,
    ) -> None:
        self._federation, self._id = federation, id
        self._devices, self._ranks, self._wire = devices, ranks, wire
        self._folder = OutputFolder((federation.config.output / id).resolve())
        self._request = self._folder.path / "request.json"
        self._rows = federation.largest_batch(id)
        self._plans: dict[tuple[int, tuple[int, int]], Plan] = {}

    def __call__(self, model: LayeredModel, layers: tuple[int, int]) -> Plan:
        """Return the plan of the folder, or measure and plan.

        Raises:
            PlanError: The model does not fit the pool.
            ColledgeError: A device failed.
        """
        key = len(model.layer_names), layers
        if key not in self._plans:
            request = PlanningRequest(
                global_batch_size=self._rows,
                objective=self._federation.nodes[self._id].objective,
                optimizer_state_factor=self._federation.config.local.optimizer.state_factor,
                layers=layers,
            )
            self._plans[key] = self._kept(model, request) or self._made(model, request)
            print(f"{self._id} trains under {self._plans[key].describe()}", flush=True)
        return self._plans[key]

    def _kept(self, model: LayeredModel, request: PlanningRequest) -> Plan | None:
        """Return the plan in the folder if it answers this request, and is for the pool as it is."""
        asked, plan = self._request, self._folder.plan
        if self._profiles(len(model.layer_names)) is None or not (asked.is_file() and plan.is_file()):
            return None
        return read_plan(plan) if read_json(PlanningRequest, asked) == request else None

    @property
    def _model_name(self) -> str:
        """The model's name in federation.yaml, and a digest of what is written there."""
        name = self._federation.nodes[self._id].model
        written = json.dumps(self._federation.config.models[name], sort_keys=True)
        return f"{name} {sha256(written.encode()).hexdigest()[:12]}"

    def _profiles(self, num_layers: int) -> tuple[PoolProfile, ModelProfile] | None:
        """Return the profiles in the folder if they are of this pool and model, of so many layers, and of such rows.

        A model is the one that federation.yaml says: ECLM's sub-models share profiles.
        """
        profiles = planning.read_profiles(self._folder)
        if profiles is None:
            return None
        pool, model = profiles
        precision = self._federation.config.local.precision
        numbers_in_a_row = model.input_bytes_per_sample // DTYPES[precision].itemsize or model.sequence_length
        modes = {device.id: device.modes for device in pool.devices}
        same = (
            modes == {device.id: (device.power_mode(),) for device in self._devices}
            and len(model.layers) == num_layers
            and model.name == self._model_name
            and model.precision == precision
            and prod(self._federation.modality.row_shape) == numbers_in_a_row
        )
        return profiles if same else None

    def _made(self, model: LayeredModel, request: PlanningRequest) -> Plan:
        profiles = self._profiles(len(model.layer_names)) or self._measured(model)
        plan = plan_training(*profiles, request).best
        self._request.unlink(missing_ok=True)  # as long as the plan in the folder may answer another one
        write_atomically(self._folder.plan, plan.to_json())
        write_atomically(self._request, request.to_json())
        return plan

    def _measured(self, model: LayeredModel) -> tuple[PoolProfile, ModelProfile]:
        config = self._federation.config
        pool, profile = profile_pool(
            self._wire,
            self._ranks,
            self._devices,
            model,
            name=self._model_name,
            row_shape=self._federation.modality.row_shape,
            global_batch_size=self._rows,
            precision=config.local.precision,
            optimizer=config.local.optimizer,
            loss=self._federation.modality.loss,
            progress=lambda line: print(line, flush=True),
        )
        self._request.unlink(missing_ok=True)  # the plan in the folder was made from other profiles
        write_atomically(self._folder.pool_profile, pool.to_json())
        write_atomically(self._folder.model_profile, profile.to_json())
        return pool, profile
