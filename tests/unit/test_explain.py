"""What limits a plan, where its figures come from, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from colledge.plan import Plan
from colledge.planner import PlanBounds, PlanningRequest, PoolCosts, predict
from colledge.planner.explain import explain, limit_sentences
from colledge.planner.limits import Limits, find_limits, media_s
from colledge.planner.request import Baseline
from colledge.planner.sources import basis, estimates, figure_sources
from colledge.profiles import ModelProfile, PoolProfile
from colledge.schedule import simulate

MB = 1_000_000
FREE = 1e15


def make_model(
    num_layers: int = 4, overhead_s: float = 0.0, workspace_bytes: int = 0, **changes: Any
) -> ModelProfile:
    """Return equal layers: a sample takes 1 s forward and 2 s backward, and `overhead_s` a micro-batch on top."""
    layer = {
        "kind": "block",
        "parameter_bytes": 10 * MB,
        "trainable_parameter_bytes": 10 * MB,
        "output_bytes_per_sample": MB,
        "saved_bytes_per_sample": 5 * MB,
        "workspace_bytes_per_sample": workspace_bytes,
        "forward_flops_per_sample": 1e9,
        "backward_flops_per_sample": 2e9,
    }
    timing = {"device_kind": "k", "mode": "max", "layer_kind": "block", "shard_fraction": 1.0}
    return ModelProfile.model_validate(
        {
            "schema": "colledge/model-profile/1",
            "name": "toy",
            "sequence_length": 8,
            "layers": [{"name": f"block.{i}", **layer} for i in range(num_layers)],
            "timings": [
                {**timing, "samples": n, "forward_s": overhead_s + n, "backward_s": overhead_s + 2 * n}
                for n in (1, 4)
            ],
            **changes,
        }
    )


def make_pool(
    ids: str,
    bandwidth: dict[str, float] | float = FREE,
    memory_bytes: int = 10_000 * MB,
    segment: bool = False,
    **changes: Any,
) -> PoolProfile:
    """Return equal devices; `bandwidth` may differ for a pair such as `ab`."""
    mode = {"name": "max", "idle_w": 5.0, "compute_w": 20.0, "communicate_w": 8.0, "source": "measured"}
    per_pair = bandwidth if isinstance(bandwidth, dict) else {}
    usual = FREE if isinstance(bandwidth, dict) else bandwidth
    links = [
        {"source": a, "target": b, "latency_s": 0.0, "bandwidth_bytes_per_s": per_pair.get(a + b, usual)}
        for a, b in combinations(ids, 2)
    ]
    air = {"name": "air", "devices": list(ids), "latency_s": 0.0, "bandwidth_bytes_per_s": usual}
    return PoolProfile.model_validate(
        {
            "schema": "colledge/pool-profile/1",
            "devices": [
                {"id": id, "kind": "k", "memory_bytes": memory_bytes, "modes": [{**mode, **changes}]}
                for id in ids
            ],
            "links": [] if segment else links,
            "segments": [air] if segment else [],
        }
    )


def make_plan(stages: Sequence[tuple[int, dict[str, int]]], num_microbatches: int, **extra: Any) -> Plan:
    """Return a plan of stages (layers, samples of each replica's device)."""
    cuts = [0]
    for layers, _ in stages:
        cuts.append(cuts[-1] + layers)
    size = sum(stages[0][1].values())
    return Plan.model_validate(
        {
            "schema": "colledge/plan/1",
            "num_layers": cuts[-1],
            "global_batch_size": size * num_microbatches,
            "microbatch_size": size,
            "stages": [
                {
                    "layers": [start, start + layers],
                    "replicas": [{"samples": n, "shards": [{"device": d}]} for d, n in replicas.items()],
                }
                for start, (layers, replicas) in zip(cuts, stages, strict=False)
            ],
            **extra,
        }
    )


ALONE = [(4, {"a": 1})]
DATA = [(4, {"a": 1, "b": 1})]
PIPELINE = [(2, {"a": 1}), (2, {"b": 1})]
THREE = [(1, {"a": 1}), (1, {"b": 1}), (2, {"c": 1})]
FOUR = [(1, {"a": 1}), (1, {"b": 1}), (1, {"c": 1}), (1, {"d": 1})]


def limits_of(plan: Plan, pool: PoolProfile, model: ModelProfile | None = None) -> Limits:
    return find_limits(plan, PoolCosts(pool, model or make_model()), 2.0)


def said(plan: Plan, pool: PoolProfile, model: ModelProfile | None = None) -> str:
    return " ".join(limit_sentences(limits_of(plan, pool, model), plan, pool))


# -- what limits ---------------------------------------------------------------------------------------------


def test_one_device_is_limited_by_computing() -> None:
    found = limits_of(make_plan(ALONE, 4), make_pool("a"))
    assert (found.kind, found.slowest_device, found.busiest_medium) == ("computing", "a", None)
    assert (found.compute_share, found.bubble_share, found.link_share) == (1, 0, 0)
    assert said(make_plan(ALONE, 4), make_pool("a")) == (
        "Limited by computing on a: a computes for 100 % of the step."
    )


def test_a_slow_link_limits_and_is_named() -> None:
    # 12 s of computing; the all-reduce of 40 MB over two devices at 1 MB/s takes 40 s.
    slow, fast = make_pool("ab", bandwidth=MB), make_pool("ab")
    found = limits_of(make_plan(DATA, 1), slow)
    assert found.kind == "link"
    assert found.busiest_medium == "a->b"
    assert found.link_share == pytest.approx(40 / 52)
    assert found.busiest_share == pytest.approx(40 / 52)
    assert "Limited by the link a->b: a computes for 23 % of the step" in said(make_plan(DATA, 1), slow)
    assert limits_of(make_plan(DATA, 1), fast).kind == "computing"


def test_the_slow_one_of_several_links_is_named() -> None:
    plan = make_plan(THREE, 4)
    for pair, wanted in (("ab", "a->b"), ("bc", "b->c")):
        found = limits_of(plan, make_pool("abc", bandwidth={pair: 0.1 * MB}))
        assert (found.kind, found.busiest_medium) in {
            ("link", wanted),
            ("link", f"{wanted[3]}->{wanted[0]}"),
        }
    assert limits_of(plan, make_pool("abc")).kind != "link"


@pytest.mark.parametrize(("pair", "wanted"), [("ab", "a->b"), ("bc", "b->c"), ("ac", "c->a")])
def test_an_all_reduce_is_held_up_by_the_slow_hop_of_its_ring(pair: str, wanted: str) -> None:
    plan = make_plan([(4, {"a": 1, "b": 1, "c": 1})], 1)
    found = limits_of(plan, make_pool("abc", bandwidth={pair: MB}))
    assert (found.kind, found.busiest_medium) == ("link", wanted)


def test_a_shard_that_computes_again_reduces_again() -> None:
    tensor = {"units": 2, "forward_allreduces": 1, "backward_allreduces": 1, "allreduce_bytes_per_sample": MB}
    layers = [layer.model_dump() | {"tensor": tensor} for layer in make_model().layers]
    model, pool = make_model(layers=layers), make_pool("ab", bandwidth=MB)
    stage = {"samples": 1, "shards": [{"device": "a", "fraction": 0.5}, {"device": "b", "fraction": 0.5}]}
    for again, passes in ((False, 2), (True, 3)):
        plan = make_plan(ALONE, 2).model_dump(by_alias=True)
        plan |= {"stages": [{"layers": [0, 4], "replicas": [stage]}], "recompute": [again]}
        costs = PoolCosts(pool, model)
        sharded = Plan.model_validate(plan)
        used_s = media_s(sharded, costs, simulate(sharded, costs, record=True))
        assert used_s == {"a->b": pytest.approx(2 * 4 * passes)}  # micro-batches, layers; 1 MB at 1 MB/s


def test_a_shared_medium_is_called_one() -> None:
    air = make_pool("ab", bandwidth=0.01 * MB, segment=True)
    assert "Limited by the shared medium air" in said(make_plan(PIPELINE, 4), air)
    assert "Limited by the shared medium" not in said(make_plan(PIPELINE, 4), make_pool("ab", segment=True))


def test_few_micro_batches_are_limited_by_the_bubble() -> None:
    few, many = make_plan(FOUR, 1), make_plan(FOUR, 32)
    found = limits_of(few, make_pool("abcd"))
    assert found.kind == "bubble"
    assert found.bubble_share == pytest.approx(3 / 4)
    assert "Limited by the pipeline's bubble (4 stages, 1 micro-batch)" in said(few, make_pool("abcd"))
    found = limits_of(many, make_pool("abcd"))
    assert found.kind == "computing"
    assert found.bubble_share == pytest.approx(3 / 35)


def test_recomputation_for_want_of_memory_is_limited_by_memory() -> None:
    plan = make_plan(ALONE, 4, recompute=[True])
    keeps = 4 * 40 * MB + 4 * 5 * MB  # weights, gradients and two moments; what four layers save for backward
    small, large = make_pool("a", memory_bytes=keeps - MB), make_pool("a", memory_bytes=keeps)
    found = limits_of(plan, small)
    assert found.kind == "memory"
    assert found.wish is not None
    assert (found.wish.change, found.wish.device) == ("no recomputation", "a")
    assert found.wish.gain == pytest.approx(1 / 4)  # four passes' worth of time become three
    text = said(plan, small)
    assert "Limited by the memory of a" in text
    assert "no recomputation would take 25 % less time, but a lacks" in text
    assert limits_of(plan, large).kind == "computing"  # it is slow, but not for want of memory


def test_a_micro_batch_that_does_not_fit_is_limited_by_memory() -> None:
    model = make_model(overhead_s=2.0)
    one = 4 * 40 * MB + 4 * 5 * MB
    found = limits_of(make_plan(ALONE, 4), make_pool("a", memory_bytes=one), model)
    assert found.kind == "memory"
    assert found.wish is not None
    assert found.wish.change == "a micro-batch of 4 rows"
    assert found.wish.lacks_bytes == 3 * 4 * 5 * MB
    assert found.memory_share == 1
    # Where a micro-batch costs no more than its samples, or memory is plenty, a larger one is not wished for.
    assert limits_of(make_plan(ALONE, 4), make_pool("a", memory_bytes=one)).wish is None
    assert limits_of(make_plan(ALONE, 4), make_pool("a"), model).wish is None


@pytest.mark.parametrize("bandwidth", [0.02 * MB, MB, FREE])
@pytest.mark.parametrize("segment", [False, True])
@pytest.mark.parametrize("stages", [DATA, PIPELINE, [(1, {"a": 2}), (3, {"b": 1, "c": 1})]])
def test_the_parts_add_up_to_the_step(stages: Any, bandwidth: float, segment: bool) -> None:
    pool = make_pool("abc", bandwidth=bandwidth, segment=segment)
    found = limits_of(make_plan(stages, 3), pool)
    parts = (found.compute_share, found.bubble_share, found.link_share)
    assert sum(parts) == pytest.approx(1)
    assert min(parts) >= 0
    assert 0 <= found.busiest_share <= 1
    assert found.busiest_medium is not None


# -- sources -------------------------------------------------------------------------------------------------


def test_what_was_measured_is_no_estimate() -> None:
    pool, model = make_pool("ab"), make_model(workspace_bytes=MB)
    plan, costs, request = make_plan(DATA, 1), PoolCosts(pool, model), PlanningRequest(global_batch_size=2)
    assert estimates(plan, request, costs) == []
    (note,) = estimates(plan, request, PoolCosts(pool, make_model()))
    assert "toy says nothing of workspace" in note
    sources = figure_sources(plan, request, costs)
    assert {figure.what for figure in sources} == {"times", "watts", "links", "layers"}
    assert basis(sources) == "measured times, measured watts, measured links, measured layers"


def test_every_kind_of_estimate_is_named() -> None:
    model = make_model(provenance="modelled", timings=[])
    pool = make_pool("ab", source="catalog", achieved_flops_per_s=1e9)
    link = pool.links[0].model_copy(update={"provenance": "declared"})
    pool = PoolProfile(schema_tag=pool.schema_tag, devices=pool.devices, links=(link,))
    request = PlanningRequest(global_batch_size=2)
    text = "\n".join(estimates(make_plan(DATA, 1), request, PoolCosts(pool, model)))
    assert "toy's layers are modelled" in text
    assert "times of a, b come from catalog rates" in text
    assert "watts of a, b are catalog" in text
    assert "a->b are declared" in text


def test_noisy_timings_are_an_estimate() -> None:
    model = make_model()
    noisy = model.timings[0].model_copy(update={"spread": 0.4})
    model = model.model_copy(update={"timings": (noisy, *model.timings[1:])})
    request = PlanningRequest(global_batch_size=2)
    text = "\n".join(estimates(make_plan(DATA, 1), request, PoolCosts(make_pool("ab"), model)))
    assert "1 of 2 timings are noisy" in text
    assert "40 %" in text


def test_a_refused_device_counts_where_its_idle_watts_do() -> None:
    pool = make_pool("ab", source="declared")
    plan, costs = make_plan(ALONE, 2), PoolCosts(pool, make_model(workspace_bytes=MB))
    refuse = {"global_batch_size": 2, "must_not_use": ("b",)}
    (whole,) = estimates(plan, PlanningRequest(**refuse), costs)
    (marginal,) = estimates(plan, PlanningRequest(**refuse, accounting="marginal"), costs)
    assert "watts of a, b" in whole
    assert "watts of a are" in marginal


# -- sentences -----------------------------------------------------------------------------------------------


def reasons_of(
    best: Plan, others: dict[str, Plan], pool: PoolProfile, baselines: Sequence[Baseline] = (), **asked: Any
) -> list[str]:
    model = make_model()
    request = PlanningRequest(global_batch_size=best.global_batch_size, **asked)

    def predicted(plan: Plan) -> Plan:
        return plan.model_copy(update={"prediction": predict(plan, pool, model)})

    ran = [
        one.model_copy(update={"plan": predicted(one.plan)}) if one.plan is not None else one
        for one in baselines
    ]
    families: Any = {plan.family: predicted(plan) for plan in (best, *others.values())}
    bounds = PlanBounds(step_s=10.0, energy_joules_per_step=100.0)
    return explain(families[best.family], families, bounds, request, pool, model, ran)


def test_the_choice_has_its_bounds_and_each_rival_its_reason() -> None:
    slow = make_pool("ab", bandwidth=MB)
    reasons = reasons_of(make_plan(ALONE, 2), {"data": make_plan(DATA, 1)}, slow, objective="time")
    text = "\n".join(reasons)
    assert "2.40 times the least possible time" in text  # 24 s, no plan below 10
    assert "The pool is worse than one machine here: a alone takes 24 s" in text
    assert "2.17 times the time" in text
    assert "limited by the link a->b (77 % of its step)" in text
    assert "Left out as no better plan with them was found: b" in text


def test_a_pool_that_helps_is_not_called_worse() -> None:
    fast = make_pool("ab")
    text = "\n".join(reasons_of(make_plan(DATA, 1), {"single": make_plan(ALONE, 2)}, fast))
    assert "worse than one machine" not in text
    assert "Best single plan found: a[0:4), 24 s" in text
    assert "No single device can hold" not in "\n".join(reasons_of(make_plan(DATA, 1), {}, fast))


def test_a_model_too_large_for_one_device_is_said_to_need_a_pool() -> None:
    least = 4 * 40 * MB + 4 * 5 * MB  # weights, gradients, two moments; one row's activations
    for memory_bytes, needs_a_pool in ((least - 1, True), (least, False)):
        pool = make_pool("ab", memory_bytes=memory_bytes)
        text = "\n".join(reasons_of(make_plan(PIPELINE, 1), {}, pool))
        assert ("No single device can hold this model" in text) == needs_a_pool


def test_estimates_come_first() -> None:
    reasons = reasons_of(make_plan(DATA, 1), {}, make_pool("ab", source="declared"))
    assert reasons[0].startswith("Estimate: the watts of a, b are declared")
    unwatched, chosen = reasons_of(make_plan(DATA, 1), {}, make_pool("ab"))[:2]
    assert unwatched.startswith("Estimate: the profile of toy")
    assert chosen.startswith("Chosen for")


def test_baselines_are_compared_or_said_to_have_no_plan() -> None:
    baselines = [
        Baseline(name="equal", plan=make_plan(ALONE, 2)),
        Baseline(name="greedy", why_not="does not fit: a lacks 3 MB"),
    ]
    text = "\n".join(reasons_of(make_plan(DATA, 1), {}, make_pool("ab"), baselines))
    assert "The best baseline of 1 is 'equal' (a[0:4)): 2.00 times the time" in text
    assert "without a plan that can run here: 'greedy'" in text
