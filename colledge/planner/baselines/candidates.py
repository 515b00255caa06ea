"""What every baseline needs: which micro-batch sizes to try, whether a plan fits, and the best of its candidates.

A baseline proposes one plan a micro-batch size. Those that fit in memory are ranked by a closed form, the first
few are simulated, and the fastest is kept, as a user of that system would. Activations are recomputed (on all
stages, as those systems' switch does) only where nothing fits without; the plan's `recompute` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from math import isqrt

import numpy as np
import numpy.typing as npt

from colledge.arrays import Array
from colledge.errors import ConfigError
from colledge.plan import Plan, PlanSchedule, Replica, Shard, Stage
from colledge.planner.cost import PoolCosts
from colledge.planner.energy import step_figures
from colledge.planner.memory import Load, MemoryModel, SpanMemory, plan_memory
from colledge.planner.request import Baseline, PlanningRequest
from colledge.schedule import Timeline, simulate
from colledge.units import format_bytes

_MOST_SIZES = 12
_MOST_SIMULATED = 3
_MOST_COMPUTATIONS = 2_500  # forwards and backwards in a simulated step
_ENOUGH_MICROBATCHES = 64  # beyond this, more of them change a pipeline's step by little


class Setting:
    """The pool, model and request of one round of baselines."""

    def __init__(self, costs: PoolCosts, request: PlanningRequest) -> None:
        self.costs, self.request = costs, request
        self.pool, self.model = costs.pool, costs.model
        self.num_layers = len(costs.model.layers)
        self.devices = tuple(d.id for d in self.pool.devices if d.id not in request.must_not_use)
        factor = request.optimizer_state_factor
        self.memory = MemoryModel(self.model, factor, request.zero, request.backend)
        self._profiles = {device.id: device for device in self.pool.devices}
        self._needed: dict[tuple[Load, int, float], int] = {}

    @cached_property
    def _spans(self) -> SpanMemory:
        return SpanMemory(self.model, self.request.optimizer_state_factor, self.request.backend)

    def most_samples(self, device: str, in_flight: int, recompute: bool) -> Array:
        """Return the samples of a micro-batch that fit on a device, for every span of layers [start, stop]."""
        profile = self.pool.device(device)
        overhead = profile.allocator_overhead
        return self._spans.most_samples(profile.room_bytes, overhead, in_flight, recompute)

    @cached_property
    def boundary_bytes(self) -> Array:
        """The bytes a sample that a boundary before layer i carries, for i = 0 .. num_layers; 0 before the first."""
        outputs = (self.costs.boundary_bytes(layer) for layer in range(self.num_layers))
        return np.array([0, *outputs], dtype=np.float64)

    @cached_property
    def has_backward(self) -> npt.NDArray[np.bool_]:
        """Whether stages that end before layer i run backwards, for i = 0 .. num_layers."""
        return np.arange(self.num_layers + 1) > self.costs.first_trained

    @cached_property
    def _divisors(self) -> tuple[int, ...]:
        batch = self.request.global_batch_size
        low = [d for d in range(1, isqrt(batch) + 1) if batch % d == 0]
        return tuple(sorted({*low, *(batch // d for d in low)}))

    def sizes(self, num_holders: int, smallest: int = 1, most: int = _MOST_SIZES) -> list[int]:
        """Return the micro-batch sizes worth trying, smallest first.

        Args:
            num_holders: Shards of the plan; more of them mean fewer micro-batches that can be simulated.
            smallest: Samples that a micro-batch must have.
            most: How many to return; they are spread evenly over the divisors of the batch.
        """
        batch = self.request.global_batch_size
        most_microbatches = max(_ENOUGH_MICROBATCHES, _MOST_COMPUTATIONS // (2 * num_holders))
        found = [d for d in self._divisors if d >= smallest and batch // d <= most_microbatches]
        if len(found) <= most:
            return found
        return [found[round(i * (len(found) - 1) / max(1, most - 1))] for i in range(most)]

    def make_plan(self, stages: Sequence[Stage], size: int, schedule: PlanSchedule | None = None) -> Plan:
        """Return a plan of these stages."""
        plan = Plan(
            schema_tag="colledge/plan/1",
            num_layers=self.num_layers,
            global_batch_size=self.request.global_batch_size,
            microbatch_size=size,
            stages=tuple(stages),
            schedule=schedule or PlanSchedule(),
            wire_precision=self.costs.wire_precision,
            zero=self.request.zero,
            backend=self.request.backend,
        )
        return self.memory.divided(plan, self._profiles)

    def choose(self, name: str, plans: Sequence[Plan], why_none: str) -> Baseline:
        """Return the fastest of the plans that fit in memory.

        Args:
            name: The baseline's name.
            plans: At most one a micro-batch size; with recomputation only if the baseline decided so itself.
            why_none: What to say where there are no plans at all.
        """
        if not plans:
            return Baseline(name=name, why_not=why_none)
        unable = [plan.beyond_data_parallelism() for plan in plans] if self.request.backend else []
        plans = [plan for plan, why in zip(plans, unable, strict=True) if why is None] if unable else plans
        if not plans:
            return Baseline(name=name, why_not=f"backend {self.request.backend} cannot run it: {unable[0]}")
        recomputing = [self.memory.divided(_recomputing(plan), self._profiles) for plan in plans]
        fitting: list[Plan] = []
        for some in (plans, recomputing):
            fitting = fitting or [plan for plan in some if self.lack(plan) is None]
        if not fitting:
            lack = min(filter(None, map(self.lack, recomputing)))
            return Baseline(
                name=name,
                why_not=f"no micro-batch size fits in memory, even when activations are recomputed: "
                f"device {lack[1]!r} lacks at least {format_bytes(lack[0])}",
            )
        return Baseline(name=name, plan=self._fastest(fitting))

    def lack(self, plan: Plan) -> tuple[int, str] | None:
        """Return the bytes lacking and the device that lacks most, or None if the plan fits."""
        worst: tuple[int, str] | None = None
        for s, (stage, depth) in enumerate(zip(plan.stages, plan.warmup_depths(), strict=True)):
            for id, load in self.memory.loads(stage, depth, plan.recomputes(s)):
                device = self.pool.device(id)
                key = load, device.runtime_bytes, device.allocator_overhead
                if key not in self._needed:
                    self._needed[key] = self.memory.parts(load, device).total_bytes
                lacking = self._needed[key] - device.memory_bytes
                if lacking > 0 and (worst is None or lacking > worst[0]):
                    worst = lacking, id
        return worst

    def _fastest(self, plans: Sequence[Plan]) -> Plan:
        """Return the plan of the shortest simulated step, with its prediction."""
        ranked = sorted(plans, key=lambda plan: (self.estimate_s(plan), plan.num_microbatches))
        found: list[tuple[Plan, Timeline]] = []
        computations = 0
        for plan in ranked[:_MOST_SIMULATED]:
            computations += 2 * plan.num_microbatches * len(plan.devices)
            if found and computations > _MOST_COMPUTATIONS:
                break
            found.append((plan, simulate(plan, self.costs)))
        plan, timeline = min(found, key=lambda pair: pair[1].step_s)
        memory = plan_memory(plan, self.pool, self.model, self.request.optimizer_state_factor)
        return plan.model_copy(update={"prediction": step_figures(plan, self.pool, timeline, memory)})

    def estimate_s(self, plan: Plan) -> float:
        """Return about how long a step takes, without synchronisation: pipeline fill plus its slowest part.

        Raises:
            ConfigError: A route or a timing is missing.
        """
        parts: list[tuple[float, float]] = []  # seconds of a micro-batch there and back, of its slowest half
        for index, stage in enumerate(plan.stages):
            total = max(
                sum(self._replica_s(stage, replica, plan.recomputes(index, self.costs.first_trained)))
                for replica in stage.replicas
            )
            parts.append((total, total))
        for left, right in pairwise(plan.stages):
            row_bytes = self.costs.boundary_bytes(left.layers[1] - 1)
            a, b = left.replicas[-1].shards[0].device, right.replicas[0].shards[0].device
            there = self.costs.route(a, b).transfer_s(plan.microbatch_size * row_bytes)
            returns = left.layers[1] > self.costs.first_trained
            back = self.costs.route(b, a).transfer_s(plan.microbatch_size * row_bytes) if returns else 0.0
            parts.append((there + back, max(there, back)))
        return sum(total for total, _ in parts) + (plan.num_microbatches - 1) * max(slow for _, slow in parts)

    def _replica_s(self, stage: Stage, replica: Replica, recompute: bool) -> tuple[float, float]:
        times = [self.costs.compute_s(stage.layers, shard, replica.samples) for shard in replica.shards]
        devices = tuple(shard.device for shard in replica.shards)
        forward, backward = self.costs.inner_allreduce_s(stage.layers, devices, replica.samples)
        forward += max(f for f, _ in times)
        backward += max(b for _, b in times)
        return forward, backward + forward * recompute


def one_shard(device: str, samples: int) -> Replica:
    """Return a replica of one device that holds its layers whole."""
    return Replica(samples=samples, shards=(Shard(device=device),))


def pipeline_stages(devices: Sequence[str], edges: Sequence[int], size: int) -> list[Stage]:
    """Return a pipeline of one device a stage, cut at `edges`."""
    return [
        Stage(layers=span, replicas=(one_shard(device, size),))
        for device, span in zip(devices, pairwise(edges), strict=True)
    ]


def even_parts(total: int, parts: int) -> list[int]:
    """Return `total` in whole parts as equal as can be, larger ones first."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]


def why_not(fault: ConfigError) -> str:
    """Return why a baseline has no plan, from an error."""
    return fault.message.rstrip(".")


def _recomputing(plan: Plan) -> Plan:
    return plan.model_copy(update={"recompute": (True,) * plan.num_stages})
