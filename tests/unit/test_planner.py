"""The planner: costs, memory, energy, bounds, and the search against everything enumerated."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colledge.errors import ColledgeError, ConfigError, OutOfMemoryError
from colledge.plan import Plan, StepFigures
from colledge.planner import (
    PlanningRequest,
    PlanningResult,
    PoolCosts,
    check_memory,
    plan_memory,
    plan_training,
    predict,
)
from colledge.planner.bounds import lower_bounds
from colledge.planner.cost import interpolate
from colledge.planner.exact import Exact
from colledge.planner.judge import Judge
from colledge.planner.layouts import compositions, depth_vectors, layouts, microbatch_sizes, proportional
from colledge.planner.memory import Load, MemoryModel, SpanMemory
from colledge.planner.shortage import Question
from colledge.planner.tables import Tables, device_classes
from colledge.profiles import ModelProfile, PoolProfile
from colledge.schedule import ActionKind, simulate

MB = 1_000_000


def make_layer(name: str, kind: str, **changes: object) -> dict[str, object]:
    return {
        "name": name,
        "kind": kind,
        "parameter_bytes": 10 * MB,
        "trainable_parameter_bytes": 10 * MB,
        "output_bytes_per_sample": MB,
        "saved_bytes_per_sample": 5 * MB,
        "forward_flops_per_sample": 1e9,
        "backward_flops_per_sample": 2e9,
        **changes,
    }


def make_model(
    seconds: dict[str, float], num_blocks: int = 2, units: int = 4, tied: bool = False, **changes: object
) -> ModelProfile:
    """Return embed + blocks + head; `seconds` is a device kind's forward time a sample of a block."""
    tensor = {
        "units": units,
        "forward_allreduces": 2,
        "backward_allreduces": 2,
        "allreduce_bytes_per_sample": MB,
    }
    timings = [
        {
            "device_kind": kind,
            "mode": "max",
            "layer_kind": layer,
            "samples": samples,
            "shard_fraction": fraction,
            "forward_s": second * scale * samples * fraction,
            "backward_s": 2 * second * scale * samples * fraction,
            "update_s": 0.01 * second * fraction,
        }
        for kind, second in seconds.items()
        for layer, scale in (("embed", 0.125), ("block", 1.0), ("head", 0.5))
        for samples in (1, 4)
        for fraction in ((1.0, 0.5) if layer == "block" else (1.0,))
    ]
    layers = [make_layer("embed", "embed", **changes)]
    layers += [make_layer(f"block.{i}", "block", tensor=tensor, **changes) for i in range(num_blocks)]
    layers.append(make_layer("head", "head", tied_to="embed" if tied else None, **changes))
    return ModelProfile.model_validate(
        {
            "schema": "colledge/model-profile/1",
            "name": "toy",
            "sequence_length": 8,
            "layers": layers,
            "timings": timings,
        }
    )


def frozen_below(model: ModelProfile, first_trained: int) -> ModelProfile:
    """Return a model of which layers [0, first_trained) do not train."""
    frozen = {"trainable_parameter_bytes": 0, "largest_gradient_bytes": 0}
    layers = [
        layer.model_copy(update=frozen if index < first_trained else {})
        for index, layer in enumerate(model.layers)
    ]
    return model.model_copy(update={"layers": tuple(layers)})


def make_pool(
    kinds: Sequence[str],
    *,
    watts: Sequence[tuple[float, float, float]] = (),
    bandwidth: float = 100 * MB,
    latency_s: float = 1e-3,
    memory_bytes: int | Sequence[int] = 10_000 * MB,
    segment: bool = False,
    ids: Sequence[str] = "abcdef",
) -> PoolProfile:
    sizes = [memory_bytes] * len(kinds) if isinstance(memory_bytes, int) else memory_bytes
    ids = ids[: len(kinds)]
    draws = list(watts) or [(5.0, 20.0, 8.0)] * len(kinds)
    devices = [
        {
            "id": id,
            "kind": kind,
            "memory_bytes": size,
            "modes": [{"name": "max", "idle_w": i, "compute_w": c, "communicate_w": t, "source": "measured"}],
        }
        for id, kind, size, (i, c, t) in zip(ids, kinds, sizes, draws, strict=False)
    ]
    way = {"latency_s": latency_s, "bandwidth_bytes_per_s": bandwidth}
    links = [{"source": a, "target": b, **way} for a, b in combinations(ids, 2)]
    shared = [{"name": "air", "devices": list(ids), **way}] if len(kinds) > 1 else []
    return PoolProfile.model_validate(
        {
            "schema": "colledge/pool-profile/1",
            "devices": devices,
            "links": [] if segment else links,
            "segments": shared if segment else [],
        }
    )


def single(device: str, model: ModelProfile, microbatch_size: int, num_microbatches: int) -> Plan:
    return make_plan(
        model,
        [((0, len(model.layers)), [(microbatch_size, [(device, 1.0)])])],
        microbatch_size,
        num_microbatches,
    )


def make_plan(
    model: ModelProfile,
    stages: Sequence[tuple[tuple[int, int], Sequence[tuple[int, Sequence[tuple[str, float]]]]]],
    microbatch_size: int,
    num_microbatches: int,
    **extra: object,
) -> Plan:
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": len(model.layers),
            "global_batch_size": microbatch_size * num_microbatches,
            "microbatch_size": microbatch_size,
            "stages": [
                {
                    "layers": layers,
                    "replicas": [
                        {"samples": n, "shards": [{"device": d, "fraction": f} for d, f in shards]}
                        for n, shards in replicas
                    ],
                }
                for layers, replicas in stages
            ],
            **extra,
        }
    )


def figures(plan: Plan) -> StepFigures:
    assert plan.prediction is not None
    return plan.prediction


# -- costs ---------------------------------------------------------------------------------------------------


def test_interpolation_goes_through_its_points_and_never_below_zero() -> None:
    points = [(2.0, 1.0), (4.0, 5.0), (8.0, 7.0)]
    assert [interpolate(points, x) for x in (2, 3, 4, 6, 8, 16)] == [1, 3, 5, 6, 7, 11]
    assert interpolate(points, 1) == 0
    assert interpolate([(4.0, 2.0)], 1) == 0.5
    assert interpolate([(4.0, 2.0)], 8) == 4


def test_layers_without_a_tensor_split_are_computed_whole_by_every_shard() -> None:
    model = make_model({"k": 1.0})
    costs = PoolCosts(make_pool(["k", "k"]), model)
    plan = make_plan(model, [((0, 4), [(4, [("a", 0.75), ("b", 0.25)])])], 4, 1)
    shard = plan.stages[0].replicas[0].shards[1]
    forward, backward = costs.compute_s((0, 4), shard, 4)
    assert forward == pytest.approx(4 * (0.125 + 2 * 0.25 + 0.5))
    assert backward == pytest.approx(2 * forward)
    assert costs.compute_s((0, 4), shard, 0) == (0, 0)


def test_ring_allreduce_shares_a_segment() -> None:
    model = make_model({"k": 1.0})
    own = PoolCosts(make_pool(["k"] * 3, bandwidth=10, latency_s=1), model)
    air = PoolCosts(make_pool(["k"] * 3, bandwidth=10, latency_s=1, segment=True), model)
    assert own.allreduce_s(("a", "b", "c"), 30) == pytest.approx(4 * 1 + 4 / 3 * 30 / 10)
    assert air.allreduce_s(("a", "b", "c"), 30) == pytest.approx(4 * 1 + 4 / 3 * 30 / (10 / 3))
    assert own.allreduce_s(("a",), 30) == 0


def test_a_missing_timing_names_device_kind_layer_kind_and_mode() -> None:
    model = make_model({"k": 1.0})
    pool = make_pool(["k", "unknown"])
    with pytest.raises(ConfigError, match=r"layer kind 'embed' on device kind 'unknown' in power mode 'max'"):
        plan_training(pool, model, PlanningRequest(global_batch_size=4))
    assert plan_training(
        pool, model, PlanningRequest(global_batch_size=4, must_not_use=("b",))
    ).best.devices == ("a",)


def test_one_device_alone_takes_its_summed_timings() -> None:
    model = make_model({"k": 0.5})
    plan = single("a", model, 4, 3)
    found = predict(plan, make_pool(["k"]), model)
    layers = 0.125 + 2 + 0.5
    assert found.step_s == pytest.approx(3 * 4 * layers * 0.5 * 3 + 4 * 0.01 * 0.5)
    assert found.devices["a"].compute_s == pytest.approx(found.step_s)
    assert found.devices["a"].idle_s == pytest.approx(0)
    assert found.energy_joules_per_step == pytest.approx(20 * found.step_s)


@pytest.mark.parametrize(("layers", "synced_mb"), [((0, 4), 30), ((0, 3), 20), ((3, 4), 0), ((1, 3), 20)])
def test_a_tied_weight_is_not_synced_twice(layers: tuple[int, int], synced_mb: int) -> None:
    costs = PoolCosts(make_pool(["k"]), make_model({"k": 1.0}, tied=True))
    assert costs.sync_bytes(layers, 1.0) == synced_mb * MB


def test_a_weight_tied_across_stages_is_reduced_over_both() -> None:
    pool = make_pool(["k", "k"], bandwidth=MB, latency_s=0)
    steps = []
    for tied in (False, True):
        model = make_model({"k": 0.001}, tied=tied)
        plan = make_plan(model, [((0, 2), [(4, [("a", 1.0)])]), ((2, 4), [(4, [("b", 1.0)])])], 4, 1)
        steps.append(predict(plan, pool, model).step_s)
    assert steps[1] - steps[0] == pytest.approx(10, rel=0.01)  # 2 (n-1)/n x 10 MB at 1 MB/s
    frozen = make_model({"k": 0.001}, tied=True, trainable_parameter_bytes=0)
    assert PoolCosts(pool, frozen).ties == ()


# -- memory --------------------------------------------------------------------------------------------------


def test_memory_parts_by_hand() -> None:
    model = make_model({"k": 1.0}, tied=True)
    pool = make_pool(["k", "k", "k"])
    plan = make_plan(
        model, [((0, 2), [(4, [("a", 1.0)])]), ((2, 4), [(4, [("b", 0.75), ("c", 0.25)])])], 4, 3
    )
    parts = plan_memory(plan, pool, model, 2.0)
    a, c = parts["a"], parts["c"]
    assert a.parameters_bytes == a.gradients_bytes == 20 * MB
    assert a.optimizer_state_bytes == 40 * MB
    assert a.activations_bytes == 2 * 4 * 10 * MB  # two micro-batches in flight
    assert a.wire_buffers_bytes == 4 * 4 * MB
    assert c.parameters_bytes == (0.25 * 10 + 10) * MB  # the head is whole in every shard
    assert c.activations_bytes == 1 * 4 * (0.25 * 5 + 5) * MB
    whole = plan_memory(single("a", model, 4, 1), pool, model, 2.0)["a"]
    assert whole.parameters_bytes == 30 * MB  # embed and head share their weight


def test_below_the_first_layer_that_trains_nothing_is_kept_and_no_gradient_is_awaited() -> None:
    model = make_model({"k": 1.0}, num_blocks=4, workspace_bytes_per_sample=3 * MB)
    model, pool = frozen_below(model, 3), make_pool(["k", "k", "k"])
    spans = zip("abc", ((0, 2), (2, 4), (4, 6)), strict=True)
    stages = [(layers, [(4, [(device, 1.0)])]) for device, layers in spans]
    for again in (False, True):
        plan = make_plan(model, stages, 4, 3, recompute=[again] * 3)
        a, b, c = plan_memory(plan, pool, model, 2.0).values()
        assert a.parameters_bytes == 20 * MB
        assert a.gradients_bytes == a.optimizer_state_bytes == a.activations_bytes == 0
        assert a.workspace_bytes == 4 * 8 * MB  # a layer's own, and what its kind keeps where it trains
        assert a.wire_buffers_bytes == 4 * 2 * MB  # sends; their number does not depend on the depth
        assert b.activations_bytes == 4 * (
            2 * MB + 5 * MB if again else 2 * 5 * MB
        )  # only its second layer keeps
        assert (
            b.wire_buffers_bytes == 4 * (2 + 2 + 2) * MB
        )  # receives; gradients received; sends, two in flight
        assert c.wire_buffers_bytes == 4 * (2 + 2) * MB
        assert c.activations_bytes == 4 * (10 + again) * MB


def test_recompute_keeps_only_the_boundary_and_one_micro_batch() -> None:
    model = make_model({"k": 1.0})
    stages = [((0, 2), [(1, [("a", 1.0)])]), ((2, 4), [(1, [("b", 1.0)])])]
    plan = make_plan(model, stages, 1, 4, schedule={"name": "gpipe"}, recompute=[True, True])
    parts = plan_memory(plan, make_pool(["k", "k"]), model, 0.0)
    assert parts["a"].activations_bytes == 10 * MB
    assert parts["b"].activations_bytes == (4 + 10) * MB


def uneven_model(numbers: random.Random) -> ModelProfile:
    """Return a model whose layers all need different bytes."""
    model = make_model({"k": 0.1}, num_blocks=3, tied=numbers.random() < 0.5)
    names = ("output", "saved", "workspace")
    layers = [
        layer.model_copy(
            update={f"{name}_bytes_per_sample": numbers.randint(0, 9 * MB) for name in names}
            | {"largest_gradient_bytes": numbers.randint(0, 40 * MB)}
        )
        for layer in model.layers
    ]
    return frozen_below(model.model_copy(update={"layers": tuple(layers)}), numbers.choice((0, 0, 1, 3, 5)))


@pytest.mark.parametrize("seed", range(8))
def test_memory_of_all_spans_is_that_of_each(seed: int) -> None:
    model = uneven_model(random.Random(seed))
    one, all_spans = MemoryModel(model, 2.0), SpanMemory(model, 2.0)
    device = make_pool(["k"]).devices[0].model_copy(update={"allocator_overhead": 0.25})
    for start, stop in combinations(range(6), 2):
        for samples, depth, recompute in ((1, 1, False), (2, 3, False), (9, 3, True)):
            load = Load((start, stop), 1.0, samples, depth, recompute)
            found = all_spans.total_bytes(0.25, samples, depth, recompute)[start, stop]
            assert found == pytest.approx(one.parts(load, device).total_bytes, abs=1), load


@pytest.mark.parametrize("seed", range(8))
def test_the_most_samples_fit_and_one_more_does_not(seed: int) -> None:
    numbers = random.Random(seed)
    model = uneven_model(numbers)
    one, all_spans = MemoryModel(model, 2.0), SpanMemory(model, 2.0)
    for span in combinations(range(6), 2):
        depth, recompute = numbers.randint(1, 3), numbers.random() < 0.5
        figures = {"memory_bytes": numbers.randint(10, 500) * MB, "runtime_bytes": 10 * MB}
        figures["allocator_overhead"] = numbers.choice((0, 0.5))
        device = make_pool(["k"]).devices[0].model_copy(update=figures)
        fraction = numbers.choice((1.0, 1.0, 0.25, 0.5))
        most = int(one.most_samples(device, span, fraction, depth, recompute))
        if fraction == 1.0:
            room, overhead = device.room_bytes, device.allocator_overhead
            assert all_spans.most_samples(room, overhead, depth, recompute)[span] == most

        needed = [
            one.parts(Load(span, fraction, samples, depth, recompute), device).total_bytes
            for samples in (max(most, 0), max(most + 1, 0))
        ]
        if most >= 0:
            assert needed[0] <= device.memory_bytes
        assert needed[1] > device.memory_bytes


def test_workspace_is_of_the_hungriest_layer() -> None:
    model = make_model({"k": 1.0})
    layers = list(model.layers)
    layers[1] = layers[1].model_copy(update={"workspace_bytes_per_sample": 3 * MB})
    layers[3] = layers[3].model_copy(
        update={"workspace_bytes_per_sample": 7 * MB, "largest_gradient_bytes": 20 * MB}
    )
    memory = MemoryModel(model.model_copy(update={"layers": tuple(layers)}), 2.0)

    device = make_pool(["k"]).devices[0].model_copy(update={"allocator_overhead": 0.5})

    def workspace(layers: tuple[int, int], fraction: float, samples: int) -> float:
        parts = memory.parts(Load(layers, fraction, samples, 1, False), device)
        assert parts.allocator_bytes == (parts.activations_bytes + parts.workspace_bytes) / 2
        return parts.workspace_bytes

    assert workspace((0, 4), 1.0, 4) == (28 + 20) * MB  # the head's: every shard holds it whole
    assert workspace((0, 4), 0.5, 2) == (14 + 20) * MB
    assert workspace((0, 3), 0.5, 4) == 6 * MB  # a block's: half a shard, half the workspace
    assert workspace((0, 1), 1.0, 4) == 0


def test_shards_keep_some_of_what_is_saved_whole() -> None:
    model = make_model({"k": 1.0}, saved_bytes_per_sample=8 * MB)
    layers = [
        layer.model_copy(
            update={"tensor": layer.tensor.model_copy(update={"whole_saved_bytes_per_sample": 2 * MB})}
        )
        if layer.tensor
        else layer
        for layer in model.layers
    ]
    memory = MemoryModel(model.model_copy(update={"layers": tuple(layers)}), 2.0)
    device = make_pool(["k"]).devices[0]
    for fraction, saved in ((1.0, 8), (0.5, 5), (0.25, 3.5)):
        parts = memory.parts(Load((1, 3), fraction, 3, 1, False), device)
        assert parts.activations_bytes == 2 * 3 * saved * MB
    values = model.model_dump(by_alias=True, mode="json")
    values["layers"][1]["tensor"]["whole_saved_bytes_per_sample"] = 9 * MB
    with pytest.raises(ValueError, match="more bytes are saved whole than in all"):
        ModelProfile.model_validate(values)


def test_check_memory_names_device_bytes_and_help() -> None:
    model = make_model({"k": 1.0})
    pool = make_pool(["k"], memory_bytes=200 * MB)
    plan = single("a", model, 4, 1)
    with pytest.raises(OutOfMemoryError) as error:
        check_memory(plan, pool, model, 2.0)
    assert "'a' needs 240 MB (240000000 bytes) and has 200 MB (200000000 bytes)" in str(error.value)
    assert "lacks 40 MB" in str(error.value)
    assert error.value.fix
    check_memory(plan, make_pool(["k"], memory_bytes=240 * MB), model, 2.0)


# -- energy --------------------------------------------------------------------------------------------------


def test_left_out_devices_idle_in_the_whole_pool_and_cost_nothing_marginally() -> None:
    model = make_model({"k": 1.0, "slow": 50.0})
    pool = make_pool(["k", "slow"], watts=[(5, 20, 8), (3, 30, 9)])
    found = predict(single("a", model, 4, 1), pool, model)
    assert found.marginal_energy_joules_per_step == pytest.approx(20 * found.step_s)
    assert found.energy_joules_per_step == pytest.approx(23 * found.step_s)
    assert found.devices["b"].idle_s == found.step_s
    assert found.devices["b"].energy_joules == pytest.approx(3 * found.step_s)
    total = sum(device.energy_joules for device in found.devices.values())
    assert total == pytest.approx(found.energy_joules_per_step)


def test_the_accounting_can_flip_the_plan() -> None:
    # b is twice as fast but draws a lot: worth it only if somebody pays for the idle third device anyway.
    model = make_model({"thrifty": 1.0, "fast": 0.5, "idler": 500.0})
    pool = make_pool(["thrifty", "fast", "idler"], watts=[(0, 10, 0), (0, 24, 0), (20, 30, 20)], bandwidth=1)
    chosen = {
        accounting: plan_training(
            pool, model, PlanningRequest(global_batch_size=4, accounting=accounting)
        ).best.devices
        for accounting in ("whole-pool", "marginal")
    }
    assert chosen == {"whole-pool": ("b",), "marginal": ("a",)}


# -- search --------------------------------------------------------------------------------------------------


def test_two_equal_devices_with_free_links_share_evenly() -> None:
    model = make_model({"k": 1.0}, units=1)
    result = plan_training(
        make_pool(["k", "k"], bandwidth=1e15, latency_s=0),
        model,
        PlanningRequest(global_batch_size=8, objective="time"),
    )
    assert result.best.family == "data"
    samples = [replica.samples for replica in result.best.stages[0].replicas]
    assert samples[0] == samples[1]
    alone = figures(result.families["single"]).step_s
    assert figures(result.best).step_s == pytest.approx(alone / 2, rel=0.01)
    assert figures(result.best).step_s >= result.bounds.step_s


def test_a_model_of_which_nothing_trains_gets_a_plan_of_forwards_only() -> None:
    model, pool = frozen_below(make_model({"k": 0.1}), 4), make_pool(["k", "k"], memory_bytes=60 * MB)
    assert model.first_trained == 4
    result = plan_training(pool, model, PlanningRequest(global_batch_size=8, objective="time"))
    costs, alone = PoolCosts(pool, model), figures(result.families["single"])
    assert alone.step_s == pytest.approx(8 * 0.1 * (0.125 + 2 + 0.5))  # no backward, no update
    assert figures(result.families["data"]).step_s == pytest.approx(alone.step_s / 2)  # nothing to sum
    for plan in (result.best, *result.families.values(), *result.frontier):
        timeline = simulate(plan, costs, record=True)
        kinds = {span.action.kind for span in timeline.spans if span.end_s > span.start_s}
        assert kinds <= {ActionKind.FORWARD, ActionKind.RECEIVE_FORWARD}
        for parts in check_memory(plan, pool, model, 2.0).values():
            assert parts.gradients_bytes == parts.optimizer_state_bytes == parts.activations_bytes == 0
        assert plan.recompute is None
    assert "Nothing trains, so every stage runs forwards only." in result.reasons


def test_a_frozen_prefix_makes_a_pipeline_quicker_by_its_backwards() -> None:
    model, pool = make_model({"k": 0.1}, num_blocks=6), make_pool(["k", "k"])
    plan = make_plan(model, [((0, 4), [(1, [("a", 1.0)])]), ((4, 8), [(1, [("b", 1.0)])])], 1, 8)
    whole, half = (predict(plan, pool, frozen_below(model, k)) for k in (0, 4))
    assert half.step_s < 0.95 * whole.step_s
    assert half.devices["a"].compute_s == pytest.approx(8 * 0.1 * (0.125 + 3))  # forwards alone, no update
    assert half.devices["b"].compute_s == whole.devices["b"].compute_s
    assert half.devices["a"].energy_joules < 0.6 * whole.devices["a"].energy_joules
    request = PlanningRequest(global_batch_size=8, objective="time")
    cut_for_it = plan_training(pool, frozen_below(model, 4), request).families["pipeline"]
    assert cut_for_it.stages[0].layers == (0, 5)  # more layers where there is no backward
    assert figures(cut_for_it).step_s < 0.8 * half.step_s
    small = make_pool(["k", "k"], memory_bytes=[80 * MB, 145 * MB])
    said = plan_training(small, frozen_below(model, 6), request).reasons
    assert (
        "Nothing trains before block.5, so stage 0 runs forwards only and no gradients travel there." in said
    )


def test_unequal_devices_share_unequally() -> None:
    model = make_model({"one": 1.0, "three": 3.0}, units=1)
    pool = make_pool(["one", "three"], bandwidth=1e15, latency_s=0)
    result = plan_training(pool, model, PlanningRequest(global_batch_size=4, objective="time"))
    assert [r.samples for r in result.families["data"].stages[0].replicas] == [3, 1]


def test_a_hopeless_link_is_not_used_and_the_reasons_say_so() -> None:
    model = make_model({"k": 1.0})
    pool = make_pool(["k", "k"], bandwidth=1)
    result = plan_training(pool, model, PlanningRequest(global_batch_size=8, objective="time"))
    assert result.best.family == "single"
    assert any("worse than one machine" in reason for reason in result.reasons)
    assert any("Left out" in reason for reason in result.reasons)


def exact_search(pool: PoolProfile, model: ModelProfile, request: PlanningRequest) -> tuple[Exact, Judge]:
    costs = PoolCosts(pool, model)
    devices = [d.id for d in pool.devices]
    judge = Judge(costs, request)
    sizes = microbatch_sizes(request.global_batch_size, 512)
    return Exact(Tables(costs, request), judge, device_classes(costs, devices), sizes), judge


@settings(max_examples=40, deadline=None)
@given(
    seconds=st.lists(st.floats(0.001, 0.1), min_size=3, max_size=3),
    watts=st.lists(st.tuples(st.floats(0, 9), st.floats(0, 40), st.floats(0, 12)), min_size=3, max_size=3),
    bandwidth=st.sampled_from([5 * MB, 100 * MB, 10_000 * MB]),
    segment=st.booleans(),
    tied=st.booleans(),
    modes=st.booleans(),
    first_trained=st.sampled_from([0, 0, 1, 2, 3, 4]),
    accounting=st.sampled_from(["whole-pool", "marginal"]),
    divided=st.sampled_from([(None, None), (1, None), (1, "fairscale"), (2, "deepspeed"), (3, "deepspeed")]),
    memory_mb=st.sampled_from([10_000, 130]),
    pick=st.randoms(use_true_random=False),
)
def test_every_bound_is_below_every_simulated_plan(
    seconds: list[float],
    watts: list[tuple[float, float, float]],
    bandwidth: float,
    segment: bool,
    tied: bool,
    modes: bool,
    first_trained: int,
    accounting: str,
    divided: tuple[int | None, str | None],
    memory_mb: int,
    pick: random.Random,
) -> None:
    kinds = ["p", "q", "r"]
    model = frozen_below(make_model(dict(zip(kinds, seconds, strict=True)), tied=tied), first_trained)
    memory = [2 * memory_mb * MB, memory_mb * MB, memory_mb * MB]
    pool = make_pool(kinds, watts=watts, bandwidth=bandwidth, segment=segment, memory_bytes=memory)
    if modes:
        pool, model = two_modes(pool, model)
    zero, backend = divided
    request = PlanningRequest(global_batch_size=4, accounting=accounting, zero=zero, backend=backend)
    bounds = lower_bounds(PoolCosts(pool, model), request)
    exact, judge = exact_search(pool, model, request)
    skeletons = list(exact.skeletons("energy"))
    for _ in range(40):
        layout, size, cuts, _, values = pick.choice(skeletons)
        at = pick.randrange(len(cuts))
        bounded = exact.bound_drafts(layout, size, cuts[at])
        assert bounded is not None
        step_s, joules, shape = bounded
        possible = [i for i, t in enumerate(step_s) if np.isfinite(t)]
        if not possible:
            continue
        choice = pick.choice(possible)
        for draft in exact.drafts(layout, size, cuts[at], np.unravel_index(choice, shape)):
            plan = judge.plan(draft)
            seen = predict(plan, pool, model)
            energy = seen.energy_joules_per_step
            if accounting == "marginal":
                energy = seen.marginal_energy_joules_per_step
            assert bounds.step_s <= seen.step_s * (1 + 1e-9)
            assert bounds.energy_joules_per_step <= energy * (1 + 1e-9) + 1e-9
            closed_s, closed_joules = judge.bound(draft)
            for low_s, low_joules in ((step_s[choice], joules[choice]), (closed_s, closed_joules)):
                assert low_s <= seen.step_s * (1 + 1e-9)
                assert low_joules <= energy * (1 + 1e-9) + 1e-12
            assert values[at] <= joules[choice] * (1 + 1e-9) + 1e-12
            again = draft._replace(stages=tuple(stage._replace(recompute=True) for stage in draft.stages))
            assert judge.bound(again)[0] <= predict(judge.plan(again), pool, model).step_s * (1 + 1e-9)
            found = judge.judge(draft)
            held = plan_memory(plan, pool, model, 2.0)
            fits = all(parts.total_bytes <= pool.device(d).memory_bytes for d, parts in held.items())
            assert (found is not None) == (
                fits and (backend is None or plan.beyond_data_parallelism() is None)
            )
            if found is None:
                continue
            assert found.step_s == seen.step_s
            assert found.energy_joules <= energy * (1 + 1e-9) + 1e-12
    for found in judge.frontier:  # what is not beaten has exact figures
        seen = predict(judge.plan(found.draft), pool, model)
        whole, marginal = seen.energy_joules_per_step, seen.marginal_energy_joules_per_step
        exactly = whole if accounting == "whole-pool" else marginal
        assert (found.step_s, found.energy_joules) == (seen.step_s, pytest.approx(exactly, abs=1e-12))


def test_the_closed_form_is_exact_where_nothing_waits() -> None:
    model, pool = make_model({"k": 0.1}), make_pool(["k", "k"])
    exact, judge = exact_search(pool, model, PlanningRequest(global_batch_size=8))
    for layout, size, cuts, _, _ in exact.skeletons("time"):
        if len(layout) > 1 or len(layout[0][0]) > 1:
            continue
        found = exact.bound_drafts(layout, size, cuts[0])
        assert found is not None
        step_s, _, shape = found
        for choice in np.flatnonzero(np.isfinite(step_s)):
            for draft in exact.drafts(layout, size, cuts[0], np.unravel_index(choice, shape)):
                seen = judge.judge(draft)
                assert seen is not None
                assert seen.step_s == pytest.approx(step_s[choice])


def test_renaming_and_reordering_devices_changes_nothing() -> None:
    model = make_model({"p": 0.05, "q": 0.08})
    watts = {"p": (4.0, 30.0, 6.0), "q": (2.0, 15.0, 5.0)}
    answers = set()
    for kinds, ids in ((["p", "q", "q"], "abc"), (["q", "p", "q"], "zxy"), (["q", "q", "p"], "cab")):
        pool = make_pool(kinds, watts=[watts[k] for k in kinds], ids=ids)
        result = plan_training(pool, model, PlanningRequest(global_batch_size=8, objective="time"))
        found = figures(result.best)
        answers.add((round(found.step_s, 9), round(found.energy_joules_per_step, 6), tuple(result.families)))
    assert len(answers) == 1


def test_alike_devices_are_tried_once() -> None:
    model = make_model({"k": 1.0, "other": 1.0})
    for kinds, distinct in ((["k"] * 3, 1), (["k", "k", "other"], 2)):
        pool = make_pool(kinds)
        classes = device_classes(PoolCosts(pool, model), [d.id for d in pool.devices])
        assert len(set(classes.values())) == distinct
        everything = list(layouts("abc", 4, dict(zip("abc", range(3), strict=True))))
        assert len(list(layouts("abc", 4, classes))) < len(everything)


def test_layouts_try_every_order_that_matters() -> None:
    found = set(layouts("abcd", 2, dict(zip("abcd", range(4), strict=True))))
    a, b, c, d = (("a",),), (("b",),), (("c",),), (("d",),)
    assert {(a, b, c, d), (d, c, b, a), (c, a), (b,)} <= found
    rows_meet = {layout for layout in found if layout[0] == (("a",), ("b",)) and len(layout) == 2}
    assert {(("c",), ("d",)), (("d",), ("c",))} <= {layout[1] for layout in rows_meet}
    two_by_two = {
        layout[0] for layout in found if len(layout) == 1 and len(layout[0][0]) == len(layout[0]) == 2
    }
    assert (("a", "b"), ("c", "d")) in two_by_two
    assert (("a", "b"), ("d", "c")) in two_by_two
    assert len(two_by_two) == 6


@settings(max_examples=25, deadline=None)
@given(
    memory=st.lists(st.integers(40, 260).map(lambda mb: mb * MB), min_size=3, max_size=3),
    objective=st.sampled_from(["energy", "time"]),
)
def test_no_plan_is_ever_over_memory(memory: list[int], objective: str) -> None:
    model = make_model({"p": 0.05, "q": 0.02, "r": 0.03})
    pool = make_pool(["p", "q", "r"], memory_bytes=memory)
    try:
        result = plan_training(pool, model, PlanningRequest(global_batch_size=4, objective=objective))
    except OutOfMemoryError:
        return
    for plan in (result.best, *result.families.values(), *result.frontier):
        for id, device in figures(plan).devices.items():
            if id in plan.devices:
                assert device.peak_memory_bytes is not None
                assert device.peak_memory_bytes <= pool.device(id).memory_bytes


def test_when_nothing_fits_the_nearest_miss_is_named() -> None:
    model = make_model({"k": 0.05})
    pool = make_pool(["k", "k"], memory_bytes=[60 * MB, 95 * MB])
    with pytest.raises(OutOfMemoryError) as error:
        plan_training(pool, model, PlanningRequest(global_batch_size=4))
    # Two layers each: 80 MB of state, two layers' activations of a sample, buffers for one boundary.
    assert "device 'a' needs 94 MB" in error.value.message
    assert "lacks 34 MB" in error.value.message
    assert error.value.fix


def test_what_would_make_it_fit_depends_on_what_trains() -> None:
    pool, model = make_pool(["k"], memory_bytes=100 * MB), make_model({"k": 0.05})
    with pytest.raises(OutOfMemoryError) as error:
        plan_training(pool, model, PlanningRequest(global_batch_size=4))
    assert "LoRA (method: lora;" in error.value.fix
    assert "frozen_precision" not in error.value.fix
    adapters = {"trainable_parameter_bytes": MB // 10, "parameter_bytes": 22 * MB}
    layers = tuple(layer.model_copy(update=adapters) for layer in model.layers)
    adapted = model.model_copy(update={"layers": layers, "precision": "float32"})
    with pytest.raises(OutOfMemoryError) as error:
        plan_training(pool, adapted, PlanningRequest(global_batch_size=4))
    assert "LoRA" not in error.value.fix
    assert "(frozen_precision: bfloat16)" in error.value.fix


def test_a_large_pool_without_memory_says_what_is_missing() -> None:
    ids = [f"device-{i}" for i in range(60)]
    pool = make_pool(["k"] * 60, memory_bytes=70 * MB, ids=ids)
    with pytest.raises(OutOfMemoryError, match=r"lacks \d+ MB, and its largest part"):
        plan_training(pool, make_model({"k": 0.05}, num_blocks=60), PlanningRequest(global_batch_size=16))


@pytest.mark.parametrize("seed", range(8))
def test_the_closest_plan_is_closest_of_all_pipelines(seed: int) -> None:
    numbers = random.Random(seed)
    model = make_model({"k": 0.05}, num_blocks=4, units=1, output_bytes_per_sample=12 * MB)
    sizes = [numbers.randint(20, 160) * MB for _ in range(3)]
    devices, memory = make_pool(["k"] * 3, memory_bytes=sizes).devices, MemoryModel(model, 2.0)
    least = min(
        max(
            min(
                memory.parts(Load(span, 1.0, 1, count - s, flag), device).total_bytes
                for flag in (False, True)
            )
            - device.memory_bytes
            for s, (span, device) in enumerate(zip(pairwise((0, *cuts, 6)), order, strict=True))
        )
        for count in (1, 2, 3)
        for order in permutations(devices, count)
        for cuts in combinations(range(1, 6), count - 1)
    )
    assert Question(devices, model, 2.0, batch=4).closest().lacking_bytes == least


@pytest.mark.parametrize(
    ("source", "target", "fault"), [("a", "a", "to itself"), ("a", "b", "appears twice")]
)
def test_odd_links_are_refused(source: str, target: str, fault: str) -> None:
    values = make_pool(["k", "k"]).model_dump(by_alias=True, mode="json")
    values["links"].append({**values["links"][0], "source": source, "target": target})
    with pytest.raises(ValueError, match=fault):
        PoolProfile.model_validate(values)


def test_recompute_is_used_only_where_memory_needs_it() -> None:
    model = make_model({"k": 0.1}, saved_bytes_per_sample=50 * MB)
    needed = 4 * 4 * 10 * MB + 4 * 50 * MB
    pool = make_pool(["k"], memory_bytes=needed)
    assert not plan_training(pool, model, PlanningRequest(global_batch_size=1)).best.recomputes(0)
    with pytest.raises(OutOfMemoryError):  # recomputing one sample's activations alone gains nothing
        plan_training(make_pool(["k"], memory_bytes=needed - 1), model, PlanningRequest(global_batch_size=1))
    tight = make_pool(["k", "k"], memory_bytes=215 * MB)
    result = plan_training(tight, model, PlanningRequest(global_batch_size=8, objective="time"))
    for plan in result.families.values():
        for s in range(plan.num_stages):
            if plan.recomputes(s):
                flags = [plan.recomputes(i) and i != s for i in range(plan.num_stages)]
                with pytest.raises(OutOfMemoryError):
                    check_memory(plan.model_copy(update={"recompute": tuple(flags)}), tight, model, 2.0)
    assert any(any(plan.recompute or ()) for plan in result.families.values())


def test_deadlines_cost_energy_and_never_less() -> None:
    model = make_model({"thrifty": 0.1, "fast": 0.05})
    pool = make_pool(["thrifty", "fast"], watts=[(1, 10, 2), (1, 60, 2)], bandwidth=1000 * MB)
    free = plan_training(pool, model, PlanningRequest(global_batch_size=8))
    fastest = plan_training(pool, model, PlanningRequest(global_batch_size=8, objective="time"))
    low, high = figures(fastest.best).step_s, figures(free.best).step_s
    energies = []
    for deadline in np.linspace(low, high * 1.01, 5):
        request = PlanningRequest(global_batch_size=8, deadline_step_s=float(deadline) * (1 + 1e-9))
        found = figures(plan_training(pool, model, request).best)
        assert found.step_s <= deadline * (1 + 1e-9)
        energies.append(found.energy_joules_per_step)
    assert energies == sorted(energies, reverse=True)
    assert energies[0] > energies[-1]
    with pytest.raises(ConfigError, match="no plan meets the deadline"):
        plan_training(pool, model, PlanningRequest(global_batch_size=8, deadline_step_s=low * 0.9))


def test_constraints_are_kept() -> None:
    model = make_model({"k": 0.1, "slow": 10.0})
    pool = make_pool(["k", "slow", "k"])
    request = PlanningRequest(global_batch_size=4, must_use=("b",), must_not_use=("c",))
    result = plan_training(pool, model, request)
    for plan in result.families.values():
        assert "b" in plan.devices
        assert "c" not in plan.devices
    with pytest.raises(ConfigError, match="'nobody' is not in the pool"):
        plan_training(pool, model, PlanningRequest(global_batch_size=4, must_use=("nobody",)))
    with pytest.raises(ConfigError, match="'b' stands in must_use and in must_not_use"):
        plan_training(pool, model, PlanningRequest(global_batch_size=4, must_use=("b",), must_not_use=("b",)))


def test_devices_without_a_link_are_not_put_together() -> None:
    model = make_model({"k": 0.1})
    pool = make_pool(["k", "k", "k"]).model_copy(update={"links": make_pool(["k", "k"]).links})
    result = plan_training(pool, model, PlanningRequest(global_batch_size=4, objective="time"))
    for plan in result.families.values():
        assert set(plan.devices) in ({"a", "b"}, {"a"}, {"b"}, {"c"})


def two_modes(pool: PoolProfile, model: ModelProfile) -> tuple[PoolProfile, ModelProfile]:
    """Add a slow mode, twice as slow at a fifth of the watts."""
    device = pool.devices[0]
    low = device.modes[0].model_copy(update={"name": "low", "idle_w": 1.0, "compute_w": 4.0})
    devices = (device.model_copy(update={"modes": (*device.modes, low)}), *pool.devices[1:])
    rows = [
        row.model_copy(
            update={"mode": "low", "forward_s": 2 * row.forward_s, "backward_s": 2 * row.backward_s}
        )
        for row in model.timings
    ]
    return pool.model_copy(update={"devices": devices}), model.model_copy(
        update={"timings": (*model.timings, *rows)}
    )


def test_a_thriftier_power_mode_is_found_and_bounded() -> None:
    pool, model = two_modes(make_pool(["k"]), make_model({"k": 0.1}))
    energy = plan_training(pool, model, PlanningRequest(global_batch_size=4))
    time = plan_training(pool, model, PlanningRequest(global_batch_size=4, objective="time"))
    assert energy.best.stages[0].replicas[0].shards[0].mode == "low"
    assert time.best.stages[0].replicas[0].shards[0].mode is None
    assert energy.bounds.energy_joules_per_step <= figures(energy.best).energy_joules_per_step
    assert time.bounds.step_s <= figures(time.best).step_s


def test_the_frontier_is_one_and_the_families_are_complete() -> None:
    model = make_model({"p": 0.05, "q": 0.08, "r": 0.02})
    pool = make_pool(["p", "q", "r"], watts=[(1, 12, 3), (2, 8, 3), (4, 45, 8)], bandwidth=1000 * MB)
    result = plan_training(pool, model, PlanningRequest(global_batch_size=8))
    assert set(result.families) == {"single", "data", "pipeline", "tensor", "hybrid"}
    assert all(plan.family == name for name, plan in result.families.items())
    points = [(figures(p).step_s, figures(p).energy_joules_per_step) for p in result.frontier]
    assert points == sorted(points)
    assert [energy for _, energy in points] == sorted((energy for _, energy in points), reverse=True)
    fastest = plan_training(pool, model, PlanningRequest(global_batch_size=8, objective="time")).best
    assert points[0][0] == pytest.approx(figures(fastest).step_s)
    assert points[-1][1] == pytest.approx(figures(result.best).energy_joules_per_step)
    assert PlanningResult.model_validate_json(result.to_json()) == result


def test_large_pools_are_planned_and_the_reasons_say_what_was_not_tried() -> None:
    model = make_model({"p": 0.05, "q": 0.08}, num_blocks=4)
    pool = make_pool(["p", "q"] * 3, bandwidth=10_000 * MB, latency_s=0)
    result = plan_training(pool, model, PlanningRequest(global_batch_size=12, objective="time"))
    assert len(result.best.devices) == 6
    assert any("too large for a proof" in reason for reason in result.reasons)


def test_shares_are_complete_and_proportional() -> None:
    assert list(compositions(4, 2)) == [(1, 3), (2, 2), (3, 1)]
    assert proportional(128, [1.0, 1.0, 2.0]) == (32, 32, 64)


def test_warm_up_depths_are_all_while_they_are_few() -> None:
    assert depth_vectors(1, 8) == [(1,)]
    assert set(depth_vectors(2, 3)) == {(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)}
    assert depth_vectors(2, 3)[0] == (2, 1)
    assert set(depth_vectors(3, 64)) == {(3, 2, 1), (5, 3, 1), (7, 4, 1), (64, 64, 64)}


def test_the_timeline_of_a_found_plan_runs_every_action() -> None:
    model = make_model({"p": 0.05, "q": 0.08})
    pool = make_pool(["p", "q"])
    plan = plan_training(pool, model, PlanningRequest(global_batch_size=8)).families["pipeline"]
    timeline = simulate(plan, PoolCosts(pool, model), record=True)
    forwards = [span for span in timeline.spans if span.action.kind is ActionKind.FORWARD]
    assert len(forwards) == plan.num_stages * plan.num_microbatches


def test_errors_of_the_planner_are_for_users() -> None:
    with pytest.raises(ColledgeError):
        predict(single("zz", make_model({"k": 1.0}), 1, 1), make_pool(["k"]), make_model({"k": 1.0}))


def test_planning_works_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import colledge.planner; print(colledge.planner.plan_training)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
