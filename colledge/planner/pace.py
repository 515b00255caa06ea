"""Slow single computations down where nobody waits for them: the same step, fewer joules.

A device that can change its power mode between two computations (a GPU's clock, in milliseconds) need not hurry
with a forward that its neighbour cannot take yet. Which computation can take how long is a linear program: start
and duration of every forward and backward, the schedule's order and the messages as constraints, energy piecewise
linear and convex in the duration. Durations are then rounded down to power modes, and what slack is left is given
away greedily under the simulator. After Perseus (Chung et al., SOSP 2024, arXiv 2312.06902), which cuts a graph
where this solves a program.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import highspy
import numpy as np

from colledge.plan import Plan, Shard
from colledge.planner.cost import PoolCosts
from colledge.planner.energy import plan_joules
from colledge.profiles import PowerMode
from colledge.schedule import ActionKind, compute_order, simulate

_MOST_COMPUTATIONS = 1500
_MOST_TRIALS = 200
_EQUAL, _ROUNDING = 1e-9, 1e-6


@dataclass(frozen=True)
class _Choice:
    """A power mode that a computation could take: seconds, and joules above the device's idling."""

    mode: str
    seconds: float
    joules: float


@dataclass(frozen=True)
class _Computation:
    """A forward or a backward of one replica, with the modes worth taking, fastest first."""

    stage: int
    replica: int
    key: str
    choices: tuple[_Choice, ...]


def paced(plan: Plan, costs: PoolCosts) -> Plan:
    """Return a plan whose computations off the critical path run in slower modes, or the plan itself.

    Args:
        plan: A plan without paced computations. Sharded replicas keep their pace.
        costs: What computing in each mode takes.
    """
    limit_s = simulate(plan, costs).step_s
    computations = list(_computations(plan, costs))
    free = sum(len(entry.choices) > 1 for entry in computations)
    if not free or len(computations) > _MOST_COMPUTATIONS:
        return plan
    durations = _Program(plan, costs, computations, limit_s).solve()
    if durations is None:
        return plan
    chosen = [entry.choices[0] for entry in computations]
    for shorter in (0.0, _ROUNDING):  # the solver keeps its limits to about 1e-7
        rounded = [
            max(
                (c for c in entry.choices if c.seconds <= d * (1 - shorter)),
                key=lambda c: c.seconds,
                default=entry.choices[0],
            )
            for entry, d in zip(computations, durations, strict=True)
        ]
        candidate = _with_modes(plan, costs, computations, rounded)
        if simulate(candidate, costs).step_s <= limit_s * (1 + _EQUAL):
            chosen = rounded
            break
    candidate = _give_slack_away(plan, costs, computations, chosen, limit_s)
    return candidate if _joules(candidate, costs) < _joules(plan, costs) else plan


def _joules(plan: Plan, costs: PoolCosts) -> float:
    return plan_joules(plan, costs.pool, simulate(plan, costs))[0]


def _computations(plan: Plan, costs: PoolCosts) -> Iterator[_Computation]:
    """Yield every forward and backward of every replica, in the order in which its stage runs them."""
    first = plan.first_backward(costs.first_trained)
    orders = compute_order(plan.warmup_depths(), plan.num_microbatches, first)
    for s, (stage, order) in enumerate(zip(plan.stages, orders, strict=True)):
        for r in range(len(stage.replicas)):
            choices = [_choices(plan, costs, s, r, backward) for backward in (False, True)]
            for action in order:
                backward = action.kind is ActionKind.BACKWARD
                yield _Computation(s, r, f"{action.kind.value}{action.microbatch}", choices[backward])


def _choices(plan: Plan, costs: PoolCosts, stage_index: int, r: int, backward: bool) -> tuple[_Choice, ...]:
    """Return the modes on the lower convex hull of (seconds, joules), from the plan's own mode to slower ones."""
    stage = plan.stages[stage_index]
    replica = stage.replicas[r]
    shard = replica.shards[0]
    device = costs.pool.device(shard.device)
    own = device.mode(shard.mode)

    def choice(mode: PowerMode) -> _Choice:
        times = costs.compute_s(stage.layers, shard.model_copy(update={"mode": mode.name}), replica.samples)
        again_s = times[0] if plan.recomputes(stage_index, costs.first_trained) else 0.0
        seconds = times[1] + again_s if backward else times[0]
        return _Choice(mode.name, seconds, (mode.compute_w - own.idle_w) * seconds)

    first = choice(own)
    if len(replica.shards) > 1 or replica.samples == 0:
        return (first,)
    others = [choice(m) for m in device.modes if m.name != own.name and costs.has_mode(device.id, m.name)]
    hull = [first]
    for point in sorted(others, key=lambda c: (c.seconds, c.joules)):
        if point.seconds <= hull[-1].seconds + _EQUAL or point.joules >= hull[-1].joules:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return tuple(hull)


def _slope(a: _Choice, b: _Choice) -> float:
    return (b.joules - a.joules) / (b.seconds - a.seconds)


class _Program:
    """The linear program: two columns a computation (start, duration), one for its joules, one a message."""

    def __init__(
        self, plan: Plan, costs: PoolCosts, computations: list[_Computation], limit_s: float
    ) -> None:
        self.plan, self.costs, self.computations, self.limit_s = plan, costs, computations, limit_s
        self.solver = highspy.Highs()
        self.solver.setOptionValue("output_flag", False)
        self.solver.setOptionValue("threads", 1)
        self.columns = 0
        self.start: list[int] = []
        self.duration: list[int] = []
        for entry in computations:
            self.start.append(self._column(0.0, limit_s))
            self.duration.append(self._column(entry.choices[0].seconds, entry.choices[-1].seconds))
        self.at = {(c.stage, c.replica, c.key): i for i, c in enumerate(computations)}

    def _column(self, low: float, high: float, cost: float = 0.0) -> int:
        self.solver.addVar(low, high)
        self.solver.changeColCost(self.columns, cost)
        self.columns += 1
        return self.columns - 1

    def _at_least(self, low: float, *terms: tuple[int, float]) -> None:
        columns, factors = zip(*terms, strict=True)
        self.solver.addRow(low, highspy.kHighsInf, len(terms), np.array(columns), np.array(factors))

    def solve(self) -> list[float] | None:
        """Return how long each computation may take, or None where there is no answer."""
        self._energies()
        self._orders()
        self._messages()
        self.solver.run()
        if self.solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        values = self.solver.getSolution().col_value
        return [float(values[column]) for column in self.duration]

    def _energies(self) -> None:
        for entry, duration in zip(self.computations, self.duration, strict=True):
            if len(entry.choices) > 1:
                joules = self._column(-highspy.kHighsInf, highspy.kHighsInf, 1.0)
                for a, b in pairwise(entry.choices):
                    slope = _slope(a, b)
                    self._at_least(a.joules - slope * a.seconds, (joules, 1.0), (duration, -slope))

    def _orders(self) -> None:
        """Keep each replica's order, and end in time for its gradient sync and update."""
        for i, (a, b) in enumerate(pairwise(self.computations)):
            if (a.stage, a.replica) == (b.stage, b.replica):
                self._at_least(0.0, (self.start[i + 1], 1.0), (self.start[i], -1.0), (self.duration[i], -1.0))
        last = {(entry.stage, entry.replica): i for i, entry in enumerate(self.computations)}
        for (s, _), i in last.items():
            tail_s = self.limit_s - self._tail_s(s)
            self._at_least(-tail_s, (self.start[i], -1.0), (self.duration[i], -1.0))

    def _tail_s(self, s: int) -> float:
        stage = self.plan.stages[s]
        update = max(self.costs.update_s(stage.layers, shard) for r in stage.replicas for shard in r.shards)
        rings = zip(*(replica.shards for replica in stage.replicas), strict=True)
        syncs = [
            self.costs.sync_s(stage.layers, tuple(shard.device for shard in ring), ring[0].fraction)
            for ring in rings
            if len(ring) > 1
        ]
        return update + max(syncs, default=0.0)

    def _messages(self) -> None:
        """Let a computation wait for the rows it needs; the messages of one sender follow each other."""
        for s in range(self.plan.num_stages - 1):
            left, right = self.plan.stages[s], self.plan.stages[s + 1]
            row_bytes = self.costs.boundary_bytes(left.layers[1] - 1)
            for a, (a_start, a_stop) in enumerate(left.row_ranges):
                for b, (b_start, b_stop) in enumerate(right.row_ranges):
                    rows = min(a_stop, b_stop) - max(a_start, b_start)
                    if rows > 0:
                        self._message((s, a), (s + 1, b), "F", rows * row_bytes)
                        if left.layers[1] > self.costs.first_trained:
                            self._message((s + 1, b), (s, a), "B", rows * row_bytes)

    def _message(
        self, sender: tuple[int, int], receiver: tuple[int, int], kind: str, num_bytes: float
    ) -> None:
        sources, targets = (
            [shard.device for shard in self.plan.stages[s].replicas[r].shards] for s, r in (sender, receiver)
        )
        routes = [self.costs.route(sources[k % len(sources)], target) for k, target in enumerate(targets)]
        slowest = max(routes, key=lambda route: route.transfer_s(num_bytes))
        occupies_s, before = num_bytes / slowest.bandwidth_bytes_per_s, None
        for m in range(self.plan.num_microbatches):
            i, j = (
                self.at[sender[0], sender[1], f"{kind}{m}"],
                self.at[receiver[0], receiver[1], f"{kind}{m}"],
            )
            sent = self._column(0.0, highspy.kHighsInf)
            self._at_least(0.0, (sent, 1.0), (self.start[i], -1.0), (self.duration[i], -1.0))
            self._at_least(occupies_s + slowest.latency_s, (self.start[j], 1.0), (sent, -1.0))
            if before is not None:
                self._at_least(occupies_s, (sent, 1.0), (before, -1.0))
            before = sent


def _give_slack_away(
    plan: Plan, costs: PoolCosts, computations: list[_Computation], chosen: list[_Choice], limit_s: float
) -> Plan:
    """Slow further computations down one by one, those that save most first, while the step keeps its limit."""
    best, trials, improved = _with_modes(plan, costs, computations, chosen), 0, True
    while improved and trials < _MOST_TRIALS:
        improved = False
        options = []
        for i, entry in enumerate(computations):
            at = entry.choices.index(chosen[i])
            if at + 1 < len(entry.choices):
                options.append((chosen[i].joules - entry.choices[at + 1].joules, i, entry.choices[at + 1]))
        for _, i, slower in sorted(options, key=lambda option: -option[0]):
            if trials >= _MOST_TRIALS:
                break
            trials += 1
            previous, chosen[i] = chosen[i], slower
            candidate = _with_modes(plan, costs, computations, chosen)
            if simulate(candidate, costs).step_s <= limit_s * (1 + _EQUAL):
                best, improved = candidate, True
            else:
                chosen[i] = previous
    return best


def _with_modes(
    plan: Plan, costs: PoolCosts, computations: list[_Computation], chosen: list[_Choice]
) -> Plan:
    other: dict[tuple[int, int], dict[str, str]] = {}
    for entry, choice in zip(computations, chosen, strict=True):
        if choice is not entry.choices[0]:
            other.setdefault((entry.stage, entry.replica), {})[entry.key] = choice.mode

    def with_pace(shard: Shard, s: int, r: int) -> Shard:
        return shard.model_copy(update={"paced": other[s, r]}) if (s, r) in other else shard

    stages = tuple(
        stage.model_copy(
            update={
                "replicas": tuple(
                    replica.model_copy(
                        update={"shards": tuple(with_pace(shard, s, r) for shard in replica.shards)}
                    )
                    for r, replica in enumerate(stage.replicas)
                )
            }
        )
        for s, stage in enumerate(plan.stages)
    )
    return plan.model_copy(update={"stages": stages})
