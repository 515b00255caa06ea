"""Times from FLOPs and rates, for device kinds that nobody timed."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from colledge.errors import ConfigError
from colledge.planner import PlanningRequest, PoolCosts, plan_training
from colledge.planner.bounds import lower_bounds
from colledge.profiles import ModelProfile, PoolProfile
from tests.unit.test_planner import MB, figures, make_layer, make_model, make_plan, make_pool

FLOPS, BYTES = 1e10, 1e9


def with_rates(
    pool: PoolProfile,
    kind: str,
    flops_per_s: float = FLOPS,
    bytes_per_s: float | None = BYTES,
    source: str = "declared",
) -> PoolProfile:
    def mode(of: dict[str, object]) -> dict[str, object]:
        return {
            **of,
            "source": source,
            "achieved_flops_per_s": flops_per_s,
            "memory_bytes_per_s": bytes_per_s,
        }

    values = pool.model_dump(by_alias=True, mode="json")
    values["devices"] = [
        {**device, "modes": [mode(m) for m in device["modes"]]} if device["kind"] == kind else device
        for device in values["devices"]
    ]
    return PoolProfile.model_validate(values)


def rated_model(**changes: object) -> ModelProfile:
    return make_model({}, **changes)


def test_a_layer_takes_its_flops_over_the_rate_of_its_mode() -> None:
    costs = PoolCosts(with_rates(make_pool(["new"]), "new"), rated_model())
    assert costs.layer_s("a", None, 1, 4, 1.0) == pytest.approx(4 * (1e9 + 2e9) / FLOPS)
    assert costs.layer_s("a", None, 1, 4, 0.5) == pytest.approx(2 * (1e9 + 2e9) / FLOPS)
    assert costs.layer_s("a", None, 0, 4, 0.5) == pytest.approx(4 * (1e9 + 2e9) / FLOPS)  # no tensor split
    plan = make_plan(rated_model(), [((0, 4), [(4, [("a", 1.0)])])], 4, 1)
    forward, backward = costs.compute_s((0, 4), plan.stages[0].replicas[0].shards[0], 4)
    assert (forward, backward) == (pytest.approx(4 * 4 * 0.1), pytest.approx(4 * 4 * 0.2))


def test_slow_memory_sets_the_time_where_it_is_slower_than_the_arithmetic() -> None:
    slow = 1 * MB
    costs = PoolCosts(with_rates(make_pool(["new"]), "new", bytes_per_s=slow), rated_model())
    weights, kept, gradients = 10 * MB, 5 * MB, 2 * 10 * MB
    forward, backward = (part[2] - part[1] for part in costs.prefix_s("new", "max", 3, 1.0))
    assert forward == pytest.approx((weights + 3 * kept) / slow)
    assert backward == pytest.approx((weights + 3 * kept + gradients) / slow)
    update = costs.update_prefix_s("new", "max", 1.0)
    assert update[2] - update[1] == pytest.approx(8 * 10 * MB / slow)


def test_a_layer_without_arithmetic_moves_its_output() -> None:
    model = rated_model(forward_flops_per_sample=0, backward_flops_per_sample=0, trainable_parameter_bytes=0)
    costs = PoolCosts(with_rates(make_pool(["new"]), "new"), model)
    assert costs.layer_s("a", None, 0, 2, 1.0) == pytest.approx(2 * MB / BYTES)  # nothing trains: no backward
    assert costs.update_prefix_s("new", "max", 1.0)[-1] == 0


def test_without_a_rate_of_memory_only_arithmetic_counts() -> None:
    costs = PoolCosts(with_rates(make_pool(["new"]), "new", bytes_per_s=None), rated_model())
    assert costs.layer_s("a", None, 1, 1, 1.0) == pytest.approx(0.3)
    assert costs.update_prefix_s("new", "max", 1.0)[1] == pytest.approx(3 * 10 * MB / FLOPS)


def test_layers_of_one_kind_are_timed_by_their_own_flops() -> None:
    values = rated_model(num_blocks=3).model_dump(by_alias=True, mode="json")
    values["layers"][2]["forward_flops_per_sample"] = 5e9
    model = ModelProfile.model_validate(values)
    pool = with_rates(make_pool(["new", "new"]), "new")
    costs = PoolCosts(pool, model)
    forward, _ = costs.prefix_s("new", "max", 1, 1.0)
    assert [b - a for a, b in pairwise(forward)] == pytest.approx([0.1, 0.1, 0.5, 0.1, 0.1])
    assert [costs.layer_class(i)[2] for i in range(5)] == [0, 1, 2, 1, 4]
    bound = lower_bounds(costs, PlanningRequest(global_batch_size=4))
    work = 4 * (5 * 0.1 + 0.4 + 5 * 0.2)
    assert bound.step_s == pytest.approx(work / 2, rel=1e-6)


def test_timings_win_over_rates() -> None:
    pool = with_rates(make_pool(["k", "new"]), "k", flops_per_s=1.0)
    costs = PoolCosts(with_rates(pool, "new"), make_model({"k": 1.0}))
    assert costs.layer_s("a", None, 1, 1, 1.0) == pytest.approx(3.0)
    assert costs.time_source("k", "max") == "measured"
    assert costs.time_source("new", "max") == "declared"
    assert costs.has_mode("a", "max")
    assert costs.has_mode("b", "max")


def test_times_from_a_measured_rate_are_modelled() -> None:
    costs = PoolCosts(with_rates(make_pool(["new"]), "new", source="measured"), rated_model())
    assert costs.time_source("new", "max") == "modelled"


def test_a_kind_of_the_catalog_needs_no_rates_in_the_pool() -> None:
    values = make_pool(["raspberry-pi-5"]).model_dump(by_alias=True, mode="json")
    values["devices"][0]["modes"][0]["name"] = "default"
    costs = PoolCosts(PoolProfile.model_validate(values), rated_model())
    assert costs.time_source("raspberry-pi-5", "default") == "catalog"
    assert costs.layer_s("a", "default", 1, 1, 1.0) == pytest.approx(3e9 / 70.4e9)
    assert not costs.has_mode("a", "max")


def test_neither_timings_nor_rates_is_one_line_with_kind_mode_and_fix() -> None:
    costs = PoolCosts(make_pool(["mystery"]), rated_model())
    for ask in (lambda: costs.layer_s("a", None, 1, 1, 1.0), lambda: costs.time_source("mystery", "max")):
        with pytest.raises(ConfigError) as error:
            ask()
        line = str(error.value)
        assert "\n" not in line
        for word in ("'mystery'", "'max'", "no rates", "achieved_flops_per_s"):
            assert word in line
    assert not costs.has_mode("a", "max")


def test_one_kind_has_one_rate() -> None:
    values = with_rates(make_pool(["new", "new"]), "new").model_dump(by_alias=True, mode="json")
    values["devices"][1]["modes"][0]["achieved_flops_per_s"] = 2 * FLOPS
    with pytest.raises(ConfigError, match=r"two rates of device kind 'new' in power mode 'max'.*'b'"):
        PoolCosts(PoolProfile.model_validate(values), rated_model())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_rate_that_is_no_rate_is_refused(bad: float) -> None:
    for name in ("flops_per_s", "bytes_per_s"):
        with pytest.raises(ValueError, match=r"finite|greater than 0"):
            with_rates(make_pool(["new"]), "new", **{name: bad})


@pytest.mark.parametrize("bytes_per_s", [None, 30 * MB])
def test_no_plan_beats_the_bounds_of_rated_devices(bytes_per_s: float | None) -> None:
    model = rated_model(num_blocks=3)
    pool = with_rates(make_pool(["new", "k", "new"]), "new", bytes_per_s=bytes_per_s)
    pool = with_rates(pool, "k", 3 * FLOPS, bytes_per_s)
    for batch, objective in product((2, 6), ("time", "energy")):
        result = plan_training(pool, model, PlanningRequest(global_batch_size=batch, objective=objective))
        for plan in (result.best, *result.families.values()):
            assert figures(plan).step_s >= result.bounds.step_s
            assert figures(plan).energy_joules_per_step >= result.bounds.energy_joules_per_step


def test_rates_plan_as_the_timings_that_they_stand_for() -> None:
    """A pool of rates without memory limits is planned like one timed at exactly those rates."""
    seconds = {"fast": 1e9 / (4 * FLOPS), "slow": 1e9 / FLOPS}
    timed = make_model(seconds, num_blocks=3)
    timed = timed.model_copy(
        update={
            "layers": tuple(
                layer.model_copy(
                    update={
                        "forward_flops_per_sample": scale * 1e9,
                        "backward_flops_per_sample": 2 * scale * 1e9,
                        "trainable_parameter_bytes": 0,
                    }
                )
                for layer, scale in zip(timed.layers, (0.125, 1, 1, 1, 0.5), strict=True)
            ),
            "timings": tuple(row.model_copy(update={"update_s": 0.0}) for row in timed.timings),
        }
    )
    pool = make_pool(["fast", "slow"])
    rated = with_rates(with_rates(pool, "fast", 4 * FLOPS, None), "slow", FLOPS, None)
    request = PlanningRequest(global_batch_size=8, objective="time")
    one = plan_training(pool, timed, request)
    other = plan_training(rated, timed.model_copy(update={"timings": ()}), request)
    assert figures(other.best).step_s == pytest.approx(figures(one.best).step_s)
    assert other.best.describe() == one.best.describe()
    assert other.bounds.step_s == pytest.approx(one.bounds.step_s)


def test_layers_alike_are_those_that_always_take_the_same_time() -> None:
    model = make_model({"k": 1.0}, num_blocks=2)
    changed = make_layer("block.9", "block", tensor=None)
    values = model.model_dump(by_alias=True, mode="json")
    values["layers"].insert(2, changed)
    costs = PoolCosts(make_pool(["k"]), ModelProfile.model_validate(values))
    assert [costs.layer_class(i) for i in range(5)] == [
        ("embed", False, 0), ("block", True, 1), ("block", False, 2), ("block", True, 1), ("head", False, 4),
    ]  # fmt: skip
