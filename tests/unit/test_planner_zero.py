"""Planning with ZeRO: what replicas divide, by hand; which plans libraries get; which remedies are true."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from colledge.errors import OutOfMemoryError
from colledge.planner import PlanningRequest, PoolCosts, check_memory, plan_memory, plan_training, predict
from colledge.planner.memory import MemoryModel
from colledge.profiles import ModelProfile, PoolProfile
from colledge.settings import LibraryName
from tests.unit.test_planner import MB, figures, make_model, make_plan, make_pool

LIBRARIES: list[tuple[int, LibraryName]] = [
    (1, "deepspeed"),
    (2, "deepspeed"),
    (3, "deepspeed"),
    (1, "fairscale"),
]


def two_replicas(model: ModelProfile, **changes: Any) -> Any:
    whole = (0, len(model.layers))
    plan = make_plan(model, [(whole, [(3, [("a", 1.0)]), (1, [("b", 1.0)])])], 4, 2)
    return plan.model_copy(update=changes)


# -- memory --------------------------------------------------------------------------------------------------------


def test_optimizer_state_goes_where_memory_is_left() -> None:
    model, pool = make_model({"k": 0.05}), make_pool(["k", "k"], memory_bytes=[200 * MB, 400 * MB])
    plan = two_replicas(model, zero=1)
    without = plan_memory(plan, pool, model, 0.0)
    left = [pool.device(d).memory_bytes - without[d].total_bytes for d in "ab"]
    devices = {device.id: device for device in pool.devices}
    divided = MemoryModel(model, 2.0, zero=1).divided(plan, devices)
    assert divided.stages[0].state_shares(0) == pytest.approx([x / sum(left) for x in left])
    parts = plan_memory(divided, pool, model, 2.0)
    for device, x in zip("ab", left, strict=True):
        assert parts[device].optimizer_state_bytes == pytest.approx(2 * 40 * MB * x / sum(left))
    assert sum(p.optimizer_state_bytes for p in parts.values()) == pytest.approx(2 * 40 * MB)
    equal = plan_memory(plan, pool, model, 2.0)  # a plan that does not say how
    assert equal["a"].optimizer_state_bytes == equal["b"].optimizer_state_bytes == 40 * MB


@pytest.mark.parametrize(("zero", "parameters", "gradients"), [(1, 40, 40), (2, 40, 20), (3, 20, 20)])
def test_a_stage_of_zero_divides_what_it_says(zero: int, parameters: int, gradients: int) -> None:
    model, pool = make_model({"k": 0.05}), make_pool(["k", "k"])
    parts = plan_memory(two_replicas(model, zero=zero), pool, model, 2.0)["a"]
    assert (parts.parameters_bytes, parts.gradients_bytes) == (parameters * MB, gradients * MB)
    assert parts.optimizer_state_bytes == 40 * MB
    assert parts.workspace_bytes == (10 * MB if zero == 3 else 0)  # the layer that is made whole


def test_one_replica_divides_nothing() -> None:
    model, pool = make_model({"k": 0.05}), make_pool(["k"])
    plan = make_plan(model, [((0, 4), [(4, [("a", 1.0)])])], 4, 2)
    for zero in (1, 3):
        assert plan_memory(plan.model_copy(update={"zero": zero}), pool, model, 2.0) == plan_memory(
            plan, pool, model, 2.0
        )


# -- time ----------------------------------------------------------------------------------------------------------


def test_the_parts_that_each_has_updated_are_exchanged() -> None:
    model, pool = make_model({"k": 0.05}), make_pool(["k", "k"])
    costs = PoolCosts(pool, model)
    plain, divided = (predict(two_replicas(model, zero=zero), pool, model) for zero in (None, 1))
    exchange = costs.allreduce_s(("a", "b"), 40 * MB)
    update = costs.update_s((0, 4), plain_shard())
    assert divided.step_s - plain.step_s == pytest.approx(exchange - update / 2)
    every_pass = predict(two_replicas(model, zero=3, backend="deepspeed"), pool, model)
    assert every_pass.step_s - divided.step_s == pytest.approx(exchange)  # two micro-batches, there and back


def plain_shard() -> Any:
    return two_replicas(make_model({"k": 0.05})).stages[0].replicas[0].shards[0]


def test_a_weight_tied_to_another_stage_is_exchanged_too() -> None:
    costs = PoolCosts(make_pool(["k", "k"]), make_model({"k": 0.05}, tied=True))
    assert costs.gather_s((0, 2), ("a", "b"), 1.0) == costs.allreduce_s(("a", "b"), 20 * MB)
    assert costs.sync_s((0, 2), ("a", "b"), 1.0) == costs.allreduce_s(("a", "b"), 10 * MB)
    assert costs.gather_s((0, 4), ("a", "b"), 1.0) == costs.sync_s((0, 4), ("a", "b"), 1.0)


# -- plans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["time", "energy"])
@pytest.mark.parametrize(
    ("zero", "backend", "count"),
    [*((*library, count) for library in LIBRARIES for count in (1, 3)), (1, "fairscale", 5)],
)
def test_a_library_gets_only_plans_that_it_can_run(
    count: int, zero: Any, backend: LibraryName, objective: Any
) -> None:
    pool = make_pool(["k"] * count, bandwidth=1000 * MB)
    model = make_model({"k": 0.05}, num_blocks=4)
    request = PlanningRequest(global_batch_size=12, objective=objective, zero=zero, backend=backend)
    result = plan_training(pool, model, request)
    plans = [result.best, *result.families.values(), *result.frontier]
    plans += [baseline.plan for baseline in result.baselines if baseline.plan is not None]
    for plan in plans:
        assert plan.beyond_data_parallelism() is None
        assert (plan.zero, plan.backend) == (zero, backend)
        check_memory(plan, pool, model, 2.0)
    assert any(f"backend {backend} cannot run it" in one.why_not for one in result.baselines) == (count > 1)
    if objective == "time":
        assert len(result.best.devices) == min(count, 4)  # rows of 5 would not divide the batch evenly
    native = plan_training(pool, model, request.model_copy(update={"zero": None, "backend": None}))
    assert figures(native.best).step_s <= figures(result.best).step_s * (1 + 1e-9) or objective == "energy"


def test_a_plan_that_fits_only_divided_is_found() -> None:
    pool, model = only_divided()
    with pytest.raises(OutOfMemoryError, match="no plan fits") as fault:
        plan_training(pool, model, PlanningRequest(global_batch_size=4))
    assert "(zero: 1)" in fault.value.fix
    result = plan_training(pool, model, PlanningRequest(global_batch_size=4, zero=1))
    plan = result.best
    assert plan.zero == 1
    assert any("Replicas divide optimizer state (ZeRO stage 1) by the memory" in r for r in result.reasons)
    assert any(share not in (None, 1.0) for p in plan.places() for share in [p.shard.state_share])


def only_divided() -> tuple[PoolProfile, ModelProfile]:
    """Return three layers that cannot be sharded, and six devices none of which holds one with its state."""
    return make_pool(["k"] * 6, memory_bytes=42 * MB), make_model({"k": 0.05}, num_blocks=1, units=1)


def one_large_layer() -> tuple[PoolProfile, ModelProfile]:
    """Return a model whose one block no device holds with its state, and four devices."""
    model = make_model({"k": 0.05}, num_blocks=1, units=1)
    large = {"parameter_bytes": 60 * MB, "trainable_parameter_bytes": 60 * MB}
    layers = (model.layers[0], model.layers[1].model_copy(update=large), model.layers[2])
    return make_pool(["k"] * 4, memory_bytes=230 * MB), model.model_copy(update={"layers": layers})


def test_a_library_without_memory_says_that_it_cannot_split_layers() -> None:
    pool, model = make_pool(["k"] * 3, memory_bytes=150 * MB), make_model({"k": 0.05}, num_blocks=6)
    request = PlanningRequest(global_batch_size=4, zero=1, backend="fairscale")
    with pytest.raises(OutOfMemoryError, match="backend fairscale runs replicas of the whole model") as fault:
        plan_training(pool, model, request)
    assert "backend: native, which splits the model's layers too" in fault.value.fix
    assert plan_training(pool, model, PlanningRequest(global_batch_size=4, zero=1)).best.num_stages > 1


# -- remedies ------------------------------------------------------------------------------------------------------


def tight(seed: int) -> tuple[PoolProfile, ModelProfile]:
    """Return a model of few layers and devices of about the memory that one needs."""
    if seed == 0:
        return one_large_layer()
    numbers = random.Random(seed)
    count = numbers.randint(2, 6)
    model = make_model({"k": 0.05}, num_blocks=numbers.choice((1, 2)), units=1, tied=numbers.random() < 0.3)
    sizes = [numbers.choice((36, 42, 60, 70, 90)) * MB for _ in range(count)]
    return make_pool(["k"] * count, memory_bytes=sizes), model


@pytest.mark.parametrize("seed", range(15))
def test_a_named_division_makes_it_fit(seed: int) -> None:
    pool, model = tight(seed)
    request = PlanningRequest(global_batch_size=4)
    try:
        plan_training(pool, model, request)
    except OutOfMemoryError as fault:
        fix = fault.fix
    else:
        return
    named: list[dict[str, Any]] = [{"zero": 1}] if "(zero: 1)" in fix else []
    found = re.search(r"backend: deepspeed, deepspeed: \{zero_stage: (\d)\}", fix)
    named += [{"zero": int(found[1]), "backend": "deepspeed"}] if found else []
    named += [{"zero": 1, "backend": "fairscale"}] if "backend: fairscale" in fix else []
    for changes in named:
        plan_training(pool, model, request.model_copy(update=changes))


def test_the_extra_of_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colledge.planner.shortage.find_spec", lambda name: None)
    pool, model = one_large_layer()
    with pytest.raises(OutOfMemoryError) as fault:
        plan_training(pool, model, PlanningRequest(global_batch_size=4))
    assert "(zero: 1)" in fault.value.fix
    assert "(backend: fairscale, after pip install 'colledge[fairscale]')" in fault.value.fix
