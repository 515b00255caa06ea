"""What a step costs in time: run a plan's schedule on paper, with the costs that somebody else knows.

The acting entity is a replica; its shards move in lock-step. A computation takes as long as its slowest shard,
plus the all-reduces inside it. A send never waits: each message enters the queue of its medium (a directed link,
or a segment that several devices share), holds it for bytes / bandwidth, and arrives a latency later. A receive
waits for every message of its micro-batch. At the end a stage's replicas all-reduce their gradients, stages
that share a tied weight all-reduce that, and every shard updates. Replicas that divide what they update (ZeRO) then
give each other their parts.

    stage 0  F0 F1 B0 .... sends F0 ──medium──> stage 1 waits for all rows of F0 ...  SYNC  STEP

Deterministic and exact for this model of the world; it knows nothing of watts or memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from typing import Protocol

import numpy as np

from colledge.arrays import Array
from colledge.plan import Plan, Replica, Shard
from colledge.profiles import Route
from colledge.schedule.action import Action, ActionKind
from colledge.schedule.generate import compute_order
from colledge.schedule.lower import Schedule, lower
from colledge.settings import ZeroStage

Intervals = list[float]  # start, end, start, end ...


class Costs(Protocol):
    """What the simulator asks. `layers` is a half-open range; all answers are in seconds or bytes."""

    @property
    def ties(self) -> tuple[tuple[int, int], ...]:
        """Pairs of layers (earlier, later) that train one shared weight."""

    @property
    def first_trained(self) -> int:
        """The first layer that trains anything: those before it have no backward, and their answers count none."""

    def compute_s(self, layers: tuple[int, int], shard: Shard, samples: int) -> tuple[float, float]:
        """Return the forward and backward seconds of one shard for `samples` rows, without all-reduces."""

    def update_s(self, layers: tuple[int, int], shard: Shard) -> float:
        """Return the seconds of one shard's optimizer update."""

    def inner_allreduce_s(
        self, layers: tuple[int, int], devices: tuple[str, ...], samples: int
    ) -> tuple[float, float]:
        """Return the seconds of a replica's tensor-parallel all-reduces in one forward and one backward."""

    def sync_s(self, layers: tuple[int, int], devices: tuple[str, ...], fraction: float) -> float:
        """Return the seconds of the gradient all-reduce of shards of that fraction, tied weights left out."""

    def gather_s(self, layers: tuple[int, int], devices: tuple[str, ...], fraction: float) -> float:
        """Return the seconds in which shards of that fraction give each other what each has updated, once."""

    def tie_s(self, tie: tuple[int, int], devices: tuple[str, ...]) -> float:
        """Return the seconds of the all-reduce of a tied weight's gradient."""

    def boundary_bytes(self, layer: int) -> int:
        """Return the bytes a sample that a pipeline boundary after `layer` carries."""

    def route(self, source: str, target: str) -> Route:
        """Return how bytes travel from one device to another."""


@dataclass(frozen=True)
class DeviceTimes:
    """A device's step, in seconds: compute_s + communicate_s + idle_s = step_s.

    `communicate_s` is time in which the device computes nothing while a transfer of its own or a collective
    that it takes part in is in progress. `paced_s` are the seconds of computing, among `compute_s`, in other power
    modes than the device's own.
    """

    compute_s: float
    communicate_s: float
    idle_s: float
    paced_s: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Span:
    """An action of a replica, from start to end; a receive's span is its wait."""

    action: Action
    replica_index: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Transfer:
    """A message between two devices, from entering its medium to its arrival."""

    source: str
    target: str
    medium: str
    start_s: float
    end_s: float


class Timeline:
    """A simulated step. `spans` and `transfers` are empty unless they were asked for."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.step_s = max(run.clock)
        self.spans: tuple[Span, ...] = run.spans() if run.record else ()
        self.transfers: tuple[Transfer, ...] = tuple(run.transfers)

    @property
    def compute_s(self) -> dict[str, float]:
        """The seconds that each device of the plan computes: what is known without looking at its waits."""
        count = self._run.num_microbatches
        return {
            device: count * (forward + backward) + update + actor.longer_s
            for actor in self._run.actors
            for device, (forward, backward, update) in zip(actor.devices, actor.own_s, strict=True)
        }

    @cached_property
    def devices(self) -> dict[str, DeviceTimes]:
        """What each device of the plan does; reckoned when it is first asked for."""
        return self._run.device_times(self.step_s)


def simulate(plan: Plan, costs: Costs, *, record: bool = False) -> Timeline:
    """Return the timeline of one step of a plan.

    Args:
        plan: The plan; its schedule is the one that the engine runs.
        costs: What computing and sending take.
        record: Keep every action and transfer, for a picture; slower.

    Raises:
        ConfigError: `costs` lacks a timing or a route that the plan needs.
    """
    run = _Run(plan, costs, record)
    run.pipeline()
    run.synchronize()
    return Timeline(run)


def gathers(zero: ZeroStage, num_microbatches: int) -> int:
    """Return how many times a step replicas under ZeRO exchange all parameters.

    Once after the update; in stage 3 half for each forward and half for each backward, of every micro-batch.
    """
    return num_microbatches if zero == 3 else 1


_FORWARD, _BACKWARD, _SEND, _RECEIVE, _END = range(5)
_UPDATE = 2  # what `_codes` calls the update at the end of a replica's log
_CODES = {
    ActionKind.FORWARD: (_FORWARD, 0),
    ActionKind.BACKWARD: (_BACKWARD, 0),
    ActionKind.SEND_FORWARD: (_SEND, 0),
    ActionKind.SEND_BACKWARD: (_SEND, 1),
    ActionKind.RECEIVE_FORWARD: (_RECEIVE, 0),
    ActionKind.RECEIVE_BACKWARD: (_RECEIVE, 1),
    ActionKind.SYNC: (_END, 0),
    ActionKind.STEP: (_END, 0),
}
_Script = tuple[tuple[int, int, int], ...]


@lru_cache(maxsize=512)
def _scripts(
    warmup: tuple[int, ...], num_microbatches: int, first_backward: int
) -> tuple[Schedule, tuple[_Script, ...]]:
    """Return the schedule and, a stage, its actions as (code, 0 forward or 1 backward, micro-batch)."""
    schedule = lower(compute_order(warmup, num_microbatches, first_backward), num_microbatches)
    scripts = tuple(
        tuple((*_CODES[action.kind], action.microbatch or 0) for action in stage) for stage in schedule.stages
    )
    return schedule, scripts


@lru_cache(maxsize=512)
def _one_by_one(warmup: tuple[int, ...], num_microbatches: int, first_backward: int) -> _Script:
    """Return every (stage, 0 forward or 1 backward, micro-batch), each after all that it waits for."""
    orders = [
        [(0 if action.kind is ActionKind.FORWARD else 1, action.microbatch or 0) for action in stage]
        for stage in compute_order(warmup, num_microbatches, first_backward)
    ]
    last, done = len(orders) - 1, [[0, 0] for _ in orders]
    position = [0] * len(orders)
    found: list[tuple[int, int, int]] = []
    stage = 0
    number = sum(map(len, orders))
    while len(found) < number:
        order, at = orders[stage], position[stage]
        while at < len(order):
            code, microbatch = order[at]
            before = stage - 1 if code == _FORWARD else stage + 1
            if 0 <= before <= last and done[before][code] <= microbatch:
                break
            found.append((stage, code, microbatch))
            done[stage][code] += 1
            at += 1
        position[stage] = at
        stage = stage + 1 if stage < last else 0
    return tuple(found)


@dataclass(slots=True)
class _Message:
    """What one replica sends to another for every micro-batch; `sent` has when each enters and arrives."""

    medium: int
    occupies_s: float
    latency_s: float
    receiver: int
    source: str
    target: str
    sent: Intervals


@dataclass(slots=True)
class _Actor:
    """A replica: what its computations take, and whom it sends to (forward, backward)."""

    stage: int
    index: int
    devices: tuple[str, ...]
    own_s: tuple[tuple[float, ...], ...]  # a shard: forward, backward and, at the end, update
    slowest_s: tuple[float, float]
    messages: tuple[list[_Message], list[_Message]]
    durations_s: tuple[list[float], list[float]]  # of every forward and backward
    paced_s: dict[str, float]  # by power mode
    longer_s: float = 0.0  # what pacing adds to its computing


class _Run:
    """The state of one simulated step."""

    def __init__(self, plan: Plan, costs: Costs, record: bool) -> None:
        self.plan, self.costs, self.record = plan, costs, record
        self.num_microbatches = plan.num_microbatches
        self.first_backward = plan.first_backward(costs.first_trained)
        self.media: dict[str, int] = {}
        self.actors: list[_Actor] = []
        self.first_actor: list[int] = []
        for index in range(plan.num_stages):
            self._add_stage(index)
        for index in range(plan.num_stages - 1):
            self._add_messages(index)
        self.clock = [0.0] * len(self.actors)
        # every computation of an actor in its stage's order, the update last
        self.log: list[Intervals] = [[] for _ in self.actors]
        # all actions, by place in the script
        self.recorded: list[list[tuple[int, float, float]]] = [[] for _ in self.actors]
        self.collectives: dict[str, Intervals] = {device: [] for device in plan.devices}
        self.transfers: list[Transfer] = []

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that the engine runs too."""
        return _scripts(self.plan.warmup_depths(), self.num_microbatches, self.first_backward)[0]

    @cached_property
    def scripts(self) -> tuple[_Script, ...]:
        """The actions of each stage."""
        return _scripts(self.plan.warmup_depths(), self.num_microbatches, self.first_backward)[1]

    def _add_stage(self, index: int) -> None:
        stage, costs = self.plan.stages[index], self.costs
        self.first_actor.append(len(self.actors))
        for r, replica in enumerate(stage.replicas):
            devices = tuple(shard.device for shard in replica.shards)
            times = [costs.compute_s(stage.layers, shard, replica.samples) for shard in replica.shards]
            reduce_f, reduce_b = costs.inner_allreduce_s(stage.layers, devices, replica.samples)
            slow_f, slow_b = max(f for f, _ in times), max(b for _, b in times)
            if self.plan.recomputes(index, costs.first_trained):
                times = [(f, f + b) for f, b in times]
                slow_b, reduce_b = slow_f + slow_b, reduce_f + reduce_b
            self.actors.append(
                _Actor(
                    stage=index,
                    index=r,
                    devices=devices,
                    own_s=tuple(times),
                    slowest_s=(slow_f, slow_b),
                    messages=([], []),
                    durations_s=(
                        [slow_f + reduce_f] * self.num_microbatches,
                        [slow_b + reduce_b] * self.num_microbatches,
                    ),
                    paced_s={},
                )
            )
            if len(devices) == 1 and replica.shards[0].paced:
                self._pace(self.actors[-1], replica)

    def _pace(self, actor: _Actor, replica: Replica) -> None:
        """Give single computations of a replica the durations of other power modes."""
        layers, shard = self.plan.stages[actor.stage].layers, replica.shards[0]
        for key, mode in shard.paced.items():
            times = self.costs.compute_s(layers, shard.model_copy(update={"mode": mode}), replica.samples)
            forward = key[0] == "F"
            seconds = times[0] if forward else times[1]
            if not forward and self.plan.recomputes(actor.stage, self.costs.first_trained):
                seconds += times[0]
            durations = actor.durations_s[0 if forward else 1]
            actor.longer_s += seconds - durations[int(key[1:])]
            durations[int(key[1:])] = seconds
            actor.paced_s[mode] = actor.paced_s.get(mode, 0.0) + seconds

    def _add_messages(self, index: int) -> None:
        """Join stage `index` and the next: rows travel between the replicas whose row ranges overlap.

        Gradients come back where the stage runs backwards.
        """
        left, right = self.plan.stages[index], self.plan.stages[index + 1]
        row_bytes = self.costs.boundary_bytes(left.layers[1] - 1)
        for a, (a_start, a_stop) in enumerate(left.row_ranges, start=self.first_actor[index]):
            for b, (b_start, b_stop) in enumerate(right.row_ranges, start=self.first_actor[index + 1]):
                rows = min(a_stop, b_stop) - max(a_start, b_start)
                if rows > 0:
                    self._add_pair(a, b, 0, rows * row_bytes)
                    if index >= self.first_backward:
                        self._add_pair(b, a, 1, rows * row_bytes)

    def _add_pair(self, sender: int, receiver: int, direction: int, num_bytes: int) -> None:
        """Each shard k of the receiver gets its copy from the sender's shard (k mod the sender's shards)."""
        sources = self.actors[sender].devices
        for k, target in enumerate(self.actors[receiver].devices):
            source = sources[k % len(sources)]
            route = self.costs.route(source, target)
            medium = self.media.setdefault(route.medium, len(self.media))
            occupies_s = num_bytes / route.bandwidth_bytes_per_s
            self.actors[sender].messages[direction].append(
                _Message(medium, occupies_s, route.latency_s, receiver, source, target, [])
            )

    def _contended(self) -> bool:
        """Return whether two replicas send through one medium, so that sends must happen in order of time."""
        user: dict[int, int] = {}
        for number, actor in enumerate(self.actors):
            for messages in actor.messages:
                for message in messages:
                    if user.setdefault(message.medium, number) != number:
                        return True
        return False

    def _expected(self) -> list[int]:
        """Return the messages still to come, a slot for each (replica, direction, micro-batch)."""
        m = self.num_microbatches
        expected = [0] * (len(self.actors) * 2 * m)
        for actor in self.actors:
            for direction in (0, 1):
                for message in actor.messages[direction]:
                    slot = (message.receiver * 2 + direction) * m
                    for number in range(slot, slot + m):
                        expected[number] += 1
        return expected

    def pipeline(self) -> None:
        """Run every replica up to its SYNC."""
        if self.record or self._contended():
            self._run_by_clock()
        else:
            self._run_in_order()

    def _run_in_order(self) -> None:
        """Run the actions in an order fixed beforehand: where no two replicas share a medium any will do."""
        count, clock, free_s = self.num_microbatches, self.clock, [0.0] * len(self.media)
        arrived_s = [([0.0] * count, [0.0] * count) for _ in self.actors]
        computing = [
            [
                [
                    (
                        number,
                        actor.durations_s[code],
                        arrived_s[number][code],
                        self.log[number].extend,
                        [
                            (m.medium, m.occupies_s, m.latency_s, arrived_s[m.receiver][code], m.sent.extend)
                            for m in actor.messages[code]
                        ],
                    )
                    for number in self._members(stage)
                    for actor in (self.actors[number],)
                ]
                for code in (_FORWARD, _BACKWARD)
            ]
            for stage in range(len(self.plan.stages))
        ]
        for stage, code, microbatch in _one_by_one(self.plan.warmup_depths(), count, self.first_backward):
            for number, durations_s, arrivals_s, extend_log, messages in computing[stage][code]:
                start, arrival = clock[number], arrivals_s[microbatch]
                if arrival > start:
                    start = arrival
                end = clock[number] = start + durations_s[microbatch]
                extend_log((start, end))
                for medium, occupies_s, latency_s, awaited_s, extend_sent in messages:
                    sent = free_s[medium]
                    if sent < end:
                        sent = end
                    free = free_s[medium] = sent + occupies_s
                    arrival = free + latency_s
                    extend_sent((sent, arrival))
                    if awaited_s[microbatch] < arrival:
                        awaited_s[microbatch] = arrival

    def _run_by_clock(self) -> None:
        """Run the actions in order of time; the replica whose clock is behind goes first."""
        count = self.num_microbatches
        expected, arrived_s = self._expected(), [0.0] * (len(self.actors) * 2 * count)
        free_s = [0.0] * len(self.media)
        contended, record = self._contended(), self.record
        position, waits_for = [0] * len(self.actors), [-1] * len(self.actors)
        clock = self.clock
        media_names = list(self.media)
        queue = [(0.0, number) for number in range(len(self.actors))]
        heapify(queue)
        while queue:
            now, number = heappop(queue)
            actor, log = self.actors[number], self.log[number]
            script, at = self.scripts[actor.stage], position[number]
            while True:
                code, direction, microbatch = script[at]
                if code <= _BACKWARD:
                    end = now + actor.durations_s[code][microbatch]
                    log += (now, end)
                    if record:
                        self.recorded[number].append((at, now, end))
                    now = end
                elif code == _RECEIVE:
                    slot = (number * 2 + direction) * count + microbatch
                    if expected[slot]:
                        waits_for[number], position[number], clock[number] = slot, at, now
                        break
                    start = now if waits_for[number] != slot else clock[number]
                    now = max(now, arrived_s[slot])
                    if record:
                        self.recorded[number].append((at, start, now))
                elif code == _SEND:
                    if contended and queue and queue[0] < (now, number):
                        position[number] = at
                        heappush(queue, (now, number))
                        break
                    for message in actor.messages[direction]:
                        start = max(now, free_s[message.medium])
                        free_s[message.medium] = start + message.occupies_s
                        end = start + message.occupies_s + message.latency_s
                        message.sent += (start, end)
                        if record:
                            name = media_names[message.medium]
                            self.transfers.append(Transfer(message.source, message.target, name, start, end))
                        other = message.receiver
                        slot = (other * 2 + direction) * count + microbatch
                        expected[slot] -= 1
                        arrived_s[slot] = max(arrived_s[slot], end)
                        if not expected[slot] and waits_for[other] == slot:
                            heappush(queue, (max(clock[other], arrived_s[slot]), other))
                    if record:
                        self.recorded[number].append((at, now, now))
                else:
                    clock[number] = now
                    break
                at += 1

    def synchronize(self) -> None:
        """Run SYNC (each stage's replicas, then tied weights) and STEP."""
        reached = list(self.clock)
        stages = self.plan.stages
        for index, stage in enumerate(stages):
            members = self._members(index)
            if len(members) > 1:
                fractions = stage.replicas[0].fractions
                groups = [tuple(self.actors[n].devices[k] for n in members) for k in range(stage.num_shards)]
                durations = [
                    self.costs.sync_s(stage.layers, group, fraction)
                    for group, fraction in zip(groups, fractions, strict=True)
                ]
                self._collective(members, groups, durations)
        for tie in self.costs.ties:
            owners = sorted({self._stage_of(layer) for layer in tie})
            if len(owners) > 1:
                members = [number for owner in owners for number in self._members(owner)]
                group = tuple(device for number in members for device in self.actors[number].devices)
                self._collective(members, [group], [self.costs.tie_s(tie, group)])
        for number, actor in enumerate(self.actors):
            stage = stages[actor.stage]
            start = self.clock[number]
            updates = [
                self.costs.update_s(stage.layers, shard) for shard in stage.replicas[actor.index].shards
            ]
            if self.plan.zero is not None:
                shares = (stage.state_shares(k)[actor.index] for k in range(stage.num_shards))
                updates = [update * share for update, share in zip(updates, shares, strict=True)]
            actor.own_s = tuple((*own, update) for own, update in zip(actor.own_s, updates, strict=True))
            self.clock[number] = start + max(updates)
            self.log[number] += (start, self.clock[number])
            if self.record:
                last = len(self.scripts[actor.stage]) - 1
                self.recorded[number] += [
                    (last - 1, reached[number], start),
                    (last, start, self.clock[number]),
                ]
        if self.plan.zero is not None:
            self._gather(gathers(self.plan.zero, self.num_microbatches))

    def _gather(self, times: int) -> None:
        """Let the replicas of each stage give each other the parameters that each has updated."""
        for index, stage in enumerate(self.plan.stages):
            members = self._members(index)
            if len(members) > 1:
                groups = [tuple(self.actors[n].devices[k] for n in members) for k in range(stage.num_shards)]
                durations = [
                    times * self.costs.gather_s(stage.layers, group, fraction)
                    for group, fraction in zip(groups, stage.replicas[0].fractions, strict=True)
                ]
                self._collective(members, groups, durations)

    def _members(self, stage: int) -> list[int]:
        first = self.first_actor[stage]
        return list(range(first, first + len(self.plan.stages[stage].replicas)))

    def _stage_of(self, layer: int) -> int:
        return next(s for s, stage in enumerate(self.plan.stages) if layer < stage.layers[1])

    def _collective(
        self, members: Sequence[int], groups: Sequence[tuple[str, ...]], durations: Sequence[float]
    ) -> None:
        """Let all members wait for the last of them, then all groups reduce side by side."""
        start = max(self.clock[number] for number in members)
        for group, duration in zip(groups, durations, strict=True):
            for device in group:
                self.collectives[device] += (start, start + duration)
        for number in members:
            self.clock[number] = start + max(durations)

    def device_times(self, step_s: float) -> dict[str, DeviceTimes]:
        """Return what each device did in a step of that length."""
        talks = self.collectives
        for actor in self.actors:
            for message in (*actor.messages[0], *actor.messages[1]):
                talks[message.source] += message.sent
                talks[message.target] += message.sent
        devices: dict[str, DeviceTimes] = {}
        for actor, log in zip(self.actors, self.log, strict=True):
            busy = np.array(log).reshape(-1, 2)
            codes = self._codes(actor.stage) if len(actor.devices) > 1 else ()
            for device, own_s in zip(actor.devices, actor.own_s, strict=True):
                talking, computing = np.array(talks[device]).reshape(-1, 2), busy
                if len(codes):  # a shard may be quicker than its replica, which ends with all-reduces
                    starts = busy[:, 0]
                    computing = np.stack((starts, starts + np.array(own_s)[codes]), axis=1)
                    slowest = starts + np.array((*actor.slowest_s, np.inf))[codes]
                    reducing = slowest < busy[:, 1]
                    talking = np.concatenate(
                        (talking, np.stack((slowest[reducing], busy[reducing, 1]), axis=1))
                    )
                compute_s = float((computing[:, 1] - computing[:, 0]).sum())
                communicate_s = min(_length_outside(talking, computing), max(0.0, step_s - compute_s))
                idle_s = max(0.0, step_s - compute_s - communicate_s)
                devices[device] = DeviceTimes(compute_s, communicate_s, idle_s, tuple(actor.paced_s.items()))
        return devices

    def _codes(self, stage: int) -> Sequence[int]:
        """Return what each computation in the log of a stage's replica is: _FORWARD, _BACKWARD or _UPDATE."""
        return [*(code for code, _, _ in self.scripts[stage] if code <= _BACKWARD), _UPDATE]

    def spans(self) -> tuple[Span, ...]:
        """Return every action of every replica, as recorded."""
        return tuple(
            Span(self.schedule.stages[actor.stage][at], actor.index, start, end)
            for actor, entries in zip(self.actors, self.recorded, strict=True)
            for at, start, end in entries
        )


def _length_outside(intervals: Array, holes: Array) -> float:
    """Return the length of the union of the intervals that lies outside the holes, which are sorted and disjoint.

    Both are (count, 2): starts and ends.
    """
    if not len(intervals):
        return 0.0
    order = np.argsort(intervals[:, 0])
    ends = np.maximum.accumulate(intervals[order, 1])
    starts = intervals[order, 0]
    starts[1:] = np.minimum(np.maximum(starts[1:], ends[:-1]), ends[1:])
    covered = np.repeat(np.concatenate(([0.0], (holes[:, 1] - holes[:, 0]).cumsum())), 2)[1:-1]
    at_starts, at_ends = np.interp((starts, ends), holes.ravel(), covered)
    return max(0.0, float((ends - starts - at_ends + at_starts).sum()))
