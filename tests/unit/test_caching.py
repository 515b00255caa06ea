"""Planning for cached activations: what is cached, what computes it, and that figures are those of the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colledge.errors import ConfigError, PlanError
from colledge.launch import planning
from colledge.launch.job import OutputFolder
from colledge.launch.planning import PlanningInputs
from colledge.launch.run_config import RunConfig
from colledge.launch.whatif import WhatIf, apply_what_if
from colledge.planner import PlanningRequest, plan_training, predict
from colledge.planner.caching import CachePlan, plan_cache, prefix_layers
from colledge.profiles import ModelProfile, PoolProfile
from colledge.records import read_json
from colledge.report.caching import CacheFill, CacheSaving
from colledge.schedule import ActionKind, plan_schedule
from colledge.settings import LoraSettings
from tests.unit.test_plan_report import model, pool

__all__ = ["model", "pool"]


@pytest.fixture
def frozen(model: ModelProfile) -> ModelProfile:
    """A model of which the last of four layers trains."""
    layers = [layer.model_copy(update={"trainable_parameter_bytes": 0}) for layer in model.layers[:3]]
    return model.model_copy(update={"layers": (*layers, model.layers[3])})


NAMES = [f"block.{i}" for i in range(4)]
REQUEST = PlanningRequest(global_batch_size=8, layers=(3, 4))


def test_the_prefix_is_computed_forwards_only(pool: PoolProfile, frozen: ModelProfile) -> None:
    assert prefix_layers(frozen.first_trained, NAMES) == (0, 3)
    cache = plan_cache(pool, frozen, REQUEST)
    assert cache.prefix.layer_range == (0, 3)
    kinds = {
        action.kind for stage in plan_schedule(cache.prefix, frozen.first_trained).stages for action in stage
    }
    assert ActionKind.FORWARD in kinds
    assert not kinds & {ActionKind.BACKWARD, ActionKind.SEND_BACKWARD, ActionKind.RECEIVE_BACKWARD}
    assert cache.uncached is not None
    assert cache.uncached.layers is None
    assert cache.row_bytes == frozen.layers[2].output_bytes_per_sample


@pytest.mark.parametrize("objective", ["time", "energy"])
def test_a_part_of_a_model_is_planned_for_as_the_whole_is_predicted(
    pool: PoolProfile, frozen: ModelProfile, objective: str
) -> None:
    request = REQUEST.model_copy(update={"objective": objective})
    for layers in ((3, 4), (0, 3)):
        result = plan_training(pool, frozen, request.model_copy(update={"layers": layers}))
        for plan in (result.best, *result.families.values(), *result.frontier):
            assert plan.layer_range == layers
            assert plan.prediction is not None
            again = predict(plan, pool, frozen)
            assert again.step_s == pytest.approx(plan.prediction.step_s, rel=1e-12)
            assert again.energy_joules_per_step == pytest.approx(
                plan.prediction.energy_joules_per_step, rel=1e-12
            )
            peaks = {id: figures.peak_memory_bytes for id, figures in plan.prediction.devices.items()}
            assert {id: figures.peak_memory_bytes for id, figures in again.devices.items()} == peaks
        seeded = plan_training(
            pool, frozen, request.model_copy(update={"layers": layers}), seeds=[result.best]
        )
        assert seeded.best.prediction == result.best.prediction


def test_a_step_on_cached_activations_is_predicted_to_be_shorter(
    pool: PoolProfile, frozen: ModelProfile
) -> None:
    request = REQUEST.model_copy(update={"objective": "time"})
    cache, cached = plan_cache(pool, frozen, request), plan_training(pool, frozen, request).best
    assert cache.uncached is not None
    without, step, fill = cache.uncached.prediction, cached.prediction, cache.prefix.prediction
    assert without is not None
    assert step is not None
    assert fill is not None
    assert step.step_s < without.step_s  # one layer of four is left, and nothing travels between stages
    assert fill.step_s < without.step_s
    assert cache.fill_figures(17) == (3 * fill.step_s, 3 * fill.energy_joules_per_step)  # batches of 8


def test_nothing_is_cached_where_the_first_block_trains(model: ModelProfile) -> None:
    with pytest.raises(ConfigError, match=r"block\.0 trains already") as fault:
        prefix_layers(model.first_trained, NAMES)
    assert "lora.blocks" in fault.value.fix


def test_the_deadline_of_a_run_leaves_time_to_fill_the_cache(pool: PoolProfile, frozen: ModelProfile) -> None:
    inputs = PlanningInputs(pool, frozen, REQUEST, steps=10, deadline_s=100.0, num_rows=40)
    cached = planning.with_cache(inputs)
    assert cached.cache is not None
    filling_s = cached.cache.fill_figures(40)[0]
    assert cached.request.deadline_step_s == pytest.approx((100.0 - filling_s) / 10)
    shorter = apply_what_if(inputs, WhatIf(deadline="50s"))
    assert planning.with_cache(shorter).request.deadline_step_s == pytest.approx((50.0 - filling_s) / 10)
    too_short = PlanningInputs(pool, frozen, REQUEST, steps=10, deadline_s=filling_s / 2, num_rows=40)
    with pytest.raises(PlanError, match="filling the activation cache takes"):
        planning.with_cache(too_short)


def test_the_report_of_a_plan_says_what_is_cached(
    pool: PoolProfile, frozen: ModelProfile, tmp_path: Path
) -> None:
    inputs = planning.with_cache(PlanningInputs(pool, frozen, REQUEST, OutputFolder(tmp_path), steps=10))
    result = planning.plan(inputs)
    made = planning.make_report(result, inputs)
    said = " ".join(made.reasons)
    assert "Nothing up to block.2 trains" in said
    assert "Without the cache a step would take" in said
    assert json.loads(planning.to_json(result, inputs))["activation_cache"]["prefix"]["layers"] == [0, 3]
    assert read_json(CachePlan, tmp_path / "activation-cache.json") == inputs.cache
    planning.write(result, PlanningInputs(pool, frozen, REQUEST), OutputFolder(tmp_path))
    assert not (tmp_path / "activation-cache.json").exists()  # an earlier plan's does not stay


def test_savings_count_what_filling_took() -> None:
    fill = CacheFill(num_rows=5, seconds=1, energy_joules=10) + CacheFill(
        num_rows=3, seconds=1, energy_joules=10
    )
    assert fill == CacheFill(num_rows=8, seconds=2, energy_joules=20)
    saving = CacheSaving(fill=fill, with_s=8, with_joules=120, without_s=16, without_joules=100)
    said = saving.sentences()
    assert "8 rows for the activation cache took 2 s and 20 J" in said[0]
    assert "50 % less of the time and 20 % more of the energy" in said[1]
    assert len(CacheSaving(fill=fill, with_s=8, with_joules=120).sentences()) == 1


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"lora": LoraSettings(blocks=(3,), alpha=2)}, True),
        ({"lora": LoraSettings(blocks=(2, 3))}, False),
        ({"lora": LoraSettings(blocks=(3,), rank=9)}, False),
        ({"lora": LoraSettings(blocks=(3,), dropout=0.1)}, False),
        ({"lora": None}, False),
        ({"lora": None, "method": "full"}, False),
    ],
)
def test_profiles_of_other_adapters_are_of_another_run(
    changes: dict[str, object], same: bool, frozen: ModelProfile
) -> None:
    values = {"model": "m", "data": {"train": "a.txt"}, "pool": "p.yaml", "method": "lora"}
    run = RunConfig.model_validate({**values, "lora": LoraSettings(blocks=(3,)), **changes})
    profile = frozen.model_copy(update={"lora": LoraSettings(blocks=(3,))})
    assert planning.trains_the_same(run, profile) == same
    assert planning.trains_the_same(run, frozen) == (run.method == "full")
