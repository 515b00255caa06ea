"""The benchmark on Jetson pools: its models have the published sizes, and its comparison is fair."""

from __future__ import annotations

import pytest

from benchmarks.jetson_pools import (
    ASTEROID,
    BATCHES,
    COLUMNS,
    EQUAL_SPLITS,
    MIXES,
    NETWORKS,
    THRIFTIEST,
    Comparison,
    all_cases,
    compare,
    make_model,
    make_pool,
    resnet50,
    table_head,
    table_row,
    value_of,
    ways_to_list,
)
from colledge.planner import PlanningRequest, PoolCosts
from colledge.planner.baselines import all_baselines
from colledge.planner.request import Objective
from colledge.profiles import ModelProfile

PAIR = {"jetson-orin-nano": 1, "jetson-nano": 1}


def parameters(model: ModelProfile) -> int:
    """Return the model's parameters, a shared one once."""
    return sum(layer.parameter_bytes for layer in model.layers if layer.tied_to is None) // 4


def test_resnet_has_the_published_parameters_and_arithmetic() -> None:
    model = resnet50()
    macs = sum(layer.forward_flops_per_sample for layer in model.layers) / 2
    assert parameters(model) == 25_557_032
    assert macs == pytest.approx(4.09e9, rel=1e-3)
    assert [layer.output_bytes_per_sample for layer in model.layers[:2]] == [4 * 64 * 56**2, 4 * 256 * 56**2]
    assert len(model.layers) == 18


def test_transformers_have_the_sizes_that_they_are_called_by() -> None:
    bert, llama = make_model("BERT-base-sized"), make_model("Llama 1.1B, LoRA")
    block, rank, width, values = llama.layers[1], 16, 2048, 256
    assert 108e6 < parameters(bert) < 110e6
    assert parameters(llama) == pytest.approx(1.10e9, rel=0.005)
    assert block.trainable_parameter_bytes == 4 * rank * (2 * width + width + values)
    assert not llama.layers[0].trainable_parameter_bytes
    assert not llama.layers[-1].trainable_parameter_bytes


def test_pools_are_the_catalogs_boards_joined_two_by_two() -> None:
    pool = make_pool(MIXES["one strong"], 100)
    assert [device.id for device in pool.devices][:2] == ["orin-nano-0", "nano-0"]
    assert pool.devices[0].modes[0].name == "15W"
    assert make_pool(MIXES["one strong"], 100, fastest=True).devices[0].modes[0].name == "25W"
    assert len(pool.links) == 10
    assert pool.route("nano-3", "nano-0").bandwidth_bytes_per_s == 12.5e6
    assert len(list(all_cases())) == len(MIXES) * len(NETWORKS) * len(BATCHES)


def test_no_way_to_list_a_pool_comes_twice() -> None:
    assert {mix: len(ways_to_list(kinds, 100)) for mix, kinds in MIXES.items()} == {
        "mixed five": 2,
        "one strong": 4,
        "three pairs": 4,
        "all equal": 1,
    }


@pytest.mark.parametrize("objective", ["time", "energy"])
def test_every_baseline_counts_with_the_best_way_to_list_the_pool(objective: Objective) -> None:
    model = resnet50()
    found = compare(PAIR, 1000, model, 8, objective)
    assert found.worse_than == []
    assert found.bound <= found.ours * (1 + 1e-9)
    request = PlanningRequest(global_batch_size=8, objective=objective)
    plans = [
        baseline.plan
        for pool in ways_to_list(PAIR, 1000)
        for baseline in all_baselines(PoolCosts(pool, model), request)
        if baseline.name == ASTEROID and baseline.plan is not None
    ]
    assert found.others[ASTEROID] == min(value_of(plan, objective) for plan in plans)
    assert found.others.keys() | found.why_not.keys() == {
        name for names in COLUMNS.values() for name in names
    } | {"data parallel, shares by speed"}
    row = table_row("one strong", 1000, "ResNet-50", found)
    assert row.count("|") == table_head(objective).splitlines()[0].count("|")


def test_a_better_plan_of_another_planner_is_reported() -> None:
    plan = compare(PAIR, 100, resnet50(), 8, "time").plan
    found = Comparison("time", 1.0, plan, 0.5, 0.0, 1.0, {ASTEROID: 0.99, THRIFTIEST: 1.2})
    assert found.worse_than == [ASTEROID]
    assert found.best_of(COLUMNS["one device"]) == (THRIFTIEST, 1.2)
    assert found.best_of(EQUAL_SPLITS)[1] == float("inf")
