"""What no plan can beat: two linear programs over layer x device, and the closed form that prunes the search.

The linear programs let every device compute any share of any layer at its best measured rate, with free
communication, no bubbles and no memory limit. The closed form bounds one candidate from the durations of its
stages; it is never above what the simulator finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Generic, TypeVar

import highspy
import numpy as np

from colledge.arrays import Array
from colledge.planner.cost import LayerClass, PoolCosts
from colledge.planner.layouts import Group
from colledge.planner.request import PlanBounds, PlanningRequest

Number = TypeVar("Number", float, Array)

_MOST_SAMPLES_TRIED = 256
_SOLVER = 1e-7  # relative; the solver is told to keep its constraints to 1e-9
_MOST_DEVICES_BY_SUBSET = 6


@dataclass(frozen=True)
class StageBounds(Generic[Number]):
    """Durations of one pipeline stage, of one candidate or of many (the arrays of one call broadcast together).

    `forward_min_s` .. over the stage's replicas; `busy_s` is the slowest replica's forward plus backward,
    `tail_s` what follows its last backward, `dynamic_joules` the energy above the floor that every second costs.
    """

    forward_min_s: Number
    forward_max_s: Number
    backward_min_s: Number
    busy_s: Number
    tail_s: Number
    dynamic_joules: Number


@dataclass(frozen=True)
class HopBounds(Generic[Number]):
    """Transfers between a stage and the next: the least for one message, and a step's bytes over all bandwidth."""

    forward_first_s: Number
    forward_total_s: Number
    backward_first_s: Number
    backward_total_s: Number
    waits_for_all: bool


def step_lower_bound(
    stages: Sequence[StageBounds[Number]],
    hops: Sequence[HopBounds[Number]],
    num_microbatches: int,
    one_medium: bool,
    larger: Callable[[Any, Any], Any] = np.maximum,
    first_backward: int = 0,
) -> Number:
    """Return a lower bound of step_s for each candidate.

    Each stage cannot start before the first micro-batch reaches it, computes all micro-batches, and is followed
    by the way back of the last one; without a backward, by its way on and back to where gradients end. Each boundary
    carries its bytes between those two.

    Args:
        stages: Durations of each stage.
        hops: Transfers between adjacent stages.
        num_microbatches: Micro-batches in a step.
        one_medium: Whether all transfers share one medium.
        larger: The larger of two numbers; `max` is much quicker for plain ones.
        first_backward: The first stage that runs backwards; those before it neither compute nor receive gradients.
    """
    last, first = len(stages) - 1, first_backward
    start: list[Any] = [0.0]
    for stage, hop in zip(stages, hops, strict=False):
        fill = stage.forward_max_s if hop.waits_for_all else stage.forward_min_s
        start.append(start[-1] + fill + hop.forward_first_s)
    # From the start of a micro-batch's forward to the end of what its stage computes last for it.
    stay: list[Any] = [stage.forward_min_s for stage in stages]
    for s in range(last, first - 1, -1):
        if s < last:
            stay[s] = stay[s] + (hops[s].forward_first_s + hops[s].backward_first_s) + stay[s + 1]
        stay[s] = stay[s] + stages[s].backward_min_s
    end: list[Any] = [stage.tail_s for stage in stages]  # what follows all that a stage computes
    for s in range(first + 1, last + 1):
        way_back = hops[s - 1].backward_first_s + stages[s - 1].backward_min_s
        end[s] = larger(end[s], way_back + end[s - 1])
    for s in range(min(first, last) - 1, -1, -1):
        end[s] = hops[s].forward_first_s + stay[s + 1] + end[s + 1]
    bound: Any = 0.0
    for s, stage in enumerate(stages):
        bound = larger(bound, start[s] + num_microbatches * stage.busy_s + end[s])
    for s, hop in enumerate(hops):
        out = start[s] + stages[s].forward_min_s + hop.forward_total_s + stay[s + 1] + end[s + 1]
        bound = larger(bound, out)
        if s >= first:
            back = start[s + 1] + stay[s + 1] + hop.backward_total_s + stages[s].backward_min_s + end[s]
            bound = larger(bound, back)
    if one_medium and hops:
        ways = [h.forward_total_s + (h.backward_total_s if s >= first else 0.0) for s, h in enumerate(hops)]
        carried = sum(ways, 0.0)
        negated_least: Any = -math.inf
        for s, (stage, rest) in enumerate(zip(stages, end, strict=True)):
            after_last = stage.backward_min_s if s >= first else stage.forward_min_s
            negated_least = larger(negated_least, -(after_last + rest))
        bound = larger(bound, stages[0].forward_min_s + carried - negated_least)
    result: Number = bound
    return result


def hop_bounds(
    costs: PoolCosts, left: Group, right: Group, out_bytes: Number, size: int, count: int
) -> HopBounds[Number]:
    """Return the bounds of the transfers between two stages.

    Args:
        costs: Answers routes.
        left: The replicas of the earlier stage.
        right: The replicas of the later one.
        out_bytes: Bytes that a row carries, of one cut or of many.
        size: Rows of a micro-batch.
        count: Micro-batches in a step.
    """
    first, total = [], []
    alone = len(left) == len(right) == 1
    for sender, receiver in ((left, right), (right, left)):
        pairs = [(s[k % len(s)], d) for s, t in product(sender, receiver) for k, d in enumerate(t)]
        routes = {route.medium: route for a, b in pairs for route in [costs.route(a, b)]}
        rates = [route.bandwidth_bytes_per_s for route in routes.values()]
        copies = size * len(receiver[0])
        total.append(count * copies * out_bytes / sum(rates))
        one = copies * out_bytes / sum(rates) if alone else out_bytes / max(rates)
        first.append(min(route.latency_s for route in routes.values()) + one)
    return HopBounds(first[0], total[0], first[1], total[1], len(right) == 1)


def lower_bounds(costs: PoolCosts, request: PlanningRequest) -> PlanBounds:
    """Return the least step time and the least energy that any plan could reach.

    The time is the answer of min T: sum_d x[l,d] = B for each layer l, sum_l t[l,d] x[l,d] <= T for each device
    d. The energy has the same constraints, the deadline, and the devices' watts in its objective; under marginal
    accounting it is the least over device subsets (pools of up to six devices; then idle energy is left out).
    """
    program = _Program(costs, request)
    everyone = program.devices
    step_s = program.solve(everyone, energy=False)
    assert step_s is not None
    deadline = request.deadline_step_s
    if deadline is not None and deadline < step_s:
        deadline = None
    if request.accounting == "whole-pool":
        joules = program.solve(everyone, energy=True, deadline_s=deadline)
    elif len(everyone) > _MOST_DEVICES_BY_SUBSET:
        joules = program.solve(everyone, energy=True, deadline_s=deadline, floor=False)
    else:
        subsets = [
            [d for i, d in enumerate(everyone) if mask >> i & 1] for mask in range(1, 2 ** len(everyone))
        ]
        found = [program.solve(subset, energy=True, deadline_s=deadline) for subset in subsets]
        joules = min((value for value in found if value is not None), default=0.0)
    return PlanBounds(step_s=max(0.0, step_s), energy_joules_per_step=max(0.0, joules or 0.0))


class _Program:
    """Builds and solves the linear programs of one pool and model; devices that are alike share their columns."""

    def __init__(self, costs: PoolCosts, request: PlanningRequest) -> None:
        self.costs, self.batch = costs, request.global_batch_size
        self.devices = [d.id for d in costs.pool.devices if d.id not in request.must_not_use]
        self.whole_pool = request.accounting == "whole-pool"
        kinds = [costs.layer_class(layer) for layer in range(len(costs.model.layers))]
        self.kinds = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        counts = {row.samples for row in costs.model.timings if row.samples <= self.batch}
        self.samples = sorted({*range(1, min(self.batch, _MOST_SAMPLES_TRIED) + 1), *counts, self.batch})
        self.best: dict[tuple[str, str, LayerClass], float] = {}

    def _best_s(self, device: str, mode: str, kind: LayerClass) -> float:
        """Return the fewest seconds a sample of a layer that any sample count and fraction gives."""
        key = (self.costs.pool.device(device).kind, mode, kind)
        if key not in self.best:
            _, splits, layer = kind
            units = self.costs.model.shard_units if splits else 1
            fractions = [u / units for u in range(1, units + 1)]
            self.best[key] = min(
                self.costs.layer_s(device, mode, layer, n, f) / (n * f)
                for n in self.samples
                for f in fractions
            )
        return self.best[key]

    def _columns(self, device: str) -> list[tuple[LayerClass, float, float]]:
        """Return (layer class, seconds a sample, watts) for each mode that can be timed."""
        profile = self.costs.pool.device(device)
        modes = [mode for mode in profile.modes if self.costs.has_mode(device, mode.name)] or [
            profile.modes[0]
        ]
        return [(k, self._best_s(device, mode.name, k), mode.compute_w) for mode in modes for k in self.kinds]

    def solve(
        self, devices: Sequence[str], *, energy: bool, deadline_s: float | None = None, floor: bool = True
    ) -> float | None:
        """Return the optimum over shares x and step time T, or None where the deadline cannot be met."""
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("primal_feasibility_tolerance", 1e-9)
        solver.setOptionValue("dual_feasibility_tolerance", 1e-9)
        infinity = highspy.kHighsInf
        idle_w, kinds = 0.0, list(self.kinds)
        alike: dict[str, tuple[str, int]] = {}
        for device in devices:
            look = self.costs.pool.device(device).model_copy(update={"id": "", "memory_bytes": 1}).to_json()
            first, number = alike.get(look, (device, 0))
            alike[look] = first, number + 1
        shares: list[list[int]] = [[] for _ in kinds]
        loads: list[tuple[int, list[int], list[float]]] = []
        # Seconds are counted in those of the slowest layer for the batch: the solver's tolerance becomes relative.
        seconds_a_sample = [second for device, _ in alike.values() for _, second, _ in self._columns(device)]
        scale_s = max(max(seconds_a_sample) * self.batch, 1e-300)
        costs: list[float] = []
        solver.addVar(0.0, infinity if deadline_s is None else deadline_s / scale_s)
        column = 1
        for device, number in alike.values():
            modes = self.costs.pool.device(device).modes
            floor_w = min(min(m.idle_w, m.compute_w, m.communicate_w) for m in modes) if floor else 0.0
            idle_w += number * floor_w
            indices, seconds = [], []
            for kind, second, watts in self._columns(device):
                second /= scale_s
                solver.addVar(0.0, infinity)
                if energy:
                    costs.append(second * (watts - floor_w))
                    solver.changeColCost(column, costs[-1])
                shares[kinds.index(kind)].append(column)
                indices.append(column)
                seconds.append(second)
                column += 1
            loads.append((number, indices, seconds))
        if self.whole_pool:
            left_out = [d for d in self.costs.pool.devices if d.id not in devices]
            idle_w += sum(d.modes[0].idle_w for d in left_out)
        solver.changeColCost(0, idle_w if energy else 1.0)
        costs.append(idle_w if energy else 1.0)
        for kind, columns in zip(kinds, shares, strict=True):
            samples = float(self.batch * self.kinds[kind])
            solver.addRow(samples, samples, len(columns), np.array(columns), np.ones(len(columns)))
        for number, indices, seconds in loads:
            row, values = np.array([0, *indices]), np.array([-float(number), *seconds])
            solver.addRow(-infinity, 0.0, len(row), row, values)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        # What the constraints may be missed by, of the whole work at the dearest rate, and more.
        slack = _SOLVER * max(abs(cost) for cost in costs)
        return (float(solver.getObjectiveValue()) * (1 - _SOLVER) - slack) * scale_s
