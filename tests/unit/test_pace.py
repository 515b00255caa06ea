"""Slowing single computations down: the example of Perseus, and that it never costs time or joules."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from colledge.errors import PlanError
from colledge.plan import Plan
from colledge.planner import PlanningRequest, PoolCosts, plan_training, predict
from colledge.planner.pace import paced
from colledge.profiles import ModelProfile, PoolProfile
from colledge.schedule import simulate
from tests.unit.test_planner import MB, figures, frozen_below, make_plan, make_pool

SPEEDS = [round(0.4 + 0.05 * i, 2) for i in range(13)][::-1]  # of the clock


def example(
    forward_s: tuple[float, ...], bandwidth: float = 1e15, speeds: Sequence[float] = SPEEDS
) -> tuple[PoolProfile, ModelProfile]:
    """Return devices that draw 3 + 12 f^3 W at clock f, and a model of one layer for each."""
    ids = "abc"[: len(forward_s)]
    pool = make_pool(ids, bandwidth=bandwidth, latency_s=0, ids=ids)
    modes = [
        {"name": f"{f:g}", "idle_w": 3, "compute_w": 3 + 12 * f**3, "communicate_w": 3, "source": "declared"}
        for f in speeds
    ]
    devices = [{**device.model_dump(), "modes": modes} for device in pool.devices]
    pool = PoolProfile.model_validate({**pool.model_dump(by_alias=True), "devices": devices})
    layers = [
        {
            "name": f"layer.{i}",
            "kind": f"layer.{i}",
            "parameter_bytes": MB,
            "trainable_parameter_bytes": MB,
            "output_bytes_per_sample": MB,
            "saved_bytes_per_sample": MB,
            "forward_flops_per_sample": 1,
            "backward_flops_per_sample": 2,
        }
        for i in range(len(forward_s))
    ]
    timings = [
        {
            "device_kind": id,
            "mode": f"{f:g}",
            "layer_kind": f"layer.{i}",
            "samples": 1,
            "shard_fraction": 1,
            "forward_s": second / f,
            "backward_s": 2 * second / f,
        }
        for i, second in enumerate(forward_s)
        for id in ids
        for f in speeds
    ]
    model = {"schema": "colledge/model-profile/1", "name": "x", "sequence_length": 1, "layers": layers}
    return pool, ModelProfile.model_validate({**model, "timings": timings})


def pipeline(model: ModelProfile, num_microbatches: int) -> Plan:
    stages = [((i, i + 1), [(1, [("abc"[i], 1.0)])]) for i in range(len(model.layers))]
    return make_plan(model, stages, 1, num_microbatches)


def dynamic_joules(plan: Plan, pool: PoolProfile, model: ModelProfile) -> float:
    found = predict(plan, pool, model)
    return found.energy_joules_per_step - found.step_s * sum(
        device.modes[0].idle_w for device in pool.devices
    )


def test_the_unequal_pipeline_of_perseus() -> None:
    pool, model = example((0.04, 0.06, 0.1))
    plan = pipeline(model, 8)
    slowed = paced(plan, PoolCosts(pool, model))
    assert dynamic_joules(plan, pool, model) == pytest.approx(57.6)
    assert predict(slowed, pool, model).step_s == pytest.approx(predict(plan, pool, model).step_s, rel=1e-9)
    assert dynamic_joules(slowed, pool, model) <= 39.95 * 1.02
    assert Plan.model_validate_json(slowed.to_json()) == slowed


def test_the_planner_paces_on_request_only() -> None:
    pool, model = example((0.04, 0.06, 0.1), speeds=(1.0, 0.6))
    joules = []
    for switch in (False, True):
        request = PlanningRequest(
            global_batch_size=8, objective="time", must_use=("a", "b", "c"), switch_modes=switch
        )
        best = plan_training(pool, model, request).best
        assert any(place.shard.paced for place in best.places()) == switch
        joules.append((figures(best).step_s, figures(best).energy_joules_per_step))
    assert joules[1][0] == pytest.approx(joules[0][0], rel=1e-9)
    assert joules[1][1] < joules[0][1]


@pytest.mark.parametrize("seed", range(12))
def test_pacing_never_costs_time_or_joules(seed: int) -> None:
    numbers = random.Random(seed)
    pool, model = example(
        tuple(numbers.uniform(0.02, 0.1) for _ in range(numbers.choice((2, 3)))),
        bandwidth=numbers.choice((5 * MB, 50 * MB, 1e15)),
    )
    plan = pipeline(model, numbers.choice((1, 3, 6)))
    model = frozen_below(model, seed % (len(model.layers) + 1))
    slowed = paced(plan, PoolCosts(pool, model))
    before, after = predict(plan, pool, model), predict(slowed, pool, model)
    assert after.step_s <= before.step_s * (1 + 1e-9)
    assert after.energy_joules_per_step <= before.energy_joules_per_step * (1 + 1e-9)
    for recorded in (False, True):
        timeline = simulate(slowed, PoolCosts(pool, model), record=recorded)
        for device, times in timeline.devices.items():
            assert timeline.compute_s[device] == pytest.approx(times.compute_s)


def test_pace_is_checked() -> None:
    pool, model = example((0.04, 0.06))
    values = pipeline(model, 2).model_dump(by_alias=True)
    shard = values["stages"][0]["replicas"][0]["shards"][0]
    for key in ("F2", "G1", "F"):
        shard["paced"] = {key: "0.5"}
        with pytest.raises(ValueError, match=r"paces F2|should match pattern"):
            Plan.model_validate(values)
    shard["paced"] = {"F1": "warp"}
    with pytest.raises(PlanError, match="no power mode 'warp'"):
        predict(Plan.model_validate(values), pool, model)


def test_a_paced_plan_is_explained_where_memory_is_tight() -> None:
    pool, model = example((0.04, 0.06, 0.1), speeds=(1.0, 0.6))
    devices = tuple(device.model_copy(update={"memory_bytes": 14 * MB}) for device in pool.devices)
    pool = PoolProfile.model_validate(pool.model_copy(update={"devices": devices}).model_dump(by_alias=True))
    request = PlanningRequest(
        global_batch_size=8, objective="time", must_use=("a", "b", "c"), switch_modes=True
    )
    result = plan_training(pool, model, request)
    assert any(place.shard.paced for place in result.best.places())
    assert any("does not switch power modes" in reason for reason in result.reasons)
