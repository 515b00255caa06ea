"""The simulator against steps worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colledge.plan import Plan, Shard
from colledge.profiles import Route
from colledge.schedule import ActionKind, Timeline, simulate


@dataclass
class TableCosts:
    """Costs from a table: seconds a sample of one layer, a device; one bandwidth and latency everywhere."""

    forward_s: dict[str, float]
    backward_s: dict[str, float]
    bandwidth: float = 1e12
    latency_s: float = 0.0
    segment: bool = False
    sync: float = 0.0
    update: float = 0.0
    reduce: float = 0.0
    bytes_a_sample: int = 0
    tied: float = 0.0
    ties: tuple[tuple[int, int], ...] = ()
    first_trained: int = 0
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def compute_s(self, layers: tuple[int, int], shard: Shard, samples: int) -> tuple[float, float]:
        work = samples * shard.fraction
        forward_s, backward_s = self.forward_s[shard.device], self.backward_s[shard.device]
        return work * (layers[1] - layers[0]) * forward_s, work * self.trained(layers) * backward_s

    def trained(self, layers: tuple[int, int]) -> int:
        return max(0, layers[1] - max(layers[0], self.first_trained))

    def update_s(self, layers: tuple[int, int], shard: Shard) -> float:
        return self.update * (layers[1] - layers[0])

    def inner_allreduce_s(
        self, layers: tuple[int, int], devices: tuple[str, ...], samples: int
    ) -> tuple[float, float]:
        once = self.reduce * samples * (layers[1] - layers[0]) if len(devices) > 1 else 0.0
        return once, once if self.trained(layers) else 0.0

    def sync_s(self, layers: tuple[int, int], devices: tuple[str, ...], fraction: float) -> float:
        self.asked.append(devices)
        return self.sync * fraction

    def tie_s(self, tie: tuple[int, int], devices: tuple[str, ...]) -> float:
        self.asked.append(devices)
        return self.tied

    def boundary_bytes(self, layer: int) -> int:
        return self.bytes_a_sample

    def route(self, source: str, target: str) -> Route:
        return Route("air" if self.segment else f"{source}->{target}", self.latency_s, self.bandwidth)


def make_plan(
    stages: Sequence[Sequence[tuple[int, Sequence[tuple[str, float]]]]],
    microbatch_size: int,
    num_microbatches: int,
    **extra: object,
) -> Plan:
    """Return a plan with one layer a stage; a stage is [(samples, [(device, fraction)])]."""
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": len(stages),
            "global_batch_size": microbatch_size * num_microbatches,
            "microbatch_size": microbatch_size,
            "stages": [
                {
                    "layers": [s, s + 1],
                    "replicas": [
                        {"samples": n, "shards": [{"device": d, "fraction": f} for d, f in shards]}
                        for n, shards in stage
                    ],
                }
                for s, stage in enumerate(stages)
            ],
            **extra,
        }
    )


def check_sums(timeline: Timeline) -> None:
    for times in timeline.devices.values():
        total = times.compute_s + times.communicate_s + times.idle_s
        assert total == pytest.approx(timeline.step_s)


def starts(timeline: Timeline, kind: ActionKind, stage: int) -> list[float]:
    return [s.start_s for s in timeline.spans if s.action.kind is kind and s.action.stage == stage]


def test_two_stage_pipeline_with_free_links() -> None:
    # a F0[0,1] F1[1,2] .......  B0[4,6] . B1[8,10]      a: warm-up 2;  F 1 s, B 2 s
    # b        F0[1,2] B0[2,4] F1[4,5] B1[5,7]           b: warm-up 1;  F 1 s, B 2 s
    plan = make_plan([[(1, [("a", 1.0)])], [(1, [("b", 1.0)])]], 1, 2)
    costs = TableCosts({"a": 1, "b": 1}, {"a": 2, "b": 2})
    timeline = simulate(plan, costs, record=True)
    assert starts(timeline, ActionKind.FORWARD, 0) == [0, 1]
    assert starts(timeline, ActionKind.FORWARD, 1) == [1, 4]
    assert starts(timeline, ActionKind.BACKWARD, 1) == [2, 5]
    assert starts(timeline, ActionKind.BACKWARD, 0) == [4, 7]
    assert timeline.step_s == 9
    assert timeline.devices["a"].compute_s == 6
    assert timeline.devices["a"].idle_s == 3
    check_sums(timeline)


def test_no_gradient_travels_below_the_first_layer_that_trains() -> None:
    # a F0[0,1] F1[1,2]                        each message holds its link for 3 s; a hears nothing any more
    # b             F0[4,5] F1[7,8] . . . . . . . . . . . . . . B0[14,16] B1[17,19]
    # c                             F0[8,9] B0[9,11] F1[11,12] B1[12,14]
    plan = make_plan([[(1, [(device, 1.0)])] for device in "abc"], 1, 2, recompute=[True, False, False])
    seconds = {"a": 1.0, "b": 1.0, "c": 1.0}
    costs = TableCosts(seconds, dict.fromkeys("abc", 2.0), bandwidth=10, bytes_a_sample=30, first_trained=1)
    for record in (False, True):
        timeline = simulate(plan, costs, record=record)
        assert timeline.step_s == 19
        assert [timeline.devices[device].compute_s for device in "abc"] == [2, 6, 6]
        assert timeline.devices["a"].communicate_s == 5
        check_sums(timeline)
    assert [(t.source, t.target) for t in timeline.transfers if "a" in (t.source, t.target)] == [
        ("a", "b")
    ] * 2
    assert starts(timeline, ActionKind.BACKWARD, 0) == starts(timeline, ActionKind.RECEIVE_BACKWARD, 0) == []
    assert starts(timeline, ActionKind.BACKWARD, 1) == [14, 17]
    assert starts(timeline, ActionKind.SEND_BACKWARD, 1) == []


def test_transfers_take_bandwidth_then_latency_and_queue_on_their_link() -> None:
    # Each message holds the link for 3 s and arrives 0.5 s later; a's forwards end at 1 and 2.
    plan = make_plan([[(1, [("a", 1.0)])], [(1, [("b", 1.0)])]], 1, 2, schedule={"name": "gpipe"})
    costs = TableCosts({"a": 1, "b": 1}, {"a": 1, "b": 1}, bandwidth=10, bytes_a_sample=30, latency_s=0.5)
    timeline = simulate(plan, costs, record=True)
    sent = [(t.source, t.start_s, t.end_s) for t in timeline.transfers]
    assert sent == [("a", 1, 4.5), ("a", 4, 7.5), ("b", 9.5, 13), ("b", 12.5, 16)]
    assert starts(timeline, ActionKind.FORWARD, 1) == [4.5, 7.5]
    assert starts(timeline, ActionKind.BACKWARD, 1) == [8.5, 9.5]
    assert timeline.step_s == 17
    # a computes [0,2], [13,14], [16,17]; its transfers cover [1,7.5] and [9.5,16]
    assert timeline.devices["a"].compute_s == 4
    assert timeline.devices["a"].communicate_s == pytest.approx(5.5 + 3.5 + 2)
    check_sums(timeline)


def test_a_segment_is_shared_by_all_its_senders() -> None:
    # Both replicas of stage 0 finish at 1 and send 1 row (10 s on the medium) to stage 1.
    stages = [[(1, [("a", 1.0)]), (1, [("b", 1.0)])], [(2, [("c", 1.0)])]]
    plan = make_plan(stages, 2, 1)
    free = {"a": 1.0, "b": 1.0, "c": 1.0}
    own = simulate(plan, TableCosts(free, free, bandwidth=1, bytes_a_sample=10), record=True)
    shared = simulate(plan, TableCosts(free, free, bandwidth=1, bytes_a_sample=10, segment=True), record=True)
    assert starts(own, ActionKind.FORWARD, 1) == [11]
    assert starts(shared, ActionKind.FORWARD, 1) == [21]
    assert [(t.source, t.start_s) for t in shared.transfers[:2]] == [("a", 1), ("b", 11)]
    # c computes 2 rows each way [21,25]; gradients leave one after the other and arrive at 35 and 45.
    assert shared.step_s == 46
    check_sums(shared)


def test_a_segment_serves_in_order_of_time_not_of_stage() -> None:
    # The slow replica comes first in the plan, but the fast one's message is on the medium first.
    stages = [[(1, [("slow", 1.0)]), (1, [("fast", 1.0)])], [(2, [("c", 1.0)])]]
    times = {"slow": 5.0, "fast": 1.0, "c": 1.0}
    costs = TableCosts(times, times, bandwidth=1, bytes_a_sample=10, segment=True)
    timeline = simulate(make_plan(stages, 2, 1), costs, record=True)
    assert [(t.source, t.start_s) for t in timeline.transfers[:2]] == [("fast", 1), ("slow", 11)]


def test_a_receive_waits_for_the_last_of_its_messages() -> None:
    # Whichever stands first in the plan, the slow replica's rows arrive last.
    stages = [[(1, [("slow", 1.0)]), (1, [("fast", 1.0)])], [(2, [("c", 1.0)])]]
    for first, second in (("slow", "fast"), ("fast", "slow")):
        stages[0] = [(1, [(first, 1.0)]), (1, [(second, 1.0)])]
        times = {"slow": 5.0, "fast": 1.0, "c": 1.0}
        timeline = simulate(make_plan(stages, 2, 1), TableCosts(times, times), record=True)
        assert starts(timeline, ActionKind.FORWARD, 1) == [5]


def test_rows_travel_only_between_overlapping_replicas() -> None:
    stages = [[(1, [("a", 1.0)]), (3, [("b", 1.0)])], [(2, [("c", 1.0)]), (2, [("d", 1.0)])]]
    free = dict.fromkeys("abcd", 1.0)
    timeline = simulate(
        make_plan(stages, 4, 1), TableCosts(free, free, bandwidth=1, bytes_a_sample=1), record=True
    )
    forward = {(t.source, t.target): t.end_s - t.start_s for t in timeline.transfers if t.source in "ab"}
    assert forward == {("a", "c"): 1, ("b", "c"): 1, ("b", "d"): 2}


def test_replicas_sync_when_the_last_one_is_ready() -> None:
    plan = make_plan([[(3, [("fast", 1.0)]), (1, [("slow", 1.0)]), (0, [("spare", 1.0)])]], 4, 2)
    times = {"fast": 1.0, "slow": 4.0, "spare": 1.0}
    costs = TableCosts(times, times, sync=10, update=0.25)
    timeline = simulate(plan, costs, record=True)
    assert timeline.step_s == 16 + 10 + 0.25
    assert costs.asked == [("fast", "slow", "spare")]
    fast, spare = timeline.devices["fast"], timeline.devices["spare"]
    assert (fast.compute_s, fast.communicate_s, fast.idle_s) == (12.25, 10, 4)
    assert (spare.compute_s, spare.communicate_s, spare.idle_s) == (0.25, 10, 16)
    check_sums(timeline)


def test_shards_move_in_lock_step_and_pay_their_allreduces() -> None:
    plan = make_plan([[(2, [("a", 0.5), ("b", 0.5)])]], 2, 3)
    costs = TableCosts({"a": 1, "b": 2}, {"a": 2, "b": 4}, reduce=0.25)
    timeline = simulate(plan, costs)
    # A forward: slowest shard 2 s + 0.5 s; a backward: 4 s + 0.5 s; three times.
    assert timeline.step_s == 21
    a = timeline.devices["a"]
    assert (a.compute_s, a.communicate_s, a.idle_s) == (9, 3, 9)
    check_sums(timeline)


def test_messages_to_shards_come_from_the_matching_shard() -> None:
    stages = [[(1, [("a", 0.5), ("b", 0.5)])], [(1, [("c", 0.5), ("d", 0.25), ("e", 0.25)])]]
    free = dict.fromkeys("abcde", 1.0)
    timeline = simulate(
        make_plan(stages, 1, 1), TableCosts(free, free, bandwidth=1, bytes_a_sample=1), record=True
    )
    pairs = [(t.source, t.target) for t in timeline.transfers]
    assert pairs == [("a", "c"), ("b", "d"), ("a", "e"), ("c", "a"), ("d", "b")]


def test_recompute_costs_one_more_forward() -> None:
    costs = TableCosts({"a": 1, "b": 2}, {"a": 2, "b": 4}, reduce=0.25)
    shards = [[(2, [("a", 0.5), ("b", 0.5)])]]
    plain, again = (simulate(make_plan(shards, 2, 3, recompute=[flag]), costs) for flag in (False, True))
    assert again.step_s == plain.step_s + 3 * 2.5
    assert again.devices["a"].compute_s == plain.devices["a"].compute_s + 3


def test_weights_tied_across_stages_are_reduced_after_both_sync() -> None:
    plan = make_plan([[(1, [("a", 1.0)])], [(1, [("b", 1.0)])]], 1, 1)
    one = {"a": 1.0, "b": 1.0}
    costs = TableCosts(one, one, tied=7, ties=((0, 1),), update=0.5)
    timeline = simulate(plan, costs, record=True)
    assert costs.asked == [("a", "b")]
    assert timeline.step_s == 4 + 7 + 0.5
    assert timeline.devices["b"].communicate_s == 7 + 0  # waiting for a's backward is idle
    assert timeline.devices["b"].idle_s == 2
    whole = Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": 2,
            "global_batch_size": 1,
            "microbatch_size": 1,
            "stages": [{"layers": [0, 2], "replicas": [{"samples": 1, "shards": [{"device": "a"}]}]}],
        }
    )
    assert simulate(whole, costs).step_s == 4 + 1  # one stage holds both: nothing to reduce


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any small plan over at most six devices, zero-sample replicas included."""
    names, stages = list("abcdef"), []
    microbatch_size = draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, 3))):
        replicas, shards = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
        cut = draw(st.integers(0, microbatch_size)) if replicas == 2 else microbatch_size
        rows = [cut, microbatch_size - cut][:replicas]
        part = draw(st.sampled_from([0.25, 0.5])) if shards == 2 else 1.0
        fractions = [part, 1 - part][:shards]
        stages.append([(n, [(names.pop(), f) for f in fractions]) for n in rows])
    name = draw(st.sampled_from(["gpipe", "1f1b"]))
    return make_plan(stages, microbatch_size, draw(st.integers(1, 4)), schedule={"name": name})


@st.composite
def costs(draw: st.DrawFn) -> TableCosts:
    seconds = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    return TableCosts(
        {d: draw(seconds) for d in "abcdef"},
        {d: draw(seconds) for d in "abcdef"},
        bandwidth=draw(st.sampled_from([1.0, 4.0, 1e9])),
        latency_s=draw(st.sampled_from([0.0, 0.5])),
        segment=draw(st.booleans()),
        bytes_a_sample=draw(st.sampled_from([0, 1, 5])),
        sync=draw(seconds),
        update=draw(seconds),
        reduce=draw(seconds),
        tied=draw(seconds),
        ties=((0, 1),) if draw(st.booleans()) else (),
        first_trained=draw(st.sampled_from([0, 0, 1, 2, 3])),
    )


@settings(max_examples=150, deadline=None)
@given(plan=plans(), table=costs())
def test_a_step_is_no_longer_than_everything_in_turn(plan: Plan, table: TableCosts) -> None:
    if plan.num_stages == 1:
        table.ties = ()
    timeline = simulate(plan, table, record=True)
    check_sums(timeline)
    waits = (ActionKind.RECEIVE_FORWARD, ActionKind.RECEIVE_BACKWARD)
    serial = sum(s.end_s - s.start_s for s in timeline.spans if s.action.kind not in waits)
    serial += sum(t.end_s - t.start_s for t in timeline.transfers)
    assert max(t.compute_s for t in timeline.devices.values()) <= timeline.step_s + 1e-9
    assert timeline.step_s <= serial + 1e-9
    quiet = simulate(plan, table)
    assert (quiet.step_s, quiet.devices) == (timeline.step_s, timeline.devices)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), table=costs())
def test_scaling_all_times_scales_the_step(plan: Plan, table: TableCosts) -> None:
    if plan.num_stages == 1:
        table.ties = ()
    c = 8.0  # a power of two, so that no rounding differs
    scaled = TableCosts(
        {d: c * s for d, s in table.forward_s.items()},
        {d: c * s for d, s in table.backward_s.items()},
        bandwidth=table.bandwidth / c,
        latency_s=c * table.latency_s,
        segment=table.segment,
        bytes_a_sample=table.bytes_a_sample,
        sync=c * table.sync,
        update=c * table.update,
        reduce=c * table.reduce,
        tied=c * table.tied,
        ties=table.ties,
        first_trained=table.first_trained,
    )
    one, eight = simulate(plan, table), simulate(plan, scaled)
    assert eight.step_s == pytest.approx(c * one.step_s)
    for device, times in one.devices.items():
        assert eight.devices[device].communicate_s == pytest.approx(c * times.communicate_s)
