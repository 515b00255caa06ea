"""The plan: what the planner writes and the engine reads. Stages of replicas of shards, and nothing else.

    plan ── stage ── replica ── shard        a stage owns layers [start, stop)           (pipeline parallelism)
         │        │          └─ shard        a replica computes `samples` rows of every
         │        └─ replica ...             micro-batch                                  (data parallelism)
         └─ stage ...                        a shard holds `fraction` of every layer     (tensor parallelism)

Data parallel is one stage of N replicas; tensor is one stage, one replica, N shards; pipeline is N stages of
one replica of one shard. Rows and layers are half-open ranges. This file decides nothing: it says what a plan
is, checks it, and answers questions about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from colledge.errors import PlanError
from colledge.profiles import PoolProfile
from colledge.records import Record, read_json
from colledge.settings import LibraryName, WirePrecision, ZeroStage

_FRACTION_TOLERANCE = 1e-6

ScheduleName = Literal["gpipe", "1f1b"]


class Shard(Record):
    """A device that holds `fraction` of every sharded layer of its replica, running in power mode `mode`.

    `paced` names another mode for single computations, such as {"F1": "15W"} for the forward of micro-batch 1: a
    device that can switch fast enough computes slower where nobody waits for it. `state_share` is the part of the
    shard's optimizer state that this replica holds under `zero: 1`; without it replicas hold equal parts.
    """

    device: str = Field(min_length=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    mode: str | None = None
    paced: dict[Annotated[str, Field(pattern=r"^[FB][0-9]{1,7}$")], str] = Field(default={})
    state_share: float | None = Field(default=None, ge=0, le=1)


class Replica(Record):
    """`samples` rows of every micro-batch (0 is allowed), computed by one or more shards together."""

    samples: int = Field(ge=0)
    shards: tuple[Shard, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Replica:
        total = sum(shard.fraction for shard in self.shards)
        if abs(total - 1) > _FRACTION_TOLERANCE:
            raise ValueError(f"fractions of a replica sum to {total:g}, wanted 1")
        return self

    @property
    def fractions(self) -> tuple[float, ...]:
        """The fraction of each shard, in order."""
        return tuple(shard.fraction for shard in self.shards)

    def unit_ranges(self, units: int) -> tuple[tuple[int, int], ...]:
        """Return the half-open range of shard units that each shard holds.

        Args:
            units: The number of equal parts that the stage's layers can be cut into.

        Raises:
            PlanError: A fraction does not fall on a unit.
        """
        edges = [0.0, *accumulate(self.fractions)]
        scaled = [edge * units for edge in edges]
        for shard, edge in zip(self.shards, scaled[1:], strict=True):
            if abs(edge - round(edge)) > _FRACTION_TOLERANCE * units:
                raise PlanError(
                    f"fraction {shard.fraction:g} of device {shard.device!r} is off the model's shard units: "
                    f"saw {shard.fraction * units:g} of {units} units, wanted a whole number.",
                    fix=f"use multiples of 1/{units}.",
                )
        return tuple((round(a), round(b)) for a, b in pairwise(scaled))


class Stage(Record):
    """Layers [start, stop) and the replicas that compute them."""

    layers: tuple[int, int]
    replicas: tuple[Replica, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Stage:
        start, stop = self.layers
        if not 0 <= start < stop:
            raise ValueError(f"layers [{start}, {stop}) are no half-open range with at least one layer")
        shapes = {replica.fractions for replica in self.replicas}
        if len(shapes) > 1:
            raise ValueError(
                f"replicas of one stage must shard alike: saw fractions {[list(s) for s in sorted(shapes)]}"
            )
        for k in range(self.num_shards):
            shares = [replica.shards[k].state_share for replica in self.replicas]
            total = sum(share or 0.0 for share in shares)
            if shares != [None] * len(shares) and (None in shares or abs(total - 1) > _FRACTION_TOLERANCE):
                raise ValueError(
                    f"state_share of the replicas of a stage is {shares}, wanted parts that sum to 1, or none"
                )
        return self

    @property
    def num_shards(self) -> int:
        """The number of shards of each replica."""
        return len(self.replicas[0].shards)

    def units(self, num_units: int, shard_index: int) -> tuple[int, int] | None:
        """Return the half-open range of shard units of a shard, or None where replicas are not sharded.

        Raises:
            PlanError: A fraction does not fall on a unit.
        """
        return self.replicas[0].unit_ranges(num_units)[shard_index] if self.num_shards > 1 else None

    def state_shares(self, shard_index: int) -> tuple[float, ...]:
        """Return the part of a shard's optimizer state that each replica holds where ZeRO divides it."""
        equal = 1 / len(self.replicas)
        shares = (replica.shards[shard_index].state_share for replica in self.replicas)
        return tuple(equal if share is None else share for share in shares)

    @property
    def row_ranges(self) -> tuple[tuple[int, int], ...]:
        """The half-open range of a micro-batch's rows that each replica computes."""
        edges = [0, *accumulate(replica.samples for replica in self.replicas)]
        return tuple(pairwise(edges))


class PlanSchedule(Record):
    """Which pipeline schedule, and the forwards each stage runs before its first backward."""

    name: ScheduleName = "1f1b"
    warmup: tuple[int, ...] | None = None


class DeviceFigures(Record):
    """What one device does in a step; predicted or measured, the same fields.

    compute_s + communicate_s + idle_s = step_s: `communicate_s` is time in which the device computes nothing
    while bytes of its own travel. `source` says where the energy comes from.
    """

    compute_s: float = Field(ge=0)
    communicate_s: float = Field(ge=0)
    idle_s: float = Field(ge=0)
    energy_joules: float = Field(ge=0)
    peak_memory_bytes: int | None = None
    source: Literal["measured", "modelled", "missing"] = "modelled"


class StepFigures(Record):
    """What one step costs; predicted or measured, the same fields.

    `energy_joules_per_step` counts the whole pool (devices left out still idle);
    `marginal_energy_joules_per_step` counts the devices used only.
    """

    step_s: float = Field(ge=0)
    energy_joules_per_step: float = Field(ge=0)
    marginal_energy_joules_per_step: float = Field(ge=0)
    devices: dict[str, DeviceFigures]


class Plan(Record):
    """plan.json: how a model is split over devices (decided; a plan written by hand loads too).

    `wire_precision` is that of activations and their gradients between stages; None is as they are computed. `layers`
    is the half-open range of layers that run, None for all: a later first layer takes activations, from a cache or
    with the batch. `zero` is the stage of ZeRO (Rajbhandari et al., arXiv 1910.02054): the replicas of a stage divide
    optimizer state (1), gradients too (2), parameters too (3); None is nothing. `backend` is the library that does,
    None the native engine.
    """

    schema_tag: Literal["colledge/plan/1"] = Field(alias="schema")
    num_layers: int = Field(ge=1)
    layers: tuple[int, int] | None = None
    global_batch_size: int = Field(ge=1, le=1_000_000)
    microbatch_size: int = Field(ge=1)
    schedule: PlanSchedule = PlanSchedule()
    stages: tuple[Stage, ...] = Field(min_length=1)
    recompute: tuple[bool, ...] | None = None
    wire_precision: WirePrecision | None = None
    zero: ZeroStage | None = None
    backend: LibraryName | None = None
    prediction: StepFigures | None = None

    @model_validator(mode="after")
    def _check(self) -> Plan:
        self._check_layers()
        self._check_samples()
        self._check_devices()
        self._check_per_stage()
        return self

    def _check_layers(self) -> None:
        first, last = self.layer_range
        if not 0 <= first < last <= self.num_layers:
            raise ValueError(
                f"layers [{first}, {last}) are no half-open range within [0, {self.num_layers}) (num_layers)"
            )
        expected = first
        for index, stage in enumerate(self.stages):
            if stage.layers[0] != expected:
                raise ValueError(
                    f"stages[{index}].layers starts at {stage.layers[0]}, wanted {expected}: "
                    f"stages must be contiguous and begin at layer {first}"
                )
            expected = stage.layers[1]
        if expected != last:
            key = "num_layers" if self.layers is None else "layers"
            raise ValueError(
                f"the stages cover layers [{first}, {expected}), wanted [{first}, {last}) ({key})"
            )

    def _check_samples(self) -> None:
        if self.global_batch_size % self.microbatch_size:
            raise ValueError(
                f"microbatch_size {self.microbatch_size} does not divide "
                f"global_batch_size {self.global_batch_size}"
            )
        for index, stage in enumerate(self.stages):
            for place in (shard for replica in stage.replicas for shard in replica.shards if shard.paced):
                if stage.num_shards > 1:
                    raise ValueError(
                        f"stages[{index}]: {place.device!r} is paced, wanted only where it is the one shard"
                    )
                late = [key for key in place.paced if int(key[1:]) >= self.num_microbatches]
                if late:
                    raise ValueError(
                        f"stages[{index}]: {place.device!r} paces {late[0]}, wanted a micro-batch below "
                        f"{self.num_microbatches}"
                    )
            total = sum(replica.samples for replica in stage.replicas)
            if total != self.microbatch_size:
                raise ValueError(
                    f"samples of stages[{index}] sum to {total}, wanted {self.microbatch_size} (microbatch_size)"
                )

    def _check_devices(self) -> None:
        seen: set[str] = set()
        for device in self.devices:
            if device in seen:
                raise ValueError(f"device {device!r} appears twice; a device holds one shard")
            seen.add(device)

    def _check_per_stage(self) -> None:
        if self.recompute is not None and len(self.recompute) != self.num_stages:
            raise ValueError(
                f"recompute has {len(self.recompute)} entries, wanted {self.num_stages} (one a stage)"
            )
        warmup = self.schedule.warmup
        if warmup is None:
            return
        if len(warmup) != self.num_stages:
            raise ValueError(
                f"schedule.warmup has {len(warmup)} entries, wanted {self.num_stages} (one a stage)"
            )
        if min(warmup) < 1:
            raise ValueError(f"schedule.warmup is {list(warmup)}, wanted depths of at least 1")
        if any(a < b for a, b in pairwise(warmup)):
            raise ValueError(
                f"schedule.warmup is {list(warmup)}, wanted depths that fall toward the last stage"
            )

    def beyond_data_parallelism(self) -> str | None:
        """Return what the plan asks beside replicas of the whole model that take turns of one micro-batch, or None."""
        stage = self.stages[0]
        idle = [replica.shards[0].device for replica in stage.replicas if replica.samples == 0]
        if self.num_stages > 1:
            return f"the plan has {self.num_stages} stages"
        if stage.num_shards > 1:
            return f"the plan cuts layers into {stage.num_shards} shards"
        if idle:
            return f"device {idle[0]!r} computes no rows, and every replica must take part in each backward"
        if self.warmup_depths()[0] > 1:
            return "the plan runs several forwards before the first backward"
        return None

    @property
    def layer_range(self) -> tuple[int, int]:
        """The half-open range of layers that run."""
        return self.layers or (0, self.num_layers)

    def alone(self) -> Plan:
        """Return the same plan for a model that has only the layers that run."""
        first, last = self.layer_range
        return self._moved(-first, last - first, None)

    def within(self, layers: tuple[int, int], num_layers: int) -> Plan:
        """Return a plan for a whole model as one for these layers of a model of `num_layers`."""
        return self._moved(layers[0], num_layers, None if layers == (0, num_layers) else layers)

    def _moved(self, by: int, num_layers: int, layers: tuple[int, int] | None) -> Plan:
        stages = tuple(
            stage.model_copy(update={"layers": (stage.layers[0] + by, stage.layers[1] + by)})
            for stage in self.stages
        )
        return self.model_copy(update={"stages": stages, "num_layers": num_layers, "layers": layers})

    @property
    def num_stages(self) -> int:
        """The number of pipeline stages."""
        return len(self.stages)

    @property
    def num_microbatches(self) -> int:
        """The number of micro-batches in a step."""
        return self.global_batch_size // self.microbatch_size

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices in plan order: by stage, replica and shard."""
        return tuple(place.shard.device for place in self.places())

    def places(self) -> Iterator[Place]:
        """Yield every shard of the plan with its position, in plan order."""
        for s, stage in enumerate(self.stages):
            for r, replica in enumerate(stage.replicas):
                for k, shard in enumerate(replica.shards):
                    yield Place(stage_index=s, replica_index=r, shard_index=k, shard=shard)

    def row_indices(self, place: Place) -> list[int]:
        """Return the rows of a batch that a device computes, micro-batch after micro-batch."""
        start, stop = self.stages[place.stage_index].row_ranges[place.replica_index]
        size = self.microbatch_size
        return [m * size + row for m in range(self.num_microbatches) for row in range(start, stop)]

    def first_backward(self, first_trained: int) -> int:
        """Return the first stage that runs backwards, or the number of stages where none does.

        Args:
            first_trained: The model's first layer that trains anything. No gradient need travel below it, so a stage
                that ends at or before it runs forwards only.
        """
        return sum(stage.layers[1] <= first_trained for stage in self.stages)

    def recomputes(self, stage_index: int, first_trained: int = 0) -> bool:
        """Return whether a stage computes its activations again in its backwards, where it has any."""
        wanted = self.recompute is not None and self.recompute[stage_index]
        return wanted and self.stages[stage_index].layers[1] > first_trained

    def warmup_depths(self) -> tuple[int, ...]:
        """Return the forwards that each stage runs before its first backward."""
        if self.schedule.name == "gpipe":
            return (self.num_microbatches,) * self.num_stages
        if self.schedule.warmup is not None:
            return tuple(min(depth, self.num_microbatches) for depth in self.schedule.warmup)
        return tuple(min(self.num_stages - s, self.num_microbatches) for s in range(self.num_stages))

    def check_pool(self, pool: PoolProfile) -> None:
        """Check that the pool has every device and power mode that the plan names.

        Raises:
            ConfigError: A device or a mode is unknown; the message names it and what is there.
        """
        for place in self.places():
            device = pool.device(place.shard.device)
            for mode in (place.shard.mode, *place.shard.paced.values()):
                if mode is not None and not device.has_mode(mode):
                    there = ", ".join(m.name for m in device.modes)
                    raise PlanError(
                        f"device {device.id!r} has no power mode {mode!r}.", fix=f"use one of {there}."
                    )

    def check_model(self, num_layers: int, shard_units: int) -> None:
        """Check that the plan fits a model of `num_layers` layers that is cut into `shard_units` units.

        Raises:
            PlanError: The plan covers another number of layers, or a fraction is off the units.
        """
        if self.num_layers != num_layers:
            raise PlanError(
                f"the plan covers {self.num_layers} layers, the model has {num_layers}.",
                fix="plan again for this model, or give the model that the plan was made for.",
            )
        for stage in self.stages:
            stage.replicas[0].unit_ranges(shard_units)

    def describe(self) -> str:
        """Return the plan in one line: `desk[0:5)x3 + pi[0:5)x1 -> orin-0|orin-1[5:8)`."""
        return " -> ".join(
            " + ".join(
                "|".join(shard.device for shard in replica.shards)
                + f"[{stage.layers[0]}:{stage.layers[1]})"
                + (f"x{replica.samples}" if len(stage.replicas) > 1 else "")
                for replica in stage.replicas
            )
            for stage in self.stages
        )

    @property
    def family(self) -> Literal["single", "data", "pipeline", "tensor", "hybrid"]:
        """The kind of parallelism that the plan uses."""
        kinds: list[Literal["data", "pipeline", "tensor"]] = []
        if any(len(stage.replicas) > 1 for stage in self.stages):
            kinds.append("data")
        if self.num_stages > 1:
            kinds.append("pipeline")
        if any(stage.num_shards > 1 for stage in self.stages):
            kinds.append("tensor")
        if not kinds:
            return "single"
        return kinds[0] if len(kinds) == 1 else "hybrid"


class Place(Record):
    """A shard and where it stands in the plan."""

    stage_index: int
    replica_index: int
    shard_index: int
    shard: Shard


def read_plan(path: Path) -> Plan:
    """Return the plan in a file.

    Raises:
        PlanError: The file is missing or breaks one of the rules; the message names the field.
    """
    return read_json(Plan, path, PlanError)
